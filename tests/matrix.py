"""One pair of transformers and peft against every model family; `nox -s matrix` runs it for nine pairs.

    python tests/matrix.py results.json            checks the installed pair, writes a row per family
    python tests/matrix.py --table *.json          prints the rows of several pairs; fails if one does not hold

Every figure is a relative difference, mean |x - y| / mean |y|, in fp32 on the reference backend.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import traceback
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any


LIMITS = {
    "logits": 1e-5,
    "gradients": 1e-4,
    "streamed": 1e-5,
    "round trip": 0.0,
    "stock peft": 1e-6,
    "merged": 1e-5,
    "merged files": 1e-5,
}
SAID = "cannot, said"
NO_READER = "does not read LoRA of"  # of the warning with which ktmoe saves what the installed peft has no way to read


def check(family: str) -> dict[str, Any]:
    """The row of one family: a number or `SAID` for each of `LIMITS`."""
    import families
    import torch
    from helpers import relative
    from peft import LoraConfig, PeftModel

    import ktmoe

    reference = ktmoe.KTConfig(kt_backend="reference")
    lora = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=["o_proj", "experts"])
    stock = families.mended(families.model(family))
    stock.config.use_cache = False
    attached = ktmoe.attach(copy.deepcopy(stock), reference)
    row: dict[str, Any] = {"logits": relative(families.logits(attached), families.logits(stock))}

    for model in (stock, attached):
        model.train()(families.IDS, labels=families.IDS).loss.backward()
    theirs = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None and p.grad.any()}
    mine = {name: p.grad for name, p in attached.named_parameters() if name in theirs}
    row["gradients"] = max(relative(mine[name], theirs[name]) for name in mine)

    with tempfile.TemporaryDirectory() as folder:
        stock.save_pretrained(f"{folder}/model")
        streamed = ktmoe.load_model(f"{folder}/model", reference, r=4)
        row["streamed"] = relative(families.logits(streamed), families.logits(stock))

        trained = ktmoe.get_peft_model(streamed, lora)
        generator = torch.Generator().manual_seed(1)
        for p in trained.parameters():
            if p.requires_grad:
                p.data.normal_(0, 0.05, generator=generator)
        expected = families.logits(trained)
        assert relative(expected, families.logits(stock)) > 1e-3, "the adapter must matter"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trained.save_pretrained(f"{folder}/adapter")
        again = ktmoe.load_adapter(ktmoe.load_model(f"{folder}/model", reference, r=4), f"{folder}/adapter")
        row["round trip"] = relative(families.logits(again), expected)
        if any(NO_READER in str(w.message) for w in caught):
            row["stock peft"] = SAID
        else:
            read = PeftModel.from_pretrained(copy.deepcopy(stock), f"{folder}/adapter")
            row["stock peft"] = relative(families.logits(read), expected)

        ktmoe.merge_adapter(f"{folder}/model", f"{folder}/adapter", f"{folder}/merged")
        row["merged files"] = relative(families.logits(families.load(family, f"{folder}/merged")), expected)
        row["merged"] = relative(families.logits(trained.merge_and_unload()), expected)
    return row


def run(out: Path) -> None:
    """Checks every family that the installed transformers has."""
    import families
    import peft
    import transformers

    rows: dict[str, Any] = {}
    for family, about in families.FAMILIES.items():
        if not hasattr(transformers, about.config):
            rows[family] = None
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                rows[family] = check(family)
            except Exception as error:
                traceback.print_exc()
                rows[family] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(f"{family}: {rows[family]}", flush=True)
    pair = f"{transformers.__version__} + {peft.__version__}"
    out.write_text(json.dumps({"pair": pair, "families": rows}, indent=1))


def holds(name: str, value: Any) -> bool:
    """Whether one cell is within its limit."""
    return value == SAID if isinstance(value, str) else value <= LIMITS[name]


def table(files: list[Path]) -> int:
    """Prints a line per pair, then every cell that does not hold; returns how many those are."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="Families that hold, and the worst relative difference among them")
    for column in ("transformers + peft", "families", *LIMITS):
        shown.add_column(column)
    wrong = []
    for file in files:
        result = json.loads(file.read_text())
        there = {family: row for family, row in result["families"].items() if row is not None}
        cells = defaultdict(list)
        for family, row in there.items():
            if "error" in row:
                wrong.append(f"{result['pair']}, {family}: {row['error']}")
                continue
            for name in LIMITS:
                cells[name].append(row[name])
                if not holds(name, row[name]):
                    wrong.append(f"{result['pair']}, {family}: {name} {row[name]}, limit {LIMITS[name]}")
        shown.add_row(result["pair"], str(len(there)), *(_cell(name, cells[name], len(there)) for name in LIMITS))
    console = Console(width=140)
    console.print(shown)
    console.print(f"limits: {', '.join(f'{name} {limit:g}' for name, limit in LIMITS.items())}")
    for line in wrong:
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"matrix: {len(files)} pairs, {len(wrong)} cells do not hold", markup=False)
    return len(wrong)


def _cell(name: str, values: list[Any], families: int) -> str:
    good = [v for v in values if holds(name, v)]
    figures = [v for v in good if not isinstance(v, str)]
    said = len(good) - len(figures)
    text = f"{len(figures)}/{families - said}"
    if figures:
        text += f" {max(figures):.0e}" if max(figures) else " exact"
    return text + (f", {said} {SAID}" if said else "")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("files", nargs="+", type=Path)
    arguments = parser.parse_args()
    if arguments.table:
        sys.exit(1 if table(arguments.files) else 0)
    run(arguments.files[0])
