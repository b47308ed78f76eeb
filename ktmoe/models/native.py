"""transformers' own model classes instead of a checkpoint's remote code.

Checkpoints keep pointing to Python files that were written for transformers 4 (`auto_map`) long after transformers has
the architecture. `trust_remote_code: true`, which many configurations set for the tokenizer, would run those files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


def native_class(path: str | os.PathLike[str], hub: Mapping[str, Any]) -> str:
    """The name of transformers' configuration class for the model, "" if it has none.

    Args:
        path: a directory, or a name on the hub.
        hub: revision, token and so on.

    Raises:
        OSError: no such model.
    """
    options = {key: value for key, value in hub.items() if key != "trust_remote_code"}
    raw, _ = PretrainedConfig.get_config_dict(path, **options)
    model_type = raw.get("model_type", "")
    return CONFIG_MAPPING[model_type].__name__ if model_type in CONFIG_MAPPING else ""


@contextmanager
def native_config(native: str) -> Iterator[None]:
    """Within it, `AutoConfig` ignores the remote code of a model whose class transformers has.

    Tokenizers' remote code is looked up elsewhere and stays possible.

    Args:
        native: from `native_class`; nothing is changed if it is "".
    """
    if not native:
        yield
        return
    stock = AutoConfig.from_pretrained

    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        found = stock(*args, **{**kwargs, "trust_remote_code": False})
        config = found[0] if isinstance(found, tuple) else found  # with return_unused_kwargs
        if hasattr(config, "auto_map"):
            del config.auto_map  # else transformers' class is registered as that remote code, and saved as such
        return found

    with mock.patch.object(AutoConfig, "from_pretrained", from_pretrained):
        yield
