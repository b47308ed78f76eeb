"""Configuration: every bad value gets a message that names the key, what it got and what to write."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from ktmoe.config import OLD_KEYS, KTConfig, check_keys
from ktmoe.types import KTError


@pytest.mark.parametrize(("given", "expected"), [("amxbf16", "AMXBF16"), ("AMXINT8", "AMXInt8"), ("Torch", "torch")])
def test_backends_in_upper_or_lower_case(given, expected):
    assert KTConfig(kt_backend=given).kt_backend == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(kt_backend="AMXFB16"), r"kt_backend: got 'AMXFB16'; expected one of .* Did you mean AMXBF16\?"),
        (dict(kt_backend=None), "kt_backend: got None"),
        (dict(kt_num_threads="sixty"), "kt_num_threads: got 'sixty'"),
        (dict(kt_num_threads=0), "kt_num_threads: got 0"),
        (dict(kt_num_threads=True), "kt_num_threads: got True"),
        (dict(kt_tp_enabled="yes"), "kt_tp_enabled: got 'yes'"),
        (dict(kt_num_gpu_experts=-1), "kt_num_gpu_experts: got -1; expected a whole number"),
        (dict(kt_num_gpu_experts=True), "kt_num_gpu_experts: got True; expected a whole number"),
        (dict(kt_num_gpu_experts="4"), "kt_num_gpu_experts: got '4'; expected a whole number"),
        (
            dict(kt_num_gpu_experts=4, kt_weight_path="w", kt_backend="AMXInt8"),
            "kt_num_gpu_experts: got 4 with kt_weight_path",
        ),
        (dict(kt_gpu_experts=[1, 2]), r"kt_gpu_experts: got \[1, 2\]; it says which, and kt_num_gpu_experts"),
        (dict(kt_gpu_experts=[1, 1], kt_num_gpu_experts=2), "expected ids of experts, each once"),
        (dict(kt_gpu_experts=[-1], kt_num_gpu_experts=1), "expected ids of experts, each once"),
        (dict(kt_gpu_experts=[1], kt_num_gpu_experts=2), "kt_gpu_experts: got 1 ids; kt_num_gpu_experts is 2"),
        (dict(kt_gpu_experts="none.json", kt_num_gpu_experts=2), "kt_gpu_experts: none.json: cannot be read"),
        (dict(kt_gpu_experts=0.5, kt_num_gpu_experts=2), "kt_gpu_experts: got 0.5; expected ids"),
        (dict(kt_weight_path="w"), "kt_weight_path: got 'w' with kt_backend: auto; .* only AMXInt8"),
        (dict(kt_weight_path="w", kt_backend="AMXBF16"), "kt_weight_path: got 'w' with kt_backend: AMXBF16"),
        (dict(kt_weight_path=3, kt_backend="AMXInt8"), "kt_weight_path: got 3; expected the folder"),
        (
            dict(kt_weight_path="w", kt_backend="AMXInt8"),
            "kt_weight_path: got 'w', which is no folder.*quantize",
        ),
        (dict(kt_max_len=-1), "kt_max_len: got -1"),
        (dict(kt_max_len=2**40), "kt_max_len: got 1099511627776; expected a whole number from 1 to 1048576"),
        (dict(kt_num_threads=20_000), "kt_num_threads: got 20000; expected a whole number from 1 to 1024"),
        (dict(kt_verify="sometimes"), "kt_verify: got 'sometimes'; expected one of quick, full, off"),
        (dict(kt_verify=True), "kt_verify: got True"),
        (dict(kt_share_backward="maybe"), "kt_share_backward: got 'maybe'"),
        (dict(kt_torch_packing="forwards"), "Did you mean forward"),
        (dict(kt_fallback="ignore"), "kt_fallback: got 'ignore'"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(KTError, match=message):
        KTConfig(**values)


def test_yaml_reads_on_and_off_as_booleans():
    assert KTConfig(kt_share_backward=True).kt_share_backward == "on"
    assert KTConfig(kt_share_backward=False).kt_share_backward == "off"
    assert KTConfig(kt_torch_packing=False).kt_torch_packing == "off"


@pytest.mark.parametrize("key", OLD_KEYS)
def test_old_keys(key):
    with pytest.raises(KTError, match=f"{key}: (write|delete)"):
        check_keys(["model_name_or_path", f"--{key}"])


def test_every_key_has_a_help_text():
    assert all(text.endswith(".") and len(text) > 20 for _, _, text in KTConfig.field_help().values())


@pytest.mark.parametrize(
    ("values", "fits"),
    [
        ({"use_kt": True, "kt_backend": "AMXInt8", "kt_num_threads": 8, "lora_rank": 8, "kt_weight_path": "w"}, True),
        ({"kt_share_backward": False, "kt_torch_packing": False, "kt_tp_enabled": True}, True),
        ({"kt_num_threads": None, "kt_num_gpu_experts": 0, "kt_config": {}}, True),
        ({"kt_backend": "cuda"}, False),
        ({"kt_num_threads": 0}, False),
        ({"kt_num_gpu_experts": 4, "kt_gpu_experts": [0, 3, 5, 6]}, True),
        ({"kt_num_gpu_experts": 4, "kt_gpu_experts": "counts.json"}, True),
        ({"kt_num_gpu_experts": -1}, False),
        ({"kt_gpu_experts": [1, 1]}, False),
        ({"kt_verify": True}, False),
        ({"kt_optimize_rule": "x"}, False),
        ({"kt_max_length": 8}, False),
    ],
)
def test_editors_are_told_what_is_taken(values, fits):
    assert jsonschema.Draft202012Validator(KTConfig.schema()).is_valid(values) is fits


def test_the_schema_takes_the_examples_and_the_command_prints_it():
    from typer.testing import CliRunner

    from ktmoe.cli import app

    printed = json.loads(CliRunner().invoke(app, ["schema"]).stdout)
    jsonschema.Draft202012Validator.check_schema(printed)
    examples = sorted((Path(__file__).parent.parent / "examples").glob("*.yaml"))
    assert len(examples) > 5
    for path in examples:
        jsonschema.validate(yaml.safe_load(path.read_text()), printed)
