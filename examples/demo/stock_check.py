"""Evaluate a model, with or without an adapter, in a process that has never heard of ktmoe.

``python stock_check.py --base DIR --data DIR --report FILE [--adapter DIR --logits FILE]``: stock transformers loads
the base model, stock peft the adapter. What is measured here is therefore what any user of the adapter gets.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from dataset import HELD_OUT_DATASET, read_dataset
from held_out import fixed_logits, report
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def expert_update_norm(model: torch.nn.Module) -> float:
    """The norm of all expert ``lora_B`` in the loaded model: zero if peft dropped them or nobody trained them."""
    total = 0.0
    for name, parameter in model.named_parameters():
        if ".experts." in name and "lora_B" in name:
            total += parameter.detach().double().square().sum().item()
    return total**0.5


def main() -> None:
    """Load, evaluate, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--logits", type=Path)
    parser.add_argument("--samples", type=int, default=3)
    args = parser.parse_args()

    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    # fp32: differences between two implementations then show, instead of bf16's rounding.
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    result = {"expert_update_norm": None}
    if args.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, args.adapter)
        result["expert_update_norm"] = expert_update_norm(model)

    model.eval()
    records = read_dataset(args.data, HELD_OUT_DATASET)
    result |= report(model, tokenizer, records, args.samples)
    if args.logits is not None:
        save_file({"logits": fixed_logits(model, tokenizer, records)}, args.logits)

    foreign = [name for name in sys.modules if name.split(".")[0] in {"ktmoe", "ktmoe_reference", "kt_kernel"}]
    if foreign:
        raise SystemExit(f"This process must be stock, but it has imported {', '.join(sorted(foreign))}.")

    args.report.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
