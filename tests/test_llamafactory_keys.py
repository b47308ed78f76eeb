"""Reading arguments as LLaMA-Factory does, and what ktmoe puts into its modules."""

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from ktmoe.llamafactory import keys
from ktmoe.types import KTError


pytestmark = pytest.mark.skipif(importlib.util.find_spec("llamafactory") is None, reason="LLaMA-Factory not installed")


@pytest.fixture(scope="module")
def llamafactory():
    from ktmoe.llamafactory import install

    install()


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(KTError, match=r"gone\.yaml: cannot be read"):
        keys.read([str(tmp_path / "gone.yaml")])
    for name, text in (("list.yaml", "- 1\n"), ("broken.yaml", "a: [\n"), ("broken.json", "{")):
        (tmp_path / name).write_text(text)
        with pytest.raises(KTError, match=name):
            keys.read([str(tmp_path / name)])


def test_json_is_read_too(tmp_path):
    (tmp_path / "config.json").write_text('{"use_kt": true, "lora_rank": 8}')
    assert keys.read([str(tmp_path / "config.json"), "lora_rank=4"]) == {"use_kt": True, "lora_rank": 4}


def test_command_line_form():
    argv = ["--use_kt", "--kt-backend", "torch", "--lora_rank=4", "--no_x", "--use_dora", "n"]
    expected = {"use_kt": True, "kt_backend": "torch", "lora_rank": 4, "no_x": True, "use_dora": False}
    assert keys.values(argv) == expected
    assert keys.values([]) == {}
    assert keys.uses_kt(argv)
    with pytest.raises(KTError, match="cpu_infer"):
        keys.check(["--cpu_infer", "4"])
    with pytest.raises(KTError, match="kt_threads: no such key"):
        keys.check(["--kt-threads", "4"])


def test_model_arguments_stay_the_same_class(llamafactory):
    from llamafactory.hparams import ModelArguments
    from llamafactory.hparams.parser import _TRAIN_ARGS

    from ktmoe.config import KTConfig

    assert _TRAIN_ARGS[0] is ModelArguments
    args = ModelArguments(model_name_or_path="x", kt_backend="torch", kt_num_threads=2)
    copy = ModelArguments.copyfrom(args, model_name_or_path="y")
    assert (copy.kt_backend, copy.kt_num_threads, copy.model_name_or_path) == ("torch", 2, "y")
    assert copy != args
    assert "kt_backend='torch'" in repr(args)
    assert {f.name for f in dataclasses.fields(KTConfig)} <= args.to_dict().keys()


def test_a_place_that_moved_is_an_error(llamafactory):
    from llamafactory.extras.env import VERSION
    from llamafactory.model import loader

    from ktmoe.llamafactory.patches import replace

    with pytest.raises(KTError, match=rf"LLaMA-Factory {VERSION}: .*no_such_function is not there"):
        replace(loader, "no_such_function", lambda original: original)


@pytest.mark.skipif(importlib.util.find_spec("torchaudio") is not None, reason="torchaudio is installed")
def test_torchaudio_is_not_claimed_to_be_there(llamafactory):
    from llamafactory.data import mm_plugin

    assert importlib.util.find_spec("torchaudio") is None
    with pytest.raises(KTError, match=r"torchaudio\.load: torchaudio is not installed"):
        mm_plugin.torchaudio.load("speech.wav")


SMAPS = Path("/proc/self/smaps")
ADVISED = """
import re, sys
if sys.argv[1] == "ktmoe":
    from ktmoe import llamafactory
    llamafactory.engage({"use_kt": True})
import transformers, peft, torch
x = torch.ones(64 * 2**20, dtype=torch.uint8)
middle = x.data_ptr() + x.nbytes // 2
for mapping in re.split(r"\\n(?=[0-9a-f]+-[0-9a-f]+ )", open("/proc/self/smaps").read()):
    first, last = (int(end, 16) for end in mapping.split()[0].split("-"))
    if first <= middle < last:
        print("hg" in mapping.split("VmFlags:")[1].split())
"""


@pytest.mark.skipif(
    not (SMAPS.exists() and Path("/sys/kernel/mm/transparent_hugepage").exists()), reason="no huge pages on this host"
)
@pytest.mark.parametrize("who", ["ktmoe", "nobody"])
def test_a_training_asks_for_huge_pages(who):
    command = [sys.executable, "-c", ADVISED, who]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(who == "ktmoe")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"kt_numa_nodes": [0, 2]}, (0, 2)),
        ({"kt_numa_nodes": 1}, (1,)),
        (["--kt_numa_nodes", "0,2"], (0, 2)),
        ({}, None),
    ],
)
def test_nodes_are_a_list_in_a_file_and_text_on_a_command_line(llamafactory, given, expected):
    from llamafactory.hparams import ModelArguments
    from transformers import HfArgumentParser

    from ktmoe.llamafactory.arguments import kt_config

    parser = HfArgumentParser(ModelArguments)
    name = {"model_name_or_path": "x"}
    if isinstance(given, dict):
        (args,) = parser.parse_dict({**name, **given})
    else:
        (args,) = parser.parse_args_into_dataclasses(["--model_name_or_path", "x", *given])
    assert kt_config(args).kt_numa_nodes == expected
