"""The torch backend: the routed experts with torch alone, forward and hand-written backward.

`backend` is the algorithm. `rows` sorts the tokens by expert and sums their results, `products` multiplies with the
frozen weights, `lora` adds one expert's LoRA, `buffers` keeps memory from call to call, `choice` decides per host.
"""

from ktmoe.backends.torch.backend import TorchBackend
from ktmoe.backends.torch.choice import build


__all__ = ["TorchBackend", "build"]
