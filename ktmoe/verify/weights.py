"""`python -m ktmoe.verify.weights --model FOLDER`: every expert of a model, on its own weights.

A backend is compared with the arithmetic that it has; how far INT8 is from the exact formula is shown beside it, as
the format's own distance, together with what was aimed at.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

from ktmoe.backends import TABLE, build, kt
from ktmoe.checkpoints import Checkpoint
from ktmoe.config import KTConfig
from ktmoe.gate import contract
from ktmoe.models import experts_in, find, forget_stored, make_skeleton, model_configuration
from ktmoe.planning import plan
from ktmoe.types import ExpertWeights, KTError, Lora, MoEShape
from ktmoe.verify import results


TOKENS = 16  # for each expert alone


@dataclass(frozen=True)
class Layer:
    """One backend on one layer. Errors of output and input gradient for every expert: [2, E].

    Attributes:
        backend: torch, or one of the kernel's.
        name: of the layer in the model.
        own: from the backend's own arithmetic.
        exact: from the exact formula; for INT8 the format's distance.
        problems: what is above this project's limits for `own`, as sentences.
    """

    backend: str
    name: str
    own: Tensor
    exact: Tensor
    problems: list[str]

    def as_json(self) -> dict[str, Any]:
        """Plain numbers; what is not finite is None."""
        rows = {key: [_plain(row) for row in getattr(self, key)] for key in ("own", "exact")}
        return {"backend": self.backend, "layer": self.name, "problems": self.problems, **rows}


def _plain(row: Tensor) -> list[float | None]:
    return [e if e - e == 0 else None for e in row.tolist()]


def measure(backend_name: str, layer_name: str, weights: ExpertWeights, top_k: int, seed: int) -> Layer:
    """Runs one layer: TOKENS drawn tokens for each expert alone, no LoRA that matters, output and input gradient."""
    shape = MoEShape(weights.num_experts, weights.hidden_size, weights.intermediate_size, top_k, 1)
    case = _case(shape, weights, seed)
    rows = len(case.hidden_states)
    backend = build(
        plan(KTConfig(kt_backend=backend_name, kt_max_len=rows), shape, weights.stored), weights, shape, 1.0
    )
    got = contract.answer(backend, case)
    exact: list[list[float]] = []
    own: list[list[float]] = []
    for e in range(shape.num_experts):  # one at a time: the answers need several copies of an expert
        mine = slice(TOKENS * e, TOKENS * (e + 1))
        gate, up, down = (w.to(torch.bfloat16).unsqueeze(0) for w in weights.expert(e))
        one = contract.Case(
            MoEShape(1, shape.hidden_size, shape.intermediate_size, top_k, 1),
            ExpertWeights(gate, up, down),
            Lora({n: t[e : e + 1] for n, t in case.lora.tensors.items()}, 1.0),
            case.hidden_states[mine],
            torch.where(case.top_k_index[mine] >= 0, 0, -1),
            case.top_k_weights[mine],
            case.grad_output[mine],
        )
        answers = [contract.specification(one, torch.float32)]
        answers.append(contract.specification(one, torch.float32, backend.int8) if backend.int8 else answers[0])
        for errors, (out, grads) in zip((exact, own), answers, strict=True):
            pairs = ((got[0][mine], out), (got[1].hidden_states[mine], grads.hidden_states))
            errors.append([((a.float() - b).abs().mean() / b.abs().mean()).item() for a, b in pairs])
    backend.close()
    found = torch.tensor(own).T  # [2, E]
    limits = TABLE[backend_name].expected
    problems = [
        f"{backend_name}, {layer_name}, expert {e}: {what} is {found[i, e]:.4g} from the backend's own arithmetic, "
        f"limit {limit}"
        for i, (what, limit) in enumerate((("output", limits.forward), ("input gradient", limits.backward)))
        for e in range(shape.num_experts)
        if not found[i, e] <= limit
    ]
    return Layer(backend_name, layer_name, found, torch.tensor(exact).T, problems)


def _case(shape: MoEShape, weights: ExpertWeights, seed: int) -> contract.Case:
    g = torch.Generator().manual_seed(seed)
    rows = TOKENS * shape.num_experts
    index = torch.full((rows, shape.top_k), -1)
    index[:, 0] = torch.arange(shape.num_experts).repeat_interleave(TOKENS)
    x, grad = (torch.randn(rows, shape.hidden_size, generator=g).to(torch.bfloat16) for _ in range(2))
    lora = {name: torch.zeros(size, dtype=torch.bfloat16) for name, size in shape.lora_shapes().items()}
    return contract.Case(shape, weights, Lora(lora, 1.0), x, index, torch.ones(rows, shape.top_k), grad)


def table(layers: list[Layer]) -> Table:
    """Per layer, in per cent: mean over experts / worst expert, with its number."""
    kind = layers[0].backend
    aimed, held = TABLE[kind].aimed_at, TABLE[kind].expected
    out = Table(title=f"{kind} on the model's own weights, %: mean of experts / worst one (its number)")
    columns = ["output", "input gradient"]
    if kind == "AMXInt8":
        columns += ["output, format from bf16", "input gradient, format from bf16"]
    out.add_column("layer")
    for column in columns:
        out.add_column(column, justify="right")
    for one in layers:
        rows = [*one.own, *one.exact][: len(columns)]
        out.add_row(one.name, *(f"{100 * r.mean():.2g} / {100 * r.max():.2g} ({int(r.argmax())})" for r in rows))
    out.add_section()
    limits = (held.forward, held.backward, aimed.forward, aimed.backward)[: len(columns)]
    out.add_row(
        "limit; for the format: aimed at" if kind == "AMXInt8" else "limit",
        *(f"{100 * limit:.1f}" for limit in limits),
    )
    return out


def above(layers: list[Layer]) -> str:
    """Which experts' format is further from bf16 than was aimed at; "" for none. No verdict on the kernel."""
    far = []
    for one in layers:
        aimed = TABLE[one.backend].aimed_at
        beyond = (one.exact[0] > aimed.forward) | (one.exact[1] > aimed.backward)
        far += [f"{one.name} expert {e}" for e in beyond.nonzero().flatten().tolist()]
    if not far:
        return ""
    more = f" and {len(far) - 5} more" if len(far) > 5 else ""
    return f"{layers[0].backend}: further from bf16 than was aimed at: {', '.join(far[:5])}{more}"


def layers_of(model: str) -> dict[str, tuple[ExpertWeights, int]]:
    """The routed experts of a model's checkpoint by layer, and experts per token. Nothing is loaded.

    Raises:
        KTError: no weights there, or as `ktmoe.attach`.
    """
    model_config = model_configuration(model, None, {})[0]
    forget_stored(model_config)
    made = make_skeleton(model_config)
    top_k = {name: layer.top_k for name, layer in find(made).items()}
    return {name: (weights, top_k[name]) for name, weights in experts_in(made, Checkpoint(model)).items()}


def main(argv: list[str] | None = None) -> int:
    """Runs every layer with every backend of this host; returns 0 only if the kernel ran and all are within limits."""
    parser = argparse.ArgumentParser(prog="ktmoe.verify.weights", description=__doc__)
    parser.add_argument("--model", required=True, help="a folder with config.json and safetensors, or a hub name")
    parser.add_argument("--seed", type=int, default=0)
    results.add_arguments(parser)
    args = parser.parse_args(argv)
    console = results.console()
    try:
        layers = layers_of(args.model)
    except (KTError, OSError) as error:
        raise SystemExit(f"ktmoe: {error}") from None
    found: dict[str, list[Layer]] = {}
    weights = next(iter(layers.values()))[0]
    shape = MoEShape(weights.num_experts, weights.hidden_size, weights.intermediate_size, 1, 1)
    for backend in results.backends_for(shape, console, weights.stored):
        steps = track(layers.items(), f"Weights, {backend}", console=console, disable=not console.is_terminal)
        found[backend] = [measure(backend, name, w, k, args.seed) for name, (w, k) in steps]
        console.print(table(found[backend]))
        if note := above(found[backend]) if backend == "AMXInt8" else "":
            console.print(note, style="yellow", markup=False, highlight=False)
    problems = [p for rows in found.values() for one in rows for p in one.problems]
    data = {
        "variant": kt.variant(),
        "seed": args.seed,
        "tokens": TOKENS,
        "aimed_at": {b: vars(TABLE[b].aimed_at) for b in found},
        "layers": [one.as_json() for rows in found.values() for one in rows],
    }
    summary = f"weights: {len(layers)} layers of the model agree with their arithmetic ({', '.join(found)})"
    return results.end(console, args, "weights", found, problems, data, summary)


if __name__ == "__main__":
    raise SystemExit(main())
