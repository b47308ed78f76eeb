"""Logits of ktmoe's own module for an adapter, to be compared with those of stock transformers and peft.

``python ktmoe_logits.py --base DIR --adapter DIR --data DIR --logits FILE``
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from dataset import HELD_OUT_DATASET, read_dataset
from held_out import fixed_logits
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import ktmoe


def main() -> None:
    """Attach ktmoe to the base model, load the adapter, save the logits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--base", "--adapter", "--data", "--logits"):
        parser.add_argument(name, type=Path, required=True)
    args = parser.parse_args()

    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    # The reference computes in fp32 and up: the comparison is then about the adapter, not about rounding.
    model = ktmoe.attach(model, ktmoe.KTConfig(kt_backend="reference"))
    model = ktmoe.load_adapter(model, args.adapter).eval()
    save_file({"logits": fixed_logits(model, tokenizer, read_dataset(args.data, HELD_OUT_DATASET))}, args.logits)


if __name__ == "__main__":
    main()
