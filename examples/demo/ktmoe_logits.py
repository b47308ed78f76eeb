"""Logits of ktmoe's own module for an adapter, to be compared with those of stock transformers and peft.

``python ktmoe_logits.py --moe DIR --adapter DIR --data DIR --logits FILE``
"""

from __future__ import annotations

import argparse
from pathlib import Path

from held_out import logits
from measure import COMPARED, load, pairs_of
from safetensors.torch import save_file
from transformers import AutoTokenizer

import ktmoe


def main() -> None:
    """Attach ktmoe to the base model, load the adapter, save the logits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--moe", "--adapter", "--data", "--logits"):
        parser.add_argument(name, type=Path, required=True)
    args = parser.parse_args()

    # The reference computes in fp32 and up: the comparison is then about the adapter, not about rounding.
    model = ktmoe.attach(load(args.moe), ktmoe.KTConfig(kt_backend="reference"))
    model = ktmoe.load_adapter(model, args.adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.moe)
    save_file({"logits": logits(model, tokenizer, pairs_of(args.data)[:COMPARED])}, args.logits)


if __name__ == "__main__":
    main()
