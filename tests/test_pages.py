"""The pages of the documentation against the code: keys, commands, messages, tables, links."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
import transformers
import typer
import yaml
from markdown_it import MarkdownIt

from ktmoe.cli import app
from ktmoe.config import OLD_KEYS, KTConfig
from ktmoe.llamafactory import keys, shipped
from ktmoe.llamafactory.rules import check_values
from ktmoe.shapes import SHAPES


ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="an sdist without docs")
PAGES = sorted(p.relative_to(ROOT).as_posix() for folder in (ROOT, DOCS, DOCS / "zh") for p in folder.glob("*.md"))
TRANSLATED = sorted(p.name for p in (DOCS / "zh").glob("*.md") if p.name != "index.md")
each_page = pytest.mark.parametrize("page", PAGES)
FORWARDED = {"train", "check", "chat", "export"}  # their arguments are LLaMA-Factory's


@cache
def parsed(page):
    return MarkdownIt().enable("table").parse((ROOT / page).read_text(encoding="utf-8"))


def blocks(page, language):
    return [t.content for t in parsed(page) if t.type == "fence" and t.info == language]


def inline(page):
    """Everything inside paragraphs, headings and cells of a page, but for fenced blocks."""
    return [child for token in parsed(page) for child in token.children or ()]


def text(token):
    return "".join(child.content for child in token.children or () if child.type in ("text", "code_inline"))


def headings(page, level):
    tokens = parsed(page)
    return [tokens[i + 1] for i, t in enumerate(tokens) if t.type == "heading_open" and t.tag == f"h{level}"]


def sections(page):
    """`{title: source}` of the second-level sections."""
    parts = re.split(r"^## (.*)\n", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def rows(page, first):
    """Cells of the body of the table whose first heading is `first`."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        found.append([c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


def anchors(page):
    """As GitHub makes them; MyST makes the same, of levels up to three."""
    included = re.findall(r"\{include\} \.\./(\S+)", (ROOT / page).read_text(encoding="utf-8"))
    own = [text(h) for p in (page, *included) for level in (1, 2, 3) for h in headings(p, level)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in own}


@pytest.mark.parametrize("folder", [DOCS, DOCS / "zh"], ids=["docs", "zh"])
def test_every_page_is_in_one_toctree(folder):
    listed = re.findall(
        r"```\{toctree\}\n(?::.*\n)*\n((?:.+\n)+)```", (folder / "index.md").read_text(encoding="utf-8")
    )
    names = [name for tree in listed for name in tree.split() if "/" not in name]
    assert sorted([*names, "index"]) == sorted(p.stem for p in folder.glob("*.md"))


@each_page
def test_links_lead_somewhere(page):
    targets = [t.attrs.get("href") or t.attrs.get("src") for t in inline(page) if t.type in ("link_open", "image")]
    for target in (t for t in targets if t and "://" not in t):
        path, _, anchor = unquote(target).partition("#")
        there = (ROOT / page).parent.joinpath(path).resolve() if path else ROOT / page
        assert there.is_file(), target
        if anchor:
            assert anchor in anchors(there.relative_to(ROOT).as_posix()), target


@pytest.mark.parametrize("readme", ["README.md", "README_zh.md"])
def test_readmes_link_every_page(readme):
    linked = {t.attrs["href"] for t in inline(readme) if t.type == "link_open"}
    own = {p.name for p in DOCS.glob("*.md")} - {"index.md"}
    instead = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
    if readme == "README_zh.md":
        instead |= {name: f"docs/zh/{name}" for name in TRANSLATED}
    assert {instead.get(name, f"docs/{name}") for name in own} <= linked


@each_page
def test_commands_are_accepted(page):
    """Sub-command, options and, where LLaMA-Factory takes the rest, ktmoe's own keys."""
    command = typer.main.get_command(app)
    found = [line for block in blocks(page, "bash") for line in block.splitlines()]
    found += [t.content for t in inline(page) if t.type == "code_inline"]
    for words in (shlex.split(line, comments=True) for line in found if line.startswith("ktmoe ")):
        name, *rest = words[1:]
        assert name in command.commands, words
        if name in FORWARDED:
            keys.check(rest)
            keys.check({k: yaml.safe_load(v) for k, v in (w.split("=", 1) for w in rest if "=" in w)})
            if rest and rest[0].endswith(".yaml") and not Path(rest[0]).stem.isupper():  # CONFIG.yaml, NAME.yaml
                assert Path(rest[0]).stem in shipped.examples(), words
        elif rest:  # a bare `ktmoe merge` in a sentence is its name
            with command.make_context("ktmoe", ["--help"], resilient_parsing=True) as root:
                command.commands[name].make_context(name, list(rest), parent=root)
        if name == "examples" and rest and rest != ["[NAME]"]:
            assert rest[0] in shipped.examples(), words


@each_page
def test_settings_are_accepted(page):
    for block in blocks(page, "yaml"):
        given = yaml.safe_load(block)
        if given.get("use_kt"):
            keys.check(given)
            if given.pop("kt_weight_path", None):  # a folder of the reader's
                assert given["kt_backend"] == "AMXInt8"
            check_values(given)


def test_every_key_has_its_section():
    assert list(sections("docs/keys.md")) == ["use_kt", *KTConfig.field_help()]


@pytest.mark.parametrize("name", KTConfig.field_help())
def test_a_key_is_described_as_it_is(name):
    _, default, _ = KTConfig.field_help()[name]
    section = sections("docs/keys.md")[name]
    for item in ("Values", "Default", "Cost"):
        assert f"- **{item}**: " in section
    (written,) = (yaml.safe_load(value) for value in re.findall(r"- \*\*Default\*\*: `(.*?)`", section))
    assert (written, type(written)) == (default, type(default))
    (example,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    assert name in yaml.safe_load(example)


CHOICES = {name: about["enum"] for name, about in KTConfig.schema()["properties"].items() if "enum" in about}


@pytest.mark.parametrize("name", CHOICES)
def test_a_key_has_the_values_that_are_listed(name):
    (listed,) = re.findall(r"- \*\*Values\*\*: (.*)", sections("docs/keys.md")[name])
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted(c for c in CHOICES[name] if isinstance(c, str))


def test_old_keys_are_told_as_the_code_tells_them():
    assert {name.strip("`"): now for name, now in rows("docs/migrating.md", "old key")} == OLD_KEYS


def test_sizes_are_computed_from_the_shapes():
    table = rows("docs/families.md", "model")
    assert len(table) == len([name for name in SHAPES if name[0].isupper() and "SmolLM2" not in name])
    for name, layers, experts, one, everything in table:
        s = SHAPES[name]
        size = 6 * s.num_experts * s.hidden_size * s.intermediate_size
        assert experts == f"{s.num_experts}, {s.top_k}"
        assert one == f"{size / 2**30:.2f} GiB"
        gigabytes = int(layers) * size / 1e9
        assert everything == (f"{gigabytes:.0f} GB" if gigabytes > 100 else f"{gigabytes:.1f} GB")
    layers = {name: int(row[0]) for name, *row in table}
    v3 = transformers.DeepseekV3Config()
    assert layers["DeepSeek-V3"] == v3.num_hidden_layers - v3.first_k_dense_replace
    assert layers["Mixtral-8x7B"] == transformers.MixtralConfig().num_hidden_layers


@cache
def messages():
    """Every text in ktmoe's sources but docstrings, with … where a value goes."""
    found = []
    for path in (ROOT / "ktmoe").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                found.append(node.value)
    return found


QUOTED = [text(h) for h in headings("docs/troubleshooting.md", 3)] if DOCS.is_dir() else []
FOREIGN = "Your setup doesn't support bf16/gpu. You need to assign use_cpu"


@pytest.mark.parametrize("title", QUOTED)
def test_a_quoted_message_is_one_of_the_code_s(title):
    if title == FOREIGN:  # transformers'
        theirs = Path(transformers.__file__).with_name("training_args.py").read_text(encoding="utf-8")
        assert all(part in theirs for part in title.split(". "))
        return
    pattern = ".*".join(map(re.escape, title.removesuffix(".").split("…")))
    assert len(title.replace("…", "")) > 12
    assert any(re.match(pattern, message, re.DOTALL) for message in messages()), title


@pytest.mark.parametrize("name", TRANSLATED)
def test_a_translated_page_is_the_same_page(name):
    """Its code, keys, sections and figures; a sentence that is added to one of them has to be added to the other."""
    page, translated = f"docs/{name}", f"docs/zh/{name}"
    once = "   :no-index:\n"  # of what is described twice, in the second place
    assert [t.content for t in parsed(page) if t.type == "fence"] == [
        t.content.replace(once, "") for t in parsed(translated) if t.type == "fence"
    ]
    assert len(headings(page, 2)) == len(headings(translated, 2)) > 0
    for (title, source), (other, theirs) in zip(sections(page).items(), sections(translated).items(), strict=True):
        mine, yours = (sorted(set(re.findall(r"`([^`\n]+)`", part))) for part in (source, theirs))
        assert mine == yours, (title, other)
        figures = [sorted(set(re.findall(r"\d[\d.,]*\d|\d", part))) for part in (source, theirs)]
        assert not set(figures[1]) - set(figures[0]), (title, other)
