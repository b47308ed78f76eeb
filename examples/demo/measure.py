"""Measure the model before and after fine-tuning, in a process that has never heard of ktmoe.

``python measure.py before --data DIR --dense DIR --moe DIR --report FILE``: whether the mixture of experts computes
what the dense model computes; then loss and answers of the dense model, which has less to compute.

``python measure.py after --data DIR --moe DIR --adapter DIR --merged DIR --logits FILE --report FILE``: stock peft
reads the adapter, and the logits are kept; then loss and answers of the merged checkpoint, in stock transformers.

What is measured here is what any user of the adapter gets. Everything is computed in fp32: differences between two
implementations then show, instead of bf16's rounding.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from dataset import HELD_OUT, HELD_OUT_PREFERENCES, read
from held_out import answer_losses, answers, logits, relative_difference
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


COMPARED = 4  # questions whose logits are compared


def load(folder: Path) -> Any:
    """A model by stock transformers, in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def pairs_of(data: Path) -> list[tuple[str, str]]:
    """The held-out questions with their answers."""
    return [(record["instruction"], record["output"]) for record in read(data, HELD_OUT)]


def report(model: Any, tokenizer: Any, data: Path, samples: int) -> dict[str, Any]:
    """Held-out loss, greedy answers of the first questions, and the losses of preferred and other answers, if any."""
    pairs = pairs_of(data)
    losses, tokens = answer_losses(model, tokenizer, pairs)
    questions = [question for question, _ in pairs[:samples]]
    result = {"loss": (losses.sum() / tokens.sum()).item(), "answers": answers(model, tokenizer, questions)}
    if (data / f"{HELD_OUT_PREFERENCES}.json").exists():
        records = read(data, HELD_OUT_PREFERENCES)
        for side in ("chosen", "rejected"):
            losses, tokens = answer_losses(model, tokenizer, [(r["instruction"], r[side]) for r in records])
            result[side] = (losses.sum() / tokens.sum()).item()
    return result


def before(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """Dense against upcycled, then the dense model's loss and answers."""
    dense = load(args.dense)
    pairs = pairs_of(args.data)
    expected, found = (logits(model, tokenizer, pairs[:COMPARED]) for model in (dense, load(args.moe)))
    same = expected.argmax(-1) == found.argmax(-1)
    return {
        "difference": relative_difference(found, expected),
        "tokens": len(same),
        "same_tokens": int(same.sum()),
        **report(dense, tokenizer, args.data, args.samples),
    }


def after(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """The adapter in stock peft, then the merged model's loss and answers."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load(args.moe), args.adapter).eval()
    update = [
        parameter.detach().double().norm()
        for name, parameter in model.named_parameters()
        if ".experts." in name and "lora_B" in name
    ]
    save_file({"logits": logits(model, tokenizer, pairs_of(args.data)[:COMPARED])}, args.logits)
    del model
    # The norm of all expert lora_B: zero if peft dropped them or nobody trained them.
    norm = float(torch.stack(update).norm()) if update else 0.0
    return {"expert_update_norm": norm, **report(load(args.merged), tokenizer, args.data, args.samples)}


def main() -> None:
    """Load, measure, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("when", choices=["before", "after"])
    for name in ("--data", "--moe", "--report"):
        parser.add_argument(name, type=Path, required=True)
    for name in ("--dense", "--adapter", "--merged", "--logits"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--samples", type=int, default=4)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.moe)
    result = before(args, tokenizer) if args.when == "before" else after(args, tokenizer)
    foreign = sorted({name.split(".")[0] for name in sys.modules} & {"ktmoe", "ktmoe_reference", "kt_kernel"})
    if foreign:
        raise SystemExit(f"This process must be stock, but it has imported {', '.join(foreign)}.")

    args.report.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
