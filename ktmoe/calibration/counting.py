"""Runs a model over token ids and counts, layer by layer, how many tokens each expert gets."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm

from ktmoe import devices
from ktmoe.calibration.rows import rows_of
from ktmoe.config import KTConfig
from ktmoe.models import load_model, moe_layers
from ktmoe.types import KTError


def calibrate(
    model: str,
    rows: Iterable[Sequence[int]],
    tokens: int,
    length: int,
    config: KTConfig | None = None,
    **from_pretrained: Any,
) -> dict[str, list[int]]:
    """Loads a model, as soon as there is a row, and counts.

    Args:
        model: a folder, or a hub name.
        rows: token ids.
        tokens: how many are enough.
        length: at which longer rows are cut off.
        config: what computes the experts; by default `auto`.
        **from_pretrained: as `load_model` takes them: `revision`, `cache_dir`, `trust_remote_code` ...

    Returns:
        E counts for each layer, by its name.

    Raises:
        KTError: as `load_model`; or no rows.
    """
    rows = (row for row in rows if len(row))
    first = next(rows, None)
    if first is None:
        raise KTError("DATA: there is not one token in it.")
    loaded = load_model(model, config or KTConfig(), **from_pretrained)
    device = devices.accelerator()
    if device is not None:
        loaded.to(device)  # the experts stay
    return _count(loaded, itertools.chain([first], rows), tokens, length)


def of_data(model: str, data: str, tokens: int, length: int, trust_remote_code: bool = False) -> dict[str, list[int]]:
    """`calibrate` with the rows of a data set. Arguments as `rows_of` and `calibrate` take them."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise KTError(f"{model}: no tokenizer there ({' '.join(str(error).split())}).") from error
    return calibrate(model, rows_of(data, tokenizer), tokens, length, trust_remote_code=trust_remote_code)


@torch.no_grad()
def _count(model: nn.Module, rows: Iterable[Sequence[int]], tokens: int, length: int) -> dict[str, list[int]]:
    layers = moe_layers(model)
    found = {name: torch.zeros(experts.num_experts, dtype=torch.int64) for name, experts in layers.items()}

    def hook(name: str) -> Any:
        def counted(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            index: Tensor = args[1] if len(args) > 1 else kwargs["top_k_index"]
            found[name] += index.flatten().cpu().bincount(minlength=len(found[name]))

        return counted

    hooks = [m.register_forward_pre_hook(hook(name), with_kwargs=True) for name, m in layers.items()]
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    model.eval()
    seen = 0
    try:
        with tqdm(total=tokens, desc="Counting", unit=" tokens", unit_scale=True) as bar:
            for row in rows:
                ids = torch.tensor([list(row)[:length]], dtype=torch.int64).to(embeddings.weight.device)
                model(input_ids=ids, use_cache=False)
                bar.update(min(ids.numel(), tokens - seen))
                seen += ids.numel()
                if seen >= tokens:
                    break
    finally:
        for one in hooks:
            one.remove()
    return {name: counts.tolist() for name, counts in found.items()}


def in_words(layers: Mapping[str, Sequence[int]], file: str | os.PathLike[str]) -> str:
    """What was counted, and the keys to write."""
    experts = max(map(len, layers.values()))
    several = sorted({experts // 8, experts // 4, experts // 2} - {0}) or [1]
    said = ", ".join(f"{n} have {_share(layers, n):.0%}" for n in several)
    return (
        f"ktmoe: {os.fspath(file)}: of {experts} experts in each of {len(layers)} layers, the most used {said} of the "
        f"tokens.\nkt_num_gpu_experts: {several[0]}\nkt_gpu_experts: {os.fspath(file)}"
    )


def _share(layers: Mapping[str, Sequence[int]], number: int) -> float:
    """What part of all tokens' experts are among the `number` most used ones of their layer: 0 to 1."""
    most = sum(sum(sorted(counts, reverse=True)[:number]) for counts in layers.values())
    return most / max(1, sum(map(sum, layers.values())))
