"""What lies beside an adapter: expert LoRA of the forked training stack is read, other trained numbers are refused."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import cached_file

from ktmoe.adapters.fused import ExpertLora
from ktmoe.types import KTError, MoEShape


EXPERTS_FILE, MANIFEST = "fused_expert_lora.safetensors", "kt_adapter_manifest.json"
# What else may lie in the folder: the Trainer's state, a whole model's weights, LLaMA-Factory's value head.
_OTHERS = re.compile(
    r"adapter_model\.(safetensors|bin)|optimizer\.(pt|bin)|scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth|"
    r"training_args\.bin|(model|pytorch_model|consolidated)\b.*|pytorch_model_fsdp.*|value_head\.(safetensors|bin)"
)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_KEY = re.compile(r"(?:.*\.)?layers\.(\d+)\.(?:\w+\.)?experts\.(gate|up|down)_lora_(a|b)")


def folder_of(source: str, hub: Mapping[str, Any]) -> Path:
    """Where an adapter's files are: the directory itself, or where those of a hub's name are kept.

    Args:
        source: a directory, or a name on the hub.
        hub: `subfolder`, `revision` ... as peft takes them.

    Raises:
        KTError: a file with trained numbers that nothing reads.
    """
    folder = Path(source, hub.get("subfolder") or "")
    if not folder.is_dir():
        known = ("subfolder", "revision", "cache_dir", "token", "force_download", "local_files_only")
        options: dict[str, Any] = {k: v for k, v in hub.items() if k in known}
        quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        for name in (MANIFEST, EXPERTS_FILE):
            found = cached_file(source, name, **options, **quiet)
            folder = Path(found).parent if found else folder
        return folder
    odd = [
        f.name
        for f in sorted(folder.iterdir())
        if f.suffix in _WEIGHTS and f.name != EXPERTS_FILE and not _OTHERS.fullmatch(f.name)
    ]
    if odd:
        raise KTError(
            f"{folder}: {', '.join(odd[:3])} beside the adapter: nothing here reads it, and what was trained into it "
            "would be left out. Move it elsewhere if the adapter is whole without it."
        )
    return folder


def read_forked(folder: Path, config: LoraConfig, shapes: Mapping[str, MoEShape]) -> dict[str, ExpertLora]:
    """The expert LoRA beside an adapter of the forked stack: `layers.{l}.experts.{gate,up,down}_lora_{a,b}`.

    A is [E, r, in], B [E, out, r], as ktmoe has them; scaled by alpha / r, with alpha from the manifest or the
    adapter's configuration.

    Args:
        folder: of the adapter.
        config: the adapter's.
        shapes: of the model's routed experts, by module name; their rank is not read.

    Returns:
        By module name; empty if the folder has no such file.

    Raises:
        KTError: damaged files, or tensors that are missing, of a wrong shape or of another model.
    """
    path = folder / EXPERTS_FILE
    if not path.is_file():
        return {}
    alpha = _alpha(folder, config)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise KTError(f"{path}: damaged ({error}). Copy the adapter again.") from error
    layers = {re.findall(r"\.(\d+)\.", name)[-1]: name for name in shapes if re.search(r"\.\d+\.", name)}
    found: dict[str, dict[str, str]] = {name: {} for name in shapes}
    wrong = []
    for key in tensors:
        match = _KEY.fullmatch(key)
        name = layers.get(match[1]) if match else None
        if match is None or name is None:
            wrong.append(f"{key} is not of this model")
        else:
            found[name][f"{match[2]}_proj.lora_{match[3].upper()}"] = key
    rank = config.r
    for name, keys in found.items():
        for part, size in shapes[name].lora_shapes(rank).items():
            if part not in keys:
                wrong.append(f"{part} of {name} is missing")
            elif tuple(tensors[keys[part]].shape) != size:
                wrong.append(f"{keys[part]} is {tuple(tensors[keys[part]].shape)}, expected {size}")
    if wrong:
        raise KTError(f"{path}: expert LoRA does not fit this model: {len(wrong)} tensors, e.g. {wrong[0]}.")
    return {
        name: ExpertLora({part: tensors[key] for part, key in keys.items()}, rank, alpha / rank)
        for name, keys in found.items()
    }


def _alpha(folder: Path, config: LoraConfig) -> float:
    """What expert LoRA is scaled by, times r. The manifest also says what its files were when they were written."""
    if config.use_rslora:
        raise KTError(
            f"{folder}: use_rslora: got true, beside {EXPERTS_FILE}, whose writer has no rsLoRA: the scale of the "
            "expert LoRA is unknown. Set it to false in adapter_config.json if alpha / r is right."
        )
    path = folder / MANIFEST
    if not path.is_file():
        return float(config.lora_alpha)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        written = manifest.get("artifacts", {}).get(EXPERTS_FILE, {}).get("sha256")
        alpha = float(manifest.get("lora", {}).get("alpha", config.lora_alpha))
    except (ValueError, AttributeError, TypeError) as error:
        raise KTError(f"{path}: damaged ({error}). Copy the adapter again.") from error
    digest = hashlib.sha256()
    with open(folder / EXPERTS_FILE, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    if written and digest.hexdigest() != written:
        raise KTError(
            f"{folder / EXPERTS_FILE}: not the file that {MANIFEST} was written for. Copy the adapter again."
        )
    return alpha
