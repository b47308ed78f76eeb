"""All or nothing: each step of attaching, adding, loading, merging and saving fails in turn; everything is as before.

A step is the call of a function of ktmoe's, peft's or transformers'. The fault is a KeyboardInterrupt, which nobody
catches by mistake.
"""

import gc
import os
import shutil
import sys

import peft
import pytest
import torch
import transformers
from helpers import relative
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from test_models import REFERENCE, logits, lora, model, moved

import ktmoe
from ktmoe.adapters import rollback
from ktmoe.models import attach


_WATCHED = tuple(os.path.dirname(m.__file__) + os.sep for m in (ktmoe, peft, transformers))


class Fault:
    """Counts the steps of what runs within, and interrupts the one of a number."""

    def __init__(self, at=None):
        self.at, self.seen, self.where = at, 0, ""

    def __enter__(self):
        gc.disable()  # finalizers run when it likes, and swallow what is raised in them
        sys.setprofile(self._see)
        return self

    def __exit__(self, *exc):
        sys.setprofile(None)
        gc.enable()

    def _see(self, frame, event, arg):
        file = frame.f_code.co_filename
        if event != "call" or not file.startswith(_WATCHED) or file == rollback.__file__:
            return
        if (
            frame.f_code.co_name == "<genexpr>"
        ):  # is called once more when it is thrown away, where nothing can be raised
            return
        self.seen += 1
        if self.seen == self.at:
            sys.setprofile(None)
            self.where = f"{file}: {frame.f_code.co_name}, from {frame.f_back and frame.f_back.f_code.co_name}"
            raise KeyboardInterrupt(self.where)


def state(made, folder):
    """Everything that a user could notice, but the numbers of merged weights, which come back up to rounding."""
    wrapped = isinstance(made, PeftModel)
    return {
        "types": {n: type(m) for n, m in made.named_modules()},
        "training": {n: m.training for n, m in made.named_modules()},
        "requires_grad": {n: p.requires_grad for n, p in made.named_parameters()},
        "attributes": {n: sorted(vars(m)) for n, m in made.named_modules()},
        "adapters": {n: c.to_dict() for n, c in made.peft_config.items()} if wrapped else None,
        "active": list(made.active_adapters) if wrapped else None,
        "merged": [list(m.merged_adapters) for m in made.modules() if hasattr(m, "merged_adapters")],
        "hooks": [len(m._load_state_dict_pre_hooks) for m in made.modules()],
        "files": {
            str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and ".saving-" not in str(p)
        },
        "folders": sorted(str(p) for p in folder.rglob("*") if p.is_dir() and ".saving-" not in str(p)),
    }


def same(made, before, exact):
    now = made.state_dict()
    return set(now) == set(before) and all(
        torch.equal(now[k], before[k]) if exact else relative(now[k], before[k]) < 1e-5 for k in now
    )


WHOLE = dict(modules_to_save=["lm_head"])
FIRST = lora("q_proj", "experts", **WHOLE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two adapters of the same modules, with other numbers."""
    root = tmp_path_factory.mktemp("adapters")
    for seed in (0, 1):
        moved(attach(model(), REFERENCE, lora=FIRST), seed).save_pretrained(
            root / str(seed), save_embedding_layers=True
        )
    return root


def plain(folder):
    return model()


def attached(folder):
    return attach(model(), REFERENCE)


def adapted(folder):
    return ktmoe.load_adapter(attached(folder), folder / "0", is_trainable=True)


def frozen(folder):
    made = ktmoe.load_adapter(attached(folder), folder / "0")
    made.save_pretrained(folder / "out")
    return made


OPERATIONS = {
    "attach": (plain, lambda m, f: attach(m, REFERENCE, lora=FIRST)),
    "get_peft_model": (attached, lambda m, f: ktmoe.get_peft_model(m, FIRST)),
    "get_peft_model, prompts": (
        attached,
        lambda m, f: ktmoe.get_peft_model(m, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
    ),
    "load_adapter": (attached, lambda m, f: ktmoe.load_adapter(m, f / "0")),
    "load another": (frozen, lambda m, f: m.load_adapter(f / "1", "other", is_trainable=True)),
    "load over it": (adapted, lambda m, f: m.load_adapter(f / "1", "default")),
    "add_adapter": (frozen, lambda m, f: m.add_adapter("other", lora("k_proj", "experts", r=2))),
    "save": (adapted, lambda m, f: m.save_pretrained(f / "new")),
    "save over it": (lambda f: frozen(f) and moved(adapted(f), 5), lambda m, f: m.save_pretrained(f / "out")),
    "merge_adapter": (adapted, lambda m, f: m.merge_adapter()),
    "merge_and_unload": (adapted, lambda m, f: m.merge_and_unload()),
    "unload": (adapted, lambda m, f: m.unload()),
    "detach": (attached, lambda m, f: ktmoe.detach(m)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_step_fails_in_turn(name, folder):
    make, operate = OPERATIONS[name]
    exact = "merge" not in name
    with Fault() as whole:
        operate(make(folder), folder)
    clean = make(folder)
    with Fault() as counted:
        operate(clean, folder)
    assert 0 < counted.seen < whole.seen
    _forget(folder, name)

    @settings(max_examples=4)
    @given(st.integers(1, counted.seen))
    def fails(at):
        made = make(folder)
        before, numbers = state(made, folder), {k: v.clone() for k, v in made.state_dict().items()}
        expected = logits(made)
        made.train()
        before["training"] = {n: m.training for n, m in made.named_modules()}
        fault = Fault(at)
        try:
            with fault:
                operate(made, folder)
        except KeyboardInterrupt as error:
            caught = error
        else:
            assert fault.seen < at, fault.where  # something was remembered since the steps were counted
            return _forget(folder, name)
        now = state(made, folder)
        assert {k for k in before if before[k] != now[k]} == set(), caught
        assert same(made, numbers, exact), caught
        got = logits(made.eval())
        assert torch.equal(got, expected) if exact else relative(got, expected) < 1e-5, caught
        operate(made, folder)  # and nothing is in the way of another try
        _forget(folder, name)

    fails()


def _forget(folder, name):
    if name == "save":
        shutil.rmtree(folder / "new", ignore_errors=True)
