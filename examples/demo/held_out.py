"""Losses, answers and logits, in plain torch and transformers: the same code before and after."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase


IGNORE_INDEX = -100
# What LLaMA-Factory's template `smollm` writes: SmolLM2's own chat template without its greeting as a system prompt.
PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def collate(tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Right-padded ``input_ids``, ``attention_mask`` and ``labels`` [B, L] of questions and answers.

    Labels cover the answer and its end, as in training, except for the newline that the template puts after the end:
    no reader sees it.
    """
    rows = []
    for question, answer in pairs:
        texts = (PROMPT.format(question), f"{answer}{tokenizer.eos_token}")
        rows.append([tokenizer.encode(text, add_special_tokens=False) for text in texts])
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    batch = {
        "input_ids": torch.full((len(rows), length), int(tokenizer.pad_token_id)),
        "attention_mask": torch.zeros(len(rows), length, dtype=torch.long),
        "labels": torch.full((len(rows), length), IGNORE_INDEX),
    }
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        batch["input_ids"][row, :end] = torch.tensor(prompt + answer)
        batch["attention_mask"][row, :end] = 1
        batch["labels"][row, len(prompt) : end] = torch.tensor(answer)
    return batch


@torch.inference_mode()
def answer_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]], batch_size: int = 16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of each answer, in nats, summed over its tokens [N], and the number of those tokens [N]."""
    sums, counts = [], []
    for start in tqdm(range(0, len(pairs), batch_size), desc="held-out questions", unit="batch", leave=False):
        batch = collate(tokenizer, pairs[start : start + batch_size])
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        losses = cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none")  # [B, L-1]
        sums.append(losses.sum(1))
        counts.append((labels != IGNORE_INDEX).sum(1))
    return torch.cat(sums), torch.cat(counts)


@torch.inference_mode()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[str],
    max_new_tokens: int = 40,
    batch_size: int = 32,
) -> list[str]:
    """Greedy answers on one line each, cut off after ``max_new_tokens``."""
    texts = []
    for start in tqdm(range(0, len(questions), batch_size), desc="answers", unit="batch", leave=False):
        prompts = [PROMPT.format(question) for question in questions[start : start + batch_size]]
        batch = tokenizer(
            prompts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt",
            return_token_type_ids=False,
        )  # fmt: skip
        output = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        for row in output[:, batch["input_ids"].shape[1] :]:
            text = " ".join(tokenizer.decode(row, skip_special_tokens=True).split())
            texts.append(text if tokenizer.eos_token_id in row else f"{text} ...")
    return texts


@torch.inference_mode()
def logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]]) -> torch.Tensor:
    """Logits [T, V] at every token of the pairs: what two implementations of one model are compared by."""
    batch = collate(tokenizer, pairs)
    mask = batch.pop("attention_mask")
    return model(input_ids=batch["input_ids"], attention_mask=mask).logits[mask.bool()].float()


def relative_difference(values: torch.Tensor, expected: torch.Tensor) -> float:
    """Mean absolute difference, relative to the mean absolute value of what was expected."""
    return ((values - expected).abs().mean() / expected.abs().mean()).item()
