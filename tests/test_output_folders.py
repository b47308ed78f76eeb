"""Where merge and quantize write: into links, mount points and the current folder, whole or not at all."""

import errno
import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from families import logits, model
from helpers import relative
from test_models import REFERENCE, lora, moved
from transformers import AutoModelForCausalLM

import ktmoe
from ktmoe import KTError
from ktmoe.convert import output, quantize
from ktmoe.models import attach


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model in shards, an adapter, and the logits of both together."""
    root = tmp_path_factory.mktemp("made")
    model().save_pretrained(root / "model", max_shard_size="400KB")
    (root / "model" / "README.md").write_text("of the model")
    adapted = moved(attach(model(), REFERENCE, lora=lora("q_proj", "experts")))
    adapted.save_pretrained(root / "adapter")
    return root, logits(adapted)


def merge(made, out, **options):
    return ktmoe.merge_adapter(made[0] / "model", made[0] / "adapter", out, **options)


def contents(folder):
    """Everything in a folder."""
    return {
        str(p.relative_to(folder)): (os.readlink(p) if p.is_symlink() else p.is_file() and digest(p))
        for p in sorted(folder.rglob("*"))
    }


def digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def other_disk(tmp_path):
    """A folder on another disk."""
    disk = Path("/dev/shm")
    if not disk.is_dir() or os.stat(disk).st_dev == os.stat(tmp_path).st_dev or not os.access(disk, os.W_OK):
        pytest.skip("no second disk here")
    with tempfile.TemporaryDirectory(dir=disk) as folder:
        yield Path(folder)


def a_link_to_another_disk(tmp_path, disk):
    (tmp_path / "out").symlink_to(disk)
    return tmp_path / "out"


def a_link_to_nothing_yet_on_another_disk(tmp_path, disk):
    (tmp_path / "out").symlink_to(disk / "deep" / "inside")
    return tmp_path / "out"


def a_new_folder_under_a_link(tmp_path, disk):
    (tmp_path / "link").symlink_to(disk)
    return tmp_path / "link" / "new" / "out"


@pytest.mark.parametrize(
    "place",
    [a_link_to_another_disk, a_link_to_nothing_yet_on_another_disk, a_new_folder_under_a_link],
    ids=lambda place: place.__name__,
)
def test_another_disk(place, made, other_disk, tmp_path, monkeypatch):
    out = place(tmp_path, other_disk)
    asked = []
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(os.stat(path).st_dev) or usage(path))
    merge(made, out)
    assert asked == [os.stat(other_disk).st_dev]
    assert relative(logits(AutoModelForCausalLM.from_pretrained(out)), made[1]) < 1e-5
    assert list(other_disk.rglob("config.json"))
    assert not [f for f in tmp_path.rglob("*") if not f.is_symlink() and f.name not in ("new", "out")]


def test_a_mount_point(made, tmp_path, monkeypatch):
    """It can be neither renamed nor removed, nothing is renamed across its border, and ext4 has a folder in it."""
    out = tmp_path / "out"
    (out / "lost+found").mkdir(parents=True)
    for name, where in (("replace", os.replace), ("rename", os.rename)):

        def across(old, new, where=where):
            old, new = Path(old), Path(new)
            if (out in old.parents) != (out in new.parents) or out in (old, new):
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            return where(old, new)

        monkeypatch.setattr(os, name, across)
    rmdir = os.rmdir
    monkeypatch.setattr(os, "rmdir", lambda path, **more: _busy() if Path(path) == out else rmdir(path, **more))
    merge(made, out)
    assert relative(logits(AutoModelForCausalLM.from_pretrained(out)), made[1]) < 1e-5
    assert {p.name for p in out.iterdir()} == {"lost+found"} | {p.name for p in (made[0] / "model").iterdir()}


def _busy():
    raise OSError(errno.EBUSY, "Device or resource busy")


@pytest.mark.parametrize("out", [".", "", "./"])
def test_the_current_folder(out, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = merge(made, out or Path())
    assert done.path == (out or ".")
    assert relative(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), made[1]) < 1e-5
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in (made[0] / "model").iterdir()}


def test_files_that_are_there_stay(made, tmp_path):
    (tmp_path / ".git").mkdir()
    for name in ("notes.txt", "run.log"):
        (tmp_path / name).write_text("mine")
    merge(made, tmp_path)
    assert relative(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), made[1]) < 1e-5
    assert {(tmp_path / name).read_text() for name in ("notes.txt", "run.log")} == {"mine"}


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "adapter_model.safetensors",
    ],
)
def test_what_would_be_replaced_or_mixed_is_refused(name, made, tmp_path):
    (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(KTError, match=f"not empty: it holds {name}"):
        merge(made, tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("which", ["model", "adapter"])
def test_never_over_its_own_input(which, made, tmp_path):
    shutil.copytree(made[0], tmp_path / "made")
    before = contents(tmp_path)
    with pytest.raises(KTError, match="not empty"):
        merge((tmp_path / "made", None), tmp_path / "made" / which)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("there", [True, False])
def test_too_little_space_leaves_nothing(there, made, tmp_path, monkeypatch):
    out = tmp_path / "deep" / "out"
    if there:
        out.mkdir(parents=True)
    before = contents(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(KTError, match=f"{'out' if there else tmp_path.name} has 0 GB free; the checkpoint takes"):
        merge(made, out)
    assert contents(tmp_path) == before


class Faults:
    """Has the n-th step that touches a folder fail: files opened for writing, folders made, names changed."""

    EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.copyfile")

    def __init__(self):
        self.folder, self.countdown, self.error = None, -1, None
        sys.addaudithook(self.hook)  # there is no way to remove one

    def hook(self, event, args):
        if self.folder is None or event not in self.EVENTS:
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if not any(isinstance(a, (str, os.PathLike)) and str(a).startswith(self.folder) for a in args):
            return
        self.countdown -= 1
        if self.countdown == 0:
            raise self.error

    def run(self, folder, countdown, error, call):
        self.folder, self.countdown, self.error = str(folder), countdown, error
        try:
            return call()
        finally:
            self.folder = None


FAULTS = Faults()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("there", [True, False])
def test_each_step_fails_in_turn(there, error, made, tmp_path):
    """Neither half an output nor a lost input, whichever it is."""
    shutil.copytree(made[0], tmp_path / "made")
    out = tmp_path / "deep" / "out"
    fresh(out, there)

    def finish(folder):
        (folder / "Modelfile").write_text("theirs")

    def call():
        return merge((tmp_path / "made", None), out, finish=finish)

    def tried(step):
        """What was raised when that step failed."""
        try:
            FAULTS.run(tmp_path, step, error, call)
        except (KTError, KeyboardInterrupt) as raised:
            return raised
        return None

    before, rolled_back = contents(tmp_path), 0
    for step in range(1, 1000):
        raised = tried(step)
        if FAULTS.countdown > 0:  # there are fewer steps
            assert raised is None
            break
        if contents(tmp_path) == before:
            rolled_back += 1
            assert isinstance(raised, type(error) if isinstance(error, KeyboardInterrupt) else KTError)
            continue
        # Everything was in its place, and what failed was tidying up.
        check_whole(out, there, made[1])
        shutil.rmtree(out)
        fresh(out, there)
        assert contents(tmp_path) == before
    assert rolled_back > 8
    check_whole(out, there, made[1])
    found = contents(tmp_path)
    assert {k: v for k, v in found.items() if k.startswith("made")} == {
        k: v for k, v in before.items() if k.startswith("made")
    }
    assert not [name for name in found if ".part" in name]


def fresh(out, there):
    """The place as it is before a run."""
    if there:
        out.mkdir(parents=True)
        (out / "notes.txt").write_text("mine")
        (out / "Modelfile").write_text("mine, and replaced in the end")
    elif out.parent.exists():
        out.parent.rmdir()


def check_whole(out, there, expected):
    """A model that loads, and what was there before."""
    assert relative(logits(AutoModelForCausalLM.from_pretrained(out)), expected) < 1e-5
    assert (out / "Modelfile").read_text() == "theirs"
    assert not there or (out / "notes.txt").read_text() == "mine"


# --- quantize ---


@pytest.mark.kernel
@pytest.mark.parametrize("place", [a_link_to_another_disk, a_link_to_nothing_yet_on_another_disk])
def test_packed_weights_on_another_disk(place, made, other_disk, tmp_path):
    out = place(tmp_path, other_disk)
    quantize.quantize_model(made[0] / "model", out)
    assert list(other_disk.rglob("manifest.json"))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.kernel
def test_packed_weights_in_a_mount_point(made, tmp_path, monkeypatch):
    (tmp_path / "lost+found").mkdir()
    monkeypatch.chdir(tmp_path)
    assert len(quantize.quantize_model(made[0] / "model", ".")) == 3
    assert len(quantize.quantize_model(made[0] / "model", ".")) == 3


@pytest.mark.kernel
def test_packing_without_space_leaves_nothing(made, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(KTError, match="GB are free"):
        quantize.quantize_model(made[0] / "model", tmp_path / "deep" / "out")
    assert not list(tmp_path.iterdir())


def test_the_names_that_mean_numbers():
    assert output.is_weights("model-00001-of-00002.safetensors")
    assert output.is_weights("model.safetensors.index.json")
    assert not output.is_weights("tokenizer.json")
