"""What a run takes beside what there is: memory by part, of the host and of the device, before a weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import transformers

from ktmoe import devices, memory
from ktmoe.budget.dry_step import Batch, dry_step, operations
from ktmoe.checkpoints import stored_format
from ktmoe.config import KTConfig
from ktmoe.models import layers_of
from ktmoe.planning import MAX_LEN
from ktmoe.retained import bytes_per_token
from ktmoe.room import Way, as_keys, free_memory, split, way_of, ways
from ktmoe.split import device_bytes, left_on_cpu
from ktmoe.types import KTError, MoEShape


if TYPE_CHECKING:
    from peft import LoraConfig

_STATE = 16  # bytes of a number in LoRA: fp32 itself, its gradient, and AdamW's two moments


# What glibc 2.36 holds beside activations that live, as a multiple of them: torch asks for aligned memory, for which
# holes are not found again. Measured at the peaks of three families on a CPU alone, with checkpointing (2.2 to 3.0)
# and without (1.3 to 1.6). With mmap for every tensor it was 0.1 to 0.4, and a step took a third longer.
_HOLES = {True: 2.3, False: 1.45}


@dataclass(frozen=True)
class Part:
    """Bytes that something takes.

    Attributes:
        name: for people.
        size: bytes.
        certain: whether every batch takes it, however short.
    """

    name: str
    size: int
    certain: bool = True


@dataclass(frozen=True)
class Budget:
    """Of one training; the process itself and its libraries are left out.

    Attributes:
        layers: how many there are of each shape.
        stored: the format of the experts' weights, as `ExpertWeights.stored`.
        batch: of one step, as long as it may be.
        retained: whether layers keep their forwards.
        host: for the routed experts, beside their weights and activations.
        device: everything else of the model.
        device_name: where that is.
        ways: how the experts' weights can be held; those that the configuration allows.
        others: those that it does not.
        on_device: experts of each layer that are on the device.
        processes: of this host, with batches, LoRA and, where there is one, a device of their own each; the routed
            experts are there once.
        free_host: bytes that this machine has for it, swap included.
        free_device: of the device; None where that is the host.
        total_host: memory of this machine, or what a container or batch job grants.
        operations: counts those of a step's products, routed experts left out.
    """

    layers: dict[MoEShape, int]
    stored: str
    batch: Batch
    retained: bool
    host: tuple[Part, ...]
    device: tuple[Part, ...]
    device_name: str
    ways: tuple[Way, ...]
    others: tuple[Way, ...]
    free_host: int
    free_device: int | None
    total_host: int
    operations: Callable[[], int]
    on_device: int = 0
    processes: int = 1

    def on_host(self, way: Way, *, certain: bool = False) -> int:
        """Bytes of host memory; where there is no device, of everything.

        Args:
            way: how the experts are held.
            certain: only what every batch takes.
        """
        parts = self.host if self.free_device is not None else (*self.host, *self.device)
        return way.size + way.activations * (not certain) + sum(p.size for p in parts if p.certain or not certain)

    def of_device(self, *, certain: bool = False) -> int:
        """Bytes of the device's own memory, 0 where there is none."""
        if self.free_device is None:
            return 0
        return sum(part.size for part in self.device if part.certain or not certain)

    def fits(self, way: Way, *, certain: bool = False) -> bool:
        """Whether there is as much memory."""
        if self.free_device is not None and self.of_device(certain=certain) > self.free_device:
            return False
        return self.on_host(way, certain=certain) <= self.free_host

    @property
    def best(self) -> Way | None:
        """The fastest of the allowed ways that fits."""
        return next((way for way in self.ways if not way.why_not and self.fits(way)), None)

    @property
    def planned(self) -> Way | None:
        """What would run: the fastest that fits, or the first that this machine can compute."""
        return self.best or next((way for way in self.ways if not way.why_not), None)


def make(
    model_config: Any,
    lora: LoraConfig,
    batch: Batch,
    config: KTConfig | None = None,
    *,
    dtype: torch.dtype | None = None,
    bits: int | None = None,
    on_cpu: bool = False,
    processes: int = 1,
    trust_remote_code: bool = False,
) -> Budget:
    """From configurations alone.

    Args:
        model_config: a transformers configuration.
        lora: the adapter.
        batch: of one step.
        config: whose `kt_` keys limit the ways; by default all are allowed.
        dtype: of everything but the routed experts; by default the configuration's.
        bits: what bitsandbytes holds it in, if it does.
        on_cpu: whether it stays on the CPU where there is a GPU.
        processes: that train together on this host.
        trust_remote_code: whether the model's own code may be run.

    Raises:
        KTError: a model or an adapter that `attach` would refuse.
    """
    config = config or KTConfig()
    shapes, _ = layers_of(model_config, lora.r, trust_remote_code=trust_remote_code)
    dtype = dtype or _dtype(model_config)
    dry = dry_step(model_config, lora, batch, dtype, bits, trust_remote_code=trust_remote_code)
    if not dry.expert_trainable:  # a backend is built for some rank all the same
        shapes = [replace(shape, rank=1) for shape in shapes]
    device = None if on_cpu else devices.accelerator()
    retained = config.kt_cpu_activation != "recompute"
    stored = stored_format(model_config)
    called = processes * batch.tokens, batch.checkpointing and not retained, processes * (config.kt_max_len or MAX_LEN)
    each = processes if device is None else 1  # of what is on the device, which every process has one of
    holes = int(_HOLES[batch.checkpointing] * each * dry.activations)
    parts = [left_on_cpu(config, shape) for shape in shapes]
    mine, others = split(list(ways(parts, stored, *called)), config, parts)
    if not mine:  # none of the listed has the keys: `reference`, or INT8 with a backward copy of each layer's own
        keys = {name: getattr(config, name) for name in ("kt_backend", "kt_share_backward")}
        mine = [way_of(keys, parts, *called)]
    of_experts = processes * dry.expert_trainable
    kept = sum(bytes_per_token(s, torch.bfloat16) for s in shapes) * called[0] + 4 * of_experts
    return Budget(
        layers=dict(Counter(shapes)),
        stored=stored,
        batch=batch,
        retained=retained,
        host=(
            Part("LoRA of the routed experts: fp32, gradients, AdamW's moments", _STATE * of_experts),
            *((Part("inputs and outputs of the routed experts, retained", kept, certain=False),) if retained else ()),
        ),
        device=(
            Part("everything but the routed experts, frozen", each * dry.weights),
            Part("its LoRA: fp32, gradients, AdamW's moments", each * _STATE * dry.trainable),
            Part("its activations at their peak", each * dry.activations, certain=False),
            *((Part("what malloc leaves unused between them", holes, certain=False),) if device is None else ()),
            *_experts_there(config, shapes, *called[:2]),
        ),
        device_name="this CPU" if device is None else _name(device),
        ways=tuple(mine),
        others=tuple(others),
        free_host=free_memory(),
        free_device=None if device is None else devices.free(device),
        total_host=memory.total(),
        operations=partial(operations, model_config, lora, batch, dtype, trust_remote_code=trust_remote_code),
        on_device=config.kt_num_gpu_experts,
        processes=processes,
    )


def _experts_there(config: KTConfig, shapes: Sequence[MoEShape], tokens: int, one_at_a_time: bool) -> tuple[Part, ...]:
    """What the routed experts on the device take there, each with as many tokens as any other."""
    n = config.kt_num_gpu_experts
    if not n:
        return ()
    fewer = -(-tokens * n // min(shape.num_experts for shape in shapes))
    keys = {"kt_backend": "torch", "kt_torch_packing": "off"}
    way = way_of(keys, [replace(shape, num_experts=n) for shape in shapes], fewer, one_at_a_time)
    return (
        Part(f"{n} routed experts of each layer, in bf16", device_bytes(config, shapes)),
        Part("their activations", way.activations, certain=False),
    )


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def of_model(
    model: str,
    rank: int = 8,
    sequences: int = 1,
    length: int = 2048,
    checkpointing: bool = True,
    processes: int = 1,
    *,
    trust_remote_code: bool = False,
) -> Budget:
    """Of a model with LoRA on all its linear layers.

    Args:
        model: a folder, or a hub name.
        rank: of the LoRA.
        sequences: of a batch.
        length: tokens of each.
        checkpointing: whether activations are computed again in the backward.
        processes: that train together on this host.
        trust_remote_code: whether the model's own code may be run.

    Raises:
        KTError: there is no such model, or it has no routed experts that ktmoe runs.
    """
    from peft import LoraConfig

    lora = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    batch = Batch(sequences, length, checkpointing)
    config = _read_config(model, trust_remote_code)
    return make(config, lora, batch, processes=processes, trust_remote_code=trust_remote_code)


def _read_config(model: str, trust_remote_code: bool) -> Any:
    """A model's configuration: no weight, and nothing that is not there already or on the hub.

    Raises:
        KTError: there is no such model.
    """
    try:
        return transformers.AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())
        raise KTError(f"{model}: neither a folder with a config.json nor a model of the hub ({said}).") from error


def _dtype(model_config: Any) -> torch.dtype:
    named = getattr(model_config, "dtype", None) or getattr(model_config, "torch_dtype", None)
    found = getattr(torch, named) if isinstance(named, str) else named
    return found if isinstance(found, torch.dtype) and found.is_floating_point else torch.bfloat16


def remedy(budget: Budget) -> str:
    """What to change where nothing fits, in a sentence."""
    fits = next((way for way in budget.others if not way.why_not and budget.fits(way)), None)
    if fits:
        return f"With {as_keys(fits.keys)} it fits."
    less = [] if budget.batch.checkpointing else ["gradient checkpointing"]
    if budget.retained:
        less.append("kt_cpu_activation: recompute")
    if budget.batch.sequences > 1:
        less.append("per_device_train_batch_size: 1")
    less += ["a smaller cutoff_len", "quantization_bit: 4 for everything but the routed experts"]
    return f"What takes less: {', '.join(less)}."
