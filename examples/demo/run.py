"""Fine-tune a real language model through stock LLaMA-Factory with ``use_kt: true``, and show that it worked.

``python examples/demo/run.py [--backend auto] [--stage sft] [--out DIR]``; README.md says what the steps are. The exit
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


HERE = Path(__file__).resolve().parent
HELD_OUT_QUESTIONS = 48
console = Console()


@dataclass
class Run:
    """Folders and times of one run."""

    out: Path
    seconds: dict[str, float] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        """A file or folder of this run."""
        return self.out / name

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Announce a step and keep its time."""
        console.rule(f"[bold]{len(self.seconds) + 1}. {name}")
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started

    def script(self, name: str, *arguments: str, **paths: str | int) -> None:
        """Run one of the demo's scripts in a process of its own; paths are relative to this run's folder."""
        from finetune import environment

        options = [text for key, value in paths.items() for text in (f"--{key}", str(self._absolute(value)))]
        env = environment(self.path("cache")) | {"TRANSFORMERS_VERBOSITY": "error"}
        subprocess.run([sys.executable, str(HERE / name), *arguments, *options], env=env, check=True)

    def measure(self, when: str, **paths: str | int) -> dict[str, Any]:
        """Run ``measure.py`` and read its report."""
        report = f"{when}.json"
        self.script("measure.py", when, data="data", moe="model/moe", report=report, **paths)
        return json.loads(self.path(report).read_text(encoding="utf-8"))

    def _absolute(self, value: str | int) -> Path | int:
        return self.path(value) if isinstance(value, str) else value


def demo(run: Run, stage: str, backend: str, seed: int, steps: int | None, samples: int) -> None:
    """All steps in order.

    Raises:
        show.DemoFailure: If a result is not what the demo is meant to show.
        subprocess.CalledProcessError: If a step fails; it has said why.
    """
    from dataset import read, write_questions
    from finetune import command, ktmoe
    from questions import ask, read_standard_library
    from show import check, check_upcycling, show

    with run.step("a real language model, and a mixture of experts made of it"):
        run.script("upcycle.py", str(run.path("model")))

    with run.step("questions that CPython's own documentation answers"):
        train, held_out = ask(read_standard_library())
        write_questions(run.path("data"), train, held_out[:HELD_OUT_QUESTIONS])
        console.print(
            f"{len(train)} questions to train on, {len(held_out[:HELD_OUT_QUESTIONS])} held out, for example"
        )
        console.print(f"{held_out[0].text}\n{held_out[0].answer}", style="italic", markup=False)
        if stage == "dpo":
            run.script("preferences.py", dense="model/dense", data="data")

    with run.step("before: stock transformers"):
        before = run.measure("before", dense="model/dense", samples=samples)
        check_upcycling(console, before)

    with run.step("ktmoe train: stock LLaMA-Factory with use_kt: true"):
        arguments = command(stage, run.path("model/moe"), run.path("data"), run.path("adapter"), backend, seed, steps)
        console.print(shlex.join(["ktmoe", *arguments]), style="dim", highlight=False)
        ktmoe(arguments, run.path("cache"))

    with run.step("ktmoe merge: adapter and model in one plain checkpoint"):
        merge = ["merge", *(str(run.path(name)) for name in ("model/moe", "adapter", "merged"))]
        console.print(shlex.join(["ktmoe", *merge]), style="dim", highlight=False)
        ktmoe(merge, run.path("cache"))

    with run.step("after: stock transformers and peft, then the same adapter in ktmoe"):
        after = run.measure("after", adapter="adapter", merged="merged", logits="stock.safetensors", samples=samples)
        run.script("ktmoe_logits.py", moe="model/moe", adapter="adapter", data="data", logits="ktmoe.safetensors")

    records = read(run.path("data"), "held_out")[:samples]
    check(show(console, run, records, before, after), stage)


def main() -> int:
    """Parse the arguments, run, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for everything the demo writes")
    parser.add_argument("--stage", choices=["sft", "dpo"], default="sft", help="answers, or preferred answers")
    parser.add_argument("--backend", default="auto", help="kt_backend: auto, AMXBF16, AMXInt8, torch ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="training steps, where the demo's own number is too many or too few")
    parser.add_argument("--samples", type=int, default=4, help="held-out questions to answer before and after")
    args = parser.parse_args()
    # Before torch loads OpenMP: threads that wait by spinning make a busy 2-core host five times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from show import DemoFailure

    run = Run(args.out.resolve())
    # What an earlier run left must not pass for this one's.
    for name in ("adapter", "cache", "data", "merged", "model"):
        shutil.rmtree(run.path(name), ignore_errors=True)
    run.out.mkdir(parents=True, exist_ok=True)
    try:
        demo(run, args.stage, args.backend, args.seed, args.steps, args.samples)
    except DemoFailure as error:
        console.print(f"[bold red]FAILED[/] {error}")
        return 1
    except subprocess.CalledProcessError as error:
        console.print(f"[bold red]FAILED[/] exit code {error.returncode}: {shlex.join(error.cmd[:4])} ...")
        return 1

    console.print("[bold green]OK[/] The model learned, and stock transformers and peft read what was saved.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
