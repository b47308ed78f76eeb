"""kt_kernel's SFT operators as backends: all that knows the kernel, its files and its traps."""

from ktmoe.backends.kt.emptying import idle_bytes
from ktmoe.backends.kt.extension import available, bind_again, extension_path, variant, version
from ktmoe.backends.kt.int8_files import Int8Files
from ktmoe.backends.kt.kernel import KernelBackend
from ktmoe.backends.kt.packed import (
    FILES,
    FORMAT,
    MANIFEST,
    PackedFile,
    PackedLayer,
    PackedModel,
    Recipe,
    fingerprint,
    write_manifest,
)
from ktmoe.backends.kt.rows import BF16, FP8, INT4, INT8
from ktmoe.backends.kt.sizes import valid_tp


__all__ = [
    "BF16",
    "FILES",
    "FORMAT",
    "FP8",
    "INT4",
    "INT8",
    "MANIFEST",
    "Int8Files",
    "KernelBackend",
    "PackedFile",
    "PackedLayer",
    "PackedModel",
    "Recipe",
    "available",
    "bind_again",
    "extension_path",
    "fingerprint",
    "idle_bytes",
    "valid_tp",
    "variant",
    "version",
    "write_manifest",
]
