"""Every family of tests/families.py on the installed transformers, attached in memory, against the unpatched model."""

import re

import families
import pytest
import torch
import transformers
from families import FAMILIES, IDS
from helpers import relative

import ktmoe
from ktmoe import KTConfig, KTError
from ktmoe.models import attach, check_model, moe_layers, unwrapped_layers
from ktmoe.models.families import expert_modules


REFERENCE = KTConfig(kt_backend="reference")


def stock(family):
    """The unpatched model."""
    return families.mended(families.model(family))


def attached(family, backend="reference"):
    return attach(families.model(family), KTConfig(kt_backend=backend))


@families.each
def test_logits_and_gradients_equal_the_unpatched_model(family):
    expected, got = stock(family), attached(family)
    assert len(moe_layers(got)) == FAMILIES[family].moe_layers
    assert unwrapped_layers(got) == []
    assert len(unwrapped_layers(expected)) >= FAMILIES[family].moe_layers
    assert relative(families.logits(got), families.logits(expected)) < 1e-5
    for made in (expected, got):
        made.train()
        made(input_ids=IDS, labels=IDS).loss.backward()
    theirs = {n: p.grad for n, p in expected.named_parameters()}
    ours = {n: p.grad for n, p in got.named_parameters()}
    assert set(ours) == {n for n in theirs if ".experts." not in n and "put_linear.weight" not in n}
    compared = {n for n in ours if theirs[n] is not None and theirs[n].abs().sum() > 0}
    routers = {n for n in compared if re.search(r"\.(gate|router)(\.wg|\.layer)?\.weight$", n)}
    assert len(routers) == FAMILIES[family].moe_layers or family == "Phi-MoE"  # its sampling passes no gradient on
    for name in compared:
        # 3e-5 of the largest: a router's gradient is a small difference of large sums
        assert (ours[name] - theirs[name]).abs().max() < 3e-5 * theirs[name].abs().max(), name
    for name in set(ours) - compared:
        assert ours[name] is None or not ours[name].any(), name


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.aux_loss])
def test_auxiliary_loss_and_router_logits(family):
    call = dict(input_ids=IDS, labels=IDS, output_router_logits=True)
    try:
        expected = stock(family)(**call)
    except AttributeError as error:  # Granite before 5.7, Qwen3-VL-MoE in 5.2
        pytest.skip(f"transformers {transformers.__version__} itself fails when {family} is asked for it: {error}")
    got = attached(family)(**call)
    torch.testing.assert_close(got.aux_loss, expected.aux_loss)
    torch.testing.assert_close(got.loss, expected.loss)
    assert len(got.router_logits) == FAMILIES[family].moe_layers
    torch.testing.assert_close(got.router_logits, expected.router_logits, rtol=1e-5, atol=1e-5)


@families.each
def test_generates_the_same_text(family):
    options = dict(max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(IDS))
    expected, got = (made.generate(IDS, **options) for made in (stock(family), attached(family)))
    assert got.shape[1] > IDS.shape[1]
    assert torch.equal(got, expected)


@families.each
def test_torch_backend_is_close(family):
    assert relative(families.logits(attached(family, "torch")), families.logits(stock(family))) < 0.05


@families.each
def test_detach_restores_the_model(family):
    made = stock(family)
    before, types = families.logits(made), {n: type(m) for n, m in made.named_modules()}
    parameters = dict(made.named_parameters())
    state = {n: t.clone() for n, t in made.state_dict().items()}
    attach(made, REFERENCE)
    assert {n: type(m) for n, m in made.named_modules()} != types
    ktmoe.detach(made)
    assert {n: type(m) for n, m in made.named_modules()} == types
    assert {n: id(p) for n, p in made.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert all(torch.equal(t, state[n]) for n, t in made.state_dict().items())
    assert torch.equal(families.logits(made), before)


@families.each
def test_a_refused_attach_leaves_the_model_as_it_was(family, monkeypatch):
    made = families.model(family)
    types = {n: type(m) for n, m in made.named_modules()}
    monkeypatch.setattr("ktmoe.models.attaching.plan", lambda *args: (_ for _ in ()).throw(KTError("no")))
    with pytest.raises(KTError, match=r"^no$"):
        attach(made, REFERENCE, r=4)
    assert {n: type(m) for n, m in made.named_modules()} == types


@families.each
def test_configuration_alone_is_enough_to_say_yes(family):
    check_model(families.config(family), REFERENCE, 4)


@families.each_refused
def test_what_does_not_fit_is_refused_by_name(family):
    message = families.row(family).message
    with pytest.raises(KTError, match=message):
        check_model(families.config(family), REFERENCE, 4)
    made = families.build(family, families.config(family))
    types = {n: type(m) for n, m in made.named_modules()}
    with pytest.raises(KTError, match=message):
        attach(made, REFERENCE)
    assert {n: type(m) for n, m in made.named_modules()} == types


@pytest.mark.skipif(families.VERSION < (5, 0), reason="transformers 4 has blocks of its own: tests/test_blocks.py")
def test_a_plain_family_needs_no_code(monkeypatch):
    """A model that nobody has heard of: its own names for everything but the stacked weights."""
    made, expected = families.model("OLMoE"), families.logits(families.model("OLMoE"))
    for layer in made.model.layers:
        for module, name in ((layer.mlp.experts, "NovelMixture"), (layer.mlp, "NovelBlock"), (layer, "NovelLayer")):
            module.__class__ = type(name, (type(module),), {})
    made.__class__ = type("NovelForCausalLM", (type(made),), {})
    assert relative(families.logits(attach(made, REFERENCE)), expected) < 1e-5


def test_vision_embeddings_are_no_experts():
    """Three-dimensional parameters alone do not make a mixture of experts."""
    made = torch.nn.Module()
    made.cls_token = torch.nn.Parameter(torch.zeros(1, 1, 8))
    made.position_embedding = torch.nn.Parameter(torch.zeros(1, 17, 8))
    assert expert_modules(torch.nn.ModuleDict({"vision": made})) == {}
