"""Every Python block of the documentation is run, on a tiny random model in the place of the one that it names."""

import re
from pathlib import Path

import pytest
import torch
from factory import save_model
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

from ktmoe.adapters.beside import EXPERTS_FILE


ROOT = Path(__file__).resolve().parent.parent
RELEASED = "Qwen/Qwen3-30B-A3B"
PAGES = {p.relative_to(ROOT).as_posix(): p for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))}


def snippets(page):
    """`(line of the file, code)` of every block, in order."""
    source = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", source, re.DOTALL | re.MULTILINE)
    return [(source[: m.start()].count("\n") + 1, m[1]) for m in found]


WITH_CODE = [name for name, page in PAGES.items() if snippets(page)]


def forked_adapter(folder, model):
    """Expert LoRA as the forked training stack writes it, of a saved model; without an adapter for the rest."""
    config = Qwen3MoeConfig.from_pretrained(model)
    e, h, i, r = config.num_experts, config.hidden_size, config.moe_intermediate_size, 8
    sides = {"gate": (h, i), "up": (h, i), "down": (i, h)}
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for name, (inner, out) in sides.items():
            tensors[f"layers.{layer}.experts.{name}_lora_a"] = torch.randn(e, r, inner)
            tensors[f"layers.{layer}.experts.{name}_lora_b"] = torch.randn(e, out, r)
    folder.mkdir()
    save_file(tensors, folder / EXPERTS_FILE)
    attention = "base_model.model.model.layers.0.self_attn.q_proj"
    size = config.num_attention_heads * config.head_dim
    rest = {f"{attention}.lora_A.weight": torch.randn(r, h), f"{attention}.lora_B.weight": torch.randn(size, r)}
    save_file(rest, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = '{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["layers.0.self_attn.q_proj"]}'
    (folder / "adapter_config.json").write_text(settings)


@pytest.mark.parametrize("name", WITH_CODE)
def test_every_block_runs(name, tmp_path, monkeypatch):
    """From top to bottom, as a reader would; what a block defines is there for the next."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    forked_adapter(tmp_path / "old_adapter", tmp_path / "model")
    state = {"__name__": "page"}
    for line, code in snippets(PAGES[name]):
        here = "\n" * line + code.replace(RELEASED, str(tmp_path / "model"))
        exec(compile(here, str(PAGES[name]), "exec"), state)


def test_no_block_is_overlooked():
    """Blocks are found by how they begin: another way to write `python` would hide one."""
    for page in PAGES.values():
        opened = re.findall(r"^\s*[`~:]{3,}\W*(?:code-block\W*)?(?:python|py|pycon)\b", page.read_text(), re.MULTILINE)
        assert len(opened) == len(snippets(page)), page
