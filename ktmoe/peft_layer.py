"""peft's view of routed experts: a LoRA layer around `MoEExperts`, through peft's custom-module mapping.

peft creates, freezes, activates, disables and deletes adapters through this class as through its own layers.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from ktmoe.experts import MoEExperts, checked_scaling, init_lora, stay_fp32_on_cpu
from ktmoe.types import KTError, Lora


PLAIN_INIT = (True, False, "gaussian")


class LoraExperts(nn.Module, LoraLayer):
    """Adapters of one layer of routed experts.

    Parameters are stacked: `lora_A.<adapter>.gate_proj` [E, r, in], `lora_B.<adapter>.gate_proj` [E, out, r], and so
    for up_proj and down_proj. They are fp32 masters and stay on the CPU; `lora_dropout` is not applied to them.
    """

    adapter_layer_names = ("lora_A", "lora_B")
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    use_rslora: dict[str, bool]
    lora_A: Any
    lora_B: Any
    active_adapters: list[str]
    disable_adapters: bool
    get_base_layer: Callable[[], MoEExperts]
    set_adapter: Callable[..., None]

    other_param_names = ("r", "lora_alpha", "scaling", "use_rslora")

    def __init__(self, base_layer: MoEExperts, adapter_name: str, config: Any = None, **kwargs: Any) -> None:
        """Called by peft, with the LoraConfig (0.19 on) or with its fields (before)."""
        nn.Module.__init__(self)
        with warnings.catch_warnings():  # peft warns of any layer type that is not its own
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        r, lora_alpha = kwargs.pop("r"), kwargs.pop("lora_alpha")
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: Any = None, **kwargs: Any) -> None:
        """Adds an adapter.

        Raises:
            KTError: a LoRA variant that the experts do not have, or a rank above what they were loaded for.
        """

        def option(name: str, default: Any) -> Any:
            return kwargs.get(name, default) if config is None else getattr(config, name, default)

        for name in ("use_dora", "lora_bias", "use_qalora"):
            if option(name, False):
                raise KTError(f"{name}: got True; the routed experts have plain LoRA only. Set it to False.")
        init = option("init_lora_weights", True)
        if init not in PLAIN_INIT:
            raise KTError(f"init_lora_weights: got {init!r}; the routed experts take True, False or 'gaussian'.")
        base: MoEExperts = self.get_base_layer()
        if base.r:
            raise KTError(
                f"r: these experts have LoRA of their own (r={base.r}), which peft's would hide. Build them with r=0."
            )
        use_rslora = option("use_rslora", False)
        scaling = checked_scaling(lora_alpha, math.sqrt(r) if use_rslora else r)
        base.load(r, scaling)
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name], self.use_rslora[adapter_name] = scaling, use_rslora
        self.lora_A[adapter_name] = nn.ParameterDict()
        self.lora_B[adapter_name] = nn.ParameterDict()
        for name, shape in base.shape(r).lora_shapes().items():
            projection, side = name.split(".")
            tensor = init_lora(shape, side)
            if init == "gaussian" and side == "lora_A":
                nn.init.normal_(tensor, std=1 / r)
            elif init is False:  # peft's convention: not a no-op, for tests
                nn.init.normal_(tensor, std=0.02)
            getattr(self, side)[adapter_name][projection] = nn.Parameter(tensor)
        set_adapter = self.set_adapter
        extra = {"inference_mode": option("inference_mode", False)}
        known = inspect.signature(set_adapter).parameters
        set_adapter(self.active_adapters, **{k: v for k, v in extra.items() if k in known})

    def stacked(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """One adapter's six parameters by the names of `LORA_NAMES`; empty if it does not cover this layer."""
        if adapter_name not in self.lora_A:
            return {}
        names = self.get_base_layer().shape(self.r[adapter_name]).lora_shapes()
        return {n: getattr(self, n.split(".")[1])[adapter_name][n.split(".")[0]] for n in names}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts with the active adapter, or without one while adapters are disabled."""
        active = [] if self.disable_adapters else [a for a in self.active_adapters if a in self.lora_A]
        lora = None
        if len(active) == 1:
            lora = Lora(self.stacked(active[0]), self.scaling[active[0]])
        elif active:
            lora = self._concatenated(active)
            self.get_base_layer().load(lora.rank)
        return self.get_base_layer().run(hidden_states, top_k_index, top_k_weights, lora)

    def _concatenated(self, adapters: list[str]) -> Lora:
        """Several active adapters add up: their ranks side by side, each B carrying its own scale."""
        tensors: dict[str, Tensor] = {}
        parts = [self.stacked(a) for a in adapters]
        for name in parts[0]:
            if name.endswith("lora_A"):
                tensors[name] = torch.cat([p[name] for p in parts], dim=1)  # [E, sum r, in]
            else:
                scaled = [p[name] * self.scaling[a] for p, a in zip(parts, adapters, strict=True)]
                tensors[name] = torch.cat(scaled, dim=2)  # [E, out, sum r]
        return Lora(tensors, 1.0)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: the kernel's packed weights cannot take an update."""
        raise KTError(
            "merge: the routed experts cannot be merged in memory yet. Load the saved adapter with stock transformers "
            "and peft on the base model, and merge there."
        )

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def _apply(self, fn: Any, recurse: bool = True) -> LoraExperts:
        """Stays where it is, and fp32: see `MoEExperts`."""
        return super()._apply(stay_fp32_on_cpu(fn), recurse)

    def __repr__(self) -> str:
        """As peft's layers print."""
        return "lora." + super().__repr__()
