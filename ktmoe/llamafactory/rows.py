"""The token ids that a configuration's training would see, by LLaMA-Factory's own data sets and templates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ktmoe.types import KTError


_STAGES = {"dpo": "rm"}  # whose rows are pairs


def rows(model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any) -> Iterator[list[int]]:
    """Of each row of the training set; of a pair, the preferred one.

    Args:
        model_args: LLaMA-Factory's, parsed.
        data_args: likewise.
        training_args: likewise.
        finetuning_args: likewise.

    Raises:
        KTError: no training set, or one that cannot be read.
    """
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.model import load_tokenizer

    if not data_args.dataset:
        raise KTError("dataset: is not given; calibration counts where the tokens of the training set go.")
    tokenizer = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(tokenizer["tokenizer"], data_args)
    stage = _STAGES.get(finetuning_args.stage, finetuning_args.stage)
    try:
        found = get_dataset(template, model_args, data_args, training_args, stage=stage, **tokenizer)
    except (ValueError, RuntimeError, OSError) as error:
        raise KTError(f"dataset: {error}") from error
    for row in found["train_dataset"]:
        yield row["chosen_input_ids"] if "chosen_input_ids" in row else row["input_ids"]
