"""The demo's data: no text reaches two splits, the same sources give the same corpus, token ids decode exactly."""

from __future__ import annotations

import ast
import importlib
import json
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest


DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo"
PINNED = {
    "json.dumps": "train",
    "shutil.copytree": "pretrain",
    "bisect.insort_left": "held_out",
    "imaplib.IMAP4.myrights": "held_out",
}


def load(name: str) -> ModuleType:
    """Import one of the demo's scripts; its folder is not a package."""
    sys.path.insert(0, str(DEMO))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(DEMO))


corpus_module = load("corpus")


@pytest.fixture(scope="module")
def corpus():
    return corpus_module.build_corpus()


@pytest.fixture(scope="module")
def pretrain_words(corpus) -> str:
    return "\n".join(f" {' '.join(corpus_module.words(document))} " for document in corpus.pretrain)


def entry(name: str, docstring: str, kind: str = "function"):
    return corpus_module.DocEntry(name, kind, f"{name}()", docstring)


def name_in(split: str, prefix: str) -> str:
    return next(f"{prefix}.f{i}" for i in range(1000) if corpus_module.split_of(f"{prefix}.f{i}") == split)


def test_is_large_enough(corpus) -> None:
    assert sum(map(len, corpus.pretrain)) > 1_000_000
    assert len(corpus.train) > 700
    assert len(corpus.held_out) > 200


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_no_answer_occurs_in_the_pretraining_text(corpus, pretrain_words: str, split: str) -> None:
    leaked = [
        pair.qualified_name
        for pair in getattr(corpus, split)
        # With a space on either side: "Register it." is not part of "Unregister it."
        if f" {' '.join(corpus_module.words(pair.answer))} " in pretrain_words
    ]
    assert leaked == []


def test_train_and_held_out_share_nothing(corpus) -> None:
    for value in (lambda pair: pair.qualified_name, lambda pair: corpus_module.answer_key(pair.answer)):
        train, held_out = ([value(pair) for pair in pairs] for pairs in (corpus.train, corpus.held_out))
        assert not set(train) & set(held_out)
        assert len(train) == len(set(train))
        assert len(held_out) == len(set(held_out))


def test_split_follows_the_name(corpus) -> None:
    assert {corpus_module.split_of(pair.qualified_name) for pair in corpus.train} == {"train"}
    assert {corpus_module.split_of(pair.qualified_name) for pair in corpus.held_out} == {"held_out"}


def test_functions_of_other_splits_stay_out_of_the_pretraining_text(corpus) -> None:
    headings = {document.split("(")[0] for document in corpus.pretrain}
    assert not headings & {pair.qualified_name for pair in corpus.train + corpus.held_out}


def test_identical_docstrings_never_land_in_two_splits() -> None:
    text = "Frobnicate the given widget until it finally sings."
    names = {split: name_in(split, "widget") for split in ("pretrain", "train", "held_out")}
    everywhere = corpus_module.build_corpus([entry(name, text) for name in names.values()], topics=[])
    assert (len(everywhere.pretrain), everywhere.train, everywhere.held_out) == (1, [], [])

    # Layout and case do not hide a copy, and the held-out side keeps it.
    copies = [entry(names["train"], text.upper()), entry(names["held_out"], text.replace(" the", "\nthe"))]
    pairs = corpus_module.build_corpus(copies, topics=[])
    assert [pair.qualified_name for pair in pairs.held_out] == [names["held_out"]]
    assert pairs.train == []

    topic = corpus_module.build_corpus(copies, topics=[f"As the manual says: {text}"])
    assert topic.train == topic.held_out == []


def test_is_deterministic() -> None:
    folder = Path(sysconfig.get_path("stdlib")) / "email"
    first, second = (corpus_module.build_corpus(corpus_module.read_standard_library(folder), []) for _ in range(2))
    assert first == second
    assert first.pretrain
    # The split is pinned: the same function is held out on every machine and every Python.
    assert [corpus_module.split_of(name) for name in PINNED] == list(PINNED.values())


def test_reads_sources_without_running_them(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text(
        '"""A package."""\nraise SystemExit\n\n'
        'class A:\n    """A class."""\n    def f(self, x=1):\n        """A method."""\n'
    )
    (tmp_path / "pkg" / "broken.py").write_text("def $template():")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text('"""Not documentation."""')
    entries = corpus_module.read_standard_library(tmp_path)
    assert [(e.qualified_name, e.kind, e.signature) for e in entries] == [
        ("pkg", "module", "pkg"),
        ("pkg.A", "class", "class pkg.A"),
        ("pkg.A.f", "function", "pkg.A.f(self, x=1)"),
    ]


def test_missing_sources_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="full CPython"):
        corpus_module.read_standard_library(tmp_path)


def test_dataset_files(corpus, tmp_path: Path) -> None:
    dataset = load("dataset")
    dataset.write_dataset(tmp_path, corpus.train[:3], corpus.held_out[:2])
    info = json.loads((tmp_path / "dataset_info.json").read_text(encoding="utf-8"))
    assert {value["file_name"] for value in info.values()} == {"pydoc_train.json", "pydoc_held_out.json"}
    record = dataset.read_dataset(tmp_path, "pydoc_train")[0]
    assert record == {"instruction": corpus.train[0].question, "input": "", "output": corpus.train[0].answer}


def test_tokenizer_round_trip(corpus, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer_module = load("tokenizer")
    texts = corpus.pretrain[:200]
    tokenizer = tokenizer_module.train_tokenizer(texts, vocab_size=1024)
    assert tokenizer_module.train_tokenizer(texts, vocab_size=1024).get_vocab() == tokenizer.get_vocab()

    tokenizer.save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*texts[:50], "naïve \t λ 🙂\n\n    end", "a  b ,c ."]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert loaded.encode(text, add_special_tokens=False) == ids
    assert (loaded.pad_token, loaded.bos_token, loaded.eos_token) == ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def test_labels_cover_the_answer_and_its_end(corpus) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    held_out = load("held_out")
    tokenizer = load("tokenizer").train_tokenizer(corpus.pretrain[:200], vocab_size=1024)
    records = [{"instruction": "What does `a.b` do?", "output": "Nothing."}, {"instruction": "?", "output": "x" * 30}]
    batch = held_out.collate(tokenizer, records)
    labels, ids = batch["labels"][0], batch["input_ids"][0]
    answered = labels != held_out.IGNORE_INDEX
    assert tokenizer.decode(labels[answered]) == "Nothing.<|im_end|>"
    assert bool((labels[answered] == ids[answered]).all())
    prompt = "<|im_start|>user\nWhat does `a.b` do?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids[batch["attention_mask"][0].bool()]) == prompt + "Nothing.<|im_end|>"


def test_demo_sources_parse_on_python_3_10() -> None:
    for path in DEMO.glob("*.py"):
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
