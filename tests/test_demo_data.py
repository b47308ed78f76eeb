"""The demo's data: no leak from training into evaluation, the same on every Python; and a tokenizer that is right."""

from __future__ import annotations

import ast
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoTokenizer


DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo"
PINNED = {"json.dumps": False, "threading.enumerate": True, "ftplib.FTP.sendcmd": True, "shutil.copytree": False}
SENTENCE = "Frobnicate the given widget until it finally sings."


def load(name: str) -> ModuleType:
    """Import one of the demo's scripts; its folder is not a package."""
    sys.path.insert(0, str(DEMO))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(DEMO))


questions = load("questions")


@pytest.fixture(scope="module")
def library():
    return questions.read_standard_library()


@pytest.fixture(scope="module")
def splits(library):
    return questions.ask(library)


def name_in(held_out: bool, prefix: str) -> str:
    return next(f"{prefix}.f{i}" for i in range(1000) if questions.is_held_out(f"{prefix}.f{i}") == held_out)


def test_is_large_enough(splits) -> None:
    train, held_out = splits
    assert len(train) > 1_200
    assert len(held_out) > 100


def test_the_splits_share_nothing(splits) -> None:
    for value in (lambda q: q.qualified_name, lambda q: q.text, lambda q: questions.opening(q.answer)):
        train, held_out = ([value(question) for question in split] for split in splits)
        assert not set(train) & set(held_out)
        assert len(train) == len(set(train))
        assert len(held_out) == len(set(held_out))


def test_identical_docstrings_never_land_in_two_splits() -> None:
    train, held_out = name_in(False, "widget"), name_in(True, "widget")
    # Layout and punctuation do not hide a copy, and the held-out side keeps it, whichever comes first.
    copies = [(train, SENTENCE), (held_out, SENTENCE.replace(" the", ", the\n")), (f"{train}.again", SENTENCE)]
    for functions in (copies, copies[::-1]):
        assert [[q.qualified_name for q in split] for split in questions.ask(functions)] == [[], [held_out]]


def test_the_split_and_the_order_follow_the_names_alone(library) -> None:
    assert {name: questions.is_held_out(name) for name in PINNED} == PINNED
    some = library[:400]
    assert questions.ask(some) == questions.ask(some[::-1])


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        (SENTENCE, SENTENCE),
        (f"{SENTENCE} Then stop it.", SENTENCE),
        (f"{SENTENCE}\n\nMore.", SENTENCE),
        ("Wait, e.g. five minutes, for the\n    widget's song.", "Wait, e.g. five minutes, for the widget's song."),
        ("Too short.", None),
        ("frobnicate(widget) -> None: this is a signature and no sentence.", None),
        (f"{'Long ' * 60}.", None),
    ],
)
def test_an_answer_is_one_sentence_of_prose(docstring, expected) -> None:
    assert questions.first_sentence(docstring) == expected


def test_private_functions_are_nobodys_question() -> None:
    assert questions.ask([("a._b.c", SENTENCE), ("_a", SENTENCE), ("a.__init__", SENTENCE)]) == ([], [])


def test_reads_sources_without_running_them(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text(
        'raise SystemExit\n\nclass A:\n    """A class."""\n    def f(self):\n        """A method."""\n'
        'def g():\n    """A function."""\n    def inner():\n        """Nobody\'s interface."""\n'
    )
    (tmp_path / "pkg" / "broken.py").write_text("def $template():")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text('def f():\n    """Not documentation."""\n')
    assert questions.read_standard_library(tmp_path) == [("pkg.A.f", "A method."), ("pkg.g", "A function.")]


def test_missing_sources_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="full CPython"):
        questions.read_standard_library(tmp_path)


def test_dataset_files(splits, tmp_path: Path) -> None:
    dataset = load("dataset")
    train, held_out = splits
    dataset.write_questions(tmp_path, train[:3], held_out[:2])
    record = dataset.read(tmp_path, dataset.TRAIN)[0]
    assert record == {"instruction": train[0].text, "input": "", "output": train[0].answer}
    dataset.write_preferences(tmp_path, dataset.PREFERENCES, [record], ["Something else."])
    (preference,) = dataset.read(tmp_path, dataset.PREFERENCES)
    assert (preference["chosen"], preference["rejected"]) == (train[0].answer, "Something else.")
    info = json.loads((tmp_path / "dataset_info.json").read_text(encoding="utf-8"))
    assert {name: value["file_name"] for name, value in info.items()} == {
        name: f"{name}.json" for name in (dataset.TRAIN, dataset.HELD_OUT, dataset.PREFERENCES)
    }
    assert [name for name, value in info.items() if value.get("ranking")] == [dataset.PREFERENCES]


def test_the_tokenizer_reads_text_without_loss(real_model) -> None:
    """transformers' own reading of this GGUF file's tokenizer turns every space into an unknown token."""
    for folder in (real_model.dense, real_model.moe):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for text in ("What does `os.path.join` do?", "naïve \t λ 🙂\n\n    end", "a  b ,c . 2026"):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
        assert tokenizer.tokenize("in 2026") == ["in", "Ġ", "2", "0", "2", "6"]
        assert tokenizer.encode("<|im_start|>user<|im_end|>") == [1, *tokenizer.encode("user"), 2]
        assert (tokenizer.bos_token, tokenizer.eos_token, len(tokenizer)) == ("<|im_start|>", "<|im_end|>", 49152)


def test_labels_cover_the_answer_and_its_end(real_model) -> None:
    held_out = load("held_out")
    tokenizer = AutoTokenizer.from_pretrained(real_model.dense)
    batch = held_out.collate(tokenizer, [("What does `a.b` do?", "Nothing."), ("?", "x" * 30)])
    labels, ids = batch["labels"][0], batch["input_ids"][0]
    answered = labels != held_out.IGNORE_INDEX
    assert tokenizer.decode(labels[answered]) == "Nothing.<|im_end|>"
    assert bool((labels[answered] == ids[answered]).all())
    prompt = "<|im_start|>user\nWhat does `a.b` do?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids[batch["attention_mask"][0].bool()]) == prompt + "Nothing.<|im_end|>"


def test_questions_are_asked_as_llama_factory_asks_them(real_model) -> None:
    pytest.importorskip("llamafactory")
    from ktmoe.llamafactory import install

    install()
    from llamafactory.data.template import TEMPLATES

    template = TEMPLATES["smollm"]
    tokenizer = AutoTokenizer.from_pretrained(real_model.dense)
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    prompt, _ = template.encode_oneturn(tokenizer, messages)
    assert tokenizer.decode(prompt) == load("held_out").PROMPT.format("What?")


def test_demo_sources_parse_on_python_3_10() -> None:
    for path in DEMO.glob("*.py"):
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
