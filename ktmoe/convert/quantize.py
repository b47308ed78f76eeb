"""`ktmoe quantize`: packs the routed experts of a checkpoint into INT8 files, for `kt_weight_path`."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

import ktmoe
from ktmoe.backends import kt
from ktmoe.backends.kt import (
    FILES,
    FORMAT,
    MANIFEST,
    PackedFile,
    PackedLayer,
    Recipe,
    fingerprint,
    write_manifest,
)
from ktmoe.convert.output import new_folder
from ktmoe.cores import usable_cores
from ktmoe.types import ExpertWeights, KTError


_SCRATCH = ".part"
_OURS = re.compile(rf"lost\+found|_layer_\d+|{re.escape(_SCRATCH)}|{re.escape(MANIFEST)}(\.part)?")


def quantize_model(
    model: str | os.PathLike[str], out: str | os.PathLike[str], tp: int = 1, threads: int | None = None
) -> list[PackedLayer]:
    """Packs a checkpoint's routed experts, layer by layer.

    Args:
        model: a directory, or a name on the hub; the files are those that transformers reads.
        out: a folder, new or left by an earlier run: layers that are whole are not made again.
        tp: parts of tensor parallelism. They are part of the format: as many as the run that loads it will have.
        threads: of the kernel; default: the cores that the process may use.

    Returns:
        What is in the folder.

    Raises:
        KTError: no kernel on this host; a checkpoint that cannot be read; sizes or parts that the kernel cannot take;
            no space; or a folder that holds something else.
    """
    from ktmoe.checkpoints import Checkpoint, refuse_quantised
    from ktmoe.models import experts_in, forget_stored, make_skeleton, model_configuration

    model_config, _, _ = model_configuration(model, None, {})
    refuse_quantised(model, model_config)
    forget_stored(model_config)
    return pack(experts_in(make_skeleton(model_config), Checkpoint(model)), Path(out), str(model), tp, threads)


def pack(
    layers: Mapping[str, ExpertWeights], out: Path, model: str, tp: int = 1, threads: int | None = None
) -> list[PackedLayer]:
    """Packs the experts of layers that somebody holds. See `quantize_model`.

    Args:
        layers: weights by module name, such as model.layers.3.mlp.experts.
        out: the folder.
        model: what they are of, for messages.
        tp: parts of tensor parallelism.
        threads: of the kernel.

    Returns:
        What is in the folder.
    """
    if why := kt.INT8.refuse_host():
        raise KTError(f"ktmoe quantize: the kernel itself packs. {why}. Run it on a CPU with AVX512-BF16 or AMX.")
    threads = threads or usable_cores()
    out = Path(os.path.realpath(out))  # it may be a link to a folder that is not there yet
    recipe = Recipe(FORMAT, kt.version(), tp)
    folders = [out / f"_layer_{n}" for n in _numbers(list(layers))]
    drafts = [
        PackedLayer(folder, name, w.num_experts, w.hidden_size, w.intermediate_size, "", "", recipe)
        for folder, (name, w) in zip(folders, layers.items(), strict=True)
    ]
    packed = []
    with _locked(out) as scratch:
        sizes = dict.fromkeys((d.num_experts, d.hidden_size, d.intermediate_size) for d in drafts)
        writers = {size: kt.Int8Files(*size, tp, threads, scratch) for size in sizes}  # a wrong --tp shows here
        _check_space(out, sum(d.size for d in drafts if not d.folder.exists()))
        with tqdm(total=sum(d.size for d in drafts), desc="Packing experts", unit="B", unit_scale=True) as bar:
            for draft, weights in zip(drafts, layers.values(), strict=True):
                layer = replace(draft, weights=fingerprint(weights))
                writer = writers[layer.num_experts, layer.hidden_size, layer.intermediate_size]
                packed.append(_kept(layer) or _made(layer, weights, writer))
                bar.update(layer.size)
    _check_distinct(packed)
    about = {"ktmoe": ktmoe.__version__, "variant": kt.variant(), "bytes": sum(d.size for d in drafts)}
    write_manifest(out, model, packed, about)
    return packed


def _made(layer: PackedLayer, weights: ExpertWeights, writer: kt.Int8Files) -> PackedLayer:
    """Packs one layer; it appears under its name when it is whole."""
    written = writer.write(weights)
    files = _hashes(replace(layer, folder=written))
    about = {"weights": layer.weights, "recipe": layer.recipe._asdict(), "files": files}
    content = json.dumps(about, indent=0).encode()
    (written / FILES).write_bytes(content)
    if layer.folder.exists():
        shutil.rmtree(layer.folder)
    written.rename(layer.folder)
    return replace(layer, listing=hashlib.sha256(content).hexdigest())


def _kept(layer: PackedLayer) -> PackedLayer | None:
    """The layer as an earlier run left it, if it is whole.

    Raises:
        KTError: it is whole, but of other weights or made otherwise.
    """
    try:
        content = (layer.folder / FILES).read_bytes()
        held = json.loads(content)
        recipe, weights, files = Recipe(**held["recipe"]), held["weights"], held["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if (recipe, weights) != (layer.recipe, layer.weights):
        why = f"packed as {recipe}, not {layer.recipe}" if recipe != layer.recipe else "packed from other weights"
        raise KTError(f"{layer.folder}: {why}. Give OUT another folder, or delete this one.")
    try:
        whole = _hashes(layer) == files
    except KTError:
        return None
    return replace(layer, listing=hashlib.sha256(content).hexdigest()) if whole else None


def _hashes(layer: PackedLayer) -> dict[str, list[int | str]]:
    """Size and SHA-256 of every file, read from disk.

    Raises:
        KTError: one is missing, or has not the size that it must have.
    """

    def one(file: PackedFile) -> list[int | str]:
        path = layer.folder / file.name
        content = path.read_bytes() if path.is_file() else b""
        if len(content) != file.size:
            raise KTError(f"{path}: {len(content)} bytes, expected {file.size}. Is the disk full?")
        return [file.size, hashlib.sha256(content).hexdigest()]

    files = list(layer.files())
    with ThreadPoolExecutor(usable_cores()) as readers:
        return dict(zip((f.name for f in files), readers.map(one, files), strict=True))


def _numbers(names: list[str]) -> list[int]:
    """The layers' numbers in their model, which name their folders as in the kernel's own files."""
    found = [re.search(r"\.(\d+)\.", name) for name in names]
    numbers = [int(match[1]) for match in found if match]
    return numbers if len(set(numbers)) == len(names) else list(range(len(names)))


def _check_distinct(packed: list[PackedLayer]) -> None:
    """Weights say which layer they are. Raises KTError if they cannot."""
    first: dict[str, PackedLayer] = {}
    for layer in packed:
        other = first.setdefault(layer.weights, layer)
        if other.listing != layer.listing:
            raise KTError(
                f"{layer.module} and {other.module} have different weights that look alike: one row of each matrix is "
                "the same. Such a model is not packed; leave kt_weight_path out."
            )


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if free < needed:
        raise KTError(f"{out}: {free / 1e9:.3g} GB are free; the packed weights take {needed / 1e9:.3g} GB more.")


@contextmanager
def _locked(out: Path) -> Iterator[Path]:
    """The folder for this process alone, with an empty one in it for the kernel to write to.

    Raises:
        KTError: it holds something else, cannot be written, or another process packs into it.
    """
    try:
        with new_folder(out):
            strange = [f.name for f in out.iterdir() if not _OURS.fullmatch(f.name)]
            if strange:
                raise KTError(f"{out}: holds {strange[0]}, which is no packed weights. Give OUT a folder of its own.")
            folder = os.open(out, os.O_RDONLY)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                scratch = out / _SCRATCH
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir()
                try:
                    yield scratch
                finally:
                    shutil.rmtree(scratch)
            finally:
                os.close(folder)
    except BlockingIOError:
        raise KTError(f"{out}: another ktmoe quantize is writing there.") from None
    except OSError as error:
        raise KTError(f"{out}: cannot be written ({error}).") from error
