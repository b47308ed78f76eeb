"""A whole training step of a real model, stock LLaMA-Factory + peft against the same with `use_kt: true`.

    python bench/whole_step.py --tokens 8x64 4x512 --batches repeated new --checkpointing reentrant

SmolLM2-135M upcycled to eight experts (`examples/demo`), rank 8 on attention and on every expert, from one adapter;
LLaMA-Factory's defaults. Each run is a process of its own; the two take turns (A B B A), so that a machine that
warms up or slows down does so for both. Times are medians over all steps but the first two. Run it on an idle machine.
"""

import argparse
import itertools
import json
import operator
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
TARGETS = "q_proj,k_proj,v_proj,o_proj,w1,w2,w3"  # attention and experts, as the adapter has them
WARM_UP = 2  # steps
CHECKPOINTING = {
    "reentrant": {},
    "non-reentrant": {"use_reentrant_gc": False},
    "off": {"disable_gradient_checkpointing": True},
}
CONTESTANTS = {
    "stock": {},
    "ktmoe": {"use_kt": True, "kt_backend": "auto"},
    "ktmoe torch": {"use_kt": True, "kt_backend": "torch"},
    "ktmoe AMXBF16": {"use_kt": True, "kt_backend": "AMXBF16"},
    "stock, huge pages": {},
}
# What `ktmoe train` sets for itself; without ktmoe it can be had too.
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}


def train(config: Path, result: Path, profiled: bool) -> None:
    """One run, in this process; writes the time of every step, its profile, the losses, and the memory at its peak."""
    keys = json.loads(config.read_text())
    if keys.get("use_kt"):
        from ktmoe.llamafactory import engage, install

        engage(keys)
        install()
    from step_profile import StepProfile
    from transformers import TrainerCallback

    from ktmoe.llamafactory.audio import torchaudio_stand_in

    with torchaudio_stand_in():
        from llamafactory.train.tuner import run_exp

    ends = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            if not ends:
                ends.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    peak, profile = Peak(), StepProfile()
    # Profiled in the last round, since hooks take time too.
    run_exp(keys, callbacks=[Clock(), profile] if profiled else [Clock()])
    history = json.loads((Path(keys["output_dir"]) / "trainer_state.json").read_text())["log_history"]
    losses = [log["loss"] for log in history if "loss" in log]
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    result.write_text(
        json.dumps(
            {"seconds": seconds, "losses": losses, "anonymous": peak.end(), "profile": profile.seconds[WARM_UP:]}
        )
    )


class Peak:
    """Anonymous memory of this process at its peak: mapped files can be dropped at any time, and do not count."""

    def __init__(self) -> None:
        self.most, self.ended = 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    @staticmethod
    def now() -> int:
        """Bytes, at this moment."""
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(s.split()[1]) * 1024 for s in status if s.startswith("RssAnon:"))

    def _watch(self) -> None:
        while not self.ended.wait(0.02):
            self.most = max(self.most, self.now())

    def end(self) -> int:
        self.ended.set()
        self.thread.join()
        return self.most


def prepare(folder: Path, shapes: list[tuple[int, int]]) -> Path:
    """Texts to train on, new for every step or one batch's worth; and an adapter to begin with. Returns the model."""
    import real_model
    from peft import LoraConfig
    from transformers import AutoTokenizer

    import ktmoe

    model = real_model.checkpoints().moe
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS.split(","), task_type="CAUSAL_LM")
    ktmoe.load_model(model, ktmoe.KTConfig(kt_backend="reference"), lora=lora).save_pretrained(folder / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = "\n".join(path.read_text() for path in sorted(Path(os.__file__).parent.glob("a*.py")))
    ids = tokenizer(text)["input_ids"]
    info = {}
    for batch, length in shapes:
        # One token for the end of text, which LLaMA-Factory adds to each text.
        for name, count in {"repeated": batch * length - 1, "new": len(ids)}.items():
            file = f"{name}-{batch}x{length}.json"
            (folder / file).write_text(json.dumps([{"text": tokenizer.decode(ids[:count])}]))
            info[file.removesuffix(".json")] = {"file_name": file, "columns": {"prompt": "text"}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return model


def compare(folder: Path, model: Path, arguments: argparse.Namespace, shape: tuple[int, int], batches: str, gc: str):
    """All contestants on one kind of step, in turns. Returns a row for each."""
    batch, length = shape
    keys = {
        "model_name_or_path": str(model),
        "adapter_name_or_path": str(folder / "adapter"),
        "stage": "pt",
        "do_train": True,
        "finetuning_type": "lora",
        "dataset": f"{batches}-{batch}x{length}",
        "dataset_dir": str(folder),
        "cutoff_len": length,
        "per_device_train_batch_size": batch,
        "max_steps": arguments.steps,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": True,
        "report_to": "none",
        "overwrite_cache": True,
        "output_dir": str(folder / "out"),
        "overwrite_output_dir": True,
        **CHECKPOINTING[gc],
    }
    found: dict[str, list[dict]] = {name: [] for name in arguments.contestants}
    for turn in range(arguments.rounds + 1):
        for name in arguments.contestants if turn % 2 == 0 else arguments.contestants[::-1]:
            config, result = folder / "config.json", folder / "result.json"
            config.write_text(json.dumps(keys | CONTESTANTS[name]))
            profiled = ["--profile"] if turn == arguments.rounds else []
            command = [sys.executable, __file__, "--run", str(config), str(result), *profiled]
            environment = os.environ | (HUGE_PAGES if "huge pages" in name else {})
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
            found[name].append(json.loads(result.read_text()))
    from step_profile import medians

    rows = []
    for name, (*runs, profiled_run) in found.items():
        seconds = statistics.median(t for run in runs for t in run["seconds"][WARM_UP:])
        memory = max(run["anonymous"] for run in runs)
        rows.append(
            {
                "tokens": f"{batch} x {length}",
                "batches": batches,
                "checkpointing": gc,
                "contestant": name,
                "seconds": seconds,
                "tokens_per_second": batch * length / seconds,
                "anonymous_bytes": memory,
                "losses": runs[0]["losses"],
                "profile": medians(profiled_run["profile"]),
            }
        )
    for row in rows:
        ratio = rows[0]["seconds"] / row["seconds"]
        print(
            f"{row['tokens']:8} {batches:9} {gc:14} {row['contestant']:14} {row['seconds']:7.2f} s/step "
            f"{row['tokens_per_second']:7.1f} tok/s  {ratio:5.2f} x {rows[0]['contestant']}  "
            f"{row['anonymous_bytes'] / 1e9:5.2f} GB  loss {row['losses'][0]:.4f} -> {row['losses'][-1]:.4f}",
            flush=True,
        )
    return rows


def write(out: Path, steps: int, rows: list[dict]) -> None:
    """`whole_step.json`, and for each kind of step a picture of where its time went."""
    from report import machine
    from step_profile import draw

    out.mkdir(parents=True, exist_ok=True)
    (out / "whole_step.json").write_text(json.dumps({"machine": machine(), "steps": steps, "rows": rows}, indent=1))
    kind = operator.itemgetter("tokens", "batches", "checkpointing")
    for what, group in itertools.groupby(rows, kind):
        title = "SmolLM2-135M upcycled, {} tokens, {} batch, checkpointing {}".format(*what)
        path = out / f"step-{'-'.join(what).replace(' ', '')}.svg"
        draw({row["contestant"]: row["profile"] for row in group}, title, path)


def main() -> None:
    """Parse the arguments, compare, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", default=["8x64", "4x512"], help="batch size x sequence length")
    parser.add_argument("--batches", nargs="+", default=["repeated", "new"], choices=["repeated", "new"])
    parser.add_argument("--checkpointing", nargs="+", default=["reentrant"], choices=CHECKPOINTING)
    parser.add_argument("--contestants", nargs="+", default=["stock", "ktmoe"], choices=CONTESTANTS)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a folder for whole_step.json and the drawn profiles")
    parser.add_argument("--run", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        train(*arguments.run, arguments.profile)
        return
    shapes = [(int(batch), int(length)) for batch, length in (text.split("x") for text in arguments.tokens)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = prepare(folder, shapes)
        rows = [
            row
            for shape in shapes
            for batches in arguments.batches
            for gc in arguments.checkpointing
            for row in compare(folder, model, arguments, shape, batches, gc)
        ]
    if arguments.out:
        write(arguments.out, arguments.steps, rows)


if __name__ == "__main__":
    main()
