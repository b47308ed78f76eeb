"""`ktmoe export` with `use_kt: true`: LLaMA-Factory's keys and files, merged by `ktmoe.merge_adapter`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ktmoe.convert import Merged, merge_adapter
from ktmoe.types import KTError


_MERGE = "the merge goes from file to file"
# name: (its default, what to do)
_FIXED: dict[str, tuple[Any, str]] = {
    "infer_dtype": ("auto", f"{_MERGE} and keeps every dtype"),
    "export_size": (5, f"{_MERGE} and keeps the model's shards"),
    "export_legacy_format": (False, "safetensors are written"),
    "quantization_bit": (None, f"{_MERGE}, which are not in 4 bits"),
    "export_quantization_bit": (None, "quantise the merged model in a second run, without use_kt"),
    "export_hub_model_id": (None, "upload the folder afterwards: hf upload"),
    "resize_vocab": (False, f"{_MERGE} and keeps every size"),
}  # fmt: skip


def export(model_args: Any, data_args: Any) -> Merged:
    """Merges the adapter into the checkpoint, with tokenizer and Modelfile beside it as LLaMA-Factory writes them.

    Model and adapter are found as `train` and `chat` find them, on the hub too.

    Args:
        model_args: LLaMA-Factory's, checked.
        data_args: for the template.

    Returns:
        What was merged.

    Raises:
        KTError: a key that has no meaning for this merge, or as `merge_adapter`.
    """
    for name, (default, why) in _FIXED.items():
        if getattr(model_args, name) != default:
            raise KTError(f"{name}: got {getattr(model_args, name)!r}; with use_kt, {why}. Leave it out.")
    if model_args.export_dir is None:
        raise KTError("export_dir: not given. Name the folder for the merged model.")
    if not model_args.adapter_name_or_path:
        raise KTError("adapter_name_or_path: not given, so there is nothing to merge. Name the adapter.")
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.model import load_tokenizer

    tokenizer = load_tokenizer(model_args)["tokenizer"]
    template = get_template_and_fix_tokenizer(tokenizer, data_args)  # a mistake shows before hours of writing
    hub = {"cache_dir": model_args.cache_dir, "revision": model_args.model_revision, "token": model_args.hf_hub_token}

    def finish(folder: Path) -> None:
        tokenizer.padding_side = "left"
        tokenizer.init_kwargs["padding_side"] = "left"
        tokenizer.save_pretrained(folder)
        (folder / "Modelfile").write_text(template.get_ollama_modelfile(tokenizer), encoding="utf-8")

    return merge_adapter(
        model_args.model_name_or_path,
        model_args.adapter_name_or_path[0],
        model_args.export_dir,
        model_options=hub,
        adapter_options={**hub, "subfolder": model_args.adapter_folder},
        finish=finish,
    )
