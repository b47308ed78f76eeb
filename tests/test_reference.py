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


def test_int8():
    w = torch.randn(7, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    w[3] = 0
    q, scale = reference.quantize_int8(w)
    assert q.dtype == torch.int8
    assert q.abs().max() == 127
    assert ((reference.int8_round_trip(w) - w).abs() <= scale / 2 + 1e-12).all()
    x = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = reference.int8_round_trip(x) @ reference.int8_round_trip(w).T
    torch.testing.assert_close(reference.int8_linear(x, w), expected, rtol=1e-12, atol=1e-12)


def test_imports_torch_alone():
    import ast
    import pathlib

    for path in pathlib.Path(reference.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in {"torch", "ktmoe_reference", "typing", "collections"}, (path.name, name)
