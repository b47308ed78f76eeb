"""An oracle that nobody here wrote: a mixture of equal experts computes what the dense language model computes.

SmolLM2-135M-Instruct, upcycled to eight experts of which two compute each token. Their weights add up to 1, so
outputs, gradients and generated text must be the dense model's, up to the rounding of the format that a backend
computes in. How much that is, the dense model says itself, its MLPs computed in that format.
The tests that run by default take the first four layers: real weights with real outliers, in seconds.
"""

import functools

import peft
import pytest
import torch
from helpers import BACKENDS, relative
from ktmoe_reference.int8 import int8_linear, int8_round_trip
from torch.nn.functional import cross_entropy, linear
from transformers import AutoModelForCausalLM, AutoTokenizer

import ktmoe


TEXTS = (
    "The capital of France is Paris, a city of two million people on the river Seine.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 41))",
    "Water boils at 100 degrees Celsius.",
)
SLACK = 1.5
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
RANK = 4
every_backend = pytest.mark.parametrize("backend", BACKENDS)


class Bf16Linear(torch.nn.Linear):
    """As BF16 experts multiply."""

    def forward(self, x):
        return linear(x.bfloat16(), self.weight.bfloat16()).to(x.dtype)


class Int8Linear(torch.nn.Linear):
    """As INT8 experts multiply: both sides in 8 bits. The gradient is that of the weight in 8 bits."""

    def forward(self, x):
        rows = x.bfloat16().to(x.dtype).flatten(0, -2)
        passed = linear(x, int8_round_trip(self.weight))
        return passed + (int8_linear(rows, self.weight).view(passed.shape) - passed).detach()


FORMATS = {"reference": torch.nn.Linear, "torch": Bf16Linear, "AMXBF16": Bf16Linear, "AMXInt8": Int8Linear}


def dense_model(folder, dtype=torch.float32, multiply=torch.nn.Linear):
    """The dense model, its MLPs' matrices multiplied in a format."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    for layer in model.model.layers:
        for name in PROJECTIONS:
            getattr(layer.mlp, name).__class__ = multiply
    return model


def upcycled(folder, backend, dtype=torch.float32, **options):
    config = ktmoe.KTConfig(kt_backend=backend, kt_num_threads=1, kt_max_len=512)
    return ktmoe.load_model(folder, config, dtype=dtype, **options).eval()


kept = functools.cache(upcycled)


def batch_of(model, padding_side="right", texts=TEXTS):
    tokenizer = AutoTokenizer.from_pretrained(model.dense)
    return tokenizer(list(texts), padding=True, padding_side=padding_side, return_tensors="pt")


@functools.cache
def oracle(folder, compute, dtype=torch.float32, multiply=torch.nn.Linear):
    """What the dense model computes in fp32, and the most that a backend of this format may be away from that."""
    exact = compute(dense_model(folder))
    if dtype == torch.float32 and multiply == torch.nn.Linear:
        return exact, 1e-5
    return exact, SLACK * relative(compute(dense_model(folder, dtype, multiply)), exact)


def check(model, folder, compute, backend, dtype=torch.float32):
    exact, limit = oracle(folder, compute, dtype, FORMATS[backend])
    print("R", backend, dtype, relative(compute(model), exact), limit)
    assert relative(compute(model), exact) < limit


def logits(model, batch):
    with torch.inference_mode():
        return model(**batch).logits[batch["attention_mask"].bool()].float()


def targets(batch):
    return batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)


def loss(model, batch):
    return cross_entropy(model(**batch).logits[:, :-1].float().transpose(1, 2), targets(batch))


@pytest.fixture(scope="module")
def plain(real_layers):
    """Logits of a batch with texts of three lengths; one function, so that the oracle is computed once."""
    return functools.partial(logits, batch=batch_of(real_layers))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_upcycled_model_computes_what_the_dense_model_computes(real_layers, plain, backend, dtype):
    model = (kept if dtype == torch.float32 else upcycled)(real_layers.moe, backend, dtype, r=RANK)
    check(model, real_layers.dense, plain, backend, dtype)


@pytest.fixture(scope="module")
def generation(real_layers):
    """A left-padded batch, and what the dense model goes on with."""
    batch = batch_of(real_layers, "left")
    return batch, generate(dense_model(real_layers.dense), batch)


def generate(model, batch, **options):
    length = batch["input_ids"].shape[1]
    return model.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None, **options)[:, length:]


@pytest.fixture(scope="module")
def forced(generation):
    """Logits [B, N, V] of generating, with a cache, what the dense model generates."""
    batch, tokens = generation
    length = batch["input_ids"].shape[1]

    def compute(model):
        output = model.generate(
            **batch, max_new_tokens=tokens.shape[1], do_sample=False, eos_token_id=None,
            output_logits=True, return_dict_in_generate=True,
            prefix_allowed_tokens_fn=lambda row, ids: [int(tokens[row, len(ids) - length])],
        )  # fmt: skip
        assert torch.equal(output.sequences[:, length:], tokens)
        return torch.stack(output.logits, 1)

    return compute


@every_backend
def test_generation_with_a_cache_and_left_padding_follows_the_dense_model(real_layers, generation, forced, backend):
    model = kept(real_layers.moe, backend, torch.float32, r=RANK)
    check(model, real_layers.dense, forced, backend)
    if backend == "reference":
        assert torch.equal(generate(model, generation[0]), generation[1])


def drawn(shape, name):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(name.encode()))) * 0.02


def lora_gradients(model, batch):
    """By layer, projection and side: gradients of LoRA that is the same for all experts, summed over them."""
    named = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            parts = name.split(".")
            layer, side = parts[parts.index("layers") + 1], "lora_A" if "lora_A" in parts else "lora_B"
            key = f"{layer}.{next(part for part in parts if part.endswith('_proj'))}.{side}"
            p.data = drawn(p.shape[-2:], key).expand(p.shape).contiguous()
            named[key] = p
    loss(model, batch).backward()
    return {key: p.grad if p.dim() == 2 else p.grad.sum(0) for key, p in named.items()}


def lora(*targets):
    return peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, task_type="CAUSAL_LM", target_modules=[*targets])


@functools.cache
def dense_gradients(folder, multiply):
    model = peft.get_peft_model(dense_model(folder, multiply=multiply), lora("q_proj", *PROJECTIONS))
    return lora_gradients(model, batch_of_dense(folder))


def batch_of_dense(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer(list(TEXTS), padding=True, padding_side="right", return_tensors="pt")


@every_backend
def test_gradients_of_equal_experts_add_up_to_those_of_the_dense_model(real_layers, backend):
    exact, rounded = (dense_gradients(real_layers.dense, m) for m in (torch.nn.Linear, FORMATS[backend]))
    model = upcycled(real_layers.moe, backend, lora=lora("q_proj", "experts"))
    found = lora_gradients(model, batch_of(real_layers))
    assert found.keys() == exact.keys()
    for name, gradient in exact.items():
        limit = 1e-4 if backend == "reference" else SLACK * relative(rounded[name], gradient)
        print("R", backend, name, relative(found[name], gradient), limit)
        assert relative(found[name], gradient) < limit, name
