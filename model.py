"""
The normalized Transformer: nGPT (arXiv:2410.01131) in the form of νGPT (arXiv:2604.27077, section 2).

Every hidden state is a unit vector, and so is every row (or column) of a weight matrix that faces it. A block does not
add to the hidden state, it turns the state a little towards the block's output, by a learnable angle per channel, the
"eigen learning rate" α. What is left to choose is how large the α and the other rescalers start and how fast everything
moves. That is not here: parametrize.py holds it, in one table.

    model = GPT(GPTConfig(width=256, depth=4, head_dim=32, vocab_size=256, seq_len=128))
    logits, loss = model(tokens, targets)        # tokens, targets: (B, T) int64
    loss.backward(); optimizer.step(); model.normalize_weights()

Symbols in comments: B sequences, T tokens each, d = width, H heads of D = head_dim, m = mlp_width, V = vocab_size.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    width: int = 1024       # d_model; a multiple of head_dim
    depth: int = 10         # number of blocks
    head_dim: int = 64      # d_head; stays the same while the width grows
    vocab_size: int = 50304
    seq_len: int = 1024     # longest context
    mlp_ratio: float = 8 / 3
    # Where each rescaler starts (init) and how fast Adam moves it (scale): see Rescaler. The defaults are nGPT's, None
    # being its width^-1/2. parametrize.py gives the values of every other parametrization.
    alpha_init: float = 0.05            # α_A, α_M: eigen learning rates of attention and MLP
    alpha_scale: float | None = None
    qk_init: float = 1.0                # s_qk: queries and keys
    qk_scale: float | None = None
    mlp_init: float = 1.0               # s_u, s_ν: the MLP's hidden units
    mlp_scale: float = 1.0
    logit_init: float = 1.0             # s_z: logits
    logit_scale: float | None = None
    # Only the plain GPT at the end of this file starts from these standard deviations; None: width^-1/2.
    embedding_std: float = 1.0
    hidden_std: float | None = None
    unembedding_std: float | None = None

    def __post_init__(self):
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim must be positive and even, since RoPE turns pairs of channels, not {self.head_dim}")
        if self.width < 1 or self.width % self.head_dim:
            raise ValueError(f"width must be a positive multiple of head_dim={self.head_dim}, not {self.width}")
        for name in ("depth", "vocab_size", "seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("alpha_scale", "qk_scale", "logit_scale", "hidden_std", "unembedding_std"):
            if getattr(self, name) is None:
                setattr(self, name, self.width ** -0.5)

    @property
    def mlp_width(self):
        """mlp_ratio · width, rounded to the nearest multiple of 16."""
        return max(16, 16 * round(self.mlp_ratio * self.width / 16))


def norm(x, dim=-1):
    """Norm(x) = x / ‖x‖₂ along `dim`, in fp32 and without a trainable gain. Same shape as x."""
    return F.normalize(x.float(), dim=dim)


def rope_table(seq_len, head_dim):
    """cos and sin of RoPE's angles t · 10000^(-2i/D), arXiv:2104.09864 eq. 15, as one (2, T, D/2) fp32 tensor."""
    angles = torch.outer(torch.arange(seq_len).float(), 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim))
    return torch.stack((angles.cos(), angles.sin()))


def rope(x, table):
    """Turn channels i and i + D/2 of x (..., T, D) as a pair by the angle of their position: a true rotation."""
    (cos, sin), (a, b) = table, x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Rescaler(nn.Module):
    """
    A trainable vector or matrix that multiplies activations: effective value = raw · init/scale, raw starting at scale.
    Adam moves raw by about η a step whatever its size, so `init` sets where the rescaler starts and `scale` how fast it
    goes: the relative change a step is η/scale. nGPT section 2.5.
    """
    def __init__(self, *shape, init, scale):
        super().__init__()
        self.init, self.scale = init, scale
        self.raw = nn.Parameter(torch.empty(shape))
        # init/scale as a tensor: torch.compile would compile a Python number into its code, anew for every parametrization
        self.register_buffer("gain", torch.empty(()), persistent=False)

    @torch.no_grad()
    def init_weights(self):
        self.raw.fill_(self.scale)
        self.gain.fill_(self.init / self.scale)

    def forward(self):
        return self.raw * self.gain


class Block(nn.Module):
    """Attention and MLP, each followed by a step on the sphere. (B, T, d) unit vectors to (B, T, d) unit vectors."""
    def __init__(self, config):
        super().__init__()
        self.config, d, m = config, config.width, config.mlp_width
        alpha = dict(init=config.alpha_init, scale=config.alpha_scale)
        mlp = dict(init=config.mlp_init, scale=config.mlp_scale)
        self.qkv = nn.Parameter(torch.empty(3 * d, d))      # W_q over W_k over W_v     unit rows
        self.attn_out = nn.Parameter(torch.empty(d, d))     # W_O                       unit columns
        self.mlp_in = nn.Parameter(torch.empty(2 * m, d))   # W_u over W_ν              unit rows
        self.mlp_out = nn.Parameter(torch.empty(d, m))      # W_oMLP                    unit columns
        self.s_qk = Rescaler(d // config.head_dim, 1, config.head_dim, init=config.qk_init, scale=config.qk_scale)
        self.s_u, self.s_v = Rescaler(m, **mlp), Rescaler(m, **mlp)                     # s_u, s_ν
        self.attn_alpha, self.mlp_alpha = Rescaler(d, **alpha), Rescaler(d, **alpha)    # α_A, α_M

    def attention(self, h, table):
        (B, T, d), D = h.shape, self.config.head_dim
        q, k, v = F.linear(h, self.qkv).view(B, T, 3, d // D, D).permute(2, 0, 3, 1, 4)     # each (B, H, T, D)
        q = norm(rope(q, table)) * self.s_qk()
        k = norm(rope(k, table)) * self.s_qk()
        # q·k of unit vectors has variance 1/D, so the softmax scale is √D where a plain Transformer has 1/√D
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True, scale=math.sqrt(D))
        return F.linear(y.transpose(1, 2).reshape(B, T, d), self.attn_out)

    def mlp(self, h):
        # u = (W_u h) ⊙ s_u and ν = (W_ν h) ⊙ s_ν √d. The factors stand on the rows of W instead of on the far larger
        # (B, T, 2m) activations: the same product, less memory traffic.
        s = torch.cat((self.s_u(), self.s_v() * math.sqrt(self.config.width)))
        u, v = F.linear(h, self.mlp_in * s[:, None]).chunk(2, dim=-1)       # each (B, T, m)
        return F.linear(F.silu(v) * u, self.mlp_out)

    def forward(self, h, table):
        # h ← Norm(h + α (Norm(block(h)) - h)): a step of a fraction |α| from h towards the block's output (LERP)
        h = norm(torch.lerp(h, norm(self.attention(h, table)), self.attn_alpha().abs()))
        return norm(torch.lerp(h, norm(self.mlp(h)), self.mlp_alpha().abs()))


class GPT(nn.Module):
    """
    Parameters are fp32 (the master weights of mixed precision). For bf16 compute call the model under torch.autocast:
    the matrix products are then bf16, hidden states and norms stay fp32.
    """
    def __init__(self, config, block=Block):
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.width))     # E_in      unit rows
        self.blocks = nn.ModuleList(block(config) for _ in range(config.depth))
        self.unembedding = nn.Parameter(torch.empty(config.vocab_size, config.width))   # E_out     unit rows, not tied
        self.s_z = Rescaler(config.vocab_size, init=config.logit_init, scale=config.logit_scale)
        self.register_buffer("rope", torch.empty(2, config.seq_len, config.head_dim // 2), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Gaussian matrices, put on the sphere (so their variance does not matter); rescalers at their scale. Call it
        again after `to_empty` if the model was built under torch.device("meta")."""
        for module in self.modules():
            if isinstance(module, Rescaler):
                module.init_weights()
        for weight, _ in self.sphere_weights():
            weight.normal_()
        self.rope.copy_(rope_table(self.config.seq_len, self.config.head_dim))
        self.normalize_weights()

    def sphere_weights(self):
        """All weight matrices, each with the dimension along which it has unit norm: the one of length d."""
        yield self.embedding, 1
        for block in self.blocks:
            yield from ((block.qkv, 1), (block.attn_out, 0), (block.mlp_in, 1), (block.mlp_out, 0))
        yield self.unembedding, 1

    @torch.no_grad()
    def normalize_weights(self):
        """Put every weight back on the sphere, in place and in fp32. To be called after every optimizer step."""
        for weight, dim in self.sphere_weights():
            weight.copy_(norm(weight, dim))

    def hidden(self, tokens):
        """Last hidden state (B, T, d), unit vectors, of tokens (B, T)."""
        if tokens.size(1) > self.config.seq_len:
            raise ValueError(f"{tokens.size(1)} tokens are more than the model's seq_len={self.config.seq_len}")
        h, table = F.embedding(tokens, self.embedding), self.rope[:, :tokens.size(1)]
        for block in self.blocks:
            h = block(h, table)
        return h

    def unembed(self, h):
        """Logits z = (E_out h) ⊙ s_z, (B, T, V), of hidden states (B, T, d); s_z stands on the rows of E_out."""
        return F.linear(h, self.unembedding * self.s_z()[:, None])

    def forward(self, tokens, targets=None):
        """
        tokens: (B, T) integers below V. Returns (logits (B, T, V), loss): loss is the mean cross-entropy in nats a token
        against targets (B, T), where a target of -1 does not count; None without targets.
        Raises ValueError if T is more than seq_len.
        """
        logits = self.unembed(self.hidden(tokens))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=None):
        """
        Continue tokens (B, T ≥ 1) by max_new_tokens and return all, (B, T + max_new_tokens). temperature 0 takes the
        likeliest token; top_k draws from the k likeliest only. The context is the last seq_len tokens.
        """
        for _ in range(max_new_tokens):
            logits = self.unembed(self.hidden(tokens[:, -self.config.seq_len:])[:, -1]).float()
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -math.inf)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                new = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)
            tokens = torch.cat((tokens, new), dim=1)
        return tokens

    def num_params(self, embeddings=True):
        """Number of parameters; embeddings=False leaves out E_in and E_out (both, as they are not tied)."""
        total = sum(p.numel() for p in self.parameters())
        return total if embeddings else total - self.embedding.numel() - self.unembedding.numel()

    def flops_per_token(self, seq_len=None):
        """FLOPs of forward and backward a token, as in PaLM's appendix B (arXiv:2204.02311): 6 for every weight in a
        matrix product plus 12 · depth · width · seq_len for attention, not halved for causality. E_in is a look-up."""
        matmul_params = sum(w.numel() for w, _ in self.sphere_weights()) - self.embedding.numel()
        return 6 * matmul_params + 12 * self.config.depth * self.config.width * (seq_len or self.config.seq_len)


# ---------------------------------------------------------------- the opponent, for comparisons; nothing above needs it

class PlainBlock(nn.Module):
    """The usual block: RMSNorm without gains before attention and MLP, whose outputs are added to h (B, T, d)."""
    def __init__(self, config):
        super().__init__()
        self.config, d, m = config, config.width, config.mlp_width
        self.qkv, self.attn_out = nn.Parameter(torch.empty(3 * d, d)), nn.Parameter(torch.empty(d, d))
        self.mlp_in, self.mlp_out = nn.Parameter(torch.empty(2 * m, d)), nn.Parameter(torch.empty(d, m))

    def forward(self, h, table):
        (B, T, d), D = h.shape, self.config.head_dim
        q, k, v = F.linear(rms_norm(h), self.qkv).view(B, T, 3, d // D, D).permute(2, 0, 3, 1, 4)
        q, k = rope(q, table).to(v.dtype), rope(k, table).to(v.dtype)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)     # softmax scale 1/√D
        h = h + F.linear(y.transpose(1, 2).reshape(B, T, d), self.attn_out)
        u, v = F.linear(rms_norm(h), self.mlp_in).chunk(2, dim=-1)
        return h + F.linear(F.silu(v) * u, self.mlp_out)


def rms_norm(x):
    return norm(x) * math.sqrt(x.size(-1))


class PlainGPT(GPT):
    """A well-tuned standard GPT (pre-norm, RoPE, SwiGLU, no biases) of the same shape and interface. It is trained without
    normalization of weights, with weight decay and warm-up: the columns gpt_sp and gpt_mup of parametrize.py."""
    def __init__(self, config):
        super().__init__(config, PlainBlock)
        del self.s_z

    @torch.no_grad()
    def init_weights(self):
        config = self.config
        self.embedding.normal_(std=config.embedding_std)
        self.unembedding.normal_(std=config.unembedding_std)
        for block in self.blocks:
            block.qkv.normal_(std=config.hidden_std)
            block.mlp_in.normal_(std=config.hidden_std)
            for out in (block.attn_out, block.mlp_out):     # smaller, as 2 · depth of them are added up (GPT-2 section 2.3)
                out.normal_(std=config.hidden_std * (2 * config.depth) ** -0.5)
        self.rope.copy_(rope_table(config.seq_len, config.head_dim))

    def normalize_weights(self):
        pass

    def unembed(self, h):
        return F.linear(rms_norm(h), self.unembedding)
