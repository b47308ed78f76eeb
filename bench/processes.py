"""Steps of two processes on the cores of one, against one process's steps on as many rows: pairs within one run.

    python -m torch.distributed.run --nproc_per_node 2 bench/processes.py --backend torch --checkpointing none

One process means the first one alone, with all cores for the rest of the model too; the other waits meanwhile. A host
that is shared drifts by tens of per cent within minutes: only the ratio of two steps that follow each other says much.
"""

import argparse
import statistics
import tempfile
import time

import peft
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import ktmoe
from ktmoe.cores import usable_cores


ROWS, LENGTH, VOCABULARY, STEPS = 4, 256, 1024, 2
REST = 0.12  # seconds, in which spinning threads come to rest


def make_model(folder):
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=1024, intermediate_size=1024, moe_intermediate_size=768,
        num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, head_dim=128,
        num_experts=64, num_experts_per_tok=6,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def load(folder, backend, checkpointing):
    lora = peft.LoraConfig(r=8, target_modules=["q_proj", "o_proj", "experts"])
    model = ktmoe.load_model(folder, ktmoe.KTConfig(kt_backend=backend), lora=lora)
    if checkpointing != "none":
        how = {"use_reentrant": checkpointing == "reentrant"}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        model.enable_input_require_grads()
    return model


def seconds(model, optimizer, rows, seed):
    """Of one step, a new batch in each of several."""
    start = time.perf_counter()
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(seed + step)
        ids = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - start) / STEPS


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--checkpointing", default="none", choices=["none", "reentrant", "nonreentrant"])
    parser.add_argument("--pairs", type=int, default=8)
    given = parser.parse_args()
    dist.init_process_group("gloo")
    rank, cores = dist.get_rank(), usable_cores()
    folder = [tempfile.mkdtemp() if rank == 0 else None]
    if rank == 0:
        make_model(folder[0])
    dist.broadcast_object_list(folder)
    model = load(folder[0], given.backend, given.checkpointing)
    wrapped = DistributedDataParallel(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)  # without a state that one process alone would change
    seconds(wrapped, optimizer, ROWS // 2, rank)
    alone, together = [], []
    for pair in range(given.pairs):
        for which in (alone, together) if pair % 2 else (together, alone):
            dist.barrier()
            time.sleep(REST)
            if which is together:
                found = [0.0, 0.0]
                dist.all_gather_object(found, seconds(wrapped, optimizer, ROWS // 2, 100 * pair + 10 * rank))
                together.append(max(found))
                continue
            if rank == 0:
                torch.set_num_threads(cores)
                seconds(model, optimizer, 1, 1)  # the first one after a change is longer
                alone.append(seconds(model, optimizer, ROWS, 50 + 100 * pair))
                torch.set_num_threads(1)
            dist.barrier()
            for parameter in trained:
                dist.broadcast(parameter.data, src=0)
    if rank == 0:
        ratios = [a / t for a, t in zip(alone, together, strict=True)]
        print(
            f"{given.backend}, checkpointing {given.checkpointing}: one process {statistics.median(alone):.2f} s, two "
            f"{statistics.median(together):.2f} s; speed of two over one {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
