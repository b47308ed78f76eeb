"""Write the questions the way LLaMA-Factory reads them: JSON files and a ``dataset_info.json``."""

from __future__ import annotations

import json
from pathlib import Path

from questions import Question


TRAIN, HELD_OUT, PREFERENCES, HELD_OUT_PREFERENCES = "questions", "held_out", "preferences", "held_out_preferences"
FILE_INDEX = "dataset_info.json"


def write_questions(data_dir: Path, train: list[Question], held_out: list[Question]) -> None:
    """For supervised fine-tuning: a question and its answer (LLaMA-Factory's "alpaca" format)."""
    for name, questions in ((TRAIN, train), (HELD_OUT, held_out)):
        records = [{"instruction": question.text, "input": "", "output": question.answer} for question in questions]
        _write(data_dir, name, records, {})


def write_preferences(data_dir: Path, name: str, questions: list[dict[str, str]], rejected: list[str]) -> None:
    """For DPO: a question, the answer to prefer, and another one."""
    records = [
        {"instruction": question["instruction"], "input": "", "chosen": question["output"], "rejected": answer}
        for question, answer in zip(questions, rejected, strict=True)
    ]
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    _write(data_dir, name, records, {"ranking": True, "columns": columns})


def read(data_dir: Path, name: str) -> list[dict[str, str]]:
    """One dataset's records."""
    return json.loads((data_dir / f"{name}.json").read_text(encoding="utf-8"))


def _write(data_dir: Path, name: str, records: list[dict[str, str]], info: dict[str, object]) -> None:
    data_dir.mkdir(parents=True, exist_ok=True)
    index = data_dir / FILE_INDEX
    datasets = json.loads(index.read_text(encoding="utf-8")) if index.exists() else {}
    datasets[name] = {"file_name": f"{name}.json", **info}
    for path, value in ((index, datasets), (data_dir / f"{name}.json", records)):
        path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
