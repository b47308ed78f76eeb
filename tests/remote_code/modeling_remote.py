"""A model as remote code holds it: blocks of DeepSeek's names and calling convention, for tests of `ktmoe.blocks`.

`DeepseekV2MoE` has a gate with an auxiliary loss in training; `DeepseekV3MoE` is for inference, and its gate says so.
"""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutput


class RemoteConfig(PretrainedConfig):
    model_type = "remote_code"

    def __init__(self, block="DeepseekV2MoE", hidden_size=64, num_hidden_layers=2, vocab_size=128, **kwargs):
        self.block, self.hidden_size, self.vocab_size = block, hidden_size, vocab_size
        self.num_hidden_layers = num_hidden_layers
        self.n_routed_experts, self.num_experts_per_tok, self.moe_intermediate_size = 4, 2, 96
        super().__init__(**kwargs)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        h, i = config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Linear(h, i, bias=False)
        self.up_proj = nn.Linear(h, i, bias=False)
        self.down_proj = nn.Linear(i, h, bias=False)
        self.act_fn = ACT2FN["silu"]

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class AddAuxiliaryLoss(torch.autograd.Function):
    """Hands the output on, and a gradient of one to the loss."""

    @staticmethod
    def forward(ctx, out, loss):
        ctx.dtype = loss.dtype
        return out.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.ones(1, dtype=ctx.dtype).squeeze()


class Gate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.topk_method = "greedy" if config.block == "DeepseekV2MoE" else "noaux_tc"
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, hidden_states):
        _, _, h = hidden_states.shape
        logits = nn.functional.linear(hidden_states.view(-1, h).float(), self.weight.float())
        if self.topk_method == "noaux_tc":
            assert not self.training
            scores = logits.sigmoid()
            index = scores.topk(self.top_k, sorted=False)[1]
            return index, 2.5 * scores.gather(1, index)
        scores = logits.softmax(-1)
        weights, index = scores.topk(self.top_k, sorted=False)
        share = nn.functional.one_hot(index, scores.shape[1]).float().mean((0, 1))
        return index, weights, 0.1 * (share * scores.mean(0)).sum() if self.training else None


class DeepseekV2MoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.experts = nn.ModuleList([MLP(config) for _ in range(config.n_routed_experts)])
        self.gate = Gate(config)
        if config.block == "DeepseekV2MoE":
            self.shared_experts = MLP(config)

    def forward(self, hidden_states):
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        index, weights, loss = self.gate(hidden_states)
        out = weighted(self.experts, flat, index, weights).view(hidden_states.shape)
        if self.training:
            out = AddAuxiliaryLoss.apply(out, loss)
        return out + self.shared_experts(hidden_states)


class DeepseekV3MoE(DeepseekV2MoE):
    def forward(self, hidden_states):
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        index, weights = self.gate(hidden_states)
        if not self.training:
            with torch.no_grad():
                out = weighted(self.experts, flat, index, weights).view(hidden_states.shape)
        return out


def weighted(experts, x, index, weights):
    out = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        token, choice = torch.where(index == e)
        out = out.index_add(0, token, expert(x[token]) * weights[token, choice, None].to(x.dtype))
    return out


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.mlp = globals()[config.block](config)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class RemoteForCausalLM(PreTrainedModel):
    config_class = RemoteConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        for p in module.parameters(recurse=False):
            nn.init.normal_(p, std=0.1)

    def get_input_embeddings(self):
        return self.embed_tokens

    def forward(self, input_ids, labels=None, **kwargs):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
