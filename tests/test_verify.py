"""`ktmoe verify` and its sections: how they end, what they write, and that nothing failed looks green."""

import argparse
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from helpers import run_python
from test_devices import CONFIG
from transformers import AutoModelForCausalLM

from ktmoe import KTError, cli
from ktmoe.backends import KERNEL_BACKENDS, TABLE, Limits, kt
from ktmoe.backends.kt import extension
from ktmoe.cores import usable_cores
from ktmoe.types import MoEShape
from ktmoe.verify import accuracy, environment, placement, plots, report, results, throughput, traps, usage, weights


@pytest.fixture
def model(tmp_path):
    CONFIG.save_pretrained(tmp_path / "small-moe")
    return str(tmp_path / "small-moe")


def test_the_shapes_of_a_model(model, tmp_path):
    assert results.shapes_of(model, 3) == {"small-moe": MoEShape(4, 64, 64, 2, 3)}
    with pytest.raises(KTError, match=r"MODEL: .*nowhere"):
        results.shapes_of(str(tmp_path / "nowhere"), 8)
    with pytest.raises(SystemExit, match="nowhere"):
        accuracy.main(["--model", str(tmp_path / "nowhere")])


@pytest.fixture
def with_weights(tmp_path):
    """A checkpoint of the same model whose second layer has outliers, as real ones have."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIG).to(torch.bfloat16)
    for experts in (m for n, m in made.named_modules() if n.endswith("1.mlp.experts")):
        experts.down_proj.data[2, :, 5] *= 3000
        experts.gate_up_proj.data[2, 5] *= 30
    made.save_pretrained(tmp_path / "with-weights")
    return str(tmp_path / "with-weights")


def _set(monkeypatch, name, **changes):
    monkeypatch.setitem(TABLE, name, replace(TABLE[name], **changes))


def test_a_models_own_weights_are_measured(with_weights, tmp_path, monkeypatch):
    assert weights.main(["--model", with_weights, "--output", str(tmp_path), "--allow-unverified"]) == 0
    result = json.loads((tmp_path / "weights.json").read_text())
    layers = result["data"]["layers"]
    here = ["torch", *(n for n in KERNEL_BACKENDS if kt.available() and not TABLE[n].stored)]
    assert [(one["backend"], one["layer"]) for one in layers] == [
        (b, f"model.layers.{n}.mlp.experts") for b in here for n in range(2)
    ]
    assert result["verdict"] == ("pass" if kt.available() else "not verified")
    assert all(len(row) == 4 for one in layers for row in one["own"] + one["exact"])
    for one in layers:
        limit = TABLE[one["backend"]].expected
        assert max(one["own"][0]) <= limit.forward
        assert max(one["own"][1]) <= limit.backward
    _set(monkeypatch, "torch", expected=Limits(-1.0, -1.0, 1))
    assert weights.main(["--model", with_weights, "--allow-unverified"]) == 1


@pytest.mark.kernel
def test_how_far_int8_is_from_bf16_is_shown_and_no_verdict(with_weights, monkeypatch, capsys):
    _set(monkeypatch, "AMXInt8", aimed_at=Limits(0.001, 0.001, 1))
    assert weights.main(["--model", with_weights]) == 0
    said = capsys.readouterr().out
    assert "format from bf16" in said
    assert "further from bf16 than was aimed at" in said
    _set(monkeypatch, "AMXInt8", expected=Limits(1e-9, 1e-9, 1))
    assert weights.main(["--model", with_weights]) == 1


def test_weights_are_measured_where_they_are(with_weights, model, tmp_path, monkeypatch):
    assert results.has_weights(with_weights)
    assert not results.has_weights(model)
    ran = []
    monkeypatch.setattr(
        report,
        "_run",
        lambda name, *args: ran.append(name) or dict(section=name, verdict="pass", summary="", problems=[], data={}),
    )
    for given, expected in (
        (with_weights, list(report.SECTIONS)),
        (model, [s for s in report.SECTIONS if s != "weights"]),
    ):
        ran.clear()
        report.verify(tmp_path / "out", given, 4, 0, 1.0, False, results.console())
        assert ran == expected


@pytest.mark.parametrize("allowed", [False, True])
def test_without_a_kernel_nothing_looks_verified(model, tmp_path, monkeypatch, capsys, allowed):
    monkeypatch.setattr(extension, "available", lambda: False)
    monkeypatch.setattr(kt, "available", lambda: False)
    monkeypatch.setattr(kt, "variant", lambda: "no such CPU")
    options = ["--output", str(tmp_path), *(["--allow-unverified"] if allowed else [])]
    for section, more in ((accuracy, ["--model", model]), (traps, []), (throughput, ["--model", model])):
        assert section.main([*options, *more]) == (0 if allowed else 1)
        assert "kernel NOT verified on this host: no such CPU" in capsys.readouterr().out
    for name in ("accuracy", "traps", "throughput"):
        assert json.loads((tmp_path / f"{name}.json").read_text())["verdict"] == "not verified"


def test_a_kernel_that_cannot_take_the_shape_is_not_called_verified(model, capsys):
    for section in (accuracy, throughput):
        assert section.main(["--model", model, "--rank", "200"]) == 1
        said = capsys.readouterr().out
        assert "kernel NOT verified on this host" in said
        assert not kt.available() or "AMXInt8 left out: r (lora_rank): got 200" in said


def test_an_error_beyond_its_limit_fails_the_section(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TABLE, "torch", replace(TABLE["torch"], expected=Limits(1e-9, 1e-9, 1e-9)))
    assert accuracy.main(["--model", model, "--output", str(tmp_path), "--allow-unverified"]) == 1
    assert "accuracy FAILED" in capsys.readouterr().out
    assert json.loads((tmp_path / "accuracy.json").read_text())["problems"]


@pytest.mark.parametrize(
    ("end", "expected"),
    [("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"), ("raise SystemExit(7)", "exit code 7")],
)
def test_a_section_that_dies_has_failed(tmp_path, monkeypatch, end, expected):
    real = report._wait
    monkeypatch.setattr(report, "_wait", lambda command: real([sys.executable, "-c", end]))
    (tmp_path / "accuracy.json").write_text('{"verdict": "pass"}')  # written before it died
    found = report._run("accuracy", [], tmp_path, results.console())
    assert found["verdict"] == "fail"
    assert expected in found["summary"]
    assert report.overall([found, {"verdict": "pass"}, {"verdict": "not verified"}]) == "fail"


def test_a_torn_result_is_a_failed_section(tmp_path, monkeypatch):
    real = report._wait
    monkeypatch.setattr(report, "_wait", lambda command: real([sys.executable, "-c", ""]))
    (tmp_path / "soak.json").write_text('{"verdict": "pa')
    assert report._run("soak", [], tmp_path, results.console())["verdict"] == "fail"


def test_problems_with_brackets_are_printed_as_they_are(tmp_path, capsys):
    args = argparse.Namespace(output=tmp_path, allow_unverified=False)
    assert results.end(results.console(), args, "traps", (), ["died in [/usr/lib/libc.so.6]"], {}) == 1
    assert "died in [/usr/lib/libc.so.6]" in capsys.readouterr().out


@pytest.mark.kernel
def test_a_probe_that_a_signal_kills_ends_nothing_else(monkeypatch, tmp_path):
    """The child dies in its second probe, the next one hangs in its second; what is between still runs."""
    plant = tmp_path / "sitecustomize.py"
    plant.write_text(
        "import os, time\n"
        "from ktmoe.verify import probes\n"
        f"def die(name): os.kill(os.getpid(), {int(signal.SIGSEGV)})\n"
        "def hold(name): return []\n"
        "def hang(name): time.sleep(600)\n"
        "for number, probe in ((2, hold), (8, die), (19, hold), (20, hang)):\n"
        "    object.__setattr__(probes.TRAPS[number], 'probe', probe)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(traps, "TRAPS", {n: traps.TRAPS[n] for n in (2, 8, 19, 20)})
    monkeypatch.setattr(traps, "_TIMEOUT", 5)
    found = dict(traps.run("AMXBF16"))
    assert found[2] == found[19] == []
    assert "killed by signal 11" in found[8][0]
    assert "killed by signal 9" in found[20][0]


class Page(HTMLParser):
    """Collects what a page would load from elsewhere, and the tags that are not closed."""

    def __init__(self):
        super().__init__()
        self.outside, self.open, self.seen = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)
        self.outside += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(text):
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.outside == []
    assert {"svg", "table", "h2"} <= page.seen


def test_a_thread_outside_of_the_mask_is_found(monkeypatch):
    """The main thread's is the process's."""
    assert usage.outside_of_the_mask() == []
    there = {os.getpid(): ("python", {0, 1}), 2: ("inside", {1}), 3: ("numa_0_t_1", {1, 99})}
    monkeypatch.setattr(usage, "running_threads", lambda: there)
    assert usage.outside_of_the_mask() == ["numa_0_t_1 may run on CPU 99, outside of the process's mask"]
    monkeypatch.setattr(usage, "running_threads", dict)  # no /proc
    assert usage.outside_of_the_mask() == []


def test_memory_of_each_node_is_what_linux_says():
    text = (
        "7f00 default anon=100 dirty=100 N0=60 N1=40 kernelpagesize_kB=4\n"
        "7f10 default file=/lib/x.so mapped=9 N0=9 kernelpagesize_kB=4\n"
        "7f20 bind:1 anon=2 dirty=2 N1=2 kernelpagesize_kB=2048\n"
    )
    assert placement.memory_by_node(text) == {0: 60 * 4096, 1: 40 * 4096 + 2 * 2**21}
    assert placement.counts(1, 1) == [1]
    assert placement.counts(6, 1) == [1, 2, 4, 6]
    assert placement.counts(6, 2) == [2, 4, 6]
    assert placement.counts(1, 2) == [2]  # two pools, and a quota of one CPU


@pytest.mark.kernel
def test_a_layer_away_from_its_threads_is_found(monkeypatch, kernel):
    """Only what came with the layer counts: the source may be anywhere."""
    shape, mb = MoEShape(4, 64, 64, 2, 4), 2**20
    for after, problems in (({0: 900 * mb, 1: 700 * mb}, 0), ({0: 900 * mb, 1: 701 * mb}, 1)):
        nodes = iter([{0: 100 * mb, 1: 700 * mb}, after])
        monkeypatch.setattr(placement, "_nodes", lambda nodes=nodes: next(nodes))
        found = placement.look(shape, False, 32, 1)["problems"]
        assert len(found) == problems, found


@pytest.mark.kernel
def test_placement_of_a_small_layer(tmp_path, kernel):
    """In a process of its own, as `ktmoe verify` runs it: no earlier pool is there."""
    done = run_python(f"""
        from ktmoe.types import MoEShape
        from ktmoe.verify import placement
        placement.SHAPES = {{placement._SHAPE: MoEShape(4, 64, 64, 2, 4)}}
        raise SystemExit(placement.main(["--tokens", "32", "--rounds", "1", "--output", {str(tmp_path)!r}]))
    """)
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "placement.json").read_text())["data"]
    (run,) = [run for run in data["runs"] if len(run["nodes"]) == 1]
    assert [int(n) for n in run["seconds"]] == placement.counts(usable_cores(nodes=run["nodes"]), 1)
    assert len(run["threads"]) == int(list(run["seconds"])[-1])  # of the last pool, and of no other
    mask = os.sched_getaffinity(0)
    assert all(thread["cpus"] and mask.issuperset(thread["cpus"]) for thread in run["threads"]), run


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_command(model, tmp_path):
    """The real thing, as a user calls it."""
    command = [sys.executable, "-m", "ktmoe.cli", "verify", model, "--output", str(tmp_path / "out")]
    done = subprocess.run([*command, "--soak-minutes", "1"], capture_output=True, text=True)
    assert done.returncode == (0 if kt.available() else 1), done.stdout + done.stderr
    result = json.loads((tmp_path / "out" / "report.json").read_text())
    assert result["verdict"] == ("pass" if kt.available() else "not verified")
    assert list(result["sections"]) == ["accuracy", "traps", "soak", "placement", "throughput"]
    runs = result["sections"]["accuracy"]["data"]["runs"]
    takes_it = [n for n in KERNEL_BACKENDS if kt.available() and not TABLE[n].stored]  # in bf16
    assert {r["backend"] for r in runs} == {"torch", *takes_it}
    check_page((tmp_path / "out" / "report.html").read_text())
    assert ("kernel verified on this host" in done.stdout) == kt.available()


def test_the_page_of_a_failed_run():
    failed = {"verdict": "fail", "summary": "killed <b>", "problems": ["<script>"], "data": {}}
    sections = {name: {"section": name, **failed} for name in report.SECTIONS}
    text = report.page(
        {"ktmoe": "0", "written": "now", "model": "<b>$x", "verdict": "fail", "environment": {}, "sections": sections}
    )
    page = Page()
    page.feed(text)
    assert page.open == []
    assert not {"script", "b", "svg"} & page.seen


def test_mistakes_on_the_command_line(tmp_path, model, capsys):
    def run(*args):
        with pytest.raises(SystemExit) as end:
            cli.app(["verify", *args])
        return end.value.code, capsys.readouterr().err

    code, said = run(str(tmp_path / "nowhere"))
    assert (code, said[:14]) == (2, "ktmoe: MODEL: ")
    (tmp_path / "file").write_text("")
    code, said = run(model, "--output", str(tmp_path / "file"))
    assert (code, "--output" in said) == (2, True), said
    (tmp_path / "out" / "soak.json").mkdir(parents=True)
    code, said = run(model, "--output", str(tmp_path / "out"))
    assert (code, "--output" in said) == (2, True), said
    code, said = run(model, "--soak-minutes", "-1")
    assert (code, "soak-minutes" in said) == (2, True), said


def test_the_environment_names_versions_and_no_names():
    found = environment.describe()
    assert found["torch"] != "not installed"
    assert found["kernel"]
    assert not any(word in " ".join(found.values()) for word in (environment.platform.node(),))


def test_plots_of_sections_that_failed_early_are_left_out():
    assert plots.draw({name: {"data": {}} for name in ("accuracy", "soak", "throughput")}) == {}
