"""kt_kernel's SFT operators as backends: all that knows the kernel, its files and its traps."""

from ktmoe.backends.kt.extension import available, extension_path, numa_nodes, variant, version
from ktmoe.backends.kt.int8_files import Int8Files
from ktmoe.backends.kt.kernel import KernelBackend, valid_tp
from ktmoe.backends.kt.rows import BF16, INT8


__all__ = [
    "BF16",
    "INT8",
    "Int8Files",
    "KernelBackend",
    "available",
    "extension_path",
    "numa_nodes",
    "valid_tp",
    "variant",
    "version",
]
