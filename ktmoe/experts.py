"""`MoEExperts`: the routed experts of one layer as an nn.Module, in the place of transformers' own."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ktmoe import devices, memory
from ktmoe.autograd import run_experts
from ktmoe.backends import TABLE, Plan, build, is_kernel
from ktmoe.config import KTConfig
from ktmoe.gate import bf16_bytes, check_on_device, ensure_verified, probe, settle
from ktmoe.interface import Backend
from ktmoe.notices import say_once
from ktmoe.planning import find_packed, plan
from ktmoe.processes import Sharing
from ktmoe.retained import RetainedForwards
from ktmoe.split import left_on_cpu, on_device, split
from ktmoe.types import ExpertWeights, KTError, Lora, MoEShape
from ktmoe.validation import check_call, check_lora, own_settings


_RANK_TO_COME = 16  # what a kernel is built for when it runs before anybody has named a rank


class MoEExperts(nn.Module):
    """Routed experts that live in host memory. Same signature as the experts modules of transformers 5.

    With `r` it owns LoRA parameters and is ready to train by itself. Without, it computes the frozen experts, and
    `ktmoe.adapters` wraps it with peft's adapters.

    Examples:
        >>> gate, up = torch.randn(2, 4, 64, 32, dtype=torch.bfloat16)
        >>> down = torch.randn(4, 32, 64, dtype=torch.bfloat16)
        >>> config = ktmoe.KTConfig(kt_backend="torch")
        >>> experts = ktmoe.MoEExperts(ktmoe.ExpertWeights(gate, up, down), top_k=2, r=8, lora_alpha=16, config=config)
        >>> hidden_states = torch.randn(10, 32, requires_grad=True)
        >>> top_k_weights, top_k_index = torch.rand(10, 4).softmax(-1).topk(2)
        >>> out = experts(hidden_states, top_k_index, top_k_weights)
        >>> out.sum().backward()
        >>> out.shape, experts.lora["down_proj.lora_B"].grad.shape
        (torch.Size([10, 32]), torch.Size([4, 32, 8]))
    """

    def __init__(
        self,
        weights: ExpertWeights,
        *,
        top_k: int,
        r: int = 0,
        lora_alpha: float | None = None,
        config: KTConfig | None = None,
        layer: str | None = None,
    ) -> None:
        """Holds the weights; loads them into the backend at once if `r` is given, else when first needed.

        Args:
            weights: frozen; stay the caller's.
            top_k: experts per token.
            r: LoRA rank, 0 for no LoRA of its own.
            lora_alpha: LoRA is scaled by lora_alpha / r; defaults to r.
            config: which backend, threads, limits.
            layer: its name in the model, for a `kt_gpu_experts` that is a file of counts.

        Raises:
            KTError: sizes or a rank that the backend cannot take.
        """
        super().__init__()
        if isinstance(r, bool) or not isinstance(r, int) or r < 0:
            raise KTError(f"r: got {r!r}; expected a whole number: the LoRA rank, or 0 for none.")
        self.weights, self.top_k, self.config = weights, top_k, config or KTConfig()
        self.r = r
        self.scaling = checked_scaling(r if lora_alpha is None else lora_alpha, r) if r else 1.0
        self._backend: RetainedForwards | None = None
        self.original: tuple[nn.Module, ...] = ()  # what it stands for in a model; no submodule
        self.sharing: Sharing | None = None  # with other processes
        shape = self.shape(max(r, 1))
        self.on_device = on_device(self.config, shape, layer)
        shape = left_on_cpu(self.config, shape)
        self.config = settle(self.config, shape, bf16_bytes(shape), weights.stored)
        self.plan: Plan = plan(self.config, shape, weights.stored)
        # Read by peft for the device to put an adapter on, and by code that asks an experts module for its dtype.
        self.weight = torch.empty(0, dtype=weights.dtype, device="cpu")
        if r:
            self.lora_A = nn.ParameterDict()
            self.lora_B = nn.ParameterDict()
            for name, size in self.shape(r).lora_shapes().items():
                projection, side = name.split(".")
                getattr(self, side)[projection] = nn.Parameter(init_lora(size, side))
            self.load(r, self.scaling)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.weights.num_experts

    @property
    def hidden_size(self) -> int:
        """H: both what comes in and what goes out."""
        return self.weights.hidden_size

    in_features = out_features = hidden_size  # peft asks a layer that it adapts

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the backend computes in; until one is loaded, bfloat16 is the guess."""
        return self._backend.compute_dtype if self._backend else torch.bfloat16

    @property
    def lora(self) -> dict[str, nn.Parameter]:
        """The module's own LoRA parameters by the names of `LORA_NAMES`; empty without `r`."""
        if not self.r:
            return {}
        return {
            name: getattr(self, name.split(".")[1])[name.split(".")[0]] for name in self.shape(self.r).lora_shapes()
        }

    def shape(self, rank: int) -> MoEShape:
        """This layer's sizes, for LoRA of up to `rank`."""
        w = self.weights
        return MoEShape(w.num_experts, w.hidden_size, w.intermediate_size, self.top_k, rank)

    def load(self, rank: int, scaling: float = 1.0) -> Backend:
        """Loads the weights into the backend, for LoRA of up to `rank`. Later calls do nothing.

        The kernel is verified first: by the contract gate for its shape on this host, then on these very weights.

        Raises:
            KTError: the kernel was loaded for a smaller rank, or `kt_weight_path` holds other or damaged weights.
            KernelError: the kernel failed a check, and `kt_fallback` is `error`.
        """
        with nullcontext() if self.sharing is None else self.sharing.lock:
            outgrown = self._backend is not None and self._backend.shape.rank < rank
            if self._backend is None or (outgrown and not is_kernel(self.plan)):  # others build nothing for a rank
                if self.sharing is None:
                    backend = self._build(rank, scaling)
                elif self.sharing.computes_here:
                    backend = self.sharing.share(self._build(rank, scaling), self.plan)
                else:
                    backend, self.plan = self.sharing.remote(rank, scaling)
                self._backend = RetainedForwards(backend, self.config.kt_cpu_activation)
            elif outgrown:
                raise KTError(
                    f"r: got {rank}; this layer's experts were loaded for at most {self._backend.shape.rank}. Attach "
                    f"the model with r={rank}: the largest rank of its adapters, or the sum of those active together."
                )
            return self._backend

    def _build(self, rank: int, scaling: float) -> Backend:
        whole = self.shape(rank)
        if self.weights.is_meta:
            raise KTError("weights: on the meta device, so there are none. Give ExpertWeights tensors with data.")
        here, shape = self.weights, left_on_cpu(self.config, whole)
        if self.on_device:
            here = here.some([e for e in range(whole.num_experts) if e not in self.on_device])
        with own_settings():
            decided = plan(self.config, shape, here.stored)
            packed = find_packed(decided, here, self.config)  # before the gate, which takes seconds
            usual = TABLE[decided.backend].built_for(shape)
            self.plan = ensure_verified(decided, usual, self.config)
            backend = build(self.plan, here, shape, scaling, packed if is_kernel(self.plan) else None)
            if is_kernel(self.plan) and backend.built_for != usual:
                self.plan = ensure_verified(self.plan, backend.built_for, self.config)
            if is_kernel(self.plan):
                backend, self.plan = probe(backend, self.plan, here, self.config)
                memory.give_back()  # what packing and the probe had: the holes of many layers add up
            device = devices.accelerator()
            if self.on_device and device is not None:
                backend = self._split(backend, whole, device)
        return backend

    def _split(self, backend: Backend, shape: MoEShape, device: torch.device) -> Backend:
        """The CPU's backend and the device's, which is checked too, as one."""
        both: Any = backend
        try:
            both = split(backend, self.weights, self.on_device, shape, device)
            check_on_device(both.there, self.weights.some(self.on_device), device, self.config)
        except torch.cuda.OutOfMemoryError as error:
            both.close()
            raise KTError(
                f"kt_num_gpu_experts: got {len(self.on_device)}; {device} has not the memory for so many of each "
                f"layer ({error}). Write a smaller number."
            ) from error
        except BaseException:
            both.close()
            raise
        return both

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Routed experts with the module's own LoRA.

        Args:
            hidden_states: [T, H].
            top_k_index: [T, K] integers; outside [0, E) means "skip".
            top_k_weights: [T, K].

        Returns:
            [T, H], dtype and device of `hidden_states`.
        """
        lora = Lora(self.lora, self.scaling) if self.r else None
        if lora is None and self.training and hidden_states.requires_grad:
            say_once(
                "ktmoe: this model trains, and its routed experts have no LoRA: they stay frozen. peft's own "
                "functions, and TRL's `peft_config`, do not see them; `ktmoe.get_peft_model`, or `lora=` when "
                "loading, does."
            )
        return self.run(hidden_states, top_k_index, top_k_weights, lora)

    def run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, lora: Lora | None) -> Tensor:
        """`forward` with a LoRA that somebody else holds, or none."""
        to_come = TABLE[self.plan.backend].rank or _RANK_TO_COME
        backend = self._backend or self.load(lora.rank if lora else to_come, lora.scaling if lora else 1.0)
        check_call(hidden_states, top_k_index, top_k_weights, backend.shape)
        if lora is not None:
            check_lora(lora, backend.shape)
            if self.sharing is not None and (self.training or torch.is_grad_enabled()):
                self.sharing.follow(lora)
        return run_experts(backend, hidden_states, top_k_index, top_k_weights, lora, self.training)

    def use_weights(self, weights: ExpertWeights) -> None:
        """Computes with other weights of the same sizes from now on; a backend that is loaded is loaded again.

        Raises:
            KernelError: the kernel failed its probe on them. The weights are the old ones.
        """
        before, self.weights = self.weights, weights
        if self._backend is None:
            return
        rank, scaling = self._backend.shape.rank, self._backend.scaling
        self.close()
        try:
            self.load(rank, scaling)
        except BaseException:
            self.weights = before
            raise

    def close(self) -> None:
        """Releases the backend. The kernel's packed buffers go to the next layer that is built alike (trap K22)."""
        if self._backend is not None:
            self._backend.close()
            self._backend = None

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copies: without the backend, which is loaded again when it is first needed."""
        return {**vars(self), "_backend": None, "sharing": None}

    def _apply(self, fn: Any, recurse: bool = True) -> MoEExperts:
        """Stays on the CPU, since the experts do not fit elsewhere, and its LoRA stays an fp32 master."""
        return super()._apply(stay_fp32_on_cpu(fn), recurse)

    def extra_repr(self) -> str:
        """Sizes and backend."""
        w = self.weights
        sizes = f"num_experts={w.num_experts}, hidden_size={w.hidden_size}, intermediate_size={w.intermediate_size}"
        return f"{sizes}, top_k={self.top_k}, backend={self.plan.backend}"


def stay_fp32_on_cpu(fn: Any) -> Any:
    """What `.to(...)` may do to LoRA of routed experts: anything but another device or dtype."""

    def stay(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.device.type == "cpu" and moved.dtype == tensor.dtype else tensor

    return stay


def checked_scaling(lora_alpha: Any, divisor: float) -> float:
    """alpha / r (or sqrt(r)). Raises KTError for an alpha that is no number above zero."""
    largest = torch.finfo(torch.float32).max
    if isinstance(lora_alpha, bool) or not isinstance(lora_alpha, (int, float)) or not 0 < lora_alpha <= largest:
        raise KTError(f"lora_alpha: got {lora_alpha!r}; expected a number above 0, within float32.")
    return lora_alpha / divisor


def init_lora(shape: tuple[int, int, int], side: str) -> Tensor:
    """A stacked LoRA tensor as peft initialises one `nn.Linear` per expert: A uniform in +-1/sqrt(in), B zero.

    Args:
        shape: [E, r, in] for lora_A, [E, out, r] for lora_B.
        side: "lora_A" or "lora_B".

    Returns:
        fp32.
    """
    with own_settings():
        tensor = torch.zeros(shape, dtype=torch.float32)
    if side == "lora_A":
        bound = 1 / math.sqrt(shape[2])  # kaiming_uniform with a = sqrt(5), nn.Linear's default
        tensor.uniform_(-bound, bound)
    return tensor
