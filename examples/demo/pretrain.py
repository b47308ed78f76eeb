"""Pretrain a small Qwen3-MoE on the demo's text with nothing but torch and stock transformers.

The fine-tuning that follows is only worth watching on a model that already knows some English. A few hundred steps
give one; their number is fixed and so is the seed, so a host that runs the demo twice gets the same weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of the pretraining run."""

    steps: int = 1400
    batch_size: int = 4
    sequence_length: int = 128
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    seed: int = 0
    max_seconds: float = 240.0  # a slow or busy host stops here instead of keeping its user waiting


def model_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeConfig:
    """A Qwen3-MoE of 8 million parameters; sizes are multiples of 64 because the kernel's tiles are."""
    return Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware. Elsewhere fp32 is faster than emulated bf16."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in probes)


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> torch.Tensor:
    """All documents in one row of token ids, each one between a bos and an eos token."""
    ids: list[int] = []
    for encoded in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        ids += [tokenizer.bos_token_id, *encoded, tokenizer.eos_token_id]
    return torch.tensor(ids)


def batches(stream: torch.Tensor, config: PretrainConfig) -> Iterator[torch.Tensor]:
    """Endless batches: every epoch cuts the stream at another offset and shuffles the pieces."""
    generator = torch.Generator().manual_seed(config.seed)
    length = config.sequence_length
    while True:
        offset = int(torch.randint(length, (), generator=generator))
        count = (len(stream) - offset) // length
        pieces = stream[offset : offset + count * length].view(count, length)
        for indices in torch.randperm(count, generator=generator).split(config.batch_size):
            if len(indices) == config.batch_size:
                yield pieces[indices]


def learning_rate_factor(step: int, config: PretrainConfig) -> float:
    """Linear warmup, then a cosine down to a twentieth."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def pretrain(
    tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], config: PretrainConfig
) -> tuple[Qwen3MoeForCausalLM, float]:
    """Pretrain the demo's base model.

    Args:
        tokenizer: The tokenizer of :mod:`tokenizer`.
        texts: Pretraining documents.
        config: Settings of the run.

    Returns:
        The model, in bf16, and the mean training loss of the last 50 steps.
    """
    torch.manual_seed(config.seed)
    torch.use_deterministic_algorithms(True)  # with two threads, sums of gradients would depend on who comes first
    model = Qwen3MoeForCausalLM(model_config(tokenizer))
    model.set_experts_implementation("grouped_mm")  # batched_mm gathers weights per token: 50 times slower on a CPU
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    source = batches(token_stream(tokenizer, texts), config)
    losses: list[float] = []
    hurried = False
    model.train()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), TextColumn("loss {task.fields[loss]}")) as progress:
        task = progress.add_task("pretraining the base model", total=config.steps, loss="-")
        started = time.monotonic()
        for step in range(config.steps):
            # Short of time, the learning rate goes down early: a model stopped at full rate is much worse.
            time_left = 1 - (time.monotonic() - started) / config.max_seconds
            if time_left <= 0:
                break
            factor = learning_rate_factor(step, config)
            hurried = hurried or 4 * time_left < factor
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * min(factor, 4 * time_left)
            input_ids = next(source)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_fast_bf16()):
                loss = model(input_ids=input_ids, labels=input_ids, output_router_logits=True).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            progress.update(task, advance=1, loss=f"{losses[-1]:.2f}")
        if hurried:
            progress.console.print(
                f"This host is slow or busy: {len(losses)} of {config.steps} steps within {config.max_seconds:.0f} s, "
                "on a shortened schedule. The base model is weaker than usual and not reproducible."
            )

    torch.use_deterministic_algorithms(False)
    recent = losses[-50:]
    return model.eval().to(torch.bfloat16), sum(recent) / len(recent)
