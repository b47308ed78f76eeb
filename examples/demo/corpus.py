"""The demo's text: what ships with CPython, split so that nothing leaks from training into evaluation.

Two sources, both on every machine that can run Python: the language reference in ``pydoc_data.topics`` and the
docstrings of the standard library, read from its source files with ``ast`` (never imported, so nothing is executed).

A function goes, whole, to exactly one split, chosen by a hash of its qualified name:

* ``pretrain``: signature and docstring are part of the text that the base model is pretrained on;
* ``train`` and ``held_out``: a question, "What does `json.dumps` do?", and the docstring's first paragraph as answer.

Docstrings repeat a lot in the standard library (`copy`, `close`, platform twins), so a split by name is not enough:
a pair is dropped if the opening words of its answer occur anywhere in the pretraining text or open an earlier pair.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


# Tests and vendored wheels are not documentation; the last three are applications.
SKIPPED_FOLDERS = {"__pycache__", "_bundled", "dist-packages", "site-packages", "test", "tests"}
SKIPPED_PACKAGES = {"idlelib", "lib2to3", "turtledemo"}

# Cumulative shares of functions per split.
PRETRAIN_SHARE, TRAIN_SHARE = 0.45, 0.88

# Two answers that open with the same words count as the same answer; shorter answers are dropped.
OPENING_WORDS = 6
MAX_ANSWER_CHARS = 280


@dataclass(frozen=True)
class DocEntry:
    """A documented object of the standard library."""

    qualified_name: str
    kind: str  # "module", "class" or "function"
    signature: str
    docstring: str


@dataclass(frozen=True)
class QAPair:
    """A question about one function and its answer, the first paragraph of the function's docstring."""

    qualified_name: str
    question: str
    answer: str


@dataclass
class DemoCorpus:
    """Pretraining documents and question-answer pairs that do not overlap."""

    pretrain: list[str] = field(default_factory=list)
    train: list[QAPair] = field(default_factory=list)
    held_out: list[QAPair] = field(default_factory=list)


def words(text: str) -> list[str]:
    """Lower-case words of a text: what two texts are compared by, whatever their layout and punctuation."""
    return re.findall(r"\w+", text.lower())


def answer_key(answer: str) -> str:
    """The opening words of an answer. Pairs with equal keys never land in two splits."""
    return " ".join(words(answer)[:OPENING_WORDS])


def opening_keys(text: str) -> Iterator[str]:
    """Every run of ``OPENING_WORDS`` words in a text, to be looked up by :func:`answer_key`."""
    tokens = words(text)
    for start in range(len(tokens) - OPENING_WORDS + 1):
        yield " ".join(tokens[start : start + OPENING_WORDS])


def split_of(qualified_name: str) -> str:
    """The split of a function, from a hash of its name alone: stable across machines and Python versions."""
    share = int.from_bytes(hashlib.sha256(qualified_name.encode()).digest()[:4], "big") / 2**32
    if share < PRETRAIN_SHARE:
        return "pretrain"
    return "train" if share < TRAIN_SHARE else "held_out"


def first_paragraph(docstring: str) -> str | None:
    """The first paragraph on one line, its first sentence if it is long, None if that makes no short answer."""
    text = " ".join(docstring.strip().split("\n\n")[0].split())
    if len(text) > MAX_ANSWER_CHARS:
        text = re.split(r"(?<=[.!?]) ", text)[0]
    if len(text) > MAX_ANSWER_CHARS or len(words(text)) < OPENING_WORDS or not text[0].isalpha():
        return None
    return text


def _source_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS.isdisjoint(parts) and parts[0] not in SKIPPED_PACKAGES:
            yield path


def _entries(node: ast.AST, qualified_name: str) -> Iterator[DocEntry]:
    if isinstance(node, ast.Module):
        kind, signature = "module", qualified_name
    elif isinstance(node, ast.ClassDef):
        kind, signature = "class", f"class {qualified_name}"
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        kind, signature = "function", f"{qualified_name}({ast.unparse(node.args)})"
    else:
        return

    docstring = ast.get_docstring(node)
    if docstring and docstring.strip():
        yield DocEntry(qualified_name, kind, signature, docstring.strip())

    if kind == "function":  # functions inside functions are nobody's interface
        return

    for child in node.body:  # pyright: ignore[reportAttributeAccessIssue]
        yield from _entries(child, f"{qualified_name}.{getattr(child, 'name', '')}")


def read_standard_library(root: Path | None = None) -> list[DocEntry]:
    """Read the docstrings of the standard library, in the order of its file names.

    Args:
        root: The folder of the library's sources; the running interpreter's own by default.

    Raises:
        FileNotFoundError: If the interpreter was installed without the library's source files.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    entries: list[DocEntry] = []
    for path in _source_files(root):
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in the library's own strings
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates that are not Python
            continue
        entries += _entries(tree, module)

    if not entries:
        raise FileNotFoundError(f"No Python source files below {root}: the demo needs a full CPython installation.")

    return entries


def read_topics() -> list[str]:
    """The language reference behind ``help("topics")``; empty where a distribution leaves it out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []

    return [topics[name].strip() for name in sorted(topics)]


def _candidate_pair(entry: DocEntry) -> QAPair | None:
    is_public = not any(part.startswith("_") for part in entry.qualified_name.split("."))
    answer = first_paragraph(entry.docstring) if is_public else None
    if answer is None:
        return None
    return QAPair(entry.qualified_name, f"What does `{entry.qualified_name}` do?", answer)


def build_corpus(entries: list[DocEntry] | None = None, topics: list[str] | None = None) -> DemoCorpus:
    """Split the documentation into pretraining text, training pairs and held-out pairs.

    Args:
        entries: Documented objects; the running interpreter's standard library by default.
        topics: Further pretraining documents; the language reference by default.

    Returns:
        The corpus. Its order, and with it everything that follows in the demo, depends on the Python version alone.
    """
    entries = read_standard_library() if entries is None else entries
    documents = list(read_topics() if topics is None else topics)
    pairs: dict[str, list[QAPair]] = {"train": [], "held_out": []}
    names: set[str] = set()
    for entry in entries:
        # A name can be defined twice (`if sys.platform ...`, overloads): its first definition decides.
        if entry.kind == "function" and entry.qualified_name in names:
            continue
        names.add(entry.qualified_name)
        split = split_of(entry.qualified_name) if entry.kind == "function" else "pretrain"
        if split == "pretrain":
            documents.append(f"{entry.signature}\n\n{entry.docstring}")
        elif (pair := _candidate_pair(entry)) is not None:
            pairs[split].append(pair)

    corpus = DemoCorpus(pretrain=list(dict.fromkeys(documents)))
    taken = {key for document in corpus.pretrain for key in opening_keys(document)}
    # Held-out pairs choose first: the training set, not the evaluation, gives way where both have the same answer.
    for split, kept in (("held_out", corpus.held_out), ("train", corpus.train)):
        for pair in pairs[split]:
            key = answer_key(pair.answer)
            if key not in taken:
                taken.add(key)
                kept.append(pair)

    return corpus


if __name__ == "__main__":
    built = build_corpus()
    print(f"{sys.version.split()[0]}: {len(built.pretrain)} documents, {sum(map(len, built.pretrain)):,} characters,")
    print(f"{len(built.train)} training pairs, {len(built.held_out)} held-out pairs")
