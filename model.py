"""
The normalized Transformer: nGPT (arXiv:2410.01131) as νGPT (arXiv:2604.27077, section 2) writes it.

Every hidden state is a unit vector of d numbers, and every weight matrix is a stack of such unit
vectors. Attention and MLP do not add to the hidden state. They turn it a little towards their
output, by a learnable step for each channel: the "eigen learning rate" α. How large α starts, and
how fast everything moves, is the table in parametrize.py.

    settings, lr_factors = parametrize("nugpt", width=256, depth=4, steps=400,
                                       base_width=64, base_depth=4, base_steps=400)
    model = GPT(GPTConfig(settings, width=256, depth=4, head_dim=32, vocab_size=256, seq_len=128))
    logits, loss = model(tokens, targets)       # tokens, targets: (B, T) int64
    loss.backward()
    optimizer.step()
    model.normalize_weights()                   # back to the sphere, after every optimizer step

In comments: B sequences of T tokens, d = width, H heads of D = head_dim, m = mlp_width,
V = vocab_size. Norm(x) = x / ‖x‖₂ over the last dimension. ⊙ multiplies entry by entry.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    settings: dict              # init and scale of each rescaler: parametrize.py's
    width: int = 1024           # d_model; a multiple of head_dim
    depth: int = 10             # number of blocks
    head_dim: int = 64          # d_head; stays the same while the width grows
    vocab_size: int = 50304
    seq_len: int = 1024         # longest context
    mlp_ratio: float = 8 / 3    # width of the MLP over the width of the model

    def __post_init__(self):
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError("head_dim must be positive and even, since RoPE turns pairs of "
                             f"channels. It is {self.head_dim}")
        if self.width < 1 or self.width % self.head_dim:
            raise ValueError(f"width must be a positive multiple of head_dim={self.head_dim}, "
                             f"not {self.width}")

    @property
    def mlp_width(self):
        """d_MLP: mlp_ratio · width, rounded to a multiple of 16."""
        return max(16, 16 * round(self.mlp_ratio * self.width / 16))


def norm(x):
    """Norm(x) = x / ‖x‖₂ over the last dimension, in fp32 and without a trainable gain."""
    return F.normalize(x.float(), dim=-1)


def rope_table(seq_len, head_dim):
    """cos and sin of RoPE's angles t · 10000^(-2i/D), stacked: (2, T, D/2) fp32.
    arXiv:2104.09864, equation 15."""
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.outer(torch.arange(seq_len).float(), frequencies)
    return torch.stack((angles.cos(), angles.sin()))


def rope(x, cos_sin):
    """x (..., T, D) with channels i and i + D/2 turned, as a pair, by their position's angle."""
    cos, sin = cos_sin
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Rescaler(nn.Module):
    """A trainable tensor that multiplies activations. Its value is raw · init/scale, and raw starts
    at scale: so `init` is where the value starts. Adam moves raw by about its learning rate a step,
    whatever the gradient, and thereby the value by about init · rate/scale: a smaller scale makes
    it faster. With init 0.05, scale 1/32 and rate 0.001 that is 3 % of 0.05 a step.
    nGPT, section 2.5."""

    def __init__(self, name, settings, *shape):
        super().__init__()
        if f"{name}_scale" not in settings:
            raise ValueError(f"the table has no scale for {name}: see SHARED_ROWS, parametrize.py")
        self.init = settings[f"{name}_init"]
        self.scale = settings[f"{name}_scale"]
        self.raw = nn.Parameter(torch.empty(shape))
        # init/scale is a tensor. A Python number would be a constant of the compiled graph, and a
        # sweep over several columns of the table would compile anew for each.
        self.register_buffer("gain", torch.empty(()), persistent=False)

    def reset(self):
        self.raw.fill_(self.scale)
        self.gain.fill_(self.init / self.scale)

    def forward(self):
        return self.raw * self.gain


class Block(nn.Module):
    """Attention and MLP, each followed by a step on the sphere.
    Takes and returns hidden states h (B, T, d), which are unit vectors."""

    def __init__(self, config):
        super().__init__()
        d = config.width
        m = config.mlp_width
        D = config.head_dim
        H = d // D
        self.head_dim = D
        # W_q … W_nu map from the hidden state: F.linear(h, W) is W h. W_O and W_oMLP map back to
        # it, and are stored transposed: y @ W. So each row of each matrix is a unit vector of d
        # numbers, and one function normalizes them all.
        self.W_q = nn.Parameter(torch.empty(d, d))
        self.W_k = nn.Parameter(torch.empty(d, d))
        self.W_v = nn.Parameter(torch.empty(d, d))
        self.W_O = nn.Parameter(torch.empty(d, d))
        self.W_u = nn.Parameter(torch.empty(m, d))
        self.W_nu = nn.Parameter(torch.empty(m, d))
        self.W_oMLP = nn.Parameter(torch.empty(m, d))
        self.s_qk = Rescaler("s_qk", config.settings, H, 1, D)
        self.s_u = Rescaler("s_u", config.settings, m)
        self.s_nu = Rescaler("s_nu", config.settings, m)
        self.alpha_A = Rescaler("alpha_A", config.settings, d)
        self.alpha_M = Rescaler("alpha_M", config.settings, d)

    def attention(self, h, cos_sin):
        """(B, T, d) to (B, T, d)."""
        B, T, d = h.shape
        heads = (B, T, d // self.head_dim, self.head_dim)
        q = F.linear(h, self.W_q).view(heads).transpose(1, 2)       # (B, H, T, D)
        k = F.linear(h, self.W_k).view(heads).transpose(1, 2)
        v = F.linear(h, self.W_v).view(heads).transpose(1, 2)
        q = norm(rope(q, cos_sin)) * self.s_qk()
        k = norm(rope(k, cos_sin)) * self.s_qk()
        # The dot product of two unit vectors has variance 1/D. So the softmax scale is √D,
        # where the usual Transformer has 1/√D.
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v,
                                           is_causal=True, scale=math.sqrt(self.head_dim))
        return y.transpose(1, 2).reshape(B, T, d) @ self.W_O

    def mlp(self, h):
        """(B, T, d) to (B, T, d)."""
        #     u = (W_u h) ⊙ s_u        ν = (W_ν h) ⊙ s_ν · √d        W_oMLP (u ⊙ SiLU(ν))
        # √d brings ν to order 1, where SiLU bends. u needs none: a norm follows the MLP.
        # Here the factors multiply the rows of W: the same u and ν in 12 to 16 % less time.
        s_u = self.s_u()
        s_nu = self.s_nu() * math.sqrt(h.size(-1))
        u = F.linear(h, self.W_u * s_u[:, None])        # (B, T, m)
        nu = F.linear(h, self.W_nu * s_nu[:, None])
        return (u * F.silu(nu)) @ self.W_oMLP

    def forward(self, h, cos_sin):
        #     h ← Norm(h + |α| ⊙ (Norm(f(h)) - h)),        f: attention, then the MLP
        # A step from h towards f(h), never away from it. As a weighted sum of h and Norm(f(h)), as
        # here, it takes 8 % less time and keeps less memory for backward.
        alpha_A = self.alpha_A().abs()
        alpha_M = self.alpha_M().abs()
        h = norm(h * (1 - alpha_A) + norm(self.attention(h, cos_sin)) * alpha_A)
        h = norm(h * (1 - alpha_M) + norm(self.mlp(h)) * alpha_M)
        return h


class GPT(nn.Module):
    """The model. Parameters are fp32. Under torch.autocast the matrix products are bf16, while
    hidden states and norms stay fp32."""

    block = Block       # a fork may put another block here

    def __init__(self, config):
        super().__init__()
        self.config = config
        V = config.vocab_size
        d = config.width
        self.embedding = nn.Parameter(torch.empty(V, d))        # E_in
        self.unembedding = nn.Parameter(torch.empty(V, d))      # E_out, not tied to E_in
        self.blocks = nn.ModuleList(self.block(config) for _ in range(config.depth))
        self.s_z = Rescaler("s_z", config.settings, V)
        cos_sin = torch.empty(2, config.seq_len, config.head_dim // 2)
        self.register_buffer("cos_sin", cos_sin, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Set all weights and buffers. Raises ValueError if a fork leaves a parameter without a
        value."""
        for parameter in self.parameters():
            parameter.fill_(math.nan)       # what a fork forgets to draw is found below
        self.draw_weights()
        self.cos_sin.copy_(rope_table(self.config.seq_len, self.config.head_dim))
        for name, parameter in self.named_parameters():
            if not parameter.is_meta and parameter.isnan().any():
                raise ValueError(f"nobody initialized {name}: do it in draw_weights, model.py")

    def draw_weights(self):
        """Draw Gaussian matrices and put them on the sphere, so that their variance does not
        matter; set rescalers to their init."""
        for weight in self.matrices():
            weight.normal_()
        self.normalize_weights()
        for module in self.modules():
            if isinstance(module, Rescaler):
                module.reset()

    def matrices(self):
        """All 2-D parameters but rescalers: those that are kept stacks of unit vectors."""
        matrices = []
        for name, parameter in self.named_parameters():
            is_rescaler = name.endswith(".raw")     # which may be 2-D in a fork
            if parameter.dim() == 2 and not is_rescaler:
                matrices.append(parameter)
        return matrices

    @torch.no_grad()
    def normalize_weights(self):
        """Put every row of every matrix back on the sphere, in place and in fp32."""
        for weight in self.matrices():
            weight.copy_(norm(weight))

    def hidden(self, tokens):
        """Last hidden states (B, T, d), unit vectors, of tokens (B, T). Raises ValueError if T is
        more than seq_len."""
        T = tokens.size(1)
        if T > self.config.seq_len:
            raise ValueError(f"{T} tokens are more than the model's seq_len={self.config.seq_len}")
        cos_sin = self.cos_sin[:, :T]
        h = F.embedding(tokens, self.embedding)
        for block in self.blocks:
            h = block(h, cos_sin)
        return h

    def unembed(self, h):
        """Logits (B, T, V) of hidden states (B, T, d)."""
        #     z = (E_out h) ⊙ s_z
        # Here s_z multiplies the rows of E_out, V · d numbers, instead of the logits, B · T · V:
        # with GPT-2's vocabulary a step takes a third less time.
        return F.linear(h, self.unembedding * self.s_z()[:, None])

    def forward(self, tokens, targets=None):
        """(logits, loss) of tokens (B, T), which are integers below V. logits: (B, T, V).
        loss: mean cross-entropy against targets (B, T) in nats a token, where a target of -1 does
        not count. Without targets the loss is None. Beside a loss the logits carry no gradient."""
        logits = self.unembed(self.hidden(tokens))
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)
        # detached: else backward would make a gradient of zeros as large as the logits
        return logits.detach(), loss

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=None):
        """tokens (B, T ≥ 1) followed by max_new_tokens, each drawn from the top_k likeliest; the
        likeliest itself at temperature 0."""
        for _ in range(max_new_tokens):
            context = tokens[:, -self.config.seq_len:]
            logits = self.unembed(self.hidden(context)[:, -1]).float()      # (B, V)
            if top_k is not None:
                largest = logits.topk(min(top_k, logits.size(-1))).values
                logits = logits.masked_fill(logits < largest[:, -1:], -math.inf)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                new = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)
            tokens = torch.cat((tokens, new), dim=1)
        return tokens

    def num_params(self):
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self):
        """FLOPs of forward and backward for one token. PaLM (arXiv:2204.02311), appendix B."""
        multiplied = sum(weight.numel() for weight in self.matrices())
        if self.embedding is not self.unembedding:      # a fork may tie them
            multiplied -= self.embedding.numel()        # the embedding is a look-up
        attention = 12 * self.config.depth * self.config.width * self.config.seq_len
        return 6 * multiplied + attention
