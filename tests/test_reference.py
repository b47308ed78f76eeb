"""The specification itself: autograd's numerical check, a case worked by hand, and its three plain statements."""

import math

import ktmoe_reference as reference
import pytest
import torch
from torch.autograd import gradcheck


E, H, I, K, R, T = 3, 5, 4, 2, 2, 6


def draw(dtype=torch.float64, intermediate=I):
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    shapes = {"A": {"gate_proj": H, "up_proj": H, "down_proj": intermediate}}
    out = {"gate_proj": intermediate, "up_proj": intermediate, "down_proj": H}
    lora = {}
    for p in out:
        lora[f"{p}.lora_A"] = randn(E, R, shapes["A"][p])
        lora[f"{p}.lora_B"] = randn(E, out[p], R)
    return dict(
        hidden_states=randn(T, H),
        top_k_index=torch.tensor([[0, 1], [1, 1], [0, E], [-1, 1], [0, 1], [1, 0]]),  # twice, skipped, expert 2 absent
        top_k_weights=torch.rand(T, K, generator=g, dtype=dtype),
        gate_proj=randn(E, intermediate, H),
        up_proj=randn(E, intermediate, H),
        down_proj=randn(E, H, intermediate),
        lora=lora,
        scaling=0.5,
    )


def differentiable(case):
    leaves = [case["hidden_states"], case["top_k_weights"], *case["lora"].values()]
    return [t.requires_grad_() for t in leaves]


@pytest.mark.parametrize("forward", [reference.experts_forward, reference.checkpointed_experts_forward])
def test_gradcheck(forward):
    case = draw()
    names = tuple(case["lora"])

    def fn(x, w, *lora):
        case_now = case | {"hidden_states": x, "top_k_weights": w, "lora": dict(zip(names, lora, strict=True))}
        return forward(**case_now)

    assert gradcheck(fn, tuple(differentiable(case)))


def test_two_experts_two_tokens_by_hand():
    """E=2, H=1, I=1, r=1, worked out with pencil and `math`."""

    def silu(v):
        return v / (1 + math.exp(-v))

    col = torch.tensor([2.0, -1.0], dtype=torch.float64).view(2, 1, 1)
    lora = {name: torch.full((2, 1, 1), 0.5, dtype=torch.float64) for name in reference.LORA_NAMES}
    out = reference.experts_forward(
        torch.tensor([[1.0], [3.0]], dtype=torch.float64),
        torch.tensor([[0, 1], [1, 1]]),
        torch.tensor([[0.25, 0.75], [1.0, 0.5]], dtype=torch.float64),
        gate_proj=col,  # expert 0: 2, expert 1: -1
        up_proj=col + 1,  # 3 and 0
        down_proj=col * 2,  # 4 and -2
        lora=lora,
        scaling=2.0,  # B A = 0.25, scaled 0.5: every weight grows by 0.5
    )
    expert0 = silu(2.5 * 1) * (3.5 * 1) * 4.5
    expert1 = [silu(-0.5 * x) * (0.5 * x) * -1.5 for x in (1.0, 3.0)]
    expected = [0.25 * expert0 + 0.75 * expert1[0], 1.5 * expert1[1]]
    torch.testing.assert_close(out[:, 0], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_tensor_parallel_parts_sum_to_the_whole(tp):
    case = draw()
    torch.testing.assert_close(
        reference.tensor_parallel_experts_forward(**case, tp=tp),
        reference.experts_forward(**case),
        rtol=1e-12,
        atol=1e-12,
    )


def test_checkpointed_is_bitwise_equal():
    grads = []
    for forward in (reference.experts_forward, reference.checkpointed_experts_forward):
        case = draw()
        leaves = differentiable(case)
        out = forward(**case)
        grads.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_lora_with_zero_b_and_merged_lora():
    case = draw()
    base = reference.experts_forward(**(case | {"lora": None}))
    zero_b = {n: torch.zeros_like(t) if n.endswith("lora_B") else t for n, t in case["lora"].items()}
    torch.testing.assert_close(reference.experts_forward(**(case | {"lora": zero_b})), base, rtol=0, atol=0)
    merged = {
        p: case[p] + case["scaling"] * case["lora"][f"{p}.lora_B"] @ case["lora"][f"{p}.lora_A"]
        for p in ("gate_proj", "up_proj", "down_proj")
    }
    torch.testing.assert_close(
        reference.experts_forward(**(case | merged | {"lora": None})), reference.experts_forward(**case)
    )


def test_quantised_rows_and_their_product():
    g = torch.Generator().manual_seed(1)
    w = torch.randn(7, 64, dtype=torch.float64, generator=g)
    w[3] = 0
    q, scale = reference.quantize_int8(w)
    assert q.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert q.abs().max() == 127
    restored = reference.dequantize_int8(q, scale)
    assert ((restored - w).abs() <= scale / 2 + 1e-6).all()
    x = torch.randn(5, 64, dtype=torch.float64, generator=g)
    expected = reference.dequantize_int8(*reference.quantize_int8(x)).double() @ restored.double().T
    torch.testing.assert_close(reference.int8_matmul(x, q.T, scale.T), expected, rtol=1e-6, atol=1e-6)
    by_column, column_scale = reference.quantize_int8(w, dim=0)
    assert torch.equal(by_column.T, reference.quantize_int8(w.T)[0])
    assert column_scale.shape == (1, 64)


def test_int8_expert_by_hand():
    """H = I = 2 without LoRA, worked out with pencil: numbers whose scales are powers of two and halves to round."""
    x = torch.tensor([[127.0, 2.5]])  # scale 1; 2.5 rounds to 2
    gate = torch.tensor([[254.0, 0.0], [0.0, 127.0]])  # scales 2 and 1: nothing lost
    up = torch.tensor([[127.0, 0.0], [127.0, 127.0]])
    down = torch.tensor([[127.0, 127.0], [0.0, 127.0]])

    def bf16(v):
        return torch.tensor(v).bfloat16().item()

    g = [bf16(254.0 * 127), bf16(127.0 * 2)]
    u = [bf16(127.0 * 127), bf16(127.0 * 129)]
    mid = [bf16(a * b) for a, b in zip(g, u, strict=True)]  # silu(g) = g
    step = max(mid) / 127
    q = [round(m / step) for m in mid]
    expected = [bf16(127 * step * (q[0] + q[1])), bf16(127 * step * q[1])]
    assert reference.int8_expert_forward(x, gate, up, down)[0].tolist() == expected


def test_int8_gradients_take_their_own_quantisation():
    """The gradient of x is W_b^T of the quantised gradient; W_b has 8 bits per column, of W or of its 8 bits."""
    g = torch.Generator().manual_seed(3)
    gate, up, down = (torch.randn(*s, generator=g).bfloat16().float() for s in ((8, 4), (8, 4), (4, 8)))
    x = torch.randn(3, 4, generator=g).bfloat16().float()
    grad = torch.randn(3, 4, generator=g).bfloat16().float()
    found = {}
    for requantised in (True, False):
        leaf = x.clone().requires_grad_()
        out = reference.int8_expert_forward(leaf, gate, up, down, requantised=requantised)
        (found[requantised],) = torch.autograd.grad(out, leaf, grad)
        copies = [
            reference.quantize_int8(
                reference.dequantize_int8(*reference.quantize_int8(w)) if requantised else w, dim=0
            )
            for w in (gate, up, down)
        ]

        def bf16(t):
            return t.bfloat16().float()

        h_gate, h_up = (bf16(reference.int8_matmul(x, q.T, s.T)) for q, s in map(reference.quantize_int8, (gate, up)))
        d_mid = bf16(reference.int8_matmul(grad, *copies[2]))
        sigmoid = torch.sigmoid(h_gate)
        d_gate = bf16(d_mid * h_up * sigmoid * (1 + h_gate * (1 - sigmoid)))
        d_up = bf16(d_mid * h_gate * sigmoid)
        expected = sum(bf16(reference.int8_matmul(d, *c)) for d, c in zip((d_gate, d_up), copies, strict=False))
        torch.testing.assert_close(found[requantised], expected, rtol=2**-7, atol=1e-4)
    assert not torch.equal(found[True], found[False])


def test_int8_in_parts_is_quantised_part_by_part():
    case = draw(torch.float32, intermediate=8) | {"lora": None}
    case["hidden_states"] = case["hidden_states"].bfloat16().float()
    half = [
        {
            "gate_proj": case["gate_proj"][:, s],
            "up_proj": case["up_proj"][:, s],
            "down_proj": case["down_proj"][:, :, s],
        }
        for s in (slice(4), slice(4, 8))
    ]
    halves = sum(reference.int8_experts_forward(**(case | h)) for h in half)
    torch.testing.assert_close(reference.int8_experts_forward(**case, tp=2), halves, rtol=2**-6, atol=1e-2)
    assert not torch.equal(reference.int8_experts_forward(**case, tp=2), reference.int8_experts_forward(**case))


@pytest.mark.parametrize("lora", [True, False])
def test_int8_is_near_the_exact_formula(lora):
    g = torch.Generator().manual_seed(4)
    e, h, i, r = 3, 64, 96, 4

    def randn(*size):
        return (torch.randn(*size, generator=g) * size[-1] ** -0.5).bfloat16().float()

    adapter = {
        f"{p}.lora_{ab}": randn(e, *size)
        for p, (n_in, n_out) in {"gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h)}.items()
        for ab, size in (("A", (r, n_in)), ("B", (n_out, r)))
    }
    case = dict(
        hidden_states=torch.randn(T, h, generator=g).bfloat16().float(),
        top_k_index=draw()["top_k_index"],
        top_k_weights=torch.rand(T, K, generator=g),
        gate_proj=randn(e, i, h),
        up_proj=randn(e, i, h),
        down_proj=randn(e, h, i),
        lora=adapter if lora else None,
        scaling=2.0,
    )
    answers = []
    for forward in (reference.int8_experts_forward, reference.experts_forward):
        leaves = [case["hidden_states"].requires_grad_(), case["top_k_weights"].requires_grad_()]
        leaves += [t.requires_grad_() for t in adapter.values()] if lora else []
        out = forward(**case)
        answers.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for int8, exact in zip(*answers, strict=True):
        error = ((int8 - exact).abs().mean() / exact.abs().mean()).item()
        assert 0.002 < error < 0.1


def test_imports_torch_alone():
    import ast
    import pathlib

    for path in pathlib.Path(reference.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in {"torch", "ktmoe_reference", "typing", "collections"}, (path.name, name)
