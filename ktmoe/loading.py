"""`load_model`: a model from disk whose routed experts transformers never loads; they are streamed to a backend."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import nn

from ktmoe import granite
from ktmoe.checkpoint import HUB, Checkpoint
from ktmoe.checkpoint_names import CheckpointNames
from ktmoe.config import KTConfig
from ktmoe.models import attach, auto_class, check_model, looks_like_experts, put
from ktmoe.types import KTError


if TYPE_CHECKING:
    from peft import LoraConfig

_NOT_READ = (
    r"\.experts\.",
    r"block_sparse_moe\.(in|out)put_linear\.",
    r"_scale_inv$",
)  # keys without a parameter, which transformers need not list
_REFUSED = (
    "state_dict",
    "gguf_file",
    "from_tf",
    "from_flax",
    "variant",
    "key_mapping",
    "tp_plan",
    "load_in_4bit",
    "load_in_8bit",
    "ignore_mismatched_sizes",
)


def load_model(
    path: str | os.PathLike[str],
    config: KTConfig | None = None,
    lora: LoraConfig | None = None,
    r: int | None = None,
    **from_pretrained: Any,
) -> nn.Module:
    """A language model from disk or the hub, its routed experts run by ktmoe.

    transformers loads everything else, where `device_map` says. The experts stay in their memory-mapped files: the
    kernel packs them from there layer by layer, and the torch backend computes straight from them.

    Args:
        path: a directory with safetensors, or a name on the hub.
        config: which backend, threads, limits.
        lora: if given, the adapter is added too, on the experts and on the rest.
        r: the largest LoRA rank that adapters will have, where `lora` does not say it.
        **from_pretrained: `dtype`, `device_map`, `attn_implementation`, `revision` ... for transformers.

    Returns:
        The model, or a PeftModel around it if `lora` was given.

    Raises:
        KTError: shards that are missing, damaged, incomplete or of another model; or as `attach`.
        KernelError: the kernel failed a check.
    """
    import transformers
    from transformers import AutoConfig

    refused = sorted(name for name in _REFUSED if from_pretrained.get(name))
    if refused:
        raise KTError(f"load_model: got {', '.join(refused)}; experts are streamed from safetensors. Leave it out.")
    config = config or KTConfig()
    hub = {k: v for k, v in from_pretrained.items() if k in HUB}
    trust = {k: v for k, v in from_pretrained.items() if k == "trust_remote_code"}
    try:
        model_config = from_pretrained.pop("config", None) or AutoConfig.from_pretrained(path, **hub, **trust)
    except (OSError, ValueError) as error:
        raise KTError(f"{path}: {error}") from error
    fp8 = forget_fp8(model_config)
    check_model(model_config, config, lora.r if lora is not None else r or 1)
    checkpoint = Checkpoint(path, **hub)
    if not {"dtype", "torch_dtype"} & set(from_pretrained):
        name = "torch_dtype" if transformers.__version__.startswith("4.") else "dtype"
        from_pretrained[name] = torch.bfloat16 if fp8 else "auto"
    with without_experts():
        model, info = auto_class(model_config).from_pretrained(
            path, config=model_config, output_loading_info=True, ignore_mismatched_sizes=True, **from_pretrained
        )
    _check_rest(model, checkpoint, info)
    return stream(model, checkpoint, config, lora, r)


def _check_rest(model: nn.Module, checkpoint: Checkpoint, info: dict[str, Any]) -> None:
    """Refuses a model whose tensors outside the experts did not all come from the files.

    Args:
        model: as transformers loaded it.
        checkpoint: where from.
        info: what transformers says about it.

    Raises:
        KTError: names the file and the key.
    """
    names = CheckpointNames(model, ())
    for key, there, expected in sorted((str(k), tuple(a), tuple(b)) for k, a, b in info["mismatched_keys"]):
        raise checkpoint.wrong_shape(
            next((k for k in checkpoint.shapes if names.parameter(k, (key,))), key), there, expected
        )
    missing = sorted(str(key) for key in info["missing_keys"])
    if missing:
        raise KTError(
            f"{checkpoint.path}: {len(missing)} tensors are missing, e.g. {', '.join(missing[:3])}. The files or "
            "config.json are incomplete or of another model."
        )


def forget_fp8(model_config: Any) -> bool:
    """Takes FP8 with block scales off a configuration, since `stream` dequantises: transformers' own way needs a GPU.

    Returns:
        Whether it was there. The parameters of the model are bare FP8 numbers until `stream`.
    """
    quantization = getattr(model_config, "quantization_config", None)
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
        return False
    del model_config.quantization_config
    return True


def _dequantise(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Gives the parameters outside the experts what their FP8 numbers and block scales mean, in place.

    Raises:
        KTError: such a parameter is not in memory (`device_map` offloads it).
    """
    parameters = dict(model.named_parameters())
    names = CheckpointNames(model, ())
    for key in checkpoint.fp8_keys():
        name = names.parameter(key, parameters)
        if name is None:  # an expert's, or of a layer that the model does not build
            continue
        if parameters[name].is_meta:
            raise KTError(f"device_map: {name} is offloaded, and FP8 weights are dequantised in memory. Leave it out.")
        parameters[name].data.copy_(checkpoint.dequantise(key))


def stream(
    model: nn.Module,
    checkpoint: Checkpoint,
    config: KTConfig | None = None,
    lora: LoraConfig | None = None,
    r: int | None = None,
) -> nn.Module:
    """`attach` for a model that was made `without_experts`: they come from the checkpoint.

    Parameters that transformers read as bare FP8 numbers (`forget_fp8`) get their block scales.

    Raises:
        KTError: as `attach`; or matrices that are missing, there twice, or of another shape.
        KernelError: the kernel failed a check.
    """
    absent = {name: m for name, m in model.named_modules() if isinstance(m, _Absent)}
    for name, module in model.named_modules():  # accelerate's hooks bring in what `device_map` offloaded
        lost = [p for p, value in module.named_parameters(name, recurse=False) if value.is_meta]
        if lost and not hasattr(module, "_hf_hook"):
            raise KTError(
                f"device_map: {lost[0]} has no weights: transformers left it on the meta device. Give a device_map "
                "that puts every module on a device, or offloads some of them beside others on a device."
            )
    for name, module in absent.items():
        put(model, name, module.experts[0])
    _dequantise(model, checkpoint)
    return attach(model, config, lora, r, checkpoint=checkpoint)


class _Absent(nn.Module):
    """Stands for the routed experts of a layer while transformers loads the rest."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = (experts.to("meta"),)  # no submodule: transformers must not see its parameters


@contextmanager
def without_experts() -> Iterator[None]:
    """Within it, transformers makes models without their routed experts; `stream` brings them back.

    transformers never reads a tensor of a checkpoint that has no parameter to go to.
    """
    from transformers import PreTrainedModel

    ready, ignore = PreTrainedModel.post_init, "_keys_to_ignore_on_load_unexpected"
    with ExitStack() as patches:

        def post_init(self: Any) -> Any:
            granite.unify(self)
            for name, experts in [(n, m) for n, m in self.named_modules() if n and looks_like_experts(n, m)]:
                put(self, name, _Absent(experts))
            patches.enter_context(mock.patch.object(type(self), ignore, [*(getattr(self, ignore) or ()), *_NOT_READ]))
            return ready(self)

        patches.enter_context(mock.patch.object(PreTrainedModel, "post_init", post_init))
        yield
