"""
The opponent: a plain GPT of the same shape, trained by the same loop. It is a fork of the reference
and shows what a fork needs: options with defaults, a table, a model and a build.

    python results/plain.py --base=results/laptop.json --parametrization=gpt_sp --width=96 \\
        --learning_rate=0.02 --weight_decay=0.1 --warmup_steps=40 --out_dir=out/plain

It has pre-norm, RoPE and SwiGLU, and no biases. results/sweep.py knows its columns, too.
"""
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from model import GPT, GPTConfig, norm, rope
from parametrize import parametrize as evaluate_table
from parametrize import read_table

# The standard parametrization, and μP for Adam (arXiv:2203.03466), in the form without an output
# multiplier: the unembedding's standard deviation and rate fall with the width instead.
# d, m_w and c = (base_width)^-1/2 are as in parametrize.py.
TABLE = {
    # row               gpt_sp     gpt_mup            what it sets
    "lr_all":          ["1",      "1"],             # multiplies η for every tensor
    "lr_embedding":    ["1",      "1"],             # and this for the embedding
    "lr_hidden":       ["1",      "m_w^-1"],        # the blocks' matrices
    "lr_unembedding":  ["1",      "m_w^-1"],        # the unembedding
    "hidden_std":      ["d^-1/2", "d^-1/2"],        # initial standard deviation: blocks' matrices
    "unembedding_std": ["d^-1/2", "c · m_w^-1"],    # and the unembedding's
}
COLUMNS = read_table(TABLE, ["gpt_sp", "gpt_mup"])


@dataclass
class Config(train.Config):
    embedding_std: float = train.option(1.0, "initial standard deviation of the embedding")


@dataclass
class PlainGPTConfig(GPTConfig):
    mlp_ratio: float = 8 / 3            # its own: a fork of model.py leaves the opponent alone
    embedding_std: float = 1.0


def rms_norm(x):
    """x over its root mean square, in the last dimension."""
    return norm(x) * math.sqrt(x.size(-1))


class PlainBlock(nn.Module):
    """RMSNorm before attention and MLP, whose outputs are added to h (B, T, d)."""

    def __init__(self, config):
        super().__init__()
        d = config.width
        m = config.mlp_width
        self.head_dim = config.head_dim
        self.W_q = nn.Parameter(torch.empty(d, d))
        self.W_k = nn.Parameter(torch.empty(d, d))
        self.W_v = nn.Parameter(torch.empty(d, d))
        self.W_u = nn.Parameter(torch.empty(m, d))
        self.W_nu = nn.Parameter(torch.empty(m, d))
        self.W_O = nn.Parameter(torch.empty(d, d))
        self.W_oMLP = nn.Parameter(torch.empty(m, d))

    def attention(self, h, cos_sin):
        B, T, d = h.shape
        heads = (B, T, d // self.head_dim, self.head_dim)
        q = F.linear(h, self.W_q).view(heads).transpose(1, 2)       # (B, H, T, D)
        k = F.linear(h, self.W_k).view(heads).transpose(1, 2)
        v = F.linear(h, self.W_v).view(heads).transpose(1, 2)
        q = rope(q, cos_sin).to(v.dtype)
        k = rope(k, cos_sin).to(v.dtype)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)     # softmax scale 1/√D
        return y.transpose(1, 2).reshape(B, T, d) @ self.W_O

    def mlp(self, h):
        u = F.linear(h, self.W_u)
        nu = F.linear(h, self.W_nu)
        return (u * F.silu(nu)) @ self.W_oMLP

    def forward(self, h, cos_sin):
        h = h + self.attention(rms_norm(h), cos_sin)
        h = h + self.mlp(rms_norm(h))
        return h


class PlainGPT(GPT):
    """Same interface as model.GPT. Its weights are not normalized, so it needs weight decay and
    warm-up."""

    block = PlainBlock

    def __init__(self, config):
        # model.GPT has a rescaler of the logits, which this model drops
        super().__init__(replace(config, settings={**config.settings, "s_z_init": 1, "s_z_scale": 1}))

    def draw_weights(self):
        hidden_std = self.config.settings["hidden_std"]
        self.s_z = None         # its logits are not rescaled
        self.embedding.normal_(std=self.config.embedding_std)
        self.unembedding.normal_(std=self.config.settings["unembedding_std"])
        # outputs are smaller, as 2 · depth of them are added up (GPT-2, section 2.3)
        output_std = hidden_std * (2 * self.config.depth) ** -0.5
        for block in self.blocks:
            for weight in (block.W_q, block.W_k, block.W_v, block.W_u, block.W_nu):
                weight.normal_(std=hidden_std)
            for weight in (block.W_O, block.W_oMLP):
                weight.normal_(std=output_std)

    def normalize_weights(self):
        pass

    def unembed(self, h):
        return F.linear(rms_norm(h), self.unembedding)


def parametrize(parametrization, **options):
    """As parametrize.parametrize, for the columns of the plain GPT; for results/verdict.py."""
    return evaluate_table(parametrization, columns=COLUMNS, **options)


def build(config, device):
    """(model, optimizer) of a plain GPT. Raises ValueError for impossible sizes."""
    settings, lr_factors = train.apply_table(config, COLUMNS)
    torch.manual_seed(config.seed)
    with device:
        model = PlainGPT(train.model_config(config, settings, PlainGPTConfig))
    return model, train.make_optimizer(model, lr_factors, config)


if __name__ == "__main__":
    sys.exit(train.main(sys.argv[1:], Config, build))
