"""ktmoe's keys as fields of LLaMA-Factory's own `ModelArguments`."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from ktmoe.config import KTConfig


def extend(cls: type) -> None:
    """Gives a dataclass, in place, the fields of `KTConfig` that it lacks.

    The class stays the same object, since parsers, annotations and `isinstance` elsewhere hold it: what the
    dataclass decorator generated is taken over from a subclass that has the fields.

    Args:
        cls: LLaMA-Factory's `ModelArguments`.
    """
    have = {f.name for f in dataclasses.fields(cls)}
    types = {name: _for_parser(hint) for name, hint in typing.get_type_hints(KTConfig).items()}
    new = {name: spec for name, spec in KTConfig.field_help().items() if name not in have}
    if not new:
        return
    twin: Any = dataclasses.make_dataclass(
        cls.__name__,
        [(n, types[n], dataclasses.field(default=d, metadata={"help": h})) for n, (_, d, h) in new.items()],
        bases=(cls,),
    )
    for name, (_, default, _) in new.items():
        cls.__annotations__[name] = types[name]  # where HfArgumentParser looks
        setattr(cls, name, default)
    for name in ("__init__", "__repr__", "__eq__", "__match_args__", "__dataclass_fields__"):
        setattr(cls, name, vars(twin)[name])


def _for_parser(hint: Any) -> Any:
    """A list is text on a command line, which `KTConfig` reads; in a file it comes as it is."""
    simple = {bool, int, str, type(None)}.issuperset(typing.get_args(hint) or [hint])
    return hint if simple else typing.Optional[str]  # noqa: UP045


def kt_config(model_args: Any) -> KTConfig:
    """The configuration in parsed `ModelArguments`.

    Raises:
        KTError: LLaMA-Factory's parser checks no values; `KTConfig` does.
    """
    return KTConfig(**{name: getattr(model_args, name) for name in KTConfig.field_help()})
