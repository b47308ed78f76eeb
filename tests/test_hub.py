"""Models and adapters on the hub: found by every command as transformers and peft find them. Offline, from a cache."""

import importlib.util
import json
import shutil

import pytest
import torch
from factory import save_model
from helpers import relative
from test_models import REFERENCE, lora, moved
from transformers import AutoModelForCausalLM

import ktmoe
from ktmoe import KTError
from ktmoe.convert import quantize
from ktmoe.models import attach


COMMITS = {"main": "a" * 40, "v2": "b" * 40}
IDS = torch.arange(2, 34).unsqueeze(0)


def publish(cache, repo, folders):
    """What a cache holds after a download: a folder for each revision."""
    where = cache / f"models--{repo.replace('/', '--')}"
    (where / "refs").mkdir(parents=True)
    for revision, folder in folders.items():
        (where / "refs" / revision).write_text(COMMITS[revision])
        shutil.copytree(folder, where / "snapshots" / COMMITS[revision])


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def stock(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, **options)


def say_fp32(folder):
    """transformers writes the dtype that was loaded, and casts to it when it loads again."""
    config = json.loads((folder / "config.json").read_text())
    config[next(name for name in ("dtype", "torch_dtype") if name in config)] = "float32"
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A cache with two revisions of a model and of an adapter, and the logits of both together.

    The adapter is not in a subfolder: offline, peft 0.20 looks for those at inner/inner.
    """
    root = tmp_path_factory.mktemp("hub")
    expected = {}
    for n, revision in enumerate(COMMITS):
        base = root / f"base-{revision}"
        save_model(base)
        made = stock(base).float()
        (base / "model.safetensors").unlink()  # `save_pretrained` leaves it where it writes shards
        with torch.no_grad():
            for p in made.parameters():
                p += 0.01 * n
        made.save_pretrained(base, max_shard_size="200KB" if n else "1GB")
        say_fp32(base)
        adapted = moved(attach(stock(base), REFERENCE, lora=lora("q_proj", "experts")), seed=n)
        adapted.save_pretrained(root / f"adapter-{revision}")
        expected[revision] = logits(adapted)
    publish(root / "cache", "me/base", {r: root / f"base-{r}" for r in COMMITS})
    publish(root / "cache", "me/adapter", {r: root / f"adapter-{r}" for r in COMMITS})
    assert relative(expected["main"], expected["v2"]) > 0.01
    return root, expected


@pytest.mark.parametrize("revision", COMMITS)
def test_load_and_merge(revision, hub, tmp_path):
    root, expected = hub
    options = {"cache_dir": root / "cache", "revision": revision}
    ours = ktmoe.load_model("me/base", REFERENCE, r=4, **options)
    assert relative(logits(ours), logits(stock("me/base", **options))) < 1e-5
    ktmoe.merge_adapter("me/base", "me/adapter", tmp_path / "out", model_options=options, adapter_options=options)
    assert relative(logits(stock(tmp_path / "out")), expected[revision]) < 1e-5
    base = root / f"base-{revision}"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in base.iterdir()}


def test_a_cache_that_holds_both_kinds_of_files(hub, tmp_path):
    """Downloads of several programs end in one folder; transformers' choice holds there too."""
    root, _ = hub
    shutil.copytree(root / "cache", tmp_path / "cache")
    snapshot = tmp_path / "cache" / "models--me--base" / "snapshots" / COMMITS["main"]
    for file in (root / "base-v2").glob("model*"):
        shutil.copy(file, snapshot)
    options = {"cache_dir": tmp_path / "cache"}
    ours = ktmoe.load_model("me/base", REFERENCE, r=4, **options)
    assert relative(logits(ours), logits(stock("me/base", **options))) < 1e-5
    ktmoe.merge_adapter("me/base", "me/adapter", tmp_path / "out", model_options=options, adapter_options=options)
    assert relative(logits(stock(tmp_path / "out")), hub[1]["main"]) < 1e-5


def test_no_such_model(tmp_path):
    for call in (
        lambda: ktmoe.load_model("me/nothing", REFERENCE),
        lambda: ktmoe.merge_adapter("me/nothing", "me/adapter", tmp_path / "out"),
        lambda: quantize.quantize_model("me/nothing", tmp_path / "out"),
    ):
        with pytest.raises(KTError, match="me/nothing"):
            call()
    assert not list(tmp_path.iterdir())
    with pytest.raises(KTError, match=r"adapter_options: got 'tokn'; expected some of subfolder, revision"):
        ktmoe.merge_adapter("me/nothing", "me/adapter", tmp_path / "out", adapter_options={"tokn": 1})


needs_llamafactory = pytest.mark.skipif(
    importlib.util.find_spec("llamafactory") is None, reason="LLaMA-Factory not installed"
)


def export(root, out, **more):
    from ktmoe.llamafactory import install

    install()
    from llamafactory.train.tuner import export_model

    export_model(
        {
            "model_name_or_path": "me/base",
            "adapter_name_or_path": "me/adapter",
            "cache_dir": str(root / "cache"),
            "template": "default",
            "export_dir": str(out),
            "use_kt": True,
            "kt_backend": "reference",
            **more,
        }
    )


@needs_llamafactory
@pytest.mark.parametrize("revision", COMMITS)
def test_export(revision, hub, tmp_path):
    root, expected = hub
    export(root, tmp_path / "out", model_revision=revision)
    assert relative(logits(stock(tmp_path / "out")), expected[revision]) < 1e-5
    assert {"Modelfile", "tokenizer.json"} <= {p.name for p in (tmp_path / "out").iterdir()}


@needs_llamafactory
def test_export_into_a_link_of_an_adapter_in_a_subfolder(hub, tmp_path):
    root, expected = hub
    (tmp_path / "out").mkdir()
    shutil.copytree(root / "adapter-main", tmp_path / "adapter" / "inner")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    local = {"model_name_or_path": str(root / "base-main"), "adapter_name_or_path": str(tmp_path / "adapter")}
    export(root, tmp_path / "link", adapter_folder="inner", **local)
    assert relative(logits(stock(tmp_path / "out")), expected["main"]) < 1e-5


@needs_llamafactory
def test_export_passes_the_token_on(hub, tmp_path, monkeypatch):
    from ktmoe.llamafactory import export as exporting

    seen = {}
    monkeypatch.setattr(exporting, "merge_adapter", lambda *_, **options: seen.update(options))
    export(hub[0], tmp_path / "out", hf_hub_token="secret")
    for which in ("model_options", "adapter_options"):
        assert seen[which]["token"] == "secret"
        assert seen[which]["cache_dir"] == str(hub[0] / "cache")


@needs_llamafactory
def test_an_export_that_fails_at_its_end_leaves_nothing(hub, tmp_path, monkeypatch):
    """The tokenizer is written after the weights, and into the same folder."""
    from transformers import PreTrainedTokenizerBase

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
    with pytest.raises(KTError, match="No space left on device"):
        export(hub[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())
