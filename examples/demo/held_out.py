"""Held-out loss, sample answers and logits, in plain torch and transformers: the same code before and after."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


IGNORE_INDEX = -100


def encode_pair(tokenizer: PreTrainedTokenizerBase, record: dict[str, str]) -> tuple[list[int], list[int]]:
    """Prompt and answer ids, as LLaMA-Factory's SFT makes them with the template ``qwen3_nothink``.

    LLaMA-Factory also trains on the newline that its template puts after the eos token. It is left out here: no reader
    sees it, and a base model that has never met it would make the loss before fine-tuning look worse than it is.
    """
    user = {"role": "user", "content": record["instruction"]}
    prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    answer = f"{record['output']}{tokenizer.eos_token}"
    return tuple(tokenizer.encode(text, add_special_tokens=False) for text in (prompt, answer))


def collate(tokenizer: PreTrainedTokenizerBase, records: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    """Right-padded ``input_ids``, ``attention_mask`` and ``labels``; labels only on the answers."""
    rows = [encode_pair(tokenizer, record) for record in records]
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
def held_out_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: list[dict[str, str]], batch_size: int = 16
) -> float:
    """Mean cross entropy per answer token, in nats, over all records."""
    total, count = 0.0, 0
    for start in range(0, len(records), batch_size):
        batch = collate(tokenizer, records[start : start + batch_size])
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        ).item()
        count += int((labels != IGNORE_INDEX).sum())
    return total / count


@torch.inference_mode()
def sample_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: list[dict[str, str]], max_new_tokens: int = 48
) -> list[str]:
    """Greedy answers, one record at a time."""
    answers = []
    for record in records:
        prompt = torch.tensor([encode_pair(tokenizer, record)[0]])
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers.append(" ".join(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).split()))
    return answers


@torch.inference_mode()
def fixed_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: list[dict[str, str]]
) -> torch.Tensor:
    """Logits of a batch that never changes, at its tokens only: what two implementations are compared on."""
    batch = collate(tokenizer, records[:4])
    mask = batch["attention_mask"].bool()
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[mask].float()


def report(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: list[dict[str, str]], samples: int
) -> dict[str, Any]:
    """Held-out loss and greedy answers of evenly spaced held-out questions."""
    chosen = [records[index * len(records) // samples] for index in range(samples)]
    return {
        "loss": held_out_loss(model, tokenizer, records),
        "samples": [
            {"question": record["instruction"], "reference": record["output"], "answer": answer}
            for record, answer in zip(chosen, sample_answers(model, tokenizer, chosen), strict=True)
        ],
    }
