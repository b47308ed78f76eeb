"""The house: what stands where, how large rooms may be, and that the map in docs/design.md shows each of them."""

import ast
import os
import re
import statistics
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"ktmoe": ROOT / "ktmoe", "ktmoe_reference": ROOT / "reference" / "ktmoe_reference"}
SOURCES = {
    f"{name}/{path.relative_to(folder).as_posix()}": path
    for name, folder in PACKAGES.items()
    for path in sorted(folder.rglob("*.py"))
}


def drawn():
    """`{path: line}` of the tree in docs/design.md."""
    (tree,) = re.findall(r"```tree\n(.*?)```", (ROOT / "docs" / "design.md").read_text(encoding="utf-8"), re.DOTALL)
    found, folders = {}, []
    for line in tree.splitlines():
        indent, name, about = re.fullmatch(r"( *)(\S+) *(.*)", line).groups()
        del folders[len(indent) // 2 :]
        if name.endswith("/"):
            folders.append(name)
        else:
            assert name not in found
            found["".join(folders) + name] = about
    return found


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="an sdist without docs")
def test_every_file_has_a_line_and_every_line_a_file():
    lines = drawn()
    assert sorted(lines) == sorted(SOURCES)
    assert [path for path, about in lines.items() if len(about.split()) < 3] == []


def test_rooms_are_small():
    sizes = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in SOURCES.items()}
    assert {name: size for name, size in sizes.items() if size > 350} == {}
    assert statistics.median(sizes.values()) < 150


def test_only_one_package_names_the_kernel():
    named = [name for name, path in SOURCES.items() if "kt_kernel" in path.read_text(encoding="utf-8")]
    assert [name for name in named if not name.startswith("ktmoe/backends/kt/")] == []


def test_every_file_says_what_it_is():
    assert [name for name, path in SOURCES.items() if not path.read_text(encoding="utf-8").startswith('"""')] == []


def drawn_from(source):
    """The calls of a file that draw from torch's own stream of random numbers, which a user's seed begins."""
    names = ("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "rand_like", "randn_like")
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        ast.unparse(call)
        for call in calls
        if ast.unparse(call.func) in [f"torch.{name}" for name in names]
        and "generator" not in [keyword.arg for keyword in call.keywords]
    ]


def test_no_measurement_draws_a_users_random_numbers():
    """A run that measures something is the run that finds it measured, to the last bit: same LoRA, same dropout."""
    assert drawn_from("a = torch.randn(3)") == ["torch.randn(3)"]
    assert drawn_from("a = torch.randn(3, generator=g)") == []
    drawing = {name: drawn_from(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}
    assert {name: calls for name, calls in drawing.items() if calls} == {}


@pytest.mark.parametrize("test", ["this one", "and the next"])
def test_no_test_finds_what_another_left_in_the_environment(test):
    assert "KTMOE_TEST_LEFT_THIS" not in os.environ
    os.environ["KTMOE_TEST_LEFT_THIS"] = test
