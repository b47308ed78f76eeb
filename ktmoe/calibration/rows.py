"""Rows of a data set as the token ids that a model would be trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ktmoe.types import KTError


_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
_ANSWERS = ("completion", "chosen", "response", "output")


def rows_of(data: str, tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of each row.

    Args:
        data: a file (.json, .jsonl, .csv, .parquet, .txt), or the name of a data set on the hub, whose split `train`
            is read.
        tokenizer: of the model; conversations go through its chat template.

    Raises:
        KTError: no such file or set, rows in a form that is not known, or conversations without a chat template.
    """
    path = Path(data)
    reader = _READERS.get(path.suffix)
    if path.exists() and reader is None:
        raise KTError(f"DATA: {data}: expected one of {', '.join(_READERS)}, or the name of a data set on the hub.")
    for row in _read(data, {"path": reader, "data_files": data} if reader else {"path": data}):
        yield _ids(row, tokenizer)


def _read(data: str, named: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    from datasets import load_dataset

    try:
        # Streaming: a large set is neither downloaded nor converted for the part of it that is read.
        yield from load_dataset(**named, split="train", streaming=True)
    except Exception as error:  # of many kinds: files, formats, the hub
        raise KTError(f"DATA: {data}: cannot be read ({' '.join(str(error).split())[:300]}).") from error


def _ids(row: Mapping[str, Any], tokenizer: Any) -> list[int]:
    found = _text_or_messages(row)
    if isinstance(found, str):
        return list(tokenizer(found)["input_ids"])
    if tokenizer.chat_template is None:
        raise KTError("DATA: its rows are conversations, and the model's tokenizer has no chat template.")
    text = tokenizer.apply_chat_template(found, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _text_or_messages(row: Mapping[str, Any]) -> str | list[dict[str, str]]:
    messages = row.get("messages") or row.get("conversations")
    if messages:
        return [_message(one) for one in messages]
    if isinstance(row.get("text"), str):
        return str(row["text"])
    question = row.get("prompt") or row.get("instruction")
    answer = next((row[name] for name in _ANSWERS if row.get(name)), None)
    if isinstance(question, list) and isinstance(answer, list):
        both = [_message(one) for one in question]
        return both + [one for one in map(_message, answer) if one not in both]
    if isinstance(question, str) and isinstance(answer, str):
        return "\n".join(part for part in (question, row.get("input"), answer) if part)
    raise KTError(
        f"DATA: a row has the columns {', '.join(row)}; expected text, messages or conversations, or prompt or "
        "instruction with completion, chosen, response or output. For other forms there is dataset_info.json: ktmoe "
        "calibrate CONFIG.yaml reads what that training would."
    )


def _message(one: Mapping[str, Any]) -> dict[str, str]:
    """{role, content}, also of ShareGPT's {from, value}."""
    role = str(one.get("role") or one.get("from"))
    return {"role": _ROLES.get(role, role), "content": str(one.get("content") or one.get("value") or "")}
