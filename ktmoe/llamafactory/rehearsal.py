"""The Trainer's own checks before a model is loaded: it trains a model of a few hundred parameters for one step.

What transformers refuses, and what fails in the first step or the first evaluation for a reason that lies in the
arguments, is found by transformers itself, whatever the release. No logger is started and nothing is written.
"""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ktmoe.llamafactory.rules import shown
from ktmoe.types import KTError


_MANY = 10**6  # steps, where the number is not known yet: no schedule is too long for it
_EVALUATE = "eval_strategy: steps with eval_dataset or val_size, and metric_for_best_model: eval_loss"


def rehearse(training_args: Any, finetuning_args: Any, data_args: Any) -> None:
    """Refuses training arguments that the Trainer would refuse after the model is loaded.

    Args:
        training_args: LLaMA-Factory's, parsed; left as they are.
        finetuning_args: likewise.
        data_args: likewise.

    Raises:
        KTError: with the message of the library, and a remedy.
    """
    import transformers
    from transformers.integrations import get_reporting_integration_callbacks
    from transformers.utils import logging

    check_output_dir(training_args.output_dir)
    with _named("report_to", training_args.report_to, "Install it, or write report_to: none"):
        for logger in get_reporting_integration_callbacks(training_args.report_to):
            logger()
    if not training_args.do_train:
        return
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            _train(training_args, finetuning_args, data_args, folder)
    finally:
        logging.set_verbosity(verbosity)
        transformers.set_seed(training_args.seed)  # as LLaMA-Factory has just done
    if training_args.push_to_hub:
        with _named("push_to_hub", True, "Log in while online, or write push_to_hub: false"):
            this: Any = SimpleNamespace(args=training_args, hub_model_id=None, is_world_process_zero=lambda: True)
            transformers.Trainer.init_hf_repo(this)


def check_output_dir(output_dir: str) -> None:
    """Refuses a folder that cannot be made or written to. What was not there is not there afterwards.

    Raises:
        KTError: names the folder.
    """
    path = Path(output_dir).absolute()
    made = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path):
            pass
    except OSError as error:
        raise KTError(
            f"output_dir: got {output_dir!r}; expected a folder that can be made and written to: {error.strerror}."
        ) from error
    finally:
        for folder in made:
            with suppress(OSError):  # it was not made, or somebody else uses it by now
                folder.rmdir()


def _train(training_args: Any, finetuning_args: Any, data_args: Any, folder: str) -> None:
    from transformers import EarlyStoppingCallback, LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer

    with _named("optim", training_args.optim, "adamw_torch is the default"):
        Trainer.get_optimizer_cls_and_kwargs(training_args)  # first: it says which package is missing
    patience = finetuning_args.early_stopping_steps
    if patience is not None:
        with _named("early_stopping_steps", patience, f"Write {_EVALUATE}, or leave it out"):
            EarlyStoppingCallback(patience).on_train_begin(training_args, None, None)
    args = _for_one_step(training_args, folder)
    rows = [{"input_ids": [1, 2, 3, 4], "attention_mask": [1] * 4, "labels": [1, 2, 3, 4]}] * 2
    evaluated: Any = rows if data_args.eval_dataset or data_args.val_size else None
    if data_args.eval_dataset and data_args.eval_on_each_dataset:
        evaluated = dict.fromkeys(data_args.eval_dataset, rows)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1,
        )
    )  # fmt: skip
    with _named("", None, "Change what it names"):
        trainer = Trainer(model, args, train_dataset=rows, eval_dataset=evaluated, callbacks=[_stop()])
        trainer.remove_callback(PrinterCallback)
        trainer.get_train_dataloader()  # with its workers, which are not started
        args.dataloader_num_workers, args.dataloader_prefetch_factor = 0, None
        args.dataloader_persistent_workers = False
        args.save_strategy, args.load_best_model_at_end = "no", False
        if finetuning_args.stage in ("dpo", "kto") and args.metric_for_best_model:
            args.metric_for_best_model = "eval_loss"  # their trainers have metrics of their own
    with _named("optim", training_args.optim, "Change what it names"):
        trainer.create_optimizer()
    kwargs = training_args.lr_scheduler_kwargs
    remedy = "Write lr_scheduler_kwargs: {name: value, ...} as it needs them, or another lr_scheduler_type"
    with _named("lr_scheduler_type", f"{shown(training_args.lr_scheduler_type)}, {shown(kwargs)}", remedy):
        trainer.create_scheduler(args.max_steps, trainer.optimizer)
    with _named("", None, "Change what it names"):
        trainer.train()


def _for_one_step(training_args: Any, folder: str) -> Any:
    args = copy.copy(training_args)
    args.output_dir, args.report_to, args.push_to_hub = folder, [], False
    args.max_steps = args.max_steps if args.max_steps > 0 else _MANY
    args.disable_tqdm, args.log_level = True, "error"
    args.dataloader_drop_last = args.auto_find_batch_size = args.torch_compile = False
    args._n_gpu = min(args._n_gpu, 1)
    if getattr(args.eval_strategy, "value", args.eval_strategy) != "no":
        args.eval_strategy, args.eval_steps, args.eval_delay = type(args.eval_strategy)("steps"), 1, 0
    return args


def _stop() -> Any:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = True
            return control

    return Stop()


@contextmanager
def _named(name: str, value: Any, remedy: str) -> Iterator[None]:
    """Within it, whatever a library raises is about one argument, or about any of them if there is no name."""
    try:
        yield
    except Exception as error:  # each library has classes of its own for what it refuses
        text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
        said = text or type(error).__name__
        got = f"{name}: got {value if name == 'lr_scheduler_type' else shown(value)};"
        if not name:
            got = f"The Trainer would stop after the model is loaded ({type(error).__name__}):"
        raise KTError(f"{got} {said.rstrip('.')}. {remedy}.") from error
