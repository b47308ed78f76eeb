"""Which files a model is: decided once, by transformers itself, for whatever reads a checkpoint."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ktmoe.types import KTError


HUB = ("subfolder", "revision", "cache_dir", "token", "force_download", "local_files_only", "proxies")
OPTIONS = (*HUB, "variant", "use_safetensors")
_ABSENT_IS_FINE = {"_raise_exceptions_for_missing_entries": False}


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model.

    Attributes:
        path: a directory or a name on the hub, as the user gave it.
        config: what config.json says; empty without one.
        folder: where config.json lies, and tokenizer and generation files beside it; None without one.
        weights: the files that transformers reads, in its order.
        promised: key -> file name, as the index says; empty where there is none.
        metadata: of the index.
    """

    path: str
    config: Mapping[str, Any]
    folder: Path | None
    weights: list[str]
    promised: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)


def find_files(
    path: str | os.PathLike[str],
    *,
    transformers_weights: str | None = None,
    adapter_beside: bool = False,
    **options: Any,
) -> ModelFiles:
    """The files that transformers would read for a model, downloaded if they are on the hub.

    Args:
        path: a directory, or a name on the hub.
        transformers_weights: the file that the configuration names as the weights; default: what config.json says.
        adapter_beside: whether an adapter in the same place is read by somebody else.
        **options: those of `OPTIONS`, as `from_pretrained` takes them. Others are ignored.

    Raises:
        KTError: no such model, no weights, an index that is broken or whose shards are missing, or an adapter that
            transformers would load on top.
    """
    path = str(path)
    hub = {k: v for k, v in options.items() if k in HUB and v is not None}
    if not adapter_beside:
        refuse_adapter(path, hub)
    config, folder = read_config(path, hub)
    explicit = transformers_weights or config.get("transformers_weights")
    choice = {k: options.get(k) for k in ("variant", "use_safetensors")}
    try:
        weights, index = _resolve(path, hub, **choice, transformers_weights=explicit)
        if None in weights:  # transformers 4, offline
            raise OSError("offline, and not in the cache")
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise KTError(f"{path}: its index of shards cannot be read ({error!r}). Download it again.") from error
    except (OSError, ValueError) as error:
        raise KTError(
            f"{path}: no weights that transformers reads: neither model.safetensors, nor "
            f"model.safetensors.index.json, nor pytorch_model.bin ({error})"
        ) from error
    index = dict(index or {})
    promised: Mapping[str, str] = index.pop("weight_map", {})
    index.pop("all_checkpoint_keys", None)
    lost = [Path(file).name for file in weights if not os.path.isfile(file)]
    if lost:
        raise KTError(
            f"{path}: {len(lost)} of {len(weights)} shards are missing: {', '.join(lost[:5])}. Download them."
        )
    return ModelFiles(path, config, folder, weights, promised, index)


def read_config(path: str, hub: Mapping[str, Any]) -> tuple[Mapping[str, Any], Path | None]:
    """What a model's config.json says, and the folder that holds it; nothing where there is none.

    Raises:
        KTError: no such model, or no JSON.
    """
    from transformers import PretrainedConfig
    from transformers.utils import cached_file

    if os.path.isfile(path):  # a file of weights, whose configuration the caller has
        return {}, None
    try:
        file = cached_file(path, "config.json", **hub, **_ABSENT_IS_FINE)
        if file is None:
            return {}, None
        content, _ = PretrainedConfig.get_config_dict(path, **hub)
    except (OSError, ValueError) as error:
        raise KTError(f"{path}: neither a directory nor a model that the hub can give ({error}).") from error
    return content, Path(file).parent


def _resolve(
    path: str, hub: Mapping[str, Any], variant: Any, use_safetensors: Any, transformers_weights: Any
) -> tuple[list[str], dict[str, Any] | None]:
    """The weights, and of shards what their index says."""
    from transformers import modeling_utils

    places = {**dict.fromkeys(HUB), "subfolder": "", "revision": "main", "force_download": False}
    places |= {"local_files_only": False, **hub}
    given = {
        **places,
        "pretrained_model_name_or_path": path,
        "variant": variant,
        "gguf_file": None,
        "from_tf": False,
        "from_flax": False,
        "use_safetensors": use_safetensors,
        "user_agent": {"file_type": "model", "framework": "pytorch"},
        "commit_hash": None,
        "is_remote_code": True,  # loading, which comes after, has the hub convert old files; once is enough
        "transformers_explicit_filename": transformers_weights,
        "download_kwargs": places,
    }
    theirs = getattr(modeling_utils, "_get_resolved_checkpoint_files", None)
    wanted = inspect.signature(theirs).parameters if theirs else {}
    if theirs is None or any(p.default is p.empty and name not in given for name, p in wanted.items()):
        return _in_order(path, hub, variant, use_safetensors)
    weights, index = theirs(**{name: given[name] for name in wanted if name in given})
    return list(weights), index


def _in_order(
    path: str, hub: Mapping[str, Any], variant: Any, use_safetensors: Any
) -> tuple[list[str], dict[str, Any] | None]:
    """transformers' order, for releases that cannot be asked: before 4.49 it is part of `from_pretrained`."""
    from transformers import modeling_utils, utils

    names = []
    if use_safetensors is not False:
        names += [(utils.SAFE_WEIGHTS_NAME, False), (utils.SAFE_WEIGHTS_INDEX_NAME, True)]
    if not use_safetensors:
        names += [(utils.WEIGHTS_NAME, False), (utils.WEIGHTS_INDEX_NAME, True)]
    for name, sharded in names:
        file = utils.cached_file(path, modeling_utils._add_variant(name, variant), **hub, **_ABSENT_IS_FINE)
        if file is not None and sharded:
            return utils.hub.get_checkpoint_shard_files(path, file, **hub)
        if file is not None:
            return [file], None
    raise OSError(f"none of {', '.join(name for name, _ in names)} is there")


def refuse_adapter(path: str | os.PathLike[str], hub: Mapping[str, Any]) -> None:
    """Refuses an adapter where a model is asked for: transformers would load it on top of one, without the experts.

    Args:
        path: a directory, or a name on the hub.
        hub: of `HUB`.

    Raises:
        KTError: an adapter is there, beside a model or in its place.
    """
    from transformers.utils import cached_file, find_adapter_config_file

    path = str(path)
    if os.path.isfile(path):
        return
    try:
        found = find_adapter_config_file(path, **hub)
        model = found and cached_file(path, "config.json", **hub, **_ABSENT_IS_FINE)
    except (OSError, ValueError) as error:
        raise KTError(f"{path}: neither a directory nor a model that the hub can give ({error}).") from error
    if not found:
        return
    remedy = "Move it (adapter_*) to a folder of its own"
    if not model:
        base = json.loads(Path(found).read_text(encoding="utf-8")).get("base_model_name_or_path")
        remedy = f"Name the model that it was trained on ({base})"
    raise KTError(
        f"{path}: holds an adapter ({Path(found).name}), which belongs on top of a model. {remedy}, and give the "
        "adapter to ktmoe.load_adapter, to `ktmoe merge`, or to adapter_name_or_path in LLaMA-Factory."
    )
