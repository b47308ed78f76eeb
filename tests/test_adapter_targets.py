"""Which modules LoRA reaches. The judge is stock peft, on a tree with one nn.Linear per expert and projection."""

import dataclasses

import families
import peft
import pytest
import torch
from families import logits, model
from helpers import relative
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file
from test_models import REFERENCE, lora, moved
from torch import nn

import ktmoe
from ktmoe import KTError, MoEExperts
from ktmoe.adapters import coverage
from ktmoe.models import attach, check_model
from ktmoe.types import PROJECTIONS, ExpertWeights


LAYERS, E = 2, 3
EXPERTS = {f"model.layers.{n}.mlp.experts": E for n in range(LAYERS)}
PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj")


def tree(per_expert):
    """Two decoder layers with attention and shared experts; routed ones as peft would see them, or attached."""
    made = nn.Module()
    for name in [*(f"model.layers.{n}.{part}" for n in range(LAYERS) for part in PARTS), "lm_head"]:
        put(made, name, nn.Linear(2, 2))
    for e in EXPERTS:
        if not per_expert:
            weights = ExpertWeights(*torch.zeros(3, E, 2, 2))
            put(made, e, MoEExperts(weights, top_k=1, config=REFERENCE))
        for n in range(E) if per_expert else ():
            for projection in PROJECTIONS:
                put(made, f"{e}.{n}.{projection}", nn.Linear(2, 2))
    return made


def put(parent, name, module):
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(parent, part):
            parent.add_module(part, nn.Module())
        parent = getattr(parent, part)
    parent.add_module(leaf, module)


def adapted(made):
    """(rank, alpha) by the name of every module with LoRA."""
    layers = {n: m for n, m in made.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    return {n: (m.r["default"], m.lora_alpha["default"]) for n, m in layers.items()}


NAMES = st.sampled_from([
    "q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "mlp.shared_expert.up_proj", "0.gate_proj",
    "model.layers.1.mlp.experts.2.down_proj", "experts.1.up_proj", "lm_head", "nothing",
])  # fmt: skip
THREE = st.just(["gate_proj", "up_proj", "down_proj"])
BLOCKS = st.sampled_from([r".*", r"model\.layers\.\d\.", r".*layers\.0\.", r".*mlp\.", r".*layers\.\d\.mlp\."])
INNER = st.sampled_from([
    "", r"\d+\.", r"(experts\.\d+|shared_expert)\.", r"experts\.\d+\.", r"experts\.[^0]\.", r"experts\.0\.", r".*",
])  # fmt: skip
LEAVES = st.sampled_from([
    r"(gate|up|down)_proj", r"\w+_proj", r"(q_proj|down_proj)", r"(up_proj|q_proj)", "gate_proj", r"self_attn\.q_proj",
])  # fmt: skip
REGEX = st.builds("".join, st.tuples(BLOCKS, INNER, LEAVES))
LISTS = st.one_of(THREE, st.lists(NAMES, min_size=1, max_size=4), st.builds(lambda a, b: [*a, b], THREE, NAMES))
KEYS = st.sampled_from([
    "q_proj", "down_proj", r".*experts\.\d+\..*", r"layers\.0\..*", "(gate|up|down)_proj", r"experts\.1\.gate_proj",
    r"model\.layers\.1\.self_attn\.o_proj",
])  # fmt: skip
PATTERNS = st.one_of(st.just({}), st.dictionaries(KEYS, st.sampled_from([4, 8, 16]), max_size=2))


@st.composite
def configs(draw):
    targets = draw(st.one_of(LISTS, REGEX, st.just("all-linear")))
    options = {"target_modules": targets, "rank_pattern": draw(PATTERNS), "alpha_pattern": draw(PATTERNS)}
    if draw(st.booleans()):
        options["exclude_modules"] = draw(st.one_of(LISTS, REGEX))
    if isinstance(targets, list) and draw(st.booleans()):
        options["layers_to_transform"] = draw(st.sampled_from([0, [1], [0, 1]]))
    return LoraConfig(r=8, lora_alpha=16, **options)


@given(configs())
def test_a_configuration_reaches_what_it_reaches_in_stock_peft(config):
    try:
        stock = adapted(peft.get_peft_model(tree(per_expert=True), dataclasses.replace(config)))
    except ValueError:  # nothing is there, or everything is excluded
        stock = {}
    expected = {n: values for n, values in stock.items() if ".experts." not in n}
    for e in EXPERTS:
        values = {stock.get(f"{e}.{n}.{projection}") for n in range(E) for projection in PROJECTIONS}
        if len(values) > 1:
            with pytest.raises(KTError, match=r"target_modules: got|_pattern: got"):
                ktmoe.get_peft_model(tree(per_expert=False), config)
            return
        expected |= {e: values.pop()} if values != {None} else {}
    if not expected:
        with pytest.raises(KTError, match="no such module"):
            ktmoe.get_peft_model(tree(per_expert=False), config)
        return
    assert adapted(ktmoe.get_peft_model(tree(per_expert=False), config)) == expected


def by_get_peft_model(config, folder):
    return ktmoe.get_peft_model(attach(model(), REFERENCE), config)


def by_attach(config, folder):
    return attach(model(), REFERENCE, lora=config)


def by_load_model(config, folder):
    """A refusal comes before the weights, which are not there."""
    families.config("Qwen3-MoE").save_pretrained(folder)
    if (refused := refusal(config)) is None:
        model().save_pretrained(folder)
    made = ktmoe.load_model(folder, REFERENCE, lora=config)
    assert refused is None
    return made


def refusal(config):
    try:
        check_model(families.config("Qwen3-MoE"), REFERENCE, 1, config)
    except KTError as error:
        return error


every_way = pytest.mark.parametrize("way", [by_get_peft_model, by_attach, by_load_model])
EACH = r".*experts\.\d+\.(gate|up|down)_proj"


@every_way
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(target_modules=r".*\.(q_proj|down_proj)"), "reaches down_proj of model.layers.0.mlp.experts alone"),
        (dict(target_modules=r".*experts\.0\..*|.*q_proj"), "reaches 1 of the 4 experts"),
        (dict(target_modules=["q_proj", "experts.0.gate_proj"]), "reaches 1 of the 4 experts"),
        (dict(target_modules=["q_proj", "experts.0"]), "reaches 1 of the 4 experts"),
        (dict(target_modules=["q_proj", "gate_up_proj"]), "reaches gate_up_proj, which is no module here,"),
        (dict(target_modules="all-linear", exclude_modules=["down_proj"]), "reaches gate_proj, up_proj of"),
        (dict(target_modules=["experts"], exclude_modules=r".*experts\.[01]\..*"), "reaches 2 of the 4 experts"),
        (dict(target_modules=["q_proj", "down_proj"], exclude_modules=["q_proj"]), "exclude_modules .q_proj.; LoRA"),
        (dict(target_modules="all-linear", rank_pattern={"gate_proj": 16}), "rank_pattern: got .* 16 for 0.gate_proj"),
        (dict(target_modules=["experts"], alpha_pattern={r".*experts\.3\..*": 1}), "alpha_pattern: got .* 1 for 3."),
        (dict(target_modules=["experts"], rank_pattern={"gate_up_proj": 16}), "rank_pattern: got .*: gate_up_proj. W"),
        (dict(target_modules=["experts"], rank_pattern={"experts": 0}), "r: got 0 for model.layers.0.mlp.experts"),
        (dict(target_modules=["experts"], use_dora=True), "use_dora: got True; the routed experts have plain LoRA"),
        (dict(target_modules=["experts"], lora_bias=True), "lora_bias: got True"),
        (dict(target_modules=["experts"], init_lora_weights="olora"), "init_lora_weights: got 'olora'"),
        (dict(target_modules=["experts"], init_lora_weights="pissa_niter_4"), "init_lora_weights: got 'pissa_nit"),
        (dict(target_modules=["experts"], velora_config={}), "velora_config: got Velora"),
        (dict(target_modules=["experts"], monteclora_config={}), "monteclora_config: got Monteclora"),
        (dict(target_modules=["q_proj"], target_parameters=["experts.down_proj"]), "target_parameters: got 'experts"),
        (dict(target_modules=["q_proj"], target_parameters=["gate_up_proj"]), "target_parameters: got 'gate_up_"),
        (dict(target_modules=["q_proj"], layer_replication=[(0, 2), (1, 3)]), "layer_replication: given"),
        (dict(target_modules=["q_proj"], modules_to_save=["down_proj"]), "modules_to_save: got .down_proj., which m"),
        (dict(target_modules=["typo"]), "target_modules: got .typo.; Qwen3MoeForCausalLM has no such module"),
        (dict(target_modules="q_proj"), "A string is a regular expression for whole names"),
        (dict(target_modules="*"), "target_modules: got '\\*', which is no regular expression"),
        (dict(target_modules=None), "target_modules: got None; peft has no default for qwen3_moe"),
        (dict(target_modules=["mlp"]), "reaches model.layers.0.mlp; peft has no LoRA for Qwen3MoeSparseMoe"),
        (dict(target_modules=["input_layernorm"]), "peft has no LoRA for Qwen3MoeRMSNorm"),
    ],
)  # fmt: skip
def test_what_experts_cannot_honour_exactly_is_refused_by_name(way, options, says, tmp_path):
    for name in ("velora_config", "monteclora_config", "layer_replication", "target_parameters", "exclude_modules"):
        if name in options and name not in {f.name for f in dataclasses.fields(LoraConfig)}:
            pytest.skip(f"peft {peft.__version__} has no {name}")
    with pytest.raises(KTError, match=says):
        way(lora(**options), tmp_path)


@every_way
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(target_modules=EACH), {"experts"}),
        (dict(target_modules=r".*experts\.(gate|up|down)_proj"), {"experts"}),
        (dict(target_modules=r".*\.(q_proj|experts)"), {"q_proj", "experts"}),
        (dict(target_modules=["gate_proj", "up_proj", "down_proj", "v_proj"]), {"v_proj", "experts"}),
        (dict(target_modules="all-linear"), {"q_proj", "k_proj", "v_proj", "o_proj", "experts"}),
        (dict(exclude_modules=["gate_proj", "up_proj", "down_proj"]), {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (dict(exclude_modules=["experts", "k_proj"]), {"q_proj", "v_proj", "o_proj"}),
        (dict(exclude_modules=r".*experts\.\d+\..*", use_dora=True), {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (dict(exclude_modules=r".*self_attn.*"), {"experts"}),
        (dict(target_modules=["experts", "q_proj"], exclude_modules=EACH, lora_bias=True), {"q_proj"}),
        (dict(target_modules=["experts"], bias="all", trainable_token_indices=[1, 2], use_rslora=True), {"experts"}),
    ],
)
def test_names_that_reach_the_experts_also_exclude_them(way, options, expected, tmp_path):
    made = way(lora(**dict(target_modules="all-linear") | options), tmp_path)
    assert {n.rpartition(".")[2] for n in adapted(made)} == expected


@every_way
def test_one_layer_by_regex_by_exclusion_or_by_number(way, tmp_path):
    for options in (
        dict(target_modules=r".*layers\.1\.mlp\.experts\.\d+\..*"),
        dict(target_modules=["experts"], exclude_modules=r".*layers\.[02]\..*"),
        dict(target_modules=["gate_proj", "up_proj", "down_proj"], layers_to_transform=[1], layers_pattern="layers"),
    ):
        assert set(adapted(way(lora(**options), tmp_path))) == {"model.layers.1.mlp.experts"}


@every_way
@pytest.mark.parametrize(
    "options",
    [
        dict(rank_pattern={"q_proj": 16}, alpha_pattern={r".*layers\.0\.self_attn\.v_proj": 3}),
        dict(use_dora=True),
        dict(init_lora_weights="olora"),
        dict(init_lora_weights="pissa"),
        dict(init_lora_weights="orthogonal"),
        dict(lora_bias=True),
        dict(use_rslora=True, bias="all"),
        dict(trainable_token_indices=[1, 2, 3]),
        dict(target_parameters=["embed_tokens.weight"]),
        dict(layers_to_transform=1, layers_pattern="layers"),
        dict(modules_to_save=["lm_head", "mlp.gate"]),
    ],
    ids=lambda options: "-".join(options),
)
def test_elsewhere_everything_is_as_in_stock_peft(way, options, tmp_path):
    """Names, sizes and the very numbers: the same seed draws the same LoRA, the base weights changed alike."""
    config = lora("q_proj", "v_proj", **options)
    torch.manual_seed(0)
    stock = peft.get_peft_model(model(), dataclasses.replace(config))
    torch.manual_seed(0)
    ours = way(config, tmp_path)
    expected = {n: p for n, p in stock.named_parameters() if ".experts." not in n}
    assert {n: p.requires_grad for n, p in ours.named_parameters()} == {
        n: p.requires_grad for n, p in expected.items()
    }
    trained = {n: p for n, p in expected.items() if p.requires_grad}
    assert trained
    if way is not by_load_model:  # it draws the layers that it loads no weights for
        assert all(torch.equal(dict(ours.named_parameters())[n], p) for n, p in trained.items())
        assert relative(logits(ours), logits(stock)) < 1e-5


@every_way
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(rank_pattern={"experts": 16}), (16, 8)),
        (dict(rank_pattern={"(gate|up|down)_proj": 16}, alpha_pattern={r".*experts\.\d+\..*": 4}), (16, 4)),
        (dict(alpha_pattern={"gate_proj": 4, "up_proj": 4, "down_proj": 4}), (4, 4)),
    ],
)
def test_patterns_equal_for_all_experts_are_honoured(way, options, expected, tmp_path):
    made = moved(way(lora("experts", "q_proj", **options), tmp_path / "model"))
    assert set(adapted(made).values()) == {expected, (4, 8)}
    made.save_pretrained(tmp_path / "adapter")
    again = ktmoe.load_adapter(attach(model(), REFERENCE), tmp_path / "adapter")
    assert adapted(again) == adapted(made)
    assert torch.equal(logits(again), logits(made))
    if peft.__version__ >= "0.20":
        stock = peft.PeftModel.from_pretrained(model(), tmp_path / "adapter")
        assert relative(logits(stock), logits(made)) < 1e-6


@pytest.mark.parametrize("family", ["Qwen2-MoE", "DeepSeek-V3"])
def test_ranks_of_shared_experts_are_not_those_of_routed_ones(family, tmp_path):
    shared = r"shared_experts?\.(gate|up|down)_proj"
    config = lora(target_modules="all-linear", rank_pattern={shared: 16}, alpha_pattern={shared: 2})
    made = moved(ktmoe.get_peft_model(attach(model(family), REFERENCE), config))
    assert {v for n, v in adapted(made).items() if "shared" in n} - {(4, 8)} == {(16, 2)}
    assert {v for n, v in adapted(made).items() if n.endswith("experts")} == {(4, 8)}
    made.save_pretrained(tmp_path)
    again = ktmoe.load_adapter(attach(model(family), REFERENCE), tmp_path)
    assert torch.equal(logits(again), logits(made))
    if peft.__version__ >= "0.20":
        assert relative(logits(peft.PeftModel.from_pretrained(model(family), tmp_path)), logits(made)) < 1e-6


@pytest.mark.parametrize("family", ["Qwen3-MoE", "Mixtral", "Qwen2-MoE"])
def test_layers_of_other_ranks_are_saved_as_they_are(family, tmp_path):
    ranks = {r"layers\.0\..*": 16, r".*layers\.2\.\w+\.experts": 2}
    config = lora("experts", "q_proj", rank_pattern=ranks, alpha_pattern={r"layers\.0\..*": 3})
    made = moved(ktmoe.get_peft_model(attach(model(family), REFERENCE), config))
    found = {n: v for n, v in adapted(made).items() if n.endswith("experts")}
    assert list(found.values()) == [(16, 3), (4, 8), (2, 8)]
    made.save_pretrained(tmp_path)
    again = ktmoe.load_adapter(attach(model(family), REFERENCE), tmp_path)
    assert adapted(again) == adapted(made)
    assert torch.equal(logits(again), logits(made))
    if peft.__version__ >= "0.20":
        assert relative(logits(peft.PeftModel.from_pretrained(model(family), tmp_path)), logits(made)) < 1e-6


def test_a_second_adapter_is_not_put_inside_of_what_the_first_trains_in_full():
    made = ktmoe.get_peft_model(attach(model(), REFERENCE), lora("q_proj", modules_to_save=["lm_head"]))
    made.add_adapter("other", lora(target_modules="all-linear"))
    found = {n for n, m in made.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    assert found
    assert not any("lm_head" in n for n in found)
    with pytest.raises(KTError, match="lm_head; peft has no LoRA for ModulesToSaveWrapper"):
        made.add_adapter("third", lora("lm_head"))


@pytest.mark.slow
def test_router_and_dora_through_llamafactory(tmp_path):
    """What the preflight lets through also trains, is saved, and goes on from its checkpoint."""
    pytest.importorskip("llamafactory")
    from factory import Workspace

    here = Workspace(tmp_path, steps=4)
    for name, keys in (
        ("router", dict(lora_target="q_proj,gate,experts")),
        ("dora", dict(lora_target="q_proj,v_proj", use_dora=True)),
    ):
        whole = here.run(name, **keys)
        again = here.run(name, **keys, resume_from_checkpoint=str(tmp_path / name / "checkpoint-2"))
        assert again == whole
        saved = load_file(tmp_path / name / "adapter_model.safetensors")
        assert any(".gate.lora_B" in k and v.any() for k, v in saved.items()) == (name == "router")
        assert any("lora_magnitude_vector" in k for k in saved) == (name == "dora")


def test_the_experts_of_a_layer_are_asked_for_their_own_targets_alone(monkeypatch):
    """Names of all linear layers times those of all experts are 73 million comparisons for DeepSeek-V3: 20 s."""
    asked, check = [], coverage.tuners_utils.check_target_module_exists

    def count(config, key):
        asked.append((key, len(config.target_modules)))
        return check(config, key)

    monkeypatch.setattr(coverage.tuners_utils, "check_target_module_exists", count)
    dense = {f"model.layers.{n}.self_attn.{p}_proj" for n in range(500) for p in "qkvo"}
    layer = coverage.ExpertNames("model.layers.3.mlp.experts", 64, PROJECTIONS, True)
    assert not coverage.covers(LoraConfig(target_modules=sorted(dense)), layer, "")
    assert max(targets for _, targets in asked) == 0
    for mine in (["experts"], ["gate_proj", "up_proj", "down_proj"], [f"experts.{e}" for e in range(64)]):
        assert coverage.covers(LoraConfig(target_modules=sorted({*dense, *mine})), layer, "")
