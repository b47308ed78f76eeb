"""Launchers that start several processes are refused before anything is loaded."""

import pytest
import torch
from factory import save_model

import ktmoe


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


def attach(model):
    from transformers import AutoModelForCausalLM

    return ktmoe.attach(AutoModelForCausalLM.from_pretrained(model), ktmoe.KTConfig(kt_backend="torch"))


def load(model):
    return ktmoe.load_model(model, ktmoe.KTConfig(kt_backend="torch"))


@pytest.mark.parametrize("how", [attach, load])
def test_several_processes(model, monkeypatch, how):
    monkeypatch.setenv("WORLD_SIZE", "2")  # what torchrun and accelerate set
    with pytest.raises(ktmoe.KTError, match=r"WORLD_SIZE: got 2 processes; .* one process so far"):
        how(model)
    monkeypatch.setenv("WORLD_SIZE", "1")
    how(model)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)  # by hand, without a launcher
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(ktmoe.KTError, match="got 4 processes"):
        how(model)


def test_refused_before_a_file_is_read(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ktmoe.KTError, match="WORLD_SIZE"):
        ktmoe.load_model(tmp_path / "nowhere")
