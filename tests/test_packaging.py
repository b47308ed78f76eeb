"""What a user installs: one version, dependencies that are imported, and nothing of the machine it was written on."""

import ast
import importlib.metadata
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ktmoe


ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
OPTIONAL = {"kt_kernel", "llamafactory"}  # installed with --no-deps, absent on some hosts: never a dependency
# What can be taken for granted wherever one of those two or a dependency is imported.
GRANTED = {"accelerate", "datasets", "huggingface_hub", "omegaconf", "trl", "yaml"}


def read_requirements(name):
    lines = (REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    lines = [line.split(" #")[0].strip() for line in lines]
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]


def names(requirements):
    return {canonicalize_name(r.name) for r in requirements}


def pins():
    found = {}
    for file in ("constraints", "kernel", "llamafactory", "model"):
        for requirement in read_requirements(file):
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", requirement
            found[canonicalize_name(requirement.name)] = specifier.version
    return found


def tracked_files():
    try:
        command = ["git", "-C", str(ROOT), "ls-files", "-z"]
        listing = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout.decode()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not a git checkout: {error}")
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def text_of(path):
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""  # a picture


def declared():
    requires = [Requirement(r) for r in importlib.metadata.requires("ktmoe")]
    dependencies = [r for r in requires if r.marker is None]
    return dependencies, extra(requires, "dev")


def extra(requires, name):
    """Requirements of an extra alone."""
    marked = [r for r in requires if r.marker is not None]
    return [r for r in marked if r.marker.evaluate({"extra": name}) and not r.marker.evaluate({"extra": ""})]


def test_installed_version_is_that_of_the_sources():
    assert importlib.metadata.version("ktmoe") == ktmoe.__version__


def test_every_requirement_is_pinned():
    for file in REQUIREMENTS.glob("*.txt"):
        assert names(read_requirements(file.stem)) <= pins().keys(), file.name


def test_installed_versions_are_the_tested_ones():
    """The tests speak for the set in requirements/: another one is no failure, but is said."""
    markers = {r.name: r.marker for r in read_requirements("constraints")}
    other = {}
    for name in names(read_requirements("train")):
        if markers[name] is None or markers[name].evaluate():
            version = importlib.metadata.version(name).split("+")[0]
            if version != pins()[name]:
                other[name] = f"{version}, tested {pins()[name]}"
    if other:
        pytest.skip(f"not the tested set: {other}")


def test_tested_set_fulfils_the_dependencies():
    dependencies, _ = declared()
    assert names(dependencies) <= names(read_requirements("train"))
    for requirement in dependencies:
        assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)]), requirement


def test_train_extra_is_the_tested_set():
    """Together with the dependencies; what decides whether adapters are right is pinned, as in requirements/."""
    requires = [Requirement(r) for r in importlib.metadata.requires("ktmoe")]
    train, (dependencies, _) = extra(requires, "train"), declared()
    assert names(train) | names(dependencies) == names(read_requirements("train"))
    pinned = {canonicalize_name(r.name): str(r.specifier) for r in train if r.specifier}
    assert pinned == {name: f"=={pins()[name]}" for name in pinned}
    assert {"transformers", "peft", "trl", "accelerate", "datasets"} <= pinned.keys()


def test_the_image_is_made_as_the_page_says():
    """There is no engine here: its steps are those of docs/install.md, which are run by hand."""
    steps = " ".join((ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").split())
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    first, second = re.findall(r"^pip install .*$", page, re.MULTILINE)[:2]
    assert first.endswith('".[train]"')
    assert '-c /ktmoe/requirements/constraints.txt "/ktmoe[train]"' in steps
    assert second.removeprefix("pip install ") in steps


def test_dev_extra_is_what_the_sessions_install():
    _, dev = declared()
    tools = {r for file in ("tests", "lint", "types") for r in names(read_requirements(file))}
    stubs = {name for name in tools if name.startswith("types-")}
    assert names(dev) == tools - stubs - names(read_requirements("train")) | {"nox"}


def test_dependencies_are_what_is_imported():
    imported = set()
    for path in (ROOT / "ktmoe").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    imported -= sys.stdlib_module_names | {"ktmoe", "ktmoe_reference"} | OPTIONAL | GRANTED
    dependencies, _ = declared()
    assert imported == names(dependencies)


def test_documented_versions_are_the_tested_ones():
    """`pip install` lines that users copy name the versions that were tested."""
    wrong = []
    for path in tracked_files():
        if path.parent == REQUIREMENTS or path.suffix not in {".md", ".py", ".toml", ".yml", ".yaml", ".sh", ""}:
            continue
        for line in text_of(path).splitlines():
            if "pip install" in line:
                for name, version in re.findall(r"([\w-]+)==([\w.]+)", line):
                    if pins().get(canonicalize_name(name), version) != version:
                        wrong.append(f"{path.relative_to(ROOT)}: {line.strip()}")
    assert not wrong


def test_import_is_free_of_the_optional_packages():
    code = f"import sys, ktmoe; print(sorted({OPTIONAL!r} & {{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_no_machine_path_and_no_registry_host():
    """Neither must reach a user: paths of the machine it was written on, and hosts that pip's own setting decides."""
    machine = re.compile(r"(?<![\w.~$}>-])/(?:work|root|opt)/")
    registry = re.compile(
        r"(?:files\.|test\.)?py(?:pi\.org|thonhosted\.org)|download\.pytorch\.org|(?:mirrors?|pypi)\.[\w.-]+/(?:pypi/)?simple"
        r"|--(?:extra-)?index-url[ =]|--find-links[ =]"
    )
    wrong = []
    for path in tracked_files():
        for number, line in enumerate(text_of(path).splitlines(), 1):
            for found in (*machine.finditer(line), *registry.finditer(line)):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {found.group()} in {line.strip()[:100]}")
    assert not wrong, "\n".join(wrong)


LOG = "# Changelog\n\n## [Unreleased]\n\n### Added\n\n- A thing.\n\n## [0.1.0] - 2026-01-01\n\n- All.\n"


@pytest.mark.parametrize(
    ("present", "wanted", "log", "expected"),
    [
        ("0.2.0.dev0", None, LOG, "0.2.0"),
        ("0.2.0.dev0", "0.2.0rc1", LOG, "0.2.0rc1"),
        ("0.1.0", "0.1.1", LOG, "0.1.1"),
        ("0.1.0", None, LOG, "VERSION: got 0.1.0, expected one after 0.1.0"),
        ("0.2.0.dev0", "0.1.0", LOG, "expected one after 0.2.0.dev0"),
        ("0.2.0.dev0", "0.2.0.dev1", LOG, "neither of development nor local"),
        ("0.2.0.dev0", "two", LOG, "got 'two', expected one as of PEP 440"),
        ("0.2.0.dev0", None, LOG.replace("### Added\n\n- A thing.\n\n", ""), "nothing is under [Unreleased]"),
    ],
)
def test_what_a_release_changes(tmp_path, present, wanted, log, expected):
    script = runpy.run_path(str(ROOT / ".ci" / "release.py"))["release"]
    (tmp_path / "ktmoe").mkdir()
    init, changelog = tmp_path / "ktmoe" / "__init__.py", tmp_path / "CHANGELOG.md"
    init.write_text(f'"""Text."""\n\n__version__ = "{present}"\n')
    changelog.write_text(log)
    if " " in expected:
        with pytest.raises(ValueError, match=re.escape(expected)):
            script(tmp_path, wanted, "2026-02-02")
        assert changelog.read_text() == log
        return
    assert script(tmp_path, wanted, "2026-02-02") == expected
    assert init.read_text() == f'"""Text."""\n\n__version__ = "{expected}"\n'
    assert f"## [Unreleased]\n\n## [{expected}] - 2026-02-02\n\n### Added" in changelog.read_text()
