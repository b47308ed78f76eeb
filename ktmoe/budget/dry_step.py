"""One training step of everything but the routed experts, without a number in it: what it allocates and multiplies.

torch's fake tensors have sizes but no memory. The model's own code runs on them, forward and backward, adapters and
checkpointing included, so that what is counted is what this model on this release of transformers does.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import peft
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from ktmoe.adapters import our_own, reach
from ktmoe.models import expert_modules, find, make_skeleton
from ktmoe.types import KTError


if TYPE_CHECKING:
    from peft import LoraConfig


_FEW = (4, 8)  # layers from which the others follow


@dataclass(frozen=True)
class Batch:
    """What one step of a device takes.

    Attributes:
        sequences: in it; of preferences two for each pair.
        length: tokens of each.
        checkpointing: whether activations are computed again in the backward.
    """

    sequences: int = 1
    length: int = 1024
    checkpointing: bool = True

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return self.sequences * self.length


class CannotCount(KTError):
    """A model whose code does not run on tensors without numbers."""


@dataclass(frozen=True)
class DryStep:
    """Of everything but the routed experts; bytes where nothing else is said.

    Attributes:
        weights: frozen parameters and buffers.
        trainable: numbers in LoRA outside of the routed experts.
        expert_trainable: numbers in the LoRA of the routed experts.
        activations: most at once beside parameters and their gradients, from the batch to the end of the backward.
    """

    weights: int
    trainable: int
    expert_trainable: int
    activations: int


def dry_step(
    model_config: Any,
    lora: LoraConfig,
    batch: Batch,
    dtype: torch.dtype,
    bits: int | None = None,
    *,
    trust_remote_code: bool = False,
) -> DryStep:
    """Counts the memory of one training step.

    Args:
        model_config: a transformers configuration.
        lora: the adapter.
        batch: of the step.
        dtype: of the weights; products are in it too, by autocast, as trainers have it.
        bits: what bitsandbytes holds linear layers in, if it does.
        trust_remote_code: whether the model's own code may be run.

    Raises:
        KTError: a model or an adapter that `attach` would refuse.
        CannotCount: the model's code does not run so.
    """
    model, expert_trainable = _model(model_config, lora, dtype, trust_remote_code)
    there = [t for n, t in (*model.named_parameters(), *model.named_buffers()) if not n.endswith(_STAND_IN)]
    head = model.get_output_embeddings()  # which bitsandbytes leaves as it is
    linear = [m.weight for m in model.modules() if type(m) is nn.Linear and m is not head and not _trains(m)]
    saved = sum(w.nbytes - w.numel() * bits // 8 for w in linear) if bits else 0

    def activations() -> int:
        with Meter([*model.parameters(), *model.buffers()]) as meter:
            _train(model, batch, dtype)
        return meter.peak - sum(p.nbytes for p in model.parameters() if p.requires_grad)

    return DryStep(
        weights=sum(t.nbytes for t in there if not t.requires_grad) - saved,
        trainable=sum(t.numel() for t in there if t.requires_grad),
        expert_trainable=expert_trainable,
        activations=_of_all_layers(model, activations),
    )


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def operations(
    model_config: Any, lora: LoraConfig, batch: Batch, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> int:
    """Counts the operations in one training step's products, routed experts left out.

    An addition and a multiplication are two. Apart from `dry_step`, since torch's counter keeps tensors alive.

    Args:
        model_config: a transformers configuration.
        lora: the adapter.
        batch: of the step.
        dtype: of the weights.
        trust_remote_code: whether the model's own code may be run.
    """
    model, _ = _model(model_config, lora, dtype, trust_remote_code)

    def count() -> int:
        with FlopCounterMode(display=False) as counter:
            _train(model, batch, dtype)
        return counter.get_total_flops()

    return _of_all_layers(model, count)


def _of_all_layers(model: nn.Module, count: Callable[[], int]) -> int:
    """What `count` finds in a training step of the model, from some of its layers where it has many.

    Memory and operations are linear in the layers: each keeps its input or all its activations. Layers of several
    kinds stand at the beginning (dense ones) or alternate, in fours at most. A step of 60 layers took 40 s.
    """
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _give_sizes(model)
        lists = [(m, n, x) for m in model.modules() for n, x in m.named_children() if isinstance(x, nn.ModuleList)]
        lists = [found for found in lists if len(found[2]) > _FEW[1] and hasattr(found[2][0], "self_attn")]
        if not lists:
            return count()
        parent, name, layers = max(lists, key=lambda found: len(found[2]))
        found = []
        for few in _FEW:
            setattr(parent, name, layers[:few])
            found.append(count())
            model.zero_grad(set_to_none=True)
        return found[1] + (found[1] - found[0]) * (len(layers) - _FEW[1]) // (_FEW[1] - _FEW[0])


def _model(model_config: Any, lora: LoraConfig, dtype: torch.dtype, trust_remote_code: bool) -> tuple[Any, int]:
    """The model on the meta device with its adapter, and how many numbers the routed experts' LoRA has."""
    model = make_skeleton(model_config, trust_remote_code).to(dtype)
    found = find(model)
    hidden = [holder for holders in expert_modules(model).values() for holder in holders]
    reached = reach(lora, model, {name: layer.num_experts for name, layer in found.items()}, hidden)
    ranks = {name: rank for name, (rank, _) in reached.experts.items()}
    of_experts = 0
    for name, layer in found.items():
        s = layer.shape()
        of_experts += 3 * ranks.get(name, 0) * s.num_experts * (s.hidden_size + s.intermediate_size)
        layer.put(_Elsewhere(trained=name in ranks))
    model.requires_grad_(False)
    if reached.modules:
        config = copy.deepcopy(lora)  # peft writes into it
        config.target_modules, config.target_parameters = set(reached.modules), None
        with our_own(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    for module in model.modules():
        if isinstance(module, _Elsewhere):
            module.requires_grad_(module.trained)
    return model, of_experts


def _give_sizes(model: nn.Module) -> None:
    """Fake tensors on the CPU in the place of those on the meta device, for which there is no autocast."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    fake: Any = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    held[name] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake


def _train(model: Any, batch: Batch, dtype: torch.dtype) -> None:
    """Forward and backward, as trainers have them.

    Raises:
        CannotCount: the model's code asks for a number, or for something else that is not there.
    """
    try:
        _step(model, batch, dtype)
    except Exception as error:  # of code that is not ours, and that may be anybody's
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CannotCount(
            f"{type(model).__name__}: what a step takes cannot be counted: its code does not run on tensors without "
            f"numbers ({why})."
        ) from error


def _step(model: Any, batch: Batch, dtype: torch.dtype) -> None:
    model.train()
    if batch.checkpointing:
        model.enable_input_require_grads()
        # The state of random numbers is a tensor that is none here.
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    ids = torch.zeros(batch.sequences, batch.length, dtype=torch.long)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = model(input_ids=ids, labels=ids, use_cache=False)
    logits, loss = out.logits.float(), out.loss  # accelerate hands outputs on in fp32
    del out, logits
    loss.backward()


class Meter(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is on, and of those that live at once the most."""

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = {t.untyped_storage()._cdata: 0 for t in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, out)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            self._seen[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.live -= self._seen.pop(key)


_STAND_IN = ".experts.lora_"


class _Elsewhere(nn.Module):
    """Experts in host memory, as the device sees them: the same call, nothing computed."""

    def __init__(self, trained: bool) -> None:
        super().__init__()
        self.trained = trained
        self.lora_ = nn.Parameter(torch.empty(1, device="meta"))  # for the backward to go through them

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
        return _Run.apply(hidden_states, top_k_weights, self.lora_)


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, top_k_weights: Tensor, lora: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_states, top_k_weights, lora)
        return torch.empty_like(hidden_states)

    @staticmethod
    def backward(ctx: Any, *grad_output: Tensor) -> Any:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors)
