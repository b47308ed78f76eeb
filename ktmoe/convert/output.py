"""Where a converted checkpoint goes: it appears there whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from ktmoe.types import KTError


WEIGHT_FILES = ("safetensors", "bin", "pt", "pth", "ckpt", "h5", "msgpack", "onnx", "gguf", "part")
_INSIDE = ".ktmoe.part"


class Output:
    """A folder to be written, which may be a link, a mount point or the current one.

    A new folder is made beside its place and renamed. One that is there is written into, from a folder inside it, so
    that nothing ever crosses a disk: what else it holds stays.

    Attributes:
        path: where it really is.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Looks at the place; nothing is touched.

        Raises:
            KTError: it is a file, holds a model or an adapter, or was left by a run that was killed.
        """
        self._given = str(path)
        self.path = Path(os.path.realpath(path))
        self._there = self.path.exists()
        if self._there and not self.path.is_dir():
            raise KTError(f"out_path: {path} is there already, and no folder. Name a new directory.")
        self._stage = self.path / _INSIDE if self._there else self.path.with_name(f"{self.path.name}.part")
        if self._stage.exists():
            raise KTError(f"out_path: {self._stage} is there, perhaps of a merge that was killed. Delete it.")
        if self._there:
            self._refuse(sorted(f.name for f in self.path.iterdir() if is_weights(f.name)))

    def check(self, names: Collection[str], size: int) -> None:
        """Refuses what would not fit or would replace somebody's files. Nothing is touched.

        Args:
            names: of the files to be written.
            size: bytes of them all.

        Raises:
            KTError: says what is in the way.
        """
        if self._there:
            self._refuse(sorted(name for name in names if (self.path / name).exists()))
        disk = next(p for p in (self.path, *self.path.parents) if p.exists())
        free = shutil.disk_usage(disk).free
        if free < size:
            raise KTError(f"out_path: {disk} has {free / 1e9:.3g} GB free; the checkpoint takes {size / 1e9:.3g} GB.")

    @contextmanager
    def written(self) -> Iterator[Path]:
        """A folder to write into. Its files are in their place when the block has ended without an error.

        Raises:
            KTError: the disk refuses; whatever was written is gone, whatever was there is there.
        """
        try:
            with new_folder(self._stage):
                try:
                    yield self._stage
                    if self._there:
                        _move(self._stage, self.path)
                    else:
                        os.replace(self._stage, self.path)
                finally:
                    shutil.rmtree(self._stage, ignore_errors=True)
        except OSError as error:
            raise KTError(f"out_path: {self._given}: {error}. Nothing was left behind.") from error

    def _refuse(self, found: list[str]) -> None:
        if found:
            raise KTError(
                f"out_path: {self._given} is there already and not empty: it holds {', '.join(found[:3])}. Name a new "
                "directory."
            )


@contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """Makes a folder and those that it lies in; what an error leaves empty is taken away again."""
    made: list[Path] = []
    try:
        for folder in reversed([p for p in (path, *path.parents) if not p.exists()]):
            folder.mkdir()
            made.append(folder)
        yield
    except BaseException:
        for folder in reversed(made):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise


def is_weights(name: str) -> bool:
    """Whether a file beside a model's configuration holds numbers, or says which files do."""
    return name.endswith((".index.json", *(f".{suffix}" for suffix in WEIGHT_FILES)))


def _move(stage: Path, out: Path) -> None:
    """Moves every file, config.json last: without it the folder is no model. Either all are moved, or none."""
    kept = stage / ".kept"
    names = sorted((f.name for f in stage.iterdir()), key=lambda name: (name == "config.json", name))
    try:
        for name in names:
            if (out / name).exists():
                kept.mkdir(exist_ok=True)
                os.replace(out / name, kept / name)
            os.replace(stage / name, out / name)
    except BaseException:
        for name in names:
            if not (stage / name).exists():
                os.replace(out / name, stage / name)
            if (kept / name).exists():
                os.replace(kept / name, out / name)
        raise
