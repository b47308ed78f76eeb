"""Packed INT8 weights on their way to disk: the kernel quantises them, and writes its own files."""

from __future__ import annotations

from pathlib import Path

import torch

from ktmoe.backends.kt import sizes
from ktmoe.backends.kt.extension import Host, quiet
from ktmoe.backends.kt.objects import KernelObject, contiguous, create
from ktmoe.types import PROJECTIONS, ExpertWeights, MoEShape


_KIND = "AMXInt8"


class Int8Files:
    """Quantises layers of one size and writes each one's files.

    One kernel object serves all of them: destroyed, it would leak its packed weights (K22).
    """

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, tp: int, threads: int, scratch: Path
    ) -> None:
        """Starts the kernel.

        Args:
            num_experts: E.
            hidden_size: H.
            intermediate_size: I.
            tp: parts of the intermediate dimension.
            threads: of all parts together.
            scratch: a folder for the kernel to write to.

        Raises:
            KTError: no SFT classes on this host, or sizes or parts that they cannot take.
        """
        self._shape = MoEShape(num_experts, hidden_size, intermediate_size, 1, 1)
        sizes.check_shape(_KIND, self._shape)
        sizes.check_tp(_KIND, self._shape, tp)
        self._host = Host.get(threads, tp)
        self._scratch = scratch
        self._made: KernelObject | None = None
        self._written = scratch

    def write(self, weights: ExpertWeights) -> Path:
        """Writes one layer's files.

        The kernel does not notice a full disk: what it wrote has to be checked.

        Args:
            weights: of these sizes.

        Returns:
            Their folder, to be moved away before the next layer.
        """
        source = {p: contiguous(getattr(weights, p), torch.bfloat16) for p in PROJECTIONS}
        pointers = {p: t.data_ptr() for p, t in source.items()}
        with self._host.lock, quiet():
            again = None
            if self._made is None:
                before = set(self._scratch.glob("*"))
                settings = {**pointers, "save": True, "path": str(self._scratch)}
                self._made = create(_KIND, self._host, self._shape, 32, 1.0, True, settings)
                (self._written,) = set(self._scratch.glob("*")) - before  # by the id that the kernel's object has
            else:  # it makes its folders once only
                for part in range(self._host.tp):
                    (self._written / f"_numa_{part}").mkdir(parents=True)
                again = list(pointers.values())
            self._made.load(again)
        return self._written
