"""From file to file: a checkpoint with an adapter merged in, a checkpoint's experts packed."""

from ktmoe.convert.int4 import quantize_int4_model
from ktmoe.convert.merge import Merged, merge_adapter
from ktmoe.convert.quantize import pack, quantize_model


__all__ = ["Merged", "merge_adapter", "pack", "quantize_int4_model", "quantize_model"]
