"""What fits into memory, known before a weight is read: sizes, the refusal with its remedy, and `ktmoe plan`."""

import dataclasses
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from typer.testing import CliRunner

import ktmoe
from ktmoe import KTConfig, KTError, memory_plan, room
from ktmoe.backends import TABLE, Plan
from ktmoe.cli import app
from ktmoe.shapes import SHAPES


CONFIG = transformers.Qwen3MoeConfig(
    hidden_size=64, moe_intermediate_size=128, num_hidden_layers=3, mlp_only_layers=[0], intermediate_size=64,
    num_attention_heads=2, num_key_value_heads=2, head_dim=32, vocab_size=64, num_experts=4, num_experts_per_tok=2,
)  # fmt: skip
WEIGHTS = 2 * 4 * 3 * 64 * 128  # of two layers


@pytest.fixture
def folder(tmp_path):
    CONFIG.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def free(monkeypatch):
    """How much memory there seems to be."""

    def set_to(size):
        monkeypatch.setattr(room, "free_memory", lambda: size)
        monkeypatch.setattr(memory_plan, "free_memory", lambda: size)

    return set_to


@pytest.fixture
def kernel_is_there(monkeypatch):
    for name, row in list(TABLE.items()):
        monkeypatch.setitem(TABLE, name, dataclasses.replace(row, refuse_host=lambda: ""))


def test_sizes_are_those_of_the_formats(folder, free):
    free(10**9)
    plan = memory_plan.make(folder, rank=4)
    assert [count for count in plan.layers.values()] == [2]
    assert [way.size / WEIGHTS for way in plan.ways] == [4, 3, 1.5, 4, 2, 0]  # two layers: half of a pair is one layer
    model = transformers.Qwen3MoeForCausalLM(CONFIG)
    everything = sum(p.numel() for p in model.parameters())
    assert plan.rest == 2 * (everything - WEIGHTS)
    adapter = peft.LoraConfig(r=4, target_modules=["experts"], task_type="CAUSAL_LM")
    attached = ktmoe.attach(model, KTConfig(kt_backend="reference"), lora=adapter)
    lora = sum(p.numel() for n, p in attached.named_parameters() if "lora_" in n)
    assert plan.lora == 16 * lora


@pytest.mark.parametrize(
    ("memory", "best"),
    [
        (5, "kt_backend: AMXBF16, kt_share_backward: off"),
        (3.5, "kt_backend: AMXBF16, kt_share_backward: on"),
        (2.5, "kt_backend: AMXInt8, kt_share_backward: on"),
        (1, "kt_backend: torch, kt_torch_packing: off"),
    ],
)
def test_the_fastest_way_that_fits(folder, free, kernel_is_there, memory, best):
    plan = memory_plan.make(folder, rank=4)
    free(int(memory * WEIGHTS) + plan.lora)
    assert room.as_keys(memory_plan.make(folder, rank=4).best.keys) == best


@pytest.mark.parametrize(
    ("keys", "fits", "refused"),
    [
        ({"kt_backend": "AMXBF16", "kt_share_backward": "off"}, 4, 3.9),
        ({"kt_backend": "AMXBF16", "kt_share_backward": "on"}, 3, 2.9),
        ({"kt_backend": "AMXInt8", "kt_share_backward": "on"}, 1.5, 1.4),
        ({"kt_backend": "torch", "kt_torch_packing": "off"}, 0, None),
        ({"kt_backend": "torch"}, 0, None),
        ({"kt_backend": "reference"}, 0, None),
    ],
)
def test_what_cannot_fit_is_refused_with_what_does(free, kernel_is_there, keys, fits, refused):
    shapes = [dataclasses.replace(shape, rank=4) for shape in [ktmoe.types.MoEShape(4, 64, 128, 2, 4)] * 2]
    free(int(fits * WEIGHTS))
    room.check_room(KTConfig(**keys), shapes)
    if refused:
        free(int(refused * WEIGHTS))
        with pytest.raises(
            KTError, match=r"the routed experts take .* GB of memory, and .* GB are free.*What fits: kt_b"
        ):
            room.check_room(KTConfig(**keys), shapes)


@pytest.mark.parametrize("name", ["load_model", "attach"])
def test_nothing_is_loaded_that_cannot_fit(name, tmp_path, free, kernel_is_there, monkeypatch):
    model = transformers.Qwen3MoeForCausalLM(CONFIG).bfloat16()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("ktmoe.experts.MoEExperts.load", lambda *args: pytest.fail("a layer was loaded"))
    free(WEIGHTS // 2)
    config = KTConfig(kt_backend="AMXInt8", kt_num_threads=1)
    with pytest.raises(KTError, match="kt_backend: torch, kt_torch_packing: off"):
        ktmoe.load_model(tmp_path, config, r=4) if name == "load_model" else ktmoe.attach(model, config, r=4)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


def test_the_command(folder, free):
    free(10**9)
    done = CliRunner().invoke(app, ["plan", folder, "--json"])
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert found["ways"][-1] == {
        "keys": {"kt_backend": "torch", "kt_torch_packing": "off"}, "bytes": 0, "fits": True, "why_not": ""
    }  # fmt: skip
    shown = CliRunner().invoke(app, ["plan", folder])
    assert "2 layers of 4 routed experts, 64 x 128, 2 for each token" in shown.stdout
    assert "the fastest way that fits" in shown.stdout
    free(1)  # not even the LoRA
    assert CliRunner().invoke(app, ["plan", folder]).exit_code == 1
    assert CliRunner().invoke(app, ["plan", folder + "/nowhere"]).exit_code == 2


def test_the_documented_table_is_what_the_rows_say():
    """docs/families.md: all layers, as AMXBF16 packs them once."""
    text = (Path(__file__).resolve().parent.parent / "docs" / "families.md").read_text(encoding="utf-8")
    for name, layers in (("DeepSeek-V2-Lite", 26), ("Qwen3-30B-A3B", 48), ("Mixtral-8x7B", 32), ("DeepSeek-V3", 58)):
        size = layers * TABLE["AMXBF16"].memory(Plan("AMXBF16", None, 1, 1, True), SHAPES[name]).each / 1e9
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
        assert f"| {size:.1f} GB |" in row or f"| {size:.0f} GB |" in row
