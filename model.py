"""
The normalized Transformer: nGPT (arXiv:2410.01131) in the form of νGPT (arXiv:2604.27077, section 2).

Every hidden state is a unit vector of d numbers, and every weight matrix is a stack of such vectors, one a row:
F.linear(h, W) maps from the hidden state, y @ W maps back. A block does not add to the hidden state: it turns the
state a little towards the block's output, by a learnable step per channel, the "eigen learning rate" α. How large α
and the other rescalers start, and how fast everything moves, is in one table: see parametrize.py.

    model = GPT(GPTConfig(width=256, depth=4, head_dim=32, vocab_size=256, seq_len=128))
    logits, loss = model(tokens, targets)        # tokens, targets: (B, T) int64
    loss.backward(); optimizer.step(); model.normalize_weights()

In comments: B sequences, T tokens each, d = width, H heads of D = head_dim, m = mlp_width, V = vocab_size.
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
    # Where each rescaler starts and how fast Adam moves it, see Rescaler: nGPT's values, None being width^-1/2
    alpha_init: float = 0.05            # α_A, α_M: eigen learning rates of attention and MLP
    alpha_scale: float | None = None
    qk_init: float = 1.0                # s_qk: queries and keys
    qk_scale: float | None = None
    mlp_init: float = 1.0               # s_u, s_ν: the MLP's hidden units
    mlp_scale: float = 1.0
    logit_init: float = 1.0             # s_z: logits
    logit_scale: float | None = None
    embedding_std: float = 1.0          # the plain GPT alone starts from these standard deviations; None: width^-1/2
    hidden_std: float | None = None
    unembedding_std: float | None = None

    def __post_init__(self):
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim must be positive and even: RoPE turns pairs of channels. It is {self.head_dim}")
        if self.width < 1 or self.width % self.head_dim:
            raise ValueError(f"width must be a positive multiple of head_dim={self.head_dim}, not {self.width}")
        for name in ("alpha_scale", "qk_scale", "logit_scale", "hidden_std", "unembedding_std"):
            if getattr(self, name) is None:
                setattr(self, name, self.width ** -0.5)

    @property
    def mlp_width(self):
        return max(16, 16 * round(self.mlp_ratio * self.width / 16))


def norm(x):
    """Norm(x) = x / ‖x‖₂ over the last dimension, in fp32 and without a trainable gain. Same shape as x."""
    return F.normalize(x.float(), dim=-1)


def rope_table(seq_len, head_dim):
    """cos and sin of RoPE's angles t · 10000^(-2i/D), arXiv:2104.09864 eq. 15, as one (2, T, D/2) fp32 tensor."""
    angles = torch.outer(torch.arange(seq_len).float(), 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim))
    return torch.stack((angles.cos(), angles.sin()))


def rope(x, table):
    """Turn channels i and i + D/2 of x (..., T, D) as a pair by the angle of their position: a true rotation."""
    (cos, sin), (a, b) = table, x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Rescaler(nn.Module):
    """A trainable tensor that multiplies activations: its value is raw · init/scale, and raw starts at scale. Adam
    moves raw by about η a step whatever its size, so the relative change a step is η/scale. nGPT section 2.5."""
    def __init__(self, *shape, init, scale):
        super().__init__()
        self.init, self.scale = init, scale
        self.raw = nn.Parameter(torch.empty(shape))
        # init/scale as a tensor: torch.compile would compile a Python number into its code, anew for every column
        self.register_buffer("gain", torch.empty(()), persistent=False)

    def draw_weights(self):
        self.raw.fill_(self.scale)
        self.gain.fill_(self.init / self.scale)

    def forward(self):
        return self.raw * self.gain


class Block(nn.Module):
    """Attention and MLP, each followed by a step on the sphere. (B, T, d) unit vectors to (B, T, d) unit vectors."""
    def __init__(self, config):
        super().__init__()
        self.config, d, m = config, config.width, config.mlp_width
        self.qkv = nn.Parameter(torch.empty(3 * d, d))      # W_q over W_k over W_v
        self.attn_out = nn.Parameter(torch.empty(d, d))     # W_O, transposed
        self.mlp_in = nn.Parameter(torch.empty(2 * m, d))   # W_u over W_ν
        self.mlp_out = nn.Parameter(torch.empty(m, d))      # W_oMLP, transposed
        self.s_qk = Rescaler(d // config.head_dim, 1, config.head_dim, init=config.qk_init, scale=config.qk_scale)
        self.s_u = Rescaler(m, init=config.mlp_init, scale=config.mlp_scale)
        self.s_v = Rescaler(m, init=config.mlp_init, scale=config.mlp_scale)            # s_ν
        self.attn_alpha = Rescaler(d, init=config.alpha_init, scale=config.alpha_scale) # α_A
        self.mlp_alpha = Rescaler(d, init=config.alpha_init, scale=config.alpha_scale)  # α_M

    def attention(self, h, table):
        (B, T, d), D = h.shape, self.config.head_dim
        q, k, v = F.linear(h, self.qkv).view(B, T, 3, d // D, D).permute(2, 0, 3, 1, 4)     # each (B, H, T, D)
        q = norm(rope(q, table)) * self.s_qk().square()     # q ⊙ s_qk · k ⊙ s_qk: both s_qk on q, which is faster
        k = norm(rope(k, table))
        # q·k of unit vectors has variance 1/D, so the softmax scale is √D where a plain Transformer has 1/√D
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True, scale=math.sqrt(D))
        return y.transpose(1, 2).reshape(B, T, d) @ self.attn_out

    def mlp(self, h):
        # u = (W_u h) ⊙ s_u and ν = (W_ν h) ⊙ s_ν √d, the factors on the rows of W: less memory traffic than on u and ν
        s = torch.cat((self.s_u(), self.s_v() * math.sqrt(self.config.width)))
        u, v = F.linear(h, self.mlp_in * s[:, None]).chunk(2, dim=-1)       # u, ν: each (B, T, m)
        return (F.silu(v) * u) @ self.mlp_out

    def forward(self, h, table):
        # h ← Norm(h + α (Norm(block(h)) - h)): a step of a fraction |α| from h towards the block's output, written as a
        # weighted sum, which keeps less for backward than torch.lerp
        a_A, a_M = self.attn_alpha().abs(), self.mlp_alpha().abs()
        h = norm(h * (1 - a_A) + norm(self.attention(h, table)) * a_A)
        return norm(h * (1 - a_M) + norm(self.mlp(h)) * a_M)


class GPT(nn.Module):
    """Parameters are fp32. Under torch.autocast the matrix products are bf16, hidden states and norms stay fp32."""
    block = Block

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.width))     # E_in
        self.blocks = nn.ModuleList(self.block(config) for _ in range(config.depth))
        self.unembedding = nn.Parameter(torch.empty(config.vocab_size, config.width))   # E_out, not tied
        self.s_z = Rescaler(config.vocab_size, init=config.logit_init, scale=config.logit_scale)
        self.register_buffer("rope", torch.empty(2, config.seq_len, config.head_dim // 2), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Draw all weights; call it again after `to_empty` from the meta device. Raises ValueError if one is left."""
        for parameter in self.parameters():
            parameter.fill_(math.nan)
        self.draw_weights()
        self.rope.copy_(rope_table(self.config.seq_len, self.config.head_dim))
        for name, parameter in self.named_parameters():
            if not parameter.is_meta and parameter.isnan().any():
                raise ValueError(f"nobody initialized {name}: do it in draw_weights, model.py")

    def draw_weights(self):
        """Gaussian matrices, put on the sphere, so that their variance does not matter; rescalers at their scale."""
        for module in self.modules():
            if isinstance(module, Rescaler):
                module.draw_weights()
        for weight in self.matrices():
            weight.normal_()
        self.normalize_weights()

    def matrices(self):
        """All matrices, a list of (number of vectors, d) parameters."""
        return [p for name, p in self.named_parameters() if p.dim() == 2 and not name.endswith(".raw")]

    @torch.no_grad()
    def normalize_weights(self):
        """Put every weight back on the sphere, in place and in fp32. To be called after every optimizer step."""
        for weight in self.matrices():
            weight.copy_(norm(weight))

    def hidden(self, tokens):
        """Last hidden state (B, T, d), unit vectors, of tokens (B, T). Raises ValueError if T is more than seq_len."""
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
        """(logits (B, T, V), loss) of tokens (B, T), integers below V. loss: mean cross-entropy in nats a token against
        targets (B, T), where -1 does not count; beside a loss logits carry no gradient. No targets: loss is None."""
        logits = self.unembed(self.hidden(tokens))
        if targets is None:
            return logits, None
        return logits.detach(), F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=None):
        """tokens (B, T ≥ 1) and max_new_tokens after them, drawn from the top_k likeliest; greedy at temperature 0."""
        for _ in range(max_new_tokens):
            logits = self.unembed(self.hidden(tokens[:, -self.config.seq_len:])[:, -1]).float()
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -math.inf)
            new = (logits.argmax(-1, keepdim=True) if temperature == 0 else
                   torch.multinomial(F.softmax(logits / temperature, dim=-1), 1))
            tokens = torch.cat((tokens, new), dim=1)
        return tokens

    def num_params(self):
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self):
        """FLOPs of forward and backward a token, as PaLM (arXiv:2204.02311, appendix B) counts them."""
        matmul_params = sum(weight.numel() for weight in self.matrices()) - self.embedding.numel()
        return 6 * matmul_params + 12 * self.config.depth * self.config.width * self.config.seq_len


# ---------------------------------------------------------------- the opponent, for comparisons; nothing above needs it

def rms_norm(x):
    return norm(x) * math.sqrt(x.size(-1))


class PlainBlock(nn.Module):
    """The usual block: RMSNorm without gains before attention and MLP, whose outputs are added to h (B, T, d)."""
    def __init__(self, config):
        super().__init__()
        self.config, d, m = config, config.width, config.mlp_width
        self.qkv, self.attn_out = nn.Parameter(torch.empty(3 * d, d)), nn.Parameter(torch.empty(d, d))
        self.mlp_in, self.mlp_out = nn.Parameter(torch.empty(2 * m, d)), nn.Parameter(torch.empty(m, d))

    def forward(self, h, table):
        (B, T, d), D = h.shape, self.config.head_dim
        q, k, v = F.linear(rms_norm(h), self.qkv).view(B, T, 3, d // D, D).permute(2, 0, 3, 1, 4)
        q, k = rope(q, table).to(v.dtype), rope(k, table).to(v.dtype)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)     # softmax scale 1/√D
        h = h + y.transpose(1, 2).reshape(B, T, d) @ self.attn_out
        u, v = F.linear(rms_norm(h), self.mlp_in).chunk(2, dim=-1)
        return h + (F.silu(v) * u) @ self.mlp_out


class PlainGPT(GPT):
    """A standard GPT: pre-norm, RoPE, SwiGLU, no biases. Same interface; it needs weight decay and warm-up."""
    block = PlainBlock

    def draw_weights(self):
        config, self.s_z = self.config, None        # logits are not rescaled
        self.embedding.normal_(std=config.embedding_std)
        self.unembedding.normal_(std=config.unembedding_std)
        for block in self.blocks:
            block.qkv.normal_(std=config.hidden_std)
            block.mlp_in.normal_(std=config.hidden_std)
            for out in (block.attn_out, block.mlp_out):     # smaller, as 2 · depth of them are added up (GPT-2, 2.3)
                out.normal_(std=config.hidden_std * (2 * config.depth) ** -0.5)

    def normalize_weights(self):
        pass

    def unembed(self, h):
        return F.linear(rms_norm(h), self.unembedding)
