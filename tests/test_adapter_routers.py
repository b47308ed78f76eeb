"""LoRA on routers: it trains as stock peft's does, or is refused before anything is loaded."""

import families
import peft
import pytest
import torch
from families import IDS, logits, model
from helpers import relative
from test_adapter_targets import adapted, every_way
from test_models import REFERENCE, lora, moved

import ktmoe
from ktmoe import KTError
from ktmoe.models import attach, check_model


ROUTERS = {"Phi-MoE": "router" if families.VERSION >= (5, 0) else "gate", "Granite-MoE": "layer", "Hunyuan-v1": "wg"}
PAST = ("DeepSeek-V2", "DeepSeek-V2-Lite", "DeepSeek-V3", "GLM4-MoE", "dots1")


@families.each
def test_lora_on_the_router_trains_or_is_refused_before_loading(family, tmp_path):
    """Gradients and file as stock peft's by `target_parameters`; stock fails, or trains nothing, for `PAST`."""
    name = ROUTERS.get(family, "gate")
    config = lora(name, "q_proj" if "DeepSeek" not in family else "o_proj")
    if family in PAST and families.VERSION >= (5, 0):
        for r in (1, 8):
            with pytest.raises(KTError, match=r"reads self\.gate\.(weight|e_score_correction_bias) past any LoRA"):
                check_model(families.config(family), REFERENCE, r, config)
        return
    check_model(families.config(family), REFERENCE, 1, config)
    ours = moved(attach(families.mended(model(family)), REFERENCE, lora=config)).train()
    ours.save_pretrained(tmp_path)
    torch.manual_seed(0)  # Phi samples its experts
    ours(IDS, labels=IDS).loss.backward()
    grads = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    of_router = [g for n, g in grads.items() if f".{name}." in n]
    assert of_router
    # Phi's sparsemixer masks all but the chosen expert, whose weight is then 1 whatever its logit.
    assert all(g is not None and (g.abs().max() > 0 or family == "Phi-MoE") for g in of_router)
    if peft.__version__ < "0.20":
        return
    stock = peft.PeftModel.from_pretrained(families.mended(model(family)), tmp_path, is_trainable=True).train()
    torch.manual_seed(0)
    stock(IDS, labels=IDS).loss.backward()
    found = {n: p.grad for n, p in stock.named_parameters() if p.requires_grad}
    assert set(found) == set(grads)
    assert all(relative(found[n], g) < 1e-4 for n, g in grads.items())


@every_way
@pytest.mark.parametrize("option", [dict(lora_dropout=0.1), dict(use_dora=True), dict(init_lora_weights="olora")])
def test_what_a_router_cannot_have_is_refused_before_loading(way, option, tmp_path):
    """In transformers 4 it is a linear layer, and has what those have."""
    if families.VERSION < (5, 0):
        assert way(lora("gate", **option), tmp_path)
        return
    for config in (lora("gate", **option), lora("q_proj", target_parameters=["gate.weight"], **option)):
        with pytest.raises(
            KTError, match=r"(lora_dropout|use_dora|init_lora_weights): got .*; model.layers.0.mlp.gate"
        ):
            way(config, tmp_path)


def test_a_router_beside_experts_is_saved_read_merged_and_added_again(tmp_path):
    made = moved(attach(model(), REFERENCE, lora=lora("gate", "experts", rank_pattern={"gate": 2})))
    assert {v for n, v in adapted(made).items() if n.endswith("gate")} == {(2, 8)}
    expected = logits(made)
    made.save_pretrained(tmp_path)
    again = ktmoe.load_adapter(attach(model(), REFERENCE), tmp_path)
    assert torch.equal(logits(again), expected)
    made.add_adapter("other", lora("gate", "experts", "q_proj"))
    made.delete_adapter("other")
    assert torch.equal(logits(made), expected)
    if peft.__version__ >= "0.20":
        assert relative(logits(peft.PeftModel.from_pretrained(model(), tmp_path)), expected) < 1e-6
    assert relative(logits(made.merge_and_unload()), expected) < 1e-5
