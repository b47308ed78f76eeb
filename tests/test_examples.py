"""Every example trains, as it stands in an empty folder, with a small model of its family in the place of its own."""

import json
import os
import subprocess
import sys

import families
import pytest
import torch
from factory import save_tokenizer
from safetensors import safe_open

from ktmoe.llamafactory import shipped


CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on the mat"}]
ROWS = {
    "trainer_sft.py": "the cat sat on the mat\n",
    "trl_sft.py": json.dumps({"messages": CHAT}) + "\n",
    "trl_dpo.py": json.dumps({"prompt": "the cat", "chosen": " sat", "rejected": " fell"}) + "\n",
}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
QUICK = ("qwen3_moe_lora_sft_kt", "qwen3_moe_lora_dpo_kt")  # the others in `nox -s training`
CONFIGURATIONS = [name for name in shipped.examples() if name not in ROWS]


def save(folder, family):
    """A model of the family, with a tokenizer and a chat template."""
    tokenizer = save_tokenizer(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    # LLaMA-Factory's templates add tokens of their own.
    made = families.model(family, torch.bfloat16, vocab_size=len(tokenizer) + 64, max_position_embeddings=4096)
    made.save_pretrained(folder)


def run(cwd, *command):
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=env,
        timeout=240,
        check=False,
    )


def expert_lora(adapter):
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        return [name for name in file.keys() if ".experts." in name]


def test_all_examples_are_tried():
    assert set(ROWS) < set(shipped.examples())
    assert {families.of_example(name) for name in CONFIGURATIONS} == set(families.OF_EXAMPLES.values())


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGURATIONS]
)
def test_a_configuration_trains(tmp_path, name):
    """`ktmoe train examples/NAME.yaml`; only the model is another one, and torch computes its experts."""
    here, model = tmp_path / "empty", tmp_path / "of family"
    here.mkdir()
    save(model, families.of_example(name))
    more = {"model_name_or_path": model, "kt_backend": "torch", "use_cpu": "true", "output_dir": "out", "max_steps": 2}
    given = [f"{key}={value}" for key, value in more.items()]
    done = run(here, "-m", "ktmoe.cli", "train", f"examples/{name}.yaml", *given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((here / "out" / "trainer_state.json").read_text())["global_step"] == 2
    assert expert_lora(here / "out")


@pytest.mark.parametrize("name", ROWS)
def test_a_script_trains(tmp_path, name):
    save(tmp_path / "model", "Qwen3-MoE")
    data = tmp_path / ("data.txt" if name == "trainer_sft.py" else "data.jsonl")
    data.write_text(8 * ROWS[name])
    (tmp_path / "script.py").write_text(shipped.examples()[name].read_text())
    done = run(tmp_path, "script.py", "--model", "model", "--data", data, "--out", "out", "--steps", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert expert_lora(tmp_path / "out")
    assert "loss" in done.stdout


@pytest.mark.slow  # in `nox -s training`
def test_a_script_trains_as_two_processes(tmp_path):
    save(tmp_path / "model", "Qwen3-MoE")
    (tmp_path / "data.txt").write_text(16 * ROWS["trainer_sft.py"])
    (tmp_path / "script.py").write_text(shipped.examples()["trainer_sft.py"].read_text())
    told = ["--model", "model", "--data", "data.txt", "--out", "out", "--steps", 2]
    done = run(tmp_path, "-m", "torch.distributed.run", "--nproc_per_node", 2, "script.py", *told)
    assert done.returncode == 0, done.stderr[-3000:]
    assert expert_lora(tmp_path / "out")
