"""`ktmoe calibrate`: counts are those of transformers' own routers, on whatever rows people have."""

import json
import re

import pytest
import torch
from factory import LAYERS, E, Workspace, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ktmoe import calibration, counts, devices
from ktmoe.calibration.rows import rows_of
from ktmoe.cli import app


TALK = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on the mat"}]
SHAREGPT = [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "sat on the mat"}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
AS_TALK, PLAIN = "<user>the cat<assistant>sat on the mat", "the cat\nsat on the mat"
ROWS = {
    "text": ({"text": "the cat sat"}, "the cat sat"),
    "messages": ({"messages": TALK}, AS_TALK),
    "sharegpt": ({"conversations": SHAREGPT}, AS_TALK),
    "prompt and completion": ({"prompt": "the cat", "completion": "sat on the mat"}, PLAIN),
    "alpaca": ({"instruction": "the", "input": "cat", "output": "sat"}, "the\ncat\nsat"),
    "pairs": ({"prompt": TALK[:1], "chosen": TALK[1:], "rejected": []}, AS_TALK),
    "pairs that begin with the prompt": ({"prompt": TALK[:1], "chosen": TALK, "rejected": []}, AS_TALK),
    "pairs of text": ({"prompt": "the cat", "chosen": "sat on the mat", "rejected": "fell"}, PLAIN),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return str(folder)


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def run(*args):
    return CliRunner().invoke(app, ["calibrate", *map(str, args)])


@pytest.mark.parametrize(("row", "text"), ROWS.values(), ids=ROWS)
def test_rows_as_people_have_them(model, tmp_path, row, text):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    (ids,) = rows_of(write(tmp_path / "data.jsonl", [row]), tokenizer)
    assert tokenizer.decode(ids).strip() == text


@pytest.mark.parametrize("kind", ["csv", "txt", "parquet"])
def test_files_of_other_kinds(model, tmp_path, kind):
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        import pandas

        pandas.DataFrame({"text": ["the cat", "the mat"]}).to_parquet(path)
    else:
        path.write_text({"csv": "text\n", "txt": ""}[kind] + "the cat\nthe mat\n")
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert [tokenizer.decode(ids).strip() for ids in rows_of(str(path), tokenizer)] == ["the cat", "the mat"]


def routed(model, rows):
    """[E] for each layer, by transformers' own model."""
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    found = torch.zeros(LAYERS, E, dtype=torch.int64)
    for ids in rows:
        for layer, logits in enumerate(stock(torch.tensor([ids]), output_router_logits=True).router_logits):
            found[layer] += logits.topk(2).indices.flatten().bincount(minlength=E)
    return found.tolist()


def test_counts_are_those_of_the_routers(model, tmp_path):
    texts = ["the cat sat on the mat", "a mat", "", "the " * 40]
    data, out = write(tmp_path / "data.jsonl", [{"text": t} for t in texts]), tmp_path / "counts.json"
    done = run(model, data, "--out", out, "--length", 20)
    assert done.exit_code == 0, done.output
    tokenizer = AutoTokenizer.from_pretrained(model)
    expected = routed(model, [tokenizer(t)["input_ids"][:20] for t in texts if t])
    assert list(counts.read(out).values()) == expected
    assert f"kt_num_gpu_experts: 1\nkt_gpu_experts: {out}" in done.output
    share = sum(sum(sorted(layer)[-2:]) for layer in expected) / sum(map(sum, expected))
    assert f"2 have {share:.0%} of the tokens" in done.output


def test_enough_tokens_are_enough(model, tmp_path):
    data = write(tmp_path / "data.jsonl", [{"text": "the cat sat on the mat"}] * 50)
    layers = calibration.of_data(model, data, tokens=30, length=2048)
    length = len(AutoTokenizer.from_pretrained(model)("the cat sat on the mat")["input_ids"])
    assert 2 * 30 <= sum(next(iter(layers.values()))) < 2 * (30 + length)


def test_a_training_of_llama_factory(tmp_path, monkeypatch):
    """Its own rows; then it trains with what was counted. The file need not be there before."""
    workspace = Workspace(tmp_path)
    out = tmp_path / "counts.json"
    keys = {"kt_num_gpu_experts": 1, "kt_gpu_experts": str(out), "kt_backend": "torch"}
    path = workspace.write("run", **keys)
    done = run(path, "--out", out)
    assert done.exit_code == 0, done.output + str(done.exception)
    layers = counts.read(out)
    assert sum(map(sum, layers.values())) > 0
    monkeypatch.setattr(devices, "accelerator", lambda: torch.device("cpu"))
    workspace.run("run", **keys)


def test_the_model_of_a_training_is_found_where_the_training_finds_it(tmp_path, monkeypatch):
    """Another revision or cache may hold other weights."""
    workspace = Workspace(tmp_path)
    given = {}

    class Loaded(Exception):
        pass

    def load(*args, **kwargs):
        given.update(kwargs)
        raise Loaded

    monkeypatch.setattr(calibration.counting, "load_model", load)
    path = workspace.write("run", model_revision="v2", cache_dir=str(tmp_path / "cache"), hf_hub_token="secret")
    assert isinstance(run(path, "--out", tmp_path / "counts.json").exception, Loaded)
    assert given == {
        "revision": "v2",
        "cache_dir": str(tmp_path / "cache"),
        "token": "secret",
        "trust_remote_code": False,
    }


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (None, "DATA: a configuration names its own"),
        ("none.jsonl", "DATA: .*none.jsonl: cannot be read"),
        ("data.doc", "expected one of .json"),
        ("broken.jsonl", "DATA: .*broken.jsonl: cannot be read"),
        ("empty.jsonl", "DATA: there is not one token in it"),
        ("odd.jsonl", "a row has the columns a, b; expected text"),
        ("talk.jsonl", "has no chat template"),
    ],
)
def test_what_cannot_be_counted_is_refused_before_the_model_is_loaded(model, tmp_path, monkeypatch, data, says):
    monkeypatch.setattr(calibration.counting, "load_model", None)
    (tmp_path / "data.doc").write_text("x")
    (tmp_path / "broken.jsonl").write_text('{"text": "the cat"}\n{"text": ')
    write(tmp_path / "empty.jsonl", [{"text": ""}])
    write(tmp_path / "odd.jsonl", [{"a": 1, "b": 2}])
    write(tmp_path / "talk.jsonl", [{"messages": TALK}])
    done = run(model, *([tmp_path / data] if data else []), "--out", tmp_path / "counts.json")
    assert done.exit_code == 2
    assert re.search(says, done.output), done.output
    assert not (tmp_path / "counts.json").exists()


def test_a_place_that_cannot_be_written_is_refused_first(model, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration.counting, "load_model", None)
    data = write(tmp_path / "data.jsonl", [{"text": "the cat"}])
    for out, says in ((tmp_path / "none" / "f.json", "is no folder"), (tmp_path, "is a folder")):
        done = run(model, data, "--out", out)
        assert done.exit_code == 2
        assert says in " ".join(done.output.split()), done.output


def test_shares():
    assert calibration.in_words({"a": [1, 7, 2, 0], "b": [5, 5, 0, 0]}, "f").startswith(
        "ktmoe: f: of 4 experts in each of 2 layers, the most used 1 have 60%, 2 have 95% of the tokens."
    )
