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
from helpers import BF16_BACKENDS, relative
from ktmoe_reference.int8 import dequantize_int8, int8_matmul, quantize_int8
from test_demo_data import load
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
every_backend = pytest.mark.parametrize("backend", BF16_BACKENDS)


class Bf16Linear(torch.nn.Linear):
    """As BF16 experts multiply."""

    def forward(self, x):
        return linear(x.bfloat16(), self.weight.bfloat16()).to(x.dtype)


class Int8Linear(torch.nn.Linear):
    """As INT8 experts multiply: both sides in 8 bits. The gradient is that of the weight in 8 bits."""

    def forward(self, x):
        rows = x.bfloat16().to(x.dtype).flatten(0, -2)
        q, scale = quantize_int8(self.weight)
        passed = linear(x, dequantize_int8(q, scale).to(x.dtype))
        return passed + (int8_matmul(rows, q.T, scale.T).view(passed.shape) - passed).detach()


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


def batch_of(folder, padding_side="right"):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer(list(TEXTS), padding=True, padding_side=padding_side, return_tensors="pt")


@functools.cache
def oracle(folder, compute, dtype=torch.float32, multiply=torch.nn.Linear):
    """What the dense model computes."""
    return compute(dense_model(folder, dtype, multiply))


def check(model, folder, compute, backend, dtype=torch.float32):
    """Holds a model to the dense one in fp32, which may be missed by what the dense model loses in the same format."""
    exact = oracle(folder, compute)
    limit = max(1e-5, SLACK * relative(oracle(folder, compute, dtype, FORMATS[backend]), exact))
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
    return functools.partial(logits, batch=batch_of(real_layers.dense))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_upcycled_model_computes_what_the_dense_model_computes(real_layers, plain, backend, dtype):
    model = (kept if dtype == torch.float32 else upcycled)(real_layers.moe, backend, dtype, r=RANK)
    check(model, real_layers.dense, plain, backend, dtype)


@pytest.fixture(scope="module")
def generation(real_layers):
    """A left-padded batch, and what the dense model goes on with."""
    batch = batch_of(real_layers.dense, "left")
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
    return lora_gradients(model, batch_of(folder))


@every_backend
def test_gradients_of_equal_experts_add_up_to_those_of_the_dense_model(real_layers, backend):
    exact, rounded = (dense_gradients(real_layers.dense, m) for m in (torch.nn.Linear, FORMATS[backend]))
    model = upcycled(real_layers.moe, backend, lora=lora("q_proj", "experts"))
    found = lora_gradients(model, batch_of(real_layers.dense))
    assert found.keys() == exact.keys()
    for name, gradient in exact.items():
        # Twice, as the contract has it: kernels also round the LoRA and its gradients.
        limit = max(1e-4, 2 * relative(rounded[name], gradient))
        assert relative(found[name], gradient) < limit, name


@pytest.mark.slow
@every_backend
def test_all_thirty_layers_compute_what_the_dense_model_computes(real_model, backend):
    plain = functools.partial(logits, batch=batch_of(real_model.dense))
    model = upcycled(real_model.moe, backend, torch.bfloat16, r=RANK)
    check(model, real_model.dense, plain, backend, torch.bfloat16)


STEPS = 60
RATE = 5e-4  # at four times that, roundings grow to 0.3 nats within sixty steps, whoever computes


@functools.cache
def curve(folder, backend):
    """Losses of 60 steps on the demo's questions, LoRA on attention and experts."""
    questions, held_out = load("questions"), load("held_out")
    train, _ = questions.ask(questions.read_standard_library())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    model = upcycled(folder, backend, torch.bfloat16, lora=lora("q_proj", "v_proj", "experts")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    found = []
    for step in range(STEPS):
        batch = held_out.collate(tokenizer, [(q.text, q.answer) for q in train[4 * step : 4 * step + 4]])
        step_loss = model(**batch).loss
        step_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(step_loss.item())
    return torch.tensor(found)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BF16_BACKENDS[1:])
def test_sixty_steps_follow_the_curve_of_the_reference(real_layers, backend):
    """In nats, of 12 to 19. INT8 is another function of the weights, 3 % from bf16 here, and still follows."""
    expected, found = (curve(real_layers.moe, name) for name in ("reference", backend))
    assert expected[-10:].mean() < expected[:10].mean() - 1
    difference = found - expected
    assert difference.abs().mean() < (0.1 if backend == "AMXInt8" else 0.035)
    assert difference[-20:].mean().abs() < (0.05 if backend == "AMXInt8" else 0.03)
