"""What a call may bring: sizes, dtypes, ids, tokens that are no numbers."""

from __future__ import annotations

from dataclasses import replace

import torch
from ktmoe_reference import LORA_NAMES

from ktmoe.backends import TABLE
from ktmoe.config import KTConfig
from ktmoe.experts import MoEExperts
from ktmoe.gate import contract
from ktmoe.verify.probes.trap import SHAPE, drawn, far, load, module, refused, tensors, trap, wrong


@trap(1, "more tokens than the capacity: segfault")
def _more_tokens_than_the_capacity(name: str) -> list[str]:
    case = drawn(name, tokens=90)
    return wrong(load(name, case, max_len=32), case)


@trap(2, "sizes that are no multiple of 32, 64 or 128: segfault or abort")
def _sizes_that_do_not_fit(name: str) -> list[str]:
    shape = replace(SHAPE, hidden_size=48 if name == "AMXBF16" else 96)
    config = KTConfig(kt_backend=name, kt_max_len=96)
    weights = contract.draw_case(shape, 1, 0, TABLE[name].stored).weights
    return refused("an odd size", "hidden_size", lambda: MoEExperts(weights, top_k=2, config=config))


@trap(3, "int32 ids, bf16 routing weights, strided input: 80 to 140 % wrong")
def _other_dtypes_and_strides(name: str) -> list[str]:
    experts, (x, index, weights) = module(name)
    strided = torch.empty(len(x), 2 * x.shape[1])[:, ::2].copy_(x.detach())
    with torch.no_grad():
        expected = experts(x, index, weights.to(torch.bfloat16).float())
        got = experts(strided, index.int().t().contiguous().t(), weights.to(torch.bfloat16))
    return [] if torch.equal(got, expected) else ["the same numbers in another dtype or layout give another output"]


@trap(4, "another top_k than configured: heap corruption")
def _another_top_k(name: str) -> list[str]:
    experts, (x, _, _) = module(name)
    index, weights = torch.zeros(len(x), 3, dtype=torch.int64), torch.ones(len(x), 3)
    return refused("three experts per token instead of two", "top_k_index", lambda: experts(x, index, weights))


@trap(5, "ids of 2^31 and more: wrong gradients")
def _huge_ids(name: str) -> list[str]:
    case = drawn(name)
    index = case.top_k_index.clone()
    index[index < 0] = 2**32 + 1
    index[::3, 1] = 2**31
    return wrong(load(name, case), replace(case, top_k_index=index))


def _replaced_rows(name: str, rows: int) -> list[str]:
    experts, (x, index, weights) = module(name)
    out = experts(x, index, weights).sum()
    for t in (x, index, weights):
        t.data = t.data.repeat(2, 1)[:rows].clone()
    return refused(f"a backward with {rows} rows", "shape", out.backward)


@trap(6, "backward with fewer rows than the forward: write out of bounds")
def _fewer_rows(name: str) -> list[str]:
    return _replaced_rows(name, 5)


@trap(7, "backward with more rows than the forward: rows never written")
def _more_rows(name: str) -> list[str]:
    return _replaced_rows(name, 40)


@trap(14, "a null gradient pointer: segfault")
def _without_lora(name: str) -> list[str]:
    experts, (x, index, weights) = module(name)
    got = torch.autograd.grad(experts.run(x, index, weights, lora=None).sum(), (x, weights))
    for key, parameter in experts.lora.items():
        if key.endswith("lora_B"):
            parameter.data.zero_()
    expected = torch.autograd.grad(experts(x, index, weights).sum(), (x, weights))
    same = all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    return [] if same else ["no LoRA and LoRA with B = 0 have different gradients"]


@trap(15, "a gate activation of -88.5 or less: NaN, and two LoRA gradients lose the token")
def _extreme_gates(name: str) -> list[str]:
    case = drawn(name)
    x = case.hidden_states.clone()
    x[3] *= 60
    x[7] *= 3000
    return far(load(name, case), replace(case, hidden_states=x))


@trap(16, "one token that is NaN: finite LoRA gradients that are wrong")
def _a_nan_token(name: str) -> list[str]:
    case = drawn(name)
    x = case.hidden_states.clone()
    x[5, 0] = float("nan")
    bad = replace(case, hidden_states=x)
    got, expected = contract.answer(load(name, case), bad)[1], contract.specification(bad)[1]
    names = ("hidden_states", "top_k_weights", *LORA_NAMES)
    return [
        f"{tensor}: NaN where it should not be, or none where it should"
        for tensor, a, b in zip(names, tensors(got), tensors(expected), strict=True)
        if not torch.equal(a.isfinite().flatten(1).all(1), b.isfinite().flatten(1).all(1))
    ]
