"""What a training would take, from its arguments: refused, or said, before a weight is read."""

from __future__ import annotations

from typing import Any

from ktmoe.budget import Batch, Budget, CannotCount, make, remedy, sentence
from ktmoe.llamafactory import preflight
from ktmoe.llamafactory.arguments import kt_config
from ktmoe.llamafactory.logs import logger
from ktmoe.processes import on_this_host
from ktmoe.room import gigabytes
from ktmoe.types import KTError


def budget_of(
    model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any, processes: int | None = None
) -> Budget:
    """The budget of a training, of batches as long as `cutoff_len` lets them be.

    Args:
        model_args: LLaMA-Factory's, parsed.
        data_args: likewise.
        training_args: likewise.
        finetuning_args: likewise.
        processes: of this host; by default those that a launcher has started.

    Raises:
        KTError: a model or an adapter that would be refused.
    """
    lora = preflight.lora_config(finetuning_args)
    lora.r = preflight.largest_rank(model_args, finetuning_args)
    pairs = 2 if finetuning_args.stage == "dpo" else 1
    return make(
        preflight.load_config(model_args),
        lora,
        Batch(
            pairs * training_args.per_device_train_batch_size,
            data_args.cutoff_len,
            not model_args.disable_gradient_checkpointing,
        ),
        kt_config(model_args),
        dtype=model_args.compute_dtype,
        bits=model_args.quantization_bit,
        on_cpu=training_args.device.type == "cpu",
        processes=processes or on_this_host(),
    )


def check_budget(model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any) -> None:
    """Refuses what no batch could make fit, and says what the longest batch takes. Arguments as `budget_of`.

    Raises:
        KTError: names the sizes and the keys with which they fit.
    """
    if model_args.kt_plan == "off" or not training_args.do_train:
        return
    try:
        budget = budget_of(model_args, data_args, training_args, finetuning_args)
    except CannotCount as error:
        logger().warning_rank0(f"ktmoe: memory was not looked at before loading. {error}")
        return
    computed = [way for way in budget.ways if not way.why_not]
    if computed and not any(budget.fits(way, certain=True) for way in computed):
        least = min(computed, key=lambda way: budget.on_host(way, certain=True))
        needed, free = gigabytes(budget.on_host(least, certain=True)), gigabytes(budget.free_host)
        device = ""
        if budget.free_device is not None:
            device = f", and {gigabytes(budget.of_device(certain=True))} of {gigabytes(budget.free_device)} of the GPU"
        raise KTError(
            f"kt_plan: weights, LoRA and optimizer alone take {needed} of host memory, and {free} are free, swap "
            f"included{device}. {remedy(budget)} kt_plan: off goes on all the same."
        )
    logger().info_rank0(f"ktmoe: {sentence(budget)}, where a batch is as long as cutoff_len allows.")
    if computed and budget.best is None:
        size = f"{budget.batch.sequences} x {budget.batch.length}"
        logger().warning_rank0(
            f"ktmoe: a batch of {size} tokens, as long as cutoff_len allows, would not fit. {remedy(budget)}"
        )
