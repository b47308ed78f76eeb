"""The torch backend: the routed experts with torch alone, forward and hand-written backward.

`backend` is the algorithm. `rows` sorts the tokens by expert and sums their results, `products` multiplies with the
frozen weights, `lora` adds one expert's LoRA, `buffers` keeps memory from call to call, `choice` decides per host.
"""

from ktmoe.backends.row import Limits, Memory, Row
from ktmoe.backends.torch.backend import TorchBackend
from ktmoe.backends.torch.choice import build, call_bytes, copied_bytes


__all__ = ["ROW", "TorchBackend", "build"]

ROW = Row(
    "torch",
    lambda plan, weights, shape, scaling, packed: build(weights, shape, plan.torch_packing),
    required=Limits(0.05, 0.10, 0.005),
    expected=Limits(0.01, 0.015, 0.005),
    aimed_at=Limits(0.05, 0.10, 0.005),
    describe=lambda: "PyTorch on the CPU",
    memory=lambda plan, shape: Memory(copied_bytes(shape, plan.torch_packing)),
    activations=lambda plan, shape, tokens: Memory(*call_bytes(shape, tokens)),
)
