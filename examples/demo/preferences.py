"""Preferences for DPO: the docstring's sentence is better than what the model says by itself.

``python preferences.py --dense DIR --data DIR``: the dense model, which computes what the mixture of experts computes,
answers some of the training questions and of the held-out ones; each pair of answers is a preference.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dataset import HELD_OUT, HELD_OUT_PREFERENCES, PREFERENCES, TRAIN, read, write_preferences
from held_out import answers
from measure import load
from transformers import AutoTokenizer


def main() -> None:
    """Generate and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--train", type=int, default=96)
    parser.add_argument("--held-out", type=int, default=48)
    args = parser.parse_args()

    model, tokenizer = load(args.dense), AutoTokenizer.from_pretrained(args.dense)
    for source, target, count in (
        (TRAIN, PREFERENCES, args.train),
        (HELD_OUT, HELD_OUT_PREFERENCES, args.held_out),
    ):
        records = read(args.data, source)[:count]
        own = answers(model, tokenizer, [record["instruction"] for record in records])
        write_preferences(args.data, target, records, [text.removesuffix(" ...") for text in own])


if __name__ == "__main__":
    main()
