"""Writing adapters: expert LoRA beside what peft writes, read back, and put in its place whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ktmoe_reference import LORA_NAMES
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ktmoe.adapters.beside import EXPERTS_FILE, MANIFEST
from ktmoe.adapters.config import PREFIX, modules_of, readable, saved_config
from ktmoe.adapters.files import CONFIG, DROPOUT, WEIGHTS, places
from ktmoe.adapters.fused import ExpertLora, fuse
from ktmoe.adapters.layout import PER_EXPERT, CheckpointLayout
from ktmoe.types import KTError, MoEShape


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A folder to write into, whose files go to `directory` when everything has been written, or not at all.

    Args:
        directory: made if it is not there, and taken away again if nothing comes into it.

    Yields:
        An empty folder, but for the model card, which peft goes on writing.
    """
    made = [d for d in (directory, *directory.parents) if not d.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
    try:
        if (directory / "README.md").is_file():
            shutil.copyfile(directory / "README.md", part / "README.md")
        yield part
        _publish(part, directory)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    shutil.rmtree(part, ignore_errors=True)


def _publish(part: Path, directory: Path) -> None:
    """Puts every file of `part` in the place of the one of its name; undone if one of them cannot be."""
    undo: list[tuple[Path, Path | None]] = []  # what was put there, and where its predecessor is kept
    made: list[Path] = []
    kept = part / ".before"
    try:
        for file in sorted(p for p in part.rglob("*") if p.is_file()):
            target = directory / file.relative_to(part)
            if not target.parent.exists():
                target.parent.mkdir()
                made.append(target.parent)
            stale = [target.with_name(n) for n in (EXPERTS_FILE, MANIFEST)] if file.name == WEIGHTS else []
            for old in [p for p in (target, *stale) if p.exists()]:
                keep = kept / str(len(undo))
                kept.mkdir(exist_ok=True)
                undo.append((old, keep))
                os.replace(old, keep)
            undo.append((target, None))
            os.replace(file, target)
    except BaseException:
        for target, before in reversed(undo):
            with contextlib.suppress(FileNotFoundError):
                target.unlink() if before is None else os.replace(before, target)
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def write_experts(
    folder: Path, experts: Mapping[str, ExpertLora], layout: CheckpointLayout, names: Collection[str]
) -> None:
    """Adds expert LoRA to an adapter that peft has written without it, and makes the configuration say so.

    What was written is read back.

    Args:
        folder: of the adapter, one that nobody reads yet.
        experts: by module name; empty if the adapter has none.
        layout: how this family's files name experts.
        names: of all modules of the model.

    Raises:
        KTError: what was written is not what was to be written.
    """
    path, config_path = folder / WEIGHTS, folder / CONFIG
    with safe_open(path, "pt") as file:
        rest = {key: file.get_tensor(key) for key in file.keys()}
    config = json.loads(config_path.read_text(encoding="utf-8"))
    dropout = config.get("lora_dropout") or 0.0
    modules = modules_of({k: tuple(v.shape) for k, v in rest.items()}, LoraConfig(**readable(config)))
    remapped = any(m.rpartition(".")[2] in layout.remapped for m in modules)
    if not experts and (layout.unreadable or not remapped):  # peft that fuses nothing remaps nothing either
        return
    config = saved_config(config, experts, modules, layout, names)
    tensors = rest | (_per_expert(experts, layout) if layout.adapter_format == PER_EXPERT else _fused(experts))
    metadata = {"format": "pt"} | ({DROPOUT: str(dropout)} if dropout and not config["lora_dropout"] else {})
    save_file(tensors, path, metadata=metadata)
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    _check_written(path, config_path, tensors, experts, layout)


def _per_expert(experts: Mapping[str, ExpertLora], layout: CheckpointLayout) -> dict[str, Tensor]:
    tensors = {}
    for name, lora in experts.items():
        for key, stack in lora.tensors.items():
            projection, side = key.split(".")
            for e in range(len(stack)):
                where = layout.to_disk(f"{PREFIX}{name}.{e}.{layout.projections[projection]}")
                tensors[f"{where}.{side}.weight"] = stack[e].clone()
    return tensors


def _fused(experts: Mapping[str, ExpertLora]) -> dict[str, Tensor]:
    tensors = {}
    for name, lora in experts.items():
        for parameter, pair in fuse(lora.tensors).items():
            inside = "base_layer." if parameter == "gate_up_proj" else ""
            for side, tensor in zip("AB", pair, strict=True):
                tensors[f"{PREFIX}{name}.{inside}lora_{side}.weight"] = tensor
    return tensors


def _check_written(
    path: Path, config_path: Path, tensors: Mapping[str, Tensor], experts: Mapping[str, ExpertLora], layout: Any
) -> None:
    """Reads back names, shapes and configuration as a reader would, before the files take their place."""
    with safe_open(path, "pt") as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    expected = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    odd = sorted(k for k in {*found, *expected} if found.get(k) != expected.get(k))
    if odd:
        raise KTError(
            f"{path}: {len(odd)} tensors are not as they were written, e.g. {odd[0]}: {found.get(odd[0])}, expected "
            f"{expected.get(odd[0])}. Is the disk full? The adapter was not saved."
        )
    config = LoraConfig(**readable(json.loads(config_path.read_text(encoding="utf-8"))))
    shapes = {name: _shape(lora) for name, lora in experts.items()}
    found_places, _ = places({layout.to_module(k): v for k, v in found.items()}, config, shapes, layout, str(path))
    lost = sorted(set(experts) - set(found_places))
    if lost:
        raise KTError(f"{path}: the expert LoRA of {len(lost)} layers is not there, e.g. {lost[0]}. Save it again.")
    for name, place in found_places.items():
        if any(not math.isclose(s, experts[name].scaling) for s in place.scaling.values()):
            raise KTError(f"{config_path}: expert LoRA is scaled by {place.scaling}, not {experts[name].scaling}.")


def _shape(lora: ExpertLora) -> MoEShape:
    e, _, h = lora.tensors[LORA_NAMES[0]].shape
    return MoEShape(e, h, lora.tensors[LORA_NAMES[1]].shape[1], 1, lora.rank)
