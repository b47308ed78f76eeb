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
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ktmoe.experts import MoEExperts, checked_scaling, init_lora, stay_fp32_on_cpu
from ktmoe.types import PROJECTIONS, ExpertWeights, KTError, Lora


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
    merged_adapters: list[str]
    merged: bool
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
        self.use_rslora = getattr(self, "use_rslora", {})  # peft 0.12 has none
        self._active_adapter = adapter_name
        self._source: ExpertWeights | None = None  # the base's own weights, while it computes with a merged copy
        r, lora_alpha = kwargs.pop("r"), kwargs.pop("lora_alpha")
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: Any = None, **kwargs: Any) -> None:
        """Adds an adapter.

        Raises:
            KTError: a rank above what the experts were loaded for. Variants of LoRA that they do not have are refused
                earlier (`ktmoe.adapters.targets`).
        """

        def option(name: str, default: Any) -> Any:
            return kwargs.get(name, default) if config is None else getattr(config, name, default)

        init = option("init_lora_weights", True)
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

    def saved_scaling(self, adapter_name: str) -> float:
        """What the adapter was made with: peft's `set_scale` holds for a model in memory, not for its file."""
        rank, alpha = self.r[adapter_name], self.lora_alpha[adapter_name]
        return alpha / (math.sqrt(rank) if self.use_rslora[adapter_name] else rank)

    def stacked(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """One adapter's six parameters by the names of `LORA_NAMES`; empty if it does not cover this layer."""
        if adapter_name not in self.lora_A:
            return {}
        names = self.get_base_layer().shape(self.r[adapter_name]).lora_shapes()
        return {n: getattr(self, n.split(".")[1])[adapter_name][n.split(".")[0]] for n in names}

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        adapter_names: list[str] | None = None,
        alora_offsets: Any = None,
    ) -> Tensor:
        """The experts with the active adapter, or without one while adapters are disabled or merged.

        Args:
            hidden_states: [T, H].
            top_k_index: [T, K].
            top_k_weights: [T, K].
            adapter_names: one for each of the B rows of a batch, "__base__" for none; T is then B times a length.
            alora_offsets: for other layers' LoRA variant.

        Returns:
            [T, H].
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed(hidden_states, top_k_index, top_k_weights, adapter_names)
        without = self.disable_adapters or self.merged
        return self._run(hidden_states, top_k_index, top_k_weights, [] if without else self.active_adapters)

    def _mixed(self, hidden_states: Tensor, index: Tensor, weights: Tensor, adapter_names: list[str]) -> Tensor:
        """Every row of a batch with an adapter of its own, as peft's layers do it."""
        tokens, rows = len(hidden_states), len(adapter_names)
        if self.merged:
            raise KTError("adapter_names: given while adapters are merged. Call `unmerge_adapter` first.")
        if not rows or tokens % rows:
            raise KTError(f"adapter_names: got {rows} names for {tokens} tokens; expected one for every row.")
        out = torch.zeros_like(hidden_states)
        for name in dict.fromkeys(adapter_names):
            row = torch.tensor([n == name for n in adapter_names], device=hidden_states.device)
            mine = row.repeat_interleave(tokens // rows)
            out[mine] = self._run(hidden_states[mine], index[mine], weights[mine], [name])
        return out

    def _run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, adapters: list[str]) -> Tensor:
        active = [a for a in adapters if a in self.lora_A]
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
        """Adds adapters to the experts' weights, as peft does: W + scaling * B A in fp32, rounded to W's dtype.

        The experts of a model that was in memory when it was attached are changed in place, as peft's own layers do.
        Those that are streamed from files, or that the caller holds, are copied first: the copy takes the memory of
        the whole layer. The backend is loaded again, and the load probe runs again, from the merged weights.

        Args:
            safe_merge: refuse NaN and infinity before anything is changed.
            adapter_names: all active ones if None.

        Raises:
            KTError: `safe_merge` found a number that is not finite.
            KernelError: the kernel fails its probe on the merged weights. They are as they were, up to rounding.
        """
        base: MoEExperts = self.get_base_layer()
        names = [n for n in check_adapters_to_merge(self, adapter_names) or () if n in self.lora_A]
        if safe_merge:
            self.check_merge(names)
        added = [n for n in names if self._changes(n)]
        before = weights = base.weights
        if added:
            if not base.original and self._source is None:
                weights = ExpertWeights(*(torch.stack(list(getattr(before, p))) for p in PROJECTIONS))
            done: list[tuple[str, int]] = []
            try:
                self._add(weights, added, 1.0, done)
                base.use_weights(weights)
            except BaseException:
                if weights is before:
                    self._add(weights, added, -1.0, [], only=done)
                raise
        if weights is not before:
            self._source = before
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Takes merged adapters out again: exactly where the weights were copied, else up to rounding, as peft."""
        names, self.merged_adapters[:] = [n for n in self.merged_adapters if n in self.lora_A], []
        base: MoEExperts = self.get_base_layer()
        if self._source is not None:
            source, self._source = self._source, None
            base.use_weights(source)
        elif names := [n for n in names if self._changes(n)]:
            self._add(base.weights, names, -1.0, [])
            base.use_weights(base.weights)

    @torch.no_grad()
    def _add(
        self,
        weights: ExpertWeights,
        adapters: list[str],
        sign: float,
        done: list[tuple[str, int]],
        only: list[tuple[str, int]] | None = None,
    ) -> None:
        """Adds `sign * scaling * B A` of the adapters to the weights, in place; `done` says how far it came."""
        every = [(projection, e) for projection in PROJECTIONS for e in range(weights.num_experts)]
        for projection, e in every if only is None else only:
            weight = getattr(weights, projection)[e]
            delta = torch.stack([self._lora(name).delta(projection, e) for name in adapters]).sum(0)
            weight.copy_(weight.float() + sign * delta)
            done.append((projection, e))

    def _changes(self, adapter_name: str) -> bool:
        """Whether merging an adapter would change a weight: a new one's B is zero."""
        return any(p.any() for n, p in self.stacked(adapter_name).items() if n.endswith("lora_B"))

    def check_merge(self, adapter_names: list[str] | None, where: str = "the routed experts") -> None:
        """Refuses a merge whose result would not be finite.

        Raises:
            KTError: names the layer and the expert.
        """
        base: MoEExperts = self.get_base_layer()
        names = [
            n for n in adapter_names or self.active_adapters if n in self.lora_A and n not in self.merged_adapters
        ]
        for projection in PROJECTIONS:
            for e in range(base.num_experts):
                merged = getattr(base.weights, projection)[e].float()
                for name in names:
                    merged = merged + self._lora(name).delta(projection, e)
                if not merged.to(base.weights.dtype).isfinite().all():
                    raise KTError(
                        f"safe_merge: {where}, {projection} of expert {e}: merging {', '.join(names)} gives NaN or "
                        "infinity. Nothing was merged; the adapter seems to be broken."
                    )

    def _lora(self, adapter_name: str) -> Lora:
        tensors = {n: p.detach() for n, p in self.stacked(adapter_name).items()}
        return Lora(tensors, self.scaling[adapter_name])

    def _apply(self, fn: Any, recurse: bool = True) -> LoraExperts:
        """Stays where it is, and fp32: see `MoEExperts`."""
        return super()._apply(stay_fp32_on_cpu(fn), recurse)

    def __repr__(self) -> str:
        """As peft's layers print."""
        return "lora." + super().__repr__()
