"""Fine-tune a small Qwen3-MoE through stock LLaMA-Factory with ``use_kt: true``, and show that it worked.

``python examples/demo/run.py [--out DIR] [--backend auto] [--seed 0]``; README.md says what the stages are. The exit
code is 0 only if the held-out loss fell clearly and stock peft agrees with ktmoe about the saved adapter.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


HERE = Path(__file__).resolve().parent

# A seventh of what the run gave on the machine it was written on, from a base model cut short by a busy host.
MINIMUM_LOSS_DROP = 0.1
# Two fp32 computations of one function agree to 1e-7. Adapters spoilt on purpose, after half an epoch: one expert of a
# layer dropped 1.1e-3, all down_proj scaled by 1.05 7e-3, two experts of one layer swapped 6e-2.
MAXIMUM_LOGITS_DIFFERENCE = 1e-4

console = Console()


class DemoFailure(Exception):
    """A check of the demo failed."""


@dataclass
class Run:
    """Folders and results of one run."""

    out: Path
    seconds: dict[str, float] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        """A file or folder of this run."""
        return self.out / name

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage and keep its time."""
        console.rule(f"[bold]{len(self.seconds) + 1}. {name}")
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started

    def script(self, name: str, **options: Path | int) -> None:
        """Run one of the demo's scripts in a process of its own."""
        from finetune import environment

        arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        env = environment(self.path("cache")) | {
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        subprocess.run([sys.executable, str(HERE / name), *arguments], env=env, check=True)

    def evaluate(self, report: str, samples: int, **options: Path) -> dict[str, Any]:
        """Run ``stock_check.py`` and read its report."""
        target = self.path(report)
        self.script(
            "stock_check.py",
            base=self.path("base"), data=self.path("data"), report=target, samples=samples, **options,
        )  # fmt: skip
        return json.loads(target.read_text(encoding="utf-8"))


def make_data_and_base(run: Run, seed: int, steps: int) -> int:
    """Corpus, tokenizer, datasets and the pretrained base model; the number of training pairs."""
    from corpus import build_corpus
    from dataset import write_dataset

    with run.stage("text that ships with CPython"):
        corpus = build_corpus()
        write_dataset(run.path("data"), corpus.train, corpus.held_out)
        console.print(
            f"{len(corpus.pretrain)} documents to pretrain on ({sum(map(len, corpus.pretrain)) / 1e6:.2f} million "
            f"characters), {len(corpus.train)} question-answer pairs to fine-tune on, {len(corpus.held_out)} held out"
        )

    with run.stage("a base model, pretrained with stock transformers"):
        import torch
        from pretrain import PretrainConfig, pretrain
        from tokenizer import train_tokenizer

        torch.set_num_threads(min(2, os.cpu_count() or 1))  # the same sums in the same order on every host
        tokenizer = train_tokenizer(corpus.pretrain)
        model, loss = pretrain(tokenizer, corpus.pretrain, PretrainConfig(steps=steps, seed=seed))
        model.save_pretrained(run.path("base"))
        tokenizer.save_pretrained(run.path("base"))
        console.print(f"Qwen3-MoE, {model.num_parameters():,} parameters, last training loss {loss:.2f}")

    return len(corpus.train)


def logits_difference(run: Run) -> float:
    """Relative mean absolute difference between ktmoe's and stock peft's logits."""
    from safetensors.torch import load_file

    stock, ours = (load_file(run.path(name))["logits"].double() for name in ("stock.safetensors", "ktmoe.safetensors"))
    return ((ours - stock).abs().mean() / stock.abs().mean()).item()


def trained_parameters(adapter: Path) -> int:
    """Number of values in the saved adapter, from the header of its file."""
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as tensors:
        shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys()]
    total = 0
    for rows, columns in shapes:
        total += rows * columns
    return total


def show(run: Run, backend: str, before: dict[str, Any], after: dict[str, Any], difference: float) -> None:
    """Print the tables at the end."""
    for old, new in zip(before["samples"], after["samples"], strict=True):
        samples = Table(title=old["question"], title_justify="left", show_header=False, width=console.width)
        for label, text in (("before", old["answer"]), ("after", new["answer"]), ("docstring", old["reference"])):
            samples.add_row(label, text or "(nothing)")
        console.print(samples)

    plots = sorted(path.name for path in run.path("adapter").glob("training_*.png"))
    summary = Table(title="ktmoe demo", show_header=False)
    summary.add_row("kt_backend asked for", backend)  # what it came to is in the log, "routed experts on ..."
    summary.add_row("trained parameters", f"{trained_parameters(run.path('adapter')):,}")
    summary.add_row("held-out loss (nats per token)", f"{before['loss']:.3f} -> {after['loss']:.3f}")
    summary.add_row("logits, ktmoe against stock peft", f"{difference:.1e} (limit {MAXIMUM_LOGITS_DIFFERENCE:.0e})")
    for name, seconds in run.seconds.items():
        summary.add_row(f"time: {name}", f"{seconds:.0f} s")
    summary.add_row("adapter", str(run.path("adapter")))
    summary.add_row("loss plots", ", ".join(plots) or "none written")
    console.print(summary)


def check(before: dict[str, Any], after: dict[str, Any], difference: float) -> None:
    """Fail unless the run shows what it is meant to show. The comparisons are written so that NaN fails."""
    if not before["loss"] - after["loss"] >= MINIMUM_LOSS_DROP:
        raise DemoFailure(
            f"The held-out loss went from {before['loss']:.3f} to {after['loss']:.3f}; it should fall by at least "
            f"{MINIMUM_LOSS_DROP}."
        )
    if not after["expert_update_norm"] > 0:
        raise DemoFailure("No trained expert LoRA arrived in the model that stock peft loaded.")
    if not difference < MAXIMUM_LOGITS_DIFFERENCE:
        raise DemoFailure(
            f"Stock peft and ktmoe disagree about the saved adapter: their logits differ by {difference:.1e} "
            f"(relative, limit {MAXIMUM_LOGITS_DIFFERENCE:.0e})."
        )


def demo(args: argparse.Namespace) -> None:
    """All stages in order."""
    from finetune import FinetuneConfig, command, finetune

    run = Run(args.out.resolve())
    for name in ("adapter", "base", "data", "cache"):  # what an earlier run left must not pass for this one's
        shutil.rmtree(run.path(name), ignore_errors=True)
    run.out.mkdir(parents=True, exist_ok=True)

    train_pairs = make_data_and_base(run, args.seed, args.pretrain_steps)
    with run.stage("held-out loss before, stock transformers"):
        before = run.evaluate("before.json", args.samples)
        console.print(f"held-out loss {before['loss']:.3f}")

    with run.stage("ktmoe train: stock LLaMA-Factory with use_kt: true"):
        config = FinetuneConfig(backend=args.backend, seed=args.seed, epochs=args.epochs)
        arguments = command(config, run.path("base"), run.path("data"), run.path("adapter"), train_pairs)
        console.print(shlex.join(["ktmoe", *arguments]), style="dim", highlight=False)
        finetune(arguments, run.path("cache"))

    with run.stage("held-out loss after, stock transformers and peft"):
        options = {"adapter": run.path("adapter"), "logits": run.path("stock.safetensors")}
        after = run.evaluate("after.json", args.samples, **options)
        console.print(f"held-out loss {after['loss']:.3f}")

    with run.stage("the same adapter in ktmoe"):
        shared = {name: run.path(name) for name in ("base", "adapter", "data")}
        run.script("ktmoe_logits.py", **shared, logits=run.path("ktmoe.safetensors"))
        difference = logits_difference(run)

    show(run, args.backend, before, after, difference)
    check(before, after, difference)


def main() -> int:
    """Parse the arguments, run, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for everything the demo writes")
    parser.add_argument("--backend", default="auto", help="kt_backend: auto, AMXBF16, AMXInt8, torch or reference")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pretrain-steps", type=int, default=1400)
    parser.add_argument("--epochs", type=float, default=2.0, help="epochs of fine-tuning")
    parser.add_argument("--samples", type=int, default=3, help="held-out questions to answer before and after")
    args = parser.parse_args()
    # Before torch loads OpenMP: threads that wait by spinning make a busy 2-core host five times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        demo(args)
    except DemoFailure as error:
        console.print(f"[bold red]FAILED[/] {error}")
        return 1
    except subprocess.CalledProcessError as error:
        console.print(f"[bold red]FAILED[/] exit code {error.returncode}: {shlex.join(error.cmd[:4])} ...")
        return 1

    console.print(
        "[bold green]OK[/] the held-out loss fell, and stock peft reads the same adapter to the same logits."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
