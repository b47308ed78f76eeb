"""A checkpoint's files, and the routed experts in them as memory-mapped tensors.

Only headers are read to find the experts: their bytes are paged in by the kernel of the operating system when somebody
computes with them, and dropped by it when memory gets scarce.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ktmoe.checkpoints.files import find_files
from ktmoe.checkpoints.names import CheckpointNames, ExpertKey
from ktmoe.checkpoints.quantised import refuse_quantised, refuse_quantised_names, stored_format
from ktmoe.checkpoints.torch_file import TorchFile
from ktmoe.stored import GROUP, BlockFP8, GroupInt4, Stored, check_scale
from ktmoe.types import PROJECTIONS, ExpertWeights, KTError, Stack


_SCALE = "_scale_inv"  # what DeepSeek-V3 adds to the name of an FP8 matrix for its block scales
_LORA = re.compile(r"\.(lora_(A|B|embedding_A|embedding_B|magnitude_vector)|modules_to_save)(\.|$)")
_FLOATS = ("BF16", "F16", "F32", "F64")


class Checkpoint:
    """The files of a model that transformers would read: safetensors, or torch's own.

    Attributes:
        path: as the user gave it.
        source: which files they are.
        shapes: of every tensor in the files, by key.
    """

    def __init__(self, path: str | os.PathLike[str], *, adapter_beside: bool = False, **options: Any) -> None:
        """Finds the files and reads their headers.

        Args:
            path: a directory, or a name on the hub.
            adapter_beside: whether an adapter in the same place is read by somebody else.
            **options: of `find_files`; `revision`, `cache_dir`, `variant` ... as transformers takes them.

        Raises:
            KTError: no weights, a shard that is missing or damaged, a key that two shards hold, or numbers that are
                quantised in a way that is not read.
        """
        self.path = str(path)
        self._opened: dict[str, Any] = {}  # key -> the open file that holds it
        self._file: dict[str, str] = {}
        self._sizes: dict[str, int] = {}  # of the files, as they were when their headers were read
        self._dtypes: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.source = find_files(path, adapter_beside=adapter_beside, **options)
        refuse_quantised(self.path, self.source.config)
        self._block = _fp8_block(self.source.config)
        for file in self.source.weights:
            self._open(file)
        self._packed: dict[str, tuple[str, str]] = {}
        if stored_format(self.source.config) == "int4":
            self._fold()
        refuse_quantised_names(self.path, self.shapes)
        self._check_fp8()
        promised = self.source.promised
        lost = sorted(set(promised) - set(self._opened))
        if lost:
            raise KTError(
                f"{self.path}: its index promises {len(lost)} tensors that its shards do not hold, e.g. {lost[0]} in "
                f"{promised[lost[0]]}. Download the checkpoint again."
            )

    def stored_keys(self) -> list[str]:
        """The matrices that are quantised and have scales: FP8 with block scales, INT4 in groups."""
        fp8 = [k for k, dtype in self._dtypes.items() if dtype == "F8_E4M3" and f"{k}{_SCALE}" in self.shapes]
        return [*fp8, *self._packed]

    def files(self) -> dict[str, list[str]]:
        """The keys of every file, by its path."""
        found: dict[str, list[str]] = {}
        for key in self.shapes:
            found.setdefault(self._file[key], []).append(key)
        return found

    def dtype(self, key: str) -> str:
        """As the file's header writes it, e.g. BF16."""
        return self._dtypes[key]

    def tensor(self, key: str) -> Tensor:
        """A view of the file."""
        return self._tensor(self._packed.get(key, (key,))[0])

    def metadata(self, key: str) -> dict[str, str]:
        """What the header of the file that holds a tensor says beside its tensors."""
        return dict(self._opened[key].metadata() or {})

    def dequantise(self, key: str) -> Tensor:
        """One of `stored_keys`, in bf16."""
        return self._stored([key])[0]

    def _stored(self, keys: Sequence[str]) -> Stored:
        if keys[0] not in self._packed:
            scales = [self._tensor(f"{key}{_SCALE}") for key in keys]
            return BlockFP8([self._tensor(key) for key in keys], scales, self._block)
        parts = [self._packed[key] for key in keys]
        return GroupInt4([self._tensor(p).view(torch.uint8) for p, _ in parts], [self._tensor(s) for _, s in parts])

    def wrong_shape(self, key: str, there: tuple[int, ...], expected: tuple[int, ...]) -> KTError:
        """The error for a tensor that does not fit the configuration."""
        return KTError(
            f"{self._file.get(key, self.path)}: {key} is {there}; the model's configuration says {expected}. The file "
            "or config.json is of another model."
        )

    def check_numbers(self, names: CheckpointNames, parameters: Container[str]) -> None:
        """Refuses tensors that are read into parameters and hold no floating-point numbers, and LoRA that is not read.

        Args:
            names: how this model's checkpoints name them.
            parameters: the model's, by name.

        Raises:
            KTError: names the file and the key.
        """
        for key, dtype in self._dtypes.items():
            plain, lora = dtype in _FLOATS or dtype.startswith("F8") or dtype == "INT4", _LORA.search(key)
            if plain and not lora:
                continue
            read = names.parameter(key, parameters)
            if read and not plain:
                raise self._wrong_dtype(key)
            if lora and not read:
                raise KTError(
                    f"{self._file[key]}: {key} is LoRA, which this model has no place for. Merge it into the weights, "
                    "or save it as an adapter (PeftModel.save_pretrained) and give that to ktmoe.load_adapter."
                )

    def _wrong_dtype(self, key: str) -> KTError:
        return KTError(f"{self._file[key]}: {key} is {self._dtypes[key]}; {_PLAIN}")

    def _open(self, file: str) -> None:
        try:
            # safetensors compares the header with the file's size
            opened = safe_open(file, "pt") if file.endswith(".safetensors") else TorchFile(file)
            self._sizes[file] = os.stat(file).st_size
        except (SafetensorError, OSError) as error:
            raise KTError(f"{file}: damaged or not a safetensors file ({error}). Download it again.") from error
        for key in opened.keys():
            if key in self._opened:
                raise KTError(
                    f"{key} is in two files of {self.path}: {self._file[key]} and {file}. Delete one of them."
                )
            header = opened.get_slice(key)
            self._opened[key], self._file[key] = opened, file
            self.shapes[key], self._dtypes[key] = tuple(header.get_shape()), header.get_dtype()

    def _fold(self) -> None:
        """Has each INT4 matrix under the name that it has unquantised, instead of the three tensors that hold it."""
        for key in [k for k in self.shapes if k.endswith("_packed")]:
            name = key.removesuffix("_packed")  # *.weight
            scale = f"{name}_scale"
            out, words = self.shapes[key] if len(self.shapes[key]) == 2 else (0, 0)
            expected = (out, 8 * words // GROUP)
            if self._dtypes[key] != "I32" or self._dtypes.get(scale) != "BF16" or self.shapes[scale] != expected:
                raise KTError(
                    f"{self._file[key]}: {key} is {self._dtypes[key]} {self.shapes[key]} with {scale} "
                    f"{self._dtypes.get(scale, 'missing')} {self.shapes.get(scale, '')}; expected I32 and BF16 "
                    f"{expected}, eight numbers to a word and a scale for each group of {GROUP}. Is the file damaged?"
                )
            self._packed[name] = key, scale
            self.shapes[name], self._dtypes[name] = (out, 8 * words), "INT4"
            self._opened[name], self._file[name] = self._opened[key], self._file[key]
            for part in (key, scale, f"{name}_shape"):
                self.shapes.pop(part, None)
                self._dtypes.pop(part, None)

    def _check_fp8(self) -> None:
        with_scales = [key for key in self.stored_keys() if key not in self._packed]
        for key in with_scales:
            check_scale(
                f"{self._file[key]}: {key}{_SCALE}: FP8 scales",
                self.shapes[key],
                self.shapes[f"{key}{_SCALE}"],
                self._block,
            )
        for key in sorted({k for k, dtype in self._dtypes.items() if dtype.startswith("F8")} - set(with_scales)):
            if not key.endswith(_SCALE):
                raise KTError(f"{self._file[key]}: {key} is FP8 without block scales ({key}{_SCALE}). {_PLAIN}")

    def experts(self, sizes: Mapping[str, tuple[int, int, int]], names: CheckpointNames) -> dict[str, ExpertWeights]:
        """The routed experts of every layer: views of the files, nothing is copied.

        Args:
            sizes: [E, I, H] of every layer, by module name.
            names: how this model's checkpoints name them.

        Raises:
            KTError: matrices that are missing, there twice, of another shape, or quantised in a way that is not read.
        """
        found: dict[str, dict[tuple[str, int | None], tuple[str, ExpertKey]]] = {name: {} for name in sizes}
        for key in self.shapes:
            place = None if key.endswith(_SCALE) else names.place(key)
            if place is None and not key.endswith(_SCALE) and names.layer_of(key) in found:
                raise KTError(f"{self._file[key]}: {key} is no weight that the routed experts have. {_PLAIN_EXPERTS}")
            if place is None or place.layer not in found:  # not an expert, or a layer that the model does not build
                continue
            other = found[place.layer].setdefault((place.projection, place.expert), (key, place))
            if other[0] != key:
                raise KTError(f"{self.path}: {key} and {other[0]} are the same matrix. Keep one of them.")
        expected = {name: _expected(size[0], found[name]) for name, size in sizes.items()}
        for what, counted in (
            ("missing", [(n, m) for n in sizes for m in expected[n] if m not in found[n]]),
            ("too many", [(n, m) for n in sizes for m in found[n] if m not in expected[n]]),
        ):
            if counted:
                shown = ", ".join(
                    ".".join(str(part) for part in (n, e, p) if part is not None) for n, (p, e) in counted[:3]
                )
                raise KTError(
                    f"{self.path}: {len(counted)} matrices of the routed experts are {what}, e.g. {shown}. The files "
                    "or config.json are incomplete or of another model."
                )
        return {name: ExpertWeights(*self._stacks(found[name], size)) for name, size in sizes.items()}

    def _stacks(self, found: Mapping[Any, tuple[str, ExpertKey]], size: tuple[int, int, int]) -> list[Stack]:
        e, i, h = size
        shapes = {"gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i)}
        if ("down_proj", None) in found:
            gate_up = self._fused(*found["gate_up_proj", None], (e, 2 * i, h))
            down = self._fused(*found["down_proj", None], (e, h, i))
            return [gate_up[:, :i], gate_up[:, i:], down]
        return [self._matrices([found[p, n][0] for n in range(e)], shapes[p]) for p in PROJECTIONS]

    def _fused(self, key: str, place: ExpertKey, shape: tuple[int, int, int]) -> Tensor:
        there = self.shapes[key]
        if self._dtypes[key] not in _FLOATS:
            raise self._wrong_dtype(key)
        turned = (shape[0], shape[2], shape[1])
        if place.transposed or (place.transposed is None and there != shape and there == turned):
            self._check_shape(key, turned)
            return self._tensor(key).mT
        self._check_shape(key, shape)
        return self._tensor(key)

    def _matrices(self, keys: Sequence[str], shape: tuple[int, int]) -> Stack:
        for key in keys:
            self._check_shape(key, shape)
        quantised = {self._dtypes[key] for key in keys} in ({"F8_E4M3"}, {"INT4"})
        for key in keys:
            if self._dtypes[key] not in _FLOATS and not quantised:
                raise self._wrong_dtype(key)
        return self._stored(keys) if quantised else [self._tensor(key) for key in keys]

    def _tensor(self, key: str) -> Tensor:
        """A view of the file. To read behind its end would be a bus error, which nobody can catch."""
        file = self._file[key]
        size = os.stat(file).st_size if os.path.exists(file) else 0
        if size < self._sizes[file]:
            raise KTError(
                f"{file}: {key} cannot be read: the file has {size} bytes, and had {self._sizes[file]} when it was "
                "opened. Do not touch a checkpoint while it is being loaded; download it again."
            )
        return self._opened[key].get_tensor(key)

    def _check_shape(self, key: str, shape: tuple[int, ...]) -> None:
        if self.shapes[key] != shape:
            raise self.wrong_shape(key, self.shapes[key], shape)


_PLAIN_EXPERTS = "They are read as gate, up and down without a bias; LoRA beside them belongs into an adapter."
_PLAIN = (
    "weights are read in bf16, fp16, fp32, FP8 with block scales (*_scale_inv), or compressed-tensors' INT4. Take the "
    "unquantised checkpoint; kt_backend: AMXInt8 quantises it while loading."
)


def _expected(experts: int, found: Iterable[tuple[str, int | None]]) -> list[tuple[str, int | None]]:
    """The matrices of a layer. What is there decides whether they are stacked or one per expert."""
    if any(e is None for _, e in found):
        return [("gate_up_proj", None), ("down_proj", None)]
    return [(p, e) for e in range(experts) for p in PROJECTIONS]


def _fp8_block(config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale, from config.json; 128 x 128 in DeepSeek-V3."""
    rows, columns = (config.get("quantization_config") or {}).get("weight_block_size") or (128, 128)
    return rows, columns
