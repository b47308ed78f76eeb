"""Several processes train like one, with one copy of the experts on a host; what they cannot do is refused early."""

import json
import os
import re

import peft
import pytest
import torch
from factory import save_model
from helpers import run_ranks
from transformers import AutoModelForCausalLM

import ktmoe
from ktmoe.processes import Ranks


STEPS = 20
# A Trainer's run: losses, norms and LoRA of every rank to files.
TRAIN = """
import json, os, peft, torch, ktmoe, transformers, ktmoe.backends.torch.choice
from datasets import Dataset
from transformers import Trainer, TrainingArguments

given = json.loads({given!r})
if given["fp32"]:
    ktmoe.backends.torch.choice.why_not_bf16 = lambda packed: "the test wants float32"
rank = int(os.environ.get("RANK", 0))
keys = given["arguments"]
if given["checkpointing"]:
    reentrant = given["checkpointing"] == "reentrant"
    keys |= {{"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {{"use_reentrant": reentrant}}}}
arguments = TrainingArguments(
    given["folder"], learning_rate=1e-3, logging_steps=1, use_cpu=True, report_to=[], disable_tqdm=True,
    remove_unused_columns=False, max_grad_norm=0.5, ddp_find_unused_parameters=False, **keys
)
transformers.set_seed(rank)  # LoRA is the first rank's
config = ktmoe.KTConfig(kt_backend=given["backend"], kt_num_threads=1)
lora = peft.LoraConfig(r=4, target_modules=given["targets"])
model = ktmoe.load_model(given["model"], config, lora=lora, dtype=torch.float32)
if given["checkpointing"]:
    model.enable_input_require_grads()
rows = torch.randint(2, 200, (64, 24), generator=torch.Generator().manual_seed(0)).tolist()

class InOrder(Trainer):
    def _get_train_sampler(self, *ignored):
        return torch.utils.data.SequentialSampler(self.train_dataset)

def collate(batch):
    ids = torch.tensor([row["input_ids"] for row in batch])
    return {{"input_ids": ids, "labels": ids}}

trainer = InOrder(model, arguments, train_dataset=Dataset.from_list([{{"input_ids": r}} for r in rows]),
                  data_collator=collate)
trainer.train(resume_from_checkpoint=given["resume"])
log = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
trained = {{n: p.detach() for n, p in model.named_parameters() if p.requires_grad}}
torch.save((log, trained), f"{{given['out']}}-{{rank}}")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder / "model")
    return folder


class Runs:
    """Runs of the same training by one process or several; the same is run once."""

    def __init__(self, folder):
        self.folder, self._done = folder, {}

    def __call__(self, ranks=1, *, backend="reference", targets="q_proj,experts", checkpointing="", fp32=False,
                 hosts=1, accumulation=1, resume=None, name="run", **arguments):  # fmt: skip
        key = (ranks, backend, targets, checkpointing, fp32, hosts, accumulation, resume, name, str(arguments))
        if key not in self._done:
            out = str(self.folder / f"out{len(self._done)}")
            keys = {"max_steps": STEPS, "save_strategy": "no", "gradient_accumulation_steps": accumulation} | arguments
            keys |= {"per_device_train_batch_size": 4 // ranks}
            given = {
                "arguments": keys, "backend": backend, "targets": targets.split(","), "out": out, "fp32": fp32,
                "checkpointing": checkpointing, "resume": resume, "model": str(self.folder / "model"),
                "folder": str(self.folder / name),
            }  # fmt: skip
            done = run_ranks(TRAIN.format(given=json.dumps(given)), ranks, hosts=hosts)
            assert [d.returncode for d in done] == [0] * ranks, "\n".join(d.stderr[-3000:] for d in done)
            self._done[key] = done, [torch.load(f"{out}-{r}") for r in range(ranks)]
        return self._done[key]


@pytest.fixture(scope="module")
def runs(folder):
    return Runs(folder)


def compare(several, one, limit):
    """Losses, norms and the trained LoRA, and that LoRA is the same to the bit on every rank."""
    (log, lora), *others = several
    (log_of_one, lora_of_one), = one  # fmt: skip
    for mine, other in zip(log, log_of_one, strict=True):
        assert mine == pytest.approx(other, rel=limit)
    for name, expected in lora_of_one.items():
        assert (lora[name] - expected).abs().max() <= limit * expected.abs().max(), name
        assert all(torch.equal(theirs[name], lora[name]) for _, theirs in others), name


@pytest.mark.parametrize(
    ("ranks", "keys"),
    [
        (2, {"checkpointing": "reentrant", "accumulation": 2}),
        (2, {"backend": "torch", "fp32": True, "checkpointing": "nonreentrant"}),
        (2, {"targets": "experts"}),  # nothing for DDP to do but ours
        (4, {"hosts": 2}),
        pytest.param(4, {"backend": "torch", "fp32": True, "accumulation": 2}, marks=pytest.mark.slow),
        pytest.param(2, {}, marks=pytest.mark.slow),
        pytest.param(2, {"checkpointing": "nonreentrant", "accumulation": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"checkpointing": "reentrant", "backend": "torch", "fp32": True}, marks=pytest.mark.slow),
    ],
)
def test_several_processes_train_like_one(runs, ranks, keys):
    done, several = runs(ranks, **keys)
    _, one = runs(**{k: v for k, v in keys.items() if k != "hosts"})
    compare(several, one, limit=2e-5)
    assert not any("Traceback" in d.stderr or "[W" in d.stderr for d in done), done


@pytest.mark.parametrize("backend", ["torch", pytest.param("AMXBF16", marks=pytest.mark.kernel)])
def test_several_processes_in_bf16(runs, backend):
    _, several = runs(2, backend=backend, checkpointing="reentrant")
    _, one = runs(backend=backend, checkpointing="reentrant")
    for (mine, norm), (other, norm_of_one) in zip(several[0][0], one[0][0], strict=True):
        assert mine == pytest.approx(other, rel=4e-3)  # 1.2e-4 to 2.3e-3, by transformers' release
        assert norm == pytest.approx(norm_of_one, rel=0.02)
    assert all(torch.equal(several[0][1][name], t) for name, t in several[1][1].items())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [4, 1])
def test_a_run_of_two_goes_on_with_another_number(runs, ranks):
    saving = {"save_strategy": "steps", "save_steps": 8, "max_steps": 16}
    _, two = runs(2, name="saved", **saving)
    checkpoint = runs.folder / "saved" / "checkpoint-8"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    _, resumed = runs(ranks, name=f"resumed{ranks}", resume=str(checkpoint), **saving)
    for name, expected in two[0][1].items():
        for _, lora in resumed:
            assert (lora[name] - expected).abs().max() <= 2e-5 * expected.abs().max(), name


# Two ranks and DDP by hand; `step` runs on each, `check` what came of it on the first.
BY_HAND = """
import contextlib, os, peft, torch, ktmoe.devices, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(rank)
ktmoe.devices.accelerator = lambda: torch.device("cpu")  # for experts on a device
config = ktmoe.KTConfig(kt_backend="reference", kt_num_gpu_experts={elsewhere})
lora = peft.LoraConfig(r=4, target_modules=["q_proj", "experts"])
model = ktmoe.load_model({model!r}, config, lora=lora, dtype=torch.float32)
wrapped = DistributedDataParallel(model)

def batch(rows, seed):
    return torch.randint(2, 200, (rows, 12), generator=torch.Generator().manual_seed(seed))

def loss(rows, seed):
    ids = batch(rows, seed)
    return wrapped(input_ids=ids, labels=ids).loss

def grads():
    return {{n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}}

"""


def by_hand(folder, code, ranks=2, elsewhere=0):
    done = run_ranks(BY_HAND.format(model=str(folder / "model"), elsewhere=elsewhere) + code, ranks)
    assert [d.returncode for d in done] == [0] * ranks, "\n".join(d.stderr[-3000:] for d in done)
    return done


@pytest.mark.parametrize("elsewhere", [0, 2])
def test_uneven_accumulation_and_evaluation_by_one_rank(folder, elsewhere):
    """What DDP allows: batches of other sizes, other numbers of them before a step, and forwards of one rank alone.

    With experts on a device too: their owner's.
    """
    by_hand(
        folder,
        """
with torch.no_grad():
    for p in model.parameters():  # B is zero at first, and A has no gradient then
        if p.requires_grad and p.shape[-1] == 4:
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(5)) / 10)
loss(2, 1).backward()
wrapped.zero_grad()
with wrapped.no_sync():
    for i in range(3 - 2 * rank):
        loss(1 + rank, 10 * rank + i).backward()
if rank == 1:
    model.eval()
    with torch.no_grad():
        for seed in range(5):
            model(input_ids=batch(1, seed)).logits
    model.train()
loss(3 - rank, 7 + rank).backward()
mine = grads()
both = [None, None]
dist.all_gather_object(both, mine)
assert all(torch.equal(both[0][n], both[1][n]) for n in mine)
if rank == 0:  # the same by one process: the model without its wrapper, nobody else calls
    wrapped.zero_grad()
    for r in range(2):
        for rows, seed in [(1 + r, 10 * r + i) for i in range(3 - 2 * r)] + [(3 - r, 7 + r)]:
            ids = batch(rows, seed)
            (model(input_ids=ids, labels=ids).loss / 2).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, mine[name], rtol=1e-4, atol=1e-6, msg=name)
dist.barrier()
""",
        elsewhere=elsewhere,
    )


def test_the_process_that_owns_the_experts_may_end_first(folder):
    """It stays until the others have ended."""
    done = by_hand(
        folder,
        """
import time
loss(1, rank).backward()
if rank == 1:
    time.sleep(2)
    model.eval()
    with torch.no_grad():
        model(input_ids=batch(1, 1)).logits
    print("computed")
""",
    )
    assert "computed" in done[1].stdout


@pytest.mark.parametrize(("end", "code"), [("os._exit(9)", 9), ("raise ValueError('of the owner')", 1)])
def test_a_process_that_owns_the_experts_and_failed_does_not_stay(folder, end, code):
    first, second = run_ranks(
        BY_HAND.format(model=str(folder / "model"), elsewhere=0)
        + f"""
loss(1, rank).backward()
if rank == 0:
    {end}
model.eval()
with torch.no_grad():
    for seed in range(100):
        model(input_ids=batch(1, seed)).logits
""",
        2,
        timeout=60,
    )
    assert first.returncode == code
    assert second.returncode not in (0, -9)
    gone = "Rank 0, whose process owns the routed experts of this host, does not answer"
    going = "The process that owns the routed experts is at its end."
    assert gone in second.stderr or going in second.stderr


def test_training_in_evaluation_mode_is_averaged_too(folder):
    """As some switch dropout off; DDP does not look at the mode either."""
    by_hand(
        folder,
        """
model.eval()
loss(2, rank).backward()
both = [None, None]
dist.all_gather_object(both, grads())
assert all(torch.equal(both[0][n], both[1][n]) for n in both[0])
dist.barrier()
""",
    )


def test_an_end_is_silent(folder):
    """Also where one process is at its end long before the other, and the script has ended the group itself."""
    done = by_hand(
        folder,
        """
import time, ktmoe.processes.ranks
ktmoe.processes.ranks._LAST = 1
loss(1, rank).backward()
dist.barrier()
if rank == 1:
    dist.destroy_process_group()
else:
    time.sleep(3)
print("end")
""",
    )
    assert [d.stdout for d in done] == ["end\n"] * 2
    assert not any("[W" in d.stderr or "Error" in d.stderr for d in done), done


@pytest.mark.parametrize(("targets", "left"), [(["q_proj", "experts"], True), (["experts"], False)])
def test_what_ddp_is_asked_to_leave_out(folder, targets, left):
    """It refuses parameters on two kinds of device, and a model of which nothing trains."""
    lora = peft.LoraConfig(r=4, target_modules=targets)
    model = ktmoe.load_model(folder / "model", ktmoe.KTConfig(kt_backend="torch"), lora=lora)
    own = [n for n, p in model.named_parameters() if p.requires_grad and ".experts." in n]
    assert len(own) == 12
    assert model._ddp_params_and_buffers_to_ignore == (sorted(own) if left else [])


def test_the_experts_are_there_once(folder, tmp_path):
    """Anonymous memory of two processes against one's: the second one has no copy of any kind."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=32, hidden_size=256, intermediate_size=64, moe_intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2, num_experts=32, num_experts_per_tok=2, head_dim=16,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    size = 4 * 32 * 3 * 256 * 512 * 2
    done = run_ranks(
        f"""
import os, torch, ktmoe, torch.distributed as dist
def held():
    fields = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
    return 1024 * int(fields["Pss_Anon"].split()[0])
dist.init_process_group("gloo")
before = held()
model = ktmoe.load_model({str(tmp_path)!r}, ktmoe.KTConfig(kt_backend="torch", kt_torch_packing="both"), r=4)
ids = torch.ones(1, 8, dtype=torch.long)
model(input_ids=ids, labels=ids).loss.backward()
print(held() - before)
dist.barrier()
""",
        2,
    )
    assert [d.returncode for d in done] == [0, 0], done
    owner, other = (int(d.stdout.split()[-1]) for d in done)
    assert owner > 1.5 * size  # both packed copies are here
    assert other < 0.5 * size  # the rest of the model, libraries


@pytest.mark.parametrize("how", ["load_model", "attach"])
def test_refused_before_anything_is_loaded(folder, monkeypatch, tmp_path, how):
    def start(path):
        if how == "load_model":
            return ktmoe.load_model(path, ktmoe.KTConfig(kt_backend="torch"))
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        return ktmoe.attach(model, ktmoe.KTConfig(kt_backend="torch"))

    monkeypatch.setenv("WORLD_SIZE", "2")  # what torchrun and accelerate set
    with pytest.raises(ktmoe.KTError, match="WORLD_SIZE: got 2 processes that do not know of each other yet"):
        start(tmp_path / "nowhere")
    monkeypatch.setenv("WORLD_SIZE", "1")
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.setenv(name, "true")
        with pytest.raises(ktmoe.KTError, match=f"{name}: got true; the routed experts do not run under"):
            start(tmp_path / "nowhere")
        monkeypatch.delenv(name)
    start(folder / "model")


def test_an_error_of_the_owner_is_the_others_too(folder):
    """Not "it does not answer": the error itself, and the next call is answered."""
    done = by_hand(
        folder,
        """
from ktmoe.interface import Backend
from ktmoe.backends.reference import ReferenceBackend
loss(1, rank)
forward = ReferenceBackend.forward
errors = [MemoryError("no room"), ktmoe.KernelError("a wrong number"), ktmoe.KTError("kt_max_len: too small")]
for number, error in enumerate(errors):
    def failing(self, *about, error=error, **more):
        raise error
    dist.barrier()
    ReferenceBackend.forward = failing
    dist.barrier()
    try:
        loss(1, 100 + 10 * number + rank)  # not one that is answered without computing
    except Exception as found:
        print(type(found).__name__, found)
    dist.barrier()
    ReferenceBackend.forward = forward
dist.barrier()
assert loss(1, rank).isfinite()
dist.barrier()
""",
    )
    assert done[0].stdout.splitlines() == [
        "MemoryError no room", "KernelError a wrong number", "KTError kt_max_len: too small",
    ]  # fmt: skip
    assert done[1].stdout.splitlines()[1:] == done[0].stdout.splitlines()[1:]
    assert "RuntimeError Rank 0, which computes the routed experts, failed with MemoryError: no room" in done[1].stdout


def test_what_the_owner_refuses_is_refused_by_all(folder):
    done = run_ranks(
        f"""
import ktmoe, os, torch.distributed as dist
dist.init_process_group("gloo")
if dist.get_rank() == 0:
    import ktmoe.models.attaching
    def no_room(*about):
        raise ktmoe.KTError("kt_backend: the owner has no room")
    ktmoe.models.attaching.check_room = no_room
try:
    ktmoe.load_model({str(folder / "model")!r}, ktmoe.KTConfig(kt_backend="torch"))
except ktmoe.KTError as error:
    print(error)
""",
        2,
    )
    assert [d.stdout.strip() for d in done] == ["kt_backend: the owner has no room"] * 2, done
    assert os.environ.get("RANK") is None


def test_an_owner_that_closed_the_connection_is_said_so():
    def ended(*message):
        raise EOFError  # without a word, as Python's connections do

    ranks = Ranks(rank=1, on_host=(0, 1), everyone=None, here=None, meeting=None, caller=ended)
    with pytest.raises(ktmoe.KTError, match=re.escape("(It closed the connection.)")):
        ranks.ask(print)
