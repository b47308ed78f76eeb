"""The demo's exit code: each result that falls short fails it, NaN too."""

import io

import pytest
from rich.console import Console
from test_demo_data import load


show = load("show")
GOOD = {"drop": 0.5, "gain": 0.6, "norm": 1.0, "difference": 1e-6}
NAN = float("nan")


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_good_results_pass(stage):
    show.check(GOOD, stage)


@pytest.mark.parametrize(
    ("stage", "key", "value"),
    [
        ("sft", "drop", 0.3),
        ("sft", "drop", NAN),
        ("dpo", "gain", 0.4),
        ("dpo", "gain", NAN),
        ("sft", "norm", 0.0),
        ("dpo", "norm", NAN),
        ("sft", "difference", 1e-3),
        ("dpo", "difference", NAN),
    ],
)
def test_a_result_that_falls_short_fails(stage, key, value):
    with pytest.raises(show.DemoFailure):
        show.check(GOOD | {key: value}, stage)


def test_a_mixture_that_computes_something_else_fails():
    before = {"tokens": 9, "same_tokens": 9, "difference": 1e-6}
    said = io.StringIO()
    show.check_upcycling(Console(file=said, width=500), before)
    assert "9 tokens differ by 1.0e-06" in said.getvalue()
    for difference in (1e-4, NAN):
        with pytest.raises(show.DemoFailure):
            show.check_upcycling(Console(file=said, width=500), before | {"difference": difference})
