"""Write the question-answer pairs the way LLaMA-Factory reads them: alpaca JSON and a ``dataset_info.json``."""

from __future__ import annotations

import json
from pathlib import Path

from corpus import QAPair


TRAIN_DATASET, HELD_OUT_DATASET = "pydoc_train", "pydoc_held_out"


def write_dataset(data_dir: Path, train: list[QAPair], held_out: list[QAPair]) -> None:
    """Write both datasets and their index into ``data_dir``."""
    data_dir.mkdir(parents=True, exist_ok=True)
    info = {}
    for name, pairs in ((TRAIN_DATASET, train), (HELD_OUT_DATASET, held_out)):
        records = [{"instruction": pair.question, "input": "", "output": pair.answer} for pair in pairs]
        _write_json(data_dir / f"{name}.json", records)
        info[name] = {"file_name": f"{name}.json"}
    _write_json(data_dir / "dataset_info.json", info)


def read_dataset(data_dir: Path, name: str) -> list[dict[str, str]]:
    """Read one dataset's records back."""
    return json.loads((data_dir / f"{name}.json").read_text(encoding="utf-8"))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
