"""`pytorch_model.bin`: torch's own format, read as safetensors files are."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator

import torch
from torch import Tensor

from ktmoe.types import KTError


_DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}


class TorchFile:
    """The tensors of one file, memory-mapped, with the methods of `safetensors.safe_open` that a reader needs."""

    def __init__(self, file: str | os.PathLike[str]) -> None:
        """Opens it; its tensors' bytes are not read.

        Raises:
            KTError: damaged, of torch before 1.6, or more than tensors.
        """
        try:
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, OSError) as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise KTError(
                f"{file}: damaged, or not a file of tensors that can be mapped ({said}). Download it again, or write "
                "the model as safetensors: transformers' save_pretrained."
            ) from error
        self._tensors = {k: v.detach() for k, v in content.items() if isinstance(v, Tensor)}

    def keys(self) -> Iterator[str]:
        """The names of its tensors."""
        return iter(self._tensors)

    def get_slice(self, key: str) -> _Header:
        """What a header would say of a tensor."""
        return _Header(self._tensors[key])

    def get_tensor(self, key: str) -> Tensor:
        """A view of the file."""
        return self._tensors[key]

    def metadata(self) -> dict[str, str]:
        """As transformers writes it into safetensors files."""
        return {"format": "pt"}


class _Header:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        """In the spelling of safetensors."""
        return _DTYPES.get(self._tensor.dtype, str(self._tensor.dtype))
