"""A small Qwen3-MoE, fine-tuned the way users do it in a long run: train, evaluate, save, load, attach again."""

from __future__ import annotations

import gc
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import ktmoe
from ktmoe.backends import TABLE, is_kernel
from ktmoe.config import KTConfig
from ktmoe.experts import MoEExperts
from ktmoe.gate import contract
from ktmoe.types import MoEShape
from ktmoe.verify.stored_model import store_experts


MAX_LEN = 64  # tokens per kernel call: half of the batches run in chunks
# (sequences, tokens each). A fixed list, since PyTorch keeps compiled code for every size that it meets: batches of
# any size would look like a leak for hours. Odd in number, so that each meets both kinds of checkpointing.
BATCHES = ((1, 5), (2, 40), (1, 64), (3, 16), (1, 33), (2, 50), (1, 90), (2, 11), (1, 65))
_VOCABULARY = 128
_SHAPE = MoEShape(num_experts=8, hidden_size=64, intermediate_size=64, top_k=2, rank=4)
_LORA = LoraConfig(
    r=_SHAPE.rank,
    lora_alpha=2 * _SHAPE.rank,
    target_modules=["q_proj", "v_proj", "experts"],
    task_type="CAUSAL_LM",
)


class Tuning:
    """A model in training.

    Attributes:
        steps: optimizer steps so far.
        tokens: trained on so far.
        mismatches: what was not bitwise what it was before it was saved, loaded or attached again, as sentences.
    """

    def __init__(self, backend: str, seed: int, folder: Path) -> None:
        """Makes the model and attaches it.

        Args:
            backend: as `kt_backend`.
            seed: of the model and of the data.
            folder: where adapters are saved; its content is overwritten.

        Raises:
            KernelError: the kernel failed a check.
        """
        # The kernel's threads wait by spinning. With one on every core, what runs between them in PyTorch waits too:
        # a step of this small model then took 20 times as long on two cores.
        threads = max(1, min(4, (os.cpu_count() or 1) // 2))
        self.config = KTConfig(kt_backend=backend, kt_max_len=MAX_LEN, kt_num_threads=threads)
        self.seed, self.folder = seed, folder
        self.steps = self.tokens = 0
        self.mismatches: list[str] = []
        self._random = torch.Generator().manual_seed(seed)
        self._probe_ids = self._draw(2, 20)
        self._shape, self._stored = contract.fitting(TABLE[backend], _SHAPE), TABLE[backend].stored
        self._start(self._load())

    def step(self) -> float:
        """Trains on one batch, with gradient checkpointing of both kinds in turn. Returns the loss."""
        ids = self._draw(*BATCHES[self.steps % len(BATCHES)])
        how = {"use_reentrant": self.steps % 2 == 0}
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        # Or the next to enable checkpointing, here or in peft, would hook the embedding a second time.
        self.model.gradient_checkpointing_disable()
        self.model.disable_input_require_grads()
        self.steps += 1
        self.tokens += ids.numel()
        return loss.item()

    def evaluate(self) -> Tensor:
        """The logits of a fixed batch, without gradients."""
        self.model.eval()
        with torch.no_grad():
            logits: Tensor = self.model(input_ids=self._probe_ids).logits
        self.model.train()
        return logits

    def save_and_load(self) -> None:
        """Saves the adapter, loads it a second time beside itself, computes with that one, and deletes it."""
        expected = self.evaluate()
        with warnings.catch_warnings():  # peft looks for the base model's folder, and there is none
            warnings.filterwarnings("ignore", message="Could not find a config file")
            self.model.save_pretrained(self.folder)
        self.model.load_adapter(self.folder, "again")
        self.model.set_adapter("again")
        self._compare("an adapter that was saved and loaded", expected)
        self.model.set_adapter("default")
        self.model.delete_adapter("again")

    def reattach(self, new: bool) -> None:
        """Gives up the attached model and goes on training its adapter in another attached model.

        Args:
            new: whether that is a new model, the old one being left to garbage collection; else the old one is
                detached and attached again.
        """
        expected = self.evaluate()
        # Through memory: files have their own turn in `save_and_load`, and reading them leaks (`soak.PER_SAVE`).
        adapter = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
        del self._optimizer
        if new:
            del self.model
            gc.collect()
            again = self._load()
        elif self._stored:  # a model from disk cannot be detached
            again = ktmoe.get_peft_model(self.model.unload(), _LORA)
        else:
            again = ktmoe.attach(ktmoe.detach(self.model.unload()), self.config, lora=_LORA)
        self._start(again)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(adapter[name])
        self._compare(f"{'a new' if new else 'the same'} model, attached again", expected)

    def _load(self) -> Any:
        """A new model with its adapter; from disk where the backend takes experts that are stored in its format."""
        if not self._stored:
            return ktmoe.attach(self._make(), self.config, lora=_LORA)
        base = self.folder / "base"
        if not base.exists():
            self._make().save_pretrained(base)
            store_experts(base, self._stored)
        return ktmoe.load_model(base, self.config, lora=_LORA)

    def _make(self) -> Any:
        torch.manual_seed(self.seed)
        s = self._shape
        config = Qwen3MoeConfig(
            vocab_size=_VOCABULARY,
            hidden_size=s.hidden_size,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            num_experts=s.num_experts,
            num_experts_per_tok=s.top_k,
            moe_intermediate_size=s.intermediate_size,
            use_cache=False,
        )
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)

    def _start(self, model: Any) -> None:
        self.model: Any = model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)

    def _draw(self, sequences: int, length: int) -> Tensor:
        """Counts by one of three strides from anywhere, modulo the vocabulary: something that can be learnt."""
        start = torch.randint(_VOCABULARY, (sequences, 1), generator=self._random)
        stride = torch.randint(1, 4, (sequences, 1), generator=self._random)
        return (start + stride * torch.arange(length)) % _VOCABULARY

    def _compare(self, what: str, expected: Tensor) -> None:
        if not torch.equal(self.evaluate(), expected):
            self.mismatches.append(f"step {self.steps}: the logits of {what} are not bitwise what they were")


class Probe:
    """A layer of its own with a fixed adapter and fixed inputs, whose answers must never change by a bit.

    It shares the kernel's threads and its backward buffer with the layers that are trained, and nothing else.
    """

    def __init__(self, config: KTConfig, seed: int) -> None:
        """Loads the layer and remembers its answers: of a batch in one kernel call, and of one in chunks."""
        row = TABLE[config.kt_backend]
        shape = contract.fitting(row, _SHAPE)
        self._case = contract.draw_case(shape, 2 * MAX_LEN - 2 * (_SHAPE.num_experts - 1), seed, row.stored)
        scale = self._case.lora.scaling * _SHAPE.rank
        self._experts = MoEExperts(
            self._case.weights, top_k=_SHAPE.top_k, r=_SHAPE.rank, lora_alpha=scale, config=config
        )
        for name, parameter in self._experts.lora.items():
            parameter.data.copy_(self._case.lora.tensors[name])
        if not is_kernel(self._experts.plan):
            self._meet_every_size()
        self._first = self._answers()

    @property
    def unchanged(self) -> bool:
        """Whether outputs and all gradients are, now, bitwise those of the first time."""
        return all(map(torch.equal, self._answers(), self._first))

    def _answers(self) -> list[Tensor]:
        found: list[Tensor] = []
        c = self._case
        for rows in (slice(MAX_LEN // 2), slice(None)):
            x, w = (t[rows].detach().requires_grad_() for t in (c.hidden_states, c.top_k_weights))
            out = self._experts(x, c.top_k_index[rows], w)
            leaves = [x, w, *self._experts.lora.values()]
            found += [out.detach(), *torch.autograd.grad(out, leaves, c.grad_output[rows])]
        return found

    def _meet_every_size(self) -> None:
        """One expert with every possible number of tokens: PyTorch compiles code for each, and keeps it."""
        for tokens in range(1, max(sequences * length for sequences, length in BATCHES) + 1):
            index = torch.full((tokens, _SHAPE.top_k), -1)
            index[:, 0] = 0
            x = torch.zeros(tokens, self._case.shape.hidden_size, dtype=torch.bfloat16, requires_grad=True)
            out = self._experts(x, index, torch.ones(tokens, _SHAPE.top_k))
            torch.autograd.grad(out.sum(), [x, *self._experts.lora.values()])
