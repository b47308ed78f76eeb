"""The demo's questions: what the functions of Python's standard library do, in the words of their docstrings.

The text is on every machine that can run Python: the docstrings are read from the library's source files with ``ast``
(never imported, so nothing is executed). A public function becomes a question, "What does `json.dumps` do?", and the
first sentence of its docstring the answer.

Nothing leaks from training into evaluation. A hash of a function's qualified name decides its split; and since
docstrings repeat a lot in the library (`copy`, `close`, platform twins), a pair whose answer opens with the same words
as another's is dropped, whichever splits the two would go to.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


# Tests and vendored wheels are not documentation; the last three are applications.
SKIPPED_FOLDERS = {"__pycache__", "_bundled", "dist-packages", "site-packages", "test", "tests"}
SKIPPED_PACKAGES = {"idlelib", "lib2to3", "turtledemo"}

HELD_OUT_SHARE = 0.1

# Two answers that open with the same words count as the same answer; shorter answers are dropped.
OPENING_WORDS = 6
MAX_ANSWER_CHARS = 200


@dataclass(frozen=True)
class Question:
    """A question about one function and its answer, the first sentence of the function's docstring."""

    qualified_name: str
    text: str
    answer: str


def words(text: str) -> list[str]:
    """Lower-case words of a text: what two texts are compared by, whatever their layout and punctuation."""
    return re.findall(r"\w+", text.lower())


def opening(answer: str) -> str:
    """The opening words of an answer. No two questions have equal ones."""
    return " ".join(words(answer)[:OPENING_WORDS])


def is_held_out(qualified_name: str) -> bool:
    """The split of a function, from a hash of its name alone: stable across machines and Python versions."""
    share = int.from_bytes(hashlib.sha256(qualified_name.encode()).digest()[:4], "big") / 2**32
    return share < HELD_OUT_SHARE


def first_sentence(docstring: str) -> str | None:
    """The first sentence of a docstring on one line, None if that makes no short answer in prose."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph)[0]
    is_prose = sentence[:1].isupper() and sentence.endswith(".") and len(words(sentence)) >= OPENING_WORDS
    return sentence if is_prose and len(sentence) <= MAX_ANSWER_CHARS else None


def _functions(node: ast.AST, qualified_name: str) -> Iterator[tuple[str, str]]:
    """Names and docstrings of all functions and methods; functions inside functions are nobody's interface."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        docstring = ast.get_docstring(node)
        if docstring:
            yield qualified_name, docstring
    elif isinstance(node, (ast.Module, ast.ClassDef)):
        for child in node.body:
            yield from _functions(child, f"{qualified_name}.{getattr(child, 'name', '')}")


def read_standard_library(root: Path | None = None) -> list[tuple[str, str]]:
    """Qualified names and docstrings of the standard library's functions, in the order of its file names.

    Args:
        root: The folder of the library's sources; the running interpreter's own by default.

    Raises:
        FileNotFoundError: If the interpreter was installed without the library's source files.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    functions: list[tuple[str, str]] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not SKIPPED_FOLDERS.isdisjoint(parts) or parts[0] in SKIPPED_PACKAGES:
            continue
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in the library's own strings
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates that are not Python
            continue
        functions += _functions(tree, module)

    if not functions:
        raise FileNotFoundError(f"No Python source files below {root}: the demo needs a full CPython installation.")

    return functions


def ask(functions: Iterable[tuple[str, str]]) -> tuple[list[Question], list[Question]]:
    """Questions to train on, and questions held out.

    Args:
        functions: Qualified names and docstrings.

    Returns:
        Both lists in an order that looks random and depends on the functions' names alone.
    """
    candidates = []
    for name, docstring in dict(functions).items():
        is_public = not any(part.startswith("_") for part in name.split("."))
        answer = first_sentence(docstring) if is_public else None
        if answer is not None:
            candidates.append(Question(name, f"What does `{name}` do?", answer))

    # Held-out questions choose first: the training set, not the evaluation, gives way where both have one answer.
    candidates.sort(key=lambda question: hashlib.sha256(question.qualified_name.encode()).digest())
    kept = {opening(question.answer): question for question in reversed(candidates)}
    questions = sorted(kept.values(), key=candidates.index)
    return (
        [question for question in questions if not is_held_out(question.qualified_name)],
        [question for question in questions if is_held_out(question.qualified_name)],
    )
