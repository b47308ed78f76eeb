"""Packed INT8 weights on disk: what `ktmoe quantize` writes and `kt_weight_path` names.

    OUT/manifest.json               written last: how they were made, and the layers
    OUT/_layer_3/files.json         size and SHA-256 of every file of a layer
    OUT/_layer_3/_numa_0/*.kt       one matrix of one expert each, as kt_kernel writes them; one folder per part

The manifest holds the SHA-256 of each files.json. kt_kernel's own way to load such files checks their sizes at most
(K24), so it is not used: the files are read and hashed here, and the kernel copies what was checked.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ktmoe.types import PROJECTIONS, ExpertWeights, KTError, MoEShape


MANIFEST, FILES = "manifest.json", "files.json"
FORMAT = 1


class Recipe(NamedTuple):
    """What the bytes of a layer depend on besides its weights.

    The CPU does not matter: kt_kernel's AMX and AVX512-BF16 variants write the same bytes.

    Attributes:
        format: of this module.
        kt_kernel: version that packed.
        tp: parts of the intermediate dimension.
    """

    format: int
    kt_kernel: str
    tp: int


class PackedFile(NamedTuple):
    """One file of a layer.

    Attributes:
        projection: gate, up or down.
        part: of tensor parallelism.
        expert: its number.
        kind: quant, for a matrix's int8 numbers, or scale, for its fp32 scales.
        size: bytes.
    """

    projection: str
    part: int
    expert: int
    kind: str
    size: int

    @property
    def name(self) -> str:
        """Relative to the layer's folder, as kt_kernel spells it."""
        return f"_numa_{self.part}/INT8_{self.projection}_{self.expert}_{self.size}Byte_{self.kind}_.kt"


@dataclass(frozen=True)
class PackedLayer:
    """The packed weights of one layer's experts.

    Attributes:
        folder: that holds them.
        module: name of the experts module in its model.
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        weights: `fingerprint` of the weights that they were made of.
        listing: SHA-256 of files.json, in hexadecimal.
        recipe: how they were made.
    """

    folder: Path
    module: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    weights: str
    listing: str
    recipe: Recipe

    def check(self, shape: MoEShape, tp: int, kt_kernel: str) -> None:
        """Refuses to be loaded as anything but what it is.

        Args:
            shape: of the layer to load.
            tp: parts that it is to be loaded for.
            kt_kernel: installed version.

        Raises:
            KTError: says what differs.
        """
        theirs = (self.num_experts, self.hidden_size, self.intermediate_size)
        mine = (shape.num_experts, shape.hidden_size, shape.intermediate_size)
        where = self.folder.parent
        if theirs != mine:
            raise KTError(
                f"kt_weight_path: {where} has layers of E, H, I = {theirs}; the model's are {mine}: it was packed "
                f"from another model. {_pack(tp)}"
            )
        if self.recipe.tp != tp:
            raise KTError(
                f"kt_weight_path: {where} was packed for {self.recipe.tp} parts of tensor parallelism; kt_tp_enabled "
                f"and the NUMA nodes of this machine make {tp}. {_pack(tp)}"
            )
        if self.recipe.kt_kernel != kt_kernel:
            raise KTError(
                f"kt_weight_path: {where} was packed by kt-kernel {self.recipe.kt_kernel}; installed is {kt_kernel}, "
                f"which may pack otherwise. {_pack(tp)}"
            )

    def files(self) -> Iterator[PackedFile]:
        """Every file, in the order in which `size` counts them."""
        i, h = self.intermediate_size // self.recipe.tp, self.hidden_size
        for projection in PROJECTIONS:
            name = projection.removesuffix("_proj")
            for part in range(self.recipe.tp):
                for e in range(self.num_experts):
                    yield PackedFile(name, part, e, "quant", i * h)
                    yield PackedFile(name, part, e, "scale", 4 * (h if name == "down" else i))

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files())

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every file, by name, from files.json.

        Raises:
            KTError: it is missing, or not the one that the manifest means.
        """
        path = self.folder / FILES
        try:
            content = path.read_bytes()
        except OSError as error:
            raise KTError(f"{path}: cannot be read ({error.strerror}). {_mend(self.folder)}") from error
        if hashlib.sha256(content).hexdigest() != self.listing:
            raise KTError(
                f"{path}: its SHA-256 is not the one in {MANIFEST}: damaged, or of another folder. "
                f"{_mend(self.folder)}"
            )
        return {name: sha256 for name, (_, sha256) in json.loads(content)["files"].items()}

    def read(self, file: PackedFile, into: memoryview, sha256: str) -> None:
        """Reads one file and checks what was read.

        Args:
            file: one of `files`.
            into: as long as the file.
            sha256: from `hashes`.

        Raises:
            KTError: it is missing, of another size, or not what was packed.
        """
        path = self.folder / file.name
        try:
            with open(path, "rb", buffering=0) as opened:
                found = os.fstat(opened.fileno()).st_size
                at = 0
                while found == file.size and at < found and (n := opened.readinto(into[at:])):
                    at += n
        except OSError as error:
            raise KTError(f"{path}: cannot be read ({error.strerror}). {_mend(self.folder)}") from error
        if found != file.size or at != file.size:
            raise KTError(f"{path}: {found} bytes, expected {file.size}: truncated or damaged. {_mend(self.folder)}")
        check_hash(path, into, sha256)


def check_hash(path: Path, content: memoryview, sha256: str) -> None:
    """Refuses what was not packed. K24: the kernel would take it.

    Raises:
        KTError: names the file.
    """
    if hashlib.sha256(content).hexdigest() != sha256:
        raise KTError(f"{path}: damaged: its SHA-256 is not that of {FILES}. {_mend(path.parents[1])}")


class PackedModel:
    """A folder of packed weights, from its manifest alone.

    Attributes:
        path: the folder.
        model: what was packed, as it was named then.
        layers: in the model's order.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads the manifest.

        Args:
            path: `kt_weight_path`.

        Raises:
            KTError: no such folder, or none that `ktmoe quantize` has finished.
        """
        self.path = Path(path)
        manifest = self.path / MANIFEST
        if not self.path.is_dir():
            raise KTError(f"kt_weight_path: got {str(path)!r}, which is no folder. {_pack(out=self.path)}")
        if not manifest.is_file() and (self.path / "config.json").is_file():  # `ktmoe quantize --format int4`, too
            raise KTError(
                f"kt_weight_path: {path} is a checkpoint, which the kernel packs while it loads. Name it in "
                "model_name_or_path, and leave kt_weight_path out: it is for experts that are packed in INT8."
            )
        if not manifest.is_file():
            raise KTError(
                f"kt_weight_path: {path} has no {MANIFEST}, which is written when all layers are packed. "
                f"{_pack(out=self.path)}"
            )
        try:
            content = json.loads(manifest.read_text(encoding="utf-8"))
            self.model = str(content["model"])
            recipe = Recipe(**content["recipe"])
            known = recipe.format == FORMAT
            layers = [PackedLayer(self.path / x.pop("folder"), **x, recipe=recipe) for x in content["layers"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise KTError(
                f"{manifest}: not written by `ktmoe quantize` ({error!r}). {_pack(out=self.path)}"
            ) from error
        if not known:
            raise KTError(f"{manifest}: of format {recipe.format}; expected {FORMAT}. {_pack(out=self.path)}")
        self.layers = layers

    def check(self, shape: MoEShape, tp: int, kt_kernel: str) -> None:
        """Refuses what cannot be this model's, before its weights are read. See `PackedLayer.check`."""
        alike = [
            layer
            for layer in self.layers
            if (layer.num_experts, layer.hidden_size, layer.intermediate_size)
            == (shape.num_experts, shape.hidden_size, shape.intermediate_size)
        ]
        for layer in (alike or self.layers)[:1]:
            layer.check(shape, tp, kt_kernel)

    def find(self, weights: ExpertWeights) -> PackedLayer:
        """The layer that was packed from these weights, wherever they are held now.

        Raises:
            KTError: none was.
        """
        mine = fingerprint(weights)
        for layer in self.layers:
            if layer.weights == mine:
                return layer
        raise KTError(
            f"kt_weight_path: none of the {len(self.layers)} layers in {self.path} was packed from this model's "
            f"weights; they are of {self.model}. {_pack()}"
        )


def fingerprint(weights: ExpertWeights) -> str:
    """SHA-256 of a sample: one row of every matrix, in bf16.

    Weights of another model, or of another fine-tune of the same one, have another. It takes milliseconds.
    """
    e, h, i = weights.num_experts, weights.hidden_size, weights.intermediate_size
    found = hashlib.sha256(f"{e} {h} {i}".encode())
    for projection in PROJECTIONS:
        stack: Any = getattr(weights, projection)
        rows = h if projection == "down_proj" else i
        one_row = getattr(stack, "row", lambda expert, n, stack=stack: stack[expert][n])
        for expert in range(e):
            row = (
                one_row(expert, (7 * expert + 3) % rows).detach().to("cpu", torch.bfloat16).resolve_neg().contiguous()
            )
            found.update(ctypes.string_at(row.data_ptr(), row.nbytes))
    return found.hexdigest()


def write_manifest(path: Path, model: str, layers: list[PackedLayer], about: Mapping[str, Any]) -> None:
    """Makes a folder of packed layers one that `kt_weight_path` takes.

    Args:
        path: the folder.
        model: what was packed.
        layers: at least one.
        about: more that is good to know, and not checked.
    """
    content: dict[str, Any] = {"model": model, **about, "recipe": layers[0].recipe._asdict(), "layers": []}
    for layer in layers:
        held = {f.name: getattr(layer, f.name) for f in fields(layer) if f.name != "recipe"}
        content["layers"].append(held | {"folder": layer.folder.name})
    part = path / f"{MANIFEST}.part"
    part.write_text(json.dumps(content, indent=1), encoding="utf-8")
    part.replace(path / MANIFEST)


def _pack(tp: int = 1, out: Path | str = "OUT") -> str:
    return f"Pack this model: ktmoe quantize MODEL {out}{f' --tp {tp}' if tp > 1 else ''}."


def _mend(folder: Path) -> str:
    return f"`ktmoe quantize MODEL {folder.parent}` makes what is damaged anew."
