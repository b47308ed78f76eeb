"""Data sets and templates by name, looked up before a tokenizer or a model is loaded."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ktmoe.llamafactory import shipped
from ktmoe.llamafactory.logs import logger
from ktmoe.types import KTError


_DEFAULT = "data"  # LLaMA-Factory's dataset_dir: a folder of its repository, which a package does not have


def check_data(data_args: Any) -> None:
    """Refuses data sets and templates that nobody knows. Where there is no `data` folder, ktmoe's own is taken.

    Args:
        data_args: LLaMA-Factory's. `dataset_dir` is changed if ktmoe's data sets are the ones that were named.

    Raises:
        KTError: with the names that are known, and the remedy.
    """
    from llamafactory.data import parser, template

    names = [*(data_args.dataset or ()), *(data_args.eval_dataset or ())]
    own = set(shipped.datasets())
    missing = not (Path(_DEFAULT) / "dataset_info.json").exists()
    if data_args.dataset_dir == _DEFAULT and missing and names and own >= set(names):
        logger().warning_rank0_once(
            f"ktmoe: there is no folder {_DEFAULT} here: {', '.join(names)} are small sets that come with ktmoe, for "
            "a first run. dataset_dir names a folder of your own."
        )
        if data_args.media_dir == data_args.dataset_dir:
            data_args.media_dir = str(shipped.DATA)
        data_args.dataset_dir = str(shipped.DATA)
    parser.get_dataset_list(names, data_args.dataset_dir)
    if data_args.template is not None and data_args.template not in template.TEMPLATES:
        raise KTError(
            f"template: got {data_args.template!r}; expected one of LLaMA-Factory's, such as "
            f"{_near(data_args.template, template.TEMPLATES)}."
        )


def get_dataset_list(original: Any) -> Any:
    """What LLaMA-Factory refuses here is the user's to mend; the remedy is added."""

    def get_dataset_list(dataset_names: Any, dataset_dir: Any) -> Any:
        try:
            return original(dataset_names, dataset_dir)
        except (ValueError, KeyError, OSError) as error:
            raise KTError(f"dataset: {' '.join(str(error).split())} {_remedy(dataset_names, dataset_dir)}") from error

    return get_dataset_list


def _remedy(names: Iterable[str], dataset_dir: Any) -> str:
    known: Any = dataset_dir
    if not isinstance(dataset_dir, dict):
        try:
            known = json.loads((Path(dataset_dir) / "dataset_info.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return (
                "dataset_dir names the folder with a dataset_info.json that describes your files. Without a folder "
                f"data, {', '.join(shipped.datasets())} come with ktmoe."
            )
    unknown = next((name for name in names if name not in known), "")
    return f"There are: {_near(unknown, known)}." if known else "It describes none."


def _near(name: str, known: Iterable[str]) -> str:
    every = list(known)
    near = difflib.get_close_matches(name, every, n=3, cutoff=0.5)
    return ", ".join(near or every[:8])
