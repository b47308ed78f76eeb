"""The keys as the user wrote them, before LLaMA-Factory's parser sees them: it lets unknown ones vanish."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Union

import yaml

from ktmoe.config import KTConfig, check_keys
from ktmoe.types import KTError


Args = Union[Mapping[str, Any], Sequence[str]]  # noqa: UP007  (evaluated at import on Python 3.10)

# Old keys that are fields of LLaMA-Factory 0.9.5 all the same: null is what they are by default.
_STOCK_FIELDS = (
    "kt_expert_checkpoint_path",
    "kt_use_lora_experts",
    "kt_lora_expert_num",
    "kt_lora_expert_intermediate_size",
)


def read(argv: Sequence[str]) -> Args:
    """What LLaMA-Factory's commands make of their arguments: a mapping if they name a file, else the list itself.

    JSON files are read here because 0.9.5 hands a path to `json.load`, which raises.

    Raises:
        KTError: a file that cannot be read or is no mapping.
    """
    if not argv or not argv[0].endswith((".yaml", ".yml", ".json")):
        return list(argv)
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = Path(argv[0]).absolute()
    try:
        if path.suffix == ".json":
            loaded = OmegaConf.create(json.loads(path.read_text(encoding="utf-8")))
        else:
            loaded = OmegaConf.load(path)
        args = OmegaConf.to_container(OmegaConf.merge(loaded, OmegaConf.from_cli(list(argv[1:]))))
    except OSError as error:
        raise KTError(f"{argv[0]}: cannot be read ({error.strerror or error}).") from error
    except (yaml.YAMLError, json.JSONDecodeError, OmegaConfBaseException, TypeError, ValueError) as error:
        raise KTError(f"{argv[0]}: not a mapping of keys to values: {error}") from error
    if not isinstance(args, dict):
        raise KTError(f"{argv[0]}: got {type(args).__name__}; expected a mapping of keys to values.")
    return {str(key): value for key, value in args.items()}


def flat(args: Args) -> Args:
    """The same arguments without `kt_config`, the mapping that LLaMA-Factory's development head has for these keys.

    Raises:
        KTError: no mapping, a key in it that ktmoe does not have, or one that is given beside it too.
    """
    if not isinstance(args, Mapping):
        if "kt_config" in values(args):
            raise KTError("kt_config: a mapping fits a file, not the command line. Write --kt_backend and so on.")
        return args
    if args.get("kt_config") is None:
        return {name: value for name, value in args.items() if name != "kt_config"}
    inner = args["kt_config"]
    if not isinstance(inner, Mapping):
        raise KTError(f"kt_config: got {inner!r}; expected a mapping of keys to values, such as kt_backend: AMXBF16.")
    for name in inner:
        if name not in KTConfig.field_help():
            near = difflib.get_close_matches(str(name), list(KTConfig.field_help()), n=1)
            hint = f"Did you mean {near[0]}?" if near else f"ktmoe's keys are {', '.join(KTConfig.field_help())}."
            raise KTError(f"kt_config: {name}: no such key. {hint}")
        if name in args:
            raise KTError(f"kt_config: {name} is given beside it too. Write it once.")
    return {name: value for name, value in args.items() if name != "kt_config"} | dict(inner)


def values(args: Args) -> dict[str, Any]:
    """Names and values of either form. On the command line a value is read as YAML, a lone flag is true."""
    if isinstance(args, Mapping):
        return dict(args)
    found: dict[str, Any] = {}
    for here, following in zip(args, [*args, "--"][1:], strict=True):
        if here.startswith("--") and len(here) > 2:
            name, equals, value = here[2:].partition("=")
            if not equals:
                value = "true" if following.startswith("--") else following
            found[name.replace("-", "_")] = _read_value(value)
    return found


def check(args: Args) -> None:
    """Refuses keys of older stacks, and kt keys that nobody knows.

    Raises:
        KTError: says what to write instead.
    """
    given = values(args)
    check_keys(name for name, value in given.items() if not (name in _STOCK_FIELDS and value is None))
    known = ["use_kt", *KTConfig.field_help()]
    for name in given:
        if name.startswith(("kt_", "use_kt")) and name not in (*known, *_STOCK_FIELDS):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"ktmoe's keys are {', '.join(known)}."
            raise KTError(f"{name}: no such key. {hint}")
    uses_kt(args)


def uses_kt(args: Args) -> bool:
    """Whether the arguments ask for ktmoe.

    Raises:
        KTError: a value that is neither true nor false; the parser would take the text "false" for true.
    """
    value = values(args).get("use_kt")
    if value is not None and not isinstance(value, bool):
        raise KTError(f"use_kt: got {value!r}; expected true or false.")
    return bool(value)


def _read_value(text: str) -> Any:
    """A command line's value; the spellings of HfArgumentParser for booleans that YAML does not have are added."""
    more = {"t": True, "y": True, "1": 1, "f": False, "n": False, "0": 0}
    try:
        return more.get(text.lower(), yaml.safe_load(text))
    except yaml.YAMLError:
        return text
