"""
Tests of all that can be tested without a network or a GPU: `python -m pytest`, about two minutes on two CPU cores.

Every test states one claim, and was seen to fail with the code it guards broken. Sizes are tiny, since a wrong factor or axis
is as wrong at width 32 as at 4096. Sections are those of νGPT (arXiv:2604.27077).
"""
import contextlib
import csv
import fcntl
import gzip
import hashlib
import http.server
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

import model as model_py
import parametrize as parametrize_py
import prepare_data
import train
from model import GPT, GPTConfig, PlainGPT, norm, rope, rope_table
from parametrize import COLUMNS, param_groups, parametrize, value
from prepare_data import TokenWriter, read_tokens

HERE = Path(train.__file__).parent
MATRICES = dict(embedding=1, qkv=1, attn_out=0, mlp_in=1, mlp_out=0, unembedding=1)   # weight: its dimension of length d
NORMALIZED = [name for name, rows in COLUMNS.items() if "alpha_init" in rows]           # columns for GPT
torch.set_num_threads(1)        # as in the subprocesses below, so that sums are taken in the same order


# ---------------------------------------------------------------- helpers

def small(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**dict(width=32, depth=2, head_dim=8, vocab_size=48, seq_len=16), **changes}))


def off_center(seed=0):
    """A model in which every factor counts: no init or scale is 1, and each raw value is its own; some α are negative."""
    model = small(seed, alpha_init=0.3, alpha_scale=0.2, qk_init=1.3, qk_scale=0.4, mlp_init=0.7, mlp_scale=0.5, logit_init=6.0,
                  logit_scale=0.6)
    for name, p in model.named_parameters():
        if name.endswith("raw"):
            p.data *= torch.empty_like(p).uniform_(0.5, 1.5) * (torch.rand_like(p).sub(0.3).sign() if "alpha" in name else 1)
    return model


def batch(seed=0, rows=2, length=16):
    return torch.randint(48, (2, rows, length), generator=torch.Generator().manual_seed(seed))      # tokens, targets


def trained(column, times=1, steps=3):
    """(losses, model) after a few steps of a column of the table on a model of `times` the base's width, depth and steps."""
    rescalers, lr_scale = parametrize(column, 32 * times, 2 * times, 10 * times, 32, 2, 10, unembedding_lr_mult=0.5)
    model, losses = small(width=32 * times, depth=2 * times, **rescalers), []
    adam = torch.optim.Adam(param_groups(model, lr_scale), betas=(0.9, 0.95), eps=1e-16)
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = group["lr_scale"] * 0.02
        losses.append(model(*batch(step))[1])
        losses[-1].backward()
        adam.step()
        adam.zero_grad()
        model.normalize_weights()
    return [loss.item() for loss in losses], model


def gradients(model, forward, tokens, targets):
    model.zero_grad()
    loss = forward(tokens, targets)[1]
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def relative_errors(a, b):
    return {name: ((a[name] - b[name]).norm() / b[name].norm()).item() for name in b}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data folder of 8,000 bytes."""
    folder = tmp_path_factory.mktemp("data")
    words = np.random.default_rng(0).choice("norm sphere rescaler alpha residual width depth head".split(), 2000)
    (folder / "words.txt").write_text(" ".join(words)[:8000])
    prepare_data.prepare(folder, [Path("words.txt")], folder, progress=False)
    return folder


def options(data, out_dir, **changes):
    """Options of a run of 8 steps of 4 sequences that takes a fraction of a second, at twice the base size."""
    tiny = dict(width=32, depth=2, head_dim=8, seq_len=16, steps=8, batch_size=4, base_width=16, base_depth=1, base_steps=4,
                data=data, out_dir=out_dir, device="cpu", dtype="float32", compile=False, log_every=1, eval_every=4,
                eval_tokens=304, checkpoint_every=4, sample_tokens=0)
    return [f"--{key}={value}" for key, value in {**tiny, **changes}.items()]


def run(*argv):
    """train.py in this process. Returns its exit code, or the sentence with which it refuses."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        sys.exit(train.main(list(argv)))
    return end.value.code or 0


def process(*argv, preexec_fn=None, **env):
    return subprocess.run([sys.executable, *map(str, argv)], cwd=HERE, capture_output=True, text=True, preexec_fn=preexec_fn,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def start(*argv, before=lambda step: None, rank=0, ranks=1, port=0, call=train.main):
    """train.py in a process of its own, forked lest it import PyTorch again. It calls before(step) at the start of each step."""
    def main():
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        train.rank, train.local_rank, train.world_size, starts = rank, rank, ranks, train.batch_starts
        train.batch_starts = lambda seed, step, *rest: (before(step), starts(seed, step, *rest))[1]
        sys.exit(call(list(argv)))
    started = multiprocessing.get_context("fork").Process(target=main)
    started.start()
    return started


def outcome(started):
    """Exit code of a process from `start`: minus the signal's number if one ended it."""
    started.join(60)
    started.kill()                                                                                  # if it hangs
    started.join()
    return started.exitcode


def send(number, at):
    """For `start`: the process gets this signal in step `at`."""
    return lambda step: os.kill(os.getpid(), number) if step == at else None


def log(out_dir, *columns):
    """Rows of log.csv, less what a clock says, or only some columns as numbers."""
    rows = train.read_csv(out_dir / "log.csv")
    if columns:
        return np.array([[float(row[column] or "nan") for column in columns] for row in rows])
    return [{key: cell for key, cell in row.items() if key not in ("seconds", "tokens_per_second")} for row in rows]


def checkpoint(out_dir):
    return torch.load(out_dir / "ckpt.pt", weights_only=True)


def assert_same_run(one, other):
    """Every bit of the weights, of Adam's state and of the log is the same, and nothing but the three files was left."""
    assert log(one) == log(other) and len(log(one)) > 0
    a, b = checkpoint(one), checkpoint(other)
    for tensors in (lambda c: c["model"], lambda c: c["optimizer"]["state"]):
        torch.testing.assert_close(tensors(a), tensors(b), rtol=0, atol=0)
    assert all(a[key] == b[key] for key in ("step", "train_loss", "val_loss"))
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    assert sorted(path.name for path in other.iterdir()) == ["ckpt.pt", "config.json", "log.csv"]


# ---------------------------------------------------------------- model.py

@pytest.mark.parametrize("steps", (0, 3))
def test_weights_have_unit_norm_along_the_axis_that_faces_the_hidden_state(steps):
    for name, weight in trained("nugpt", steps=steps)[1].named_parameters():
        if not name.endswith("raw"):
            lengths = weight.norm(dim=MATRICES[name.split(".")[-1]])
            torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_hidden_states_have_unit_norm_after_every_block():
    model, states = off_center(), []
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, h: states.extend((args[0], h)))
    model(batch()[0])
    assert len(states) == 4
    for h in states:
        torch.testing.assert_close(h.norm(dim=-1), torch.ones(2, 16))


def by_the_book(model, tokens):
    """Logits by the equations of section 2, in fp64, head by head. Only the weights and sizes come from model.py."""
    w, c = {name: p.double() for name, p in model.state_dict().items()}, model.config
    d, D, T = c.width, c.head_dim, tokens.size(1)
    Norm = lambda y: y / (y * y).sum(-1, keepdim=True).sqrt()                                       # noqa: E731
    angles = torch.arange(T).double()[:, None] / 10000 ** (torch.arange(0, D, 2).double() / D)
    turn = torch.polar(torch.ones_like(angles), angles)
    RoPE = lambda x: torch.view_as_real(torch.complex(*x.chunk(2, -1)) * turn).transpose(-1, -2).flatten(-2)     # noqa: E731
    h = w["embedding"][tokens]
    for layer in range(c.depth):
        p = f"blocks.{layer}."
        alpha_A, alpha_M = (abs(w[p + name] * c.alpha_init / c.alpha_scale) for name in ("attn_alpha.raw", "mlp_alpha.raw"))
        s_u, s_nu = (w[p + name] * c.mlp_init / c.mlp_scale for name in ("s_u.raw", "s_v.raw"))
        heads = []
        for i in range(d // D):
            s_qk = w[p + "s_qk.raw"][i] * c.qk_init / c.qk_scale
            W_q, W_k, W_v = (w[p + "qkv"][j * d + i * D:j * d + (i + 1) * D] for j in range(3))
            q, k = Norm(RoPE(h @ W_q.T)) * s_qk, Norm(RoPE(h @ W_k.T)) * s_qk
            scores = (math.sqrt(D) * q @ k.transpose(1, 2)).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ h @ W_v.T)
        h = Norm(h + alpha_A * (Norm(torch.cat(heads, -1) @ w[p + "attn_out"].T) - h))
        W_u, W_nu = w[p + "mlp_in"].chunk(2)
        u, nu = h @ W_u.T * s_u, h @ W_nu.T * s_nu * math.sqrt(d)
        h = Norm(h + alpha_M * (Norm(nu / (1 + torch.exp(-nu)) * u @ w[p + "mlp_out"].T) - h))
    return h @ w["unembedding"].T * (w["s_z.raw"] * c.logit_init / c.logit_scale)


def test_model_is_the_equations():
    model, (tokens, targets) = off_center(), batch()
    targets[0, 3:9] = -1                                                                            # does not count
    logits, loss = model(tokens, targets)
    book = by_the_book(model, tokens)
    fp32 = 50 * 2 ** -24 * book.abs().max().item()                                                  # tens of roundings
    torch.testing.assert_close(logits.double(), book, rtol=0, atol=fp32)
    likelihood = book.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(loss.double(), -likelihood[targets >= 0].mean(), rtol=1e-5, atol=0)
    assert model(tokens)[1] is None


def test_attention_scores_depend_on_distance_alone(monkeypatch):
    """Exact while s_qk is the same for both channels that RoPE turns as a pair, as at initialization: s_qk multiplies after
    the turn, and the published method has one value for each channel."""
    model, seen = small(), []
    monkeypatch.setattr(model_py.F, "scaled_dot_product_attention", lambda q, k, v, **_: seen.extend((q, k)) or v)
    h = norm(torch.randn(32)).expand(1, 16, 32)                                     # the same vector at every position
    model.blocks[0].attention(h, model.rope)
    scores = (seen[0] @ seen[1].transpose(-1, -2))[0]                               # (H, T, T)
    torch.testing.assert_close(scores[:, 1:, 1:], scores[:, :-1, :-1])              # s(t + 1, t' + 1) = s(t, t')
    assert (scores[:, 8, 8] - scores[:, 8, 4]).abs().min() > 1e-3                   # and they do depend on distance
    x = torch.randn(16, 8)
    torch.testing.assert_close(rope(x, rope_table(16, 8)).norm(dim=-1), x.norm(dim=-1))


def test_no_token_sees_a_later_one():
    model, (tokens, _) = off_center(), batch()
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 48
    before, after = model(tokens)[0], model(changed)[0]
    assert torch.equal(before[:, :9], after[:, :9]) and not torch.isclose(before[:, 9:], after[:, 9:]).all(-1).any()


@pytest.mark.parametrize("heads, depth, matrices, paper", ((8, 12, 0.2597, 0.26), (40, 12, 3.216, 3.22), (12, 8, 0.3895, 0.39),
                                                           (12, 128, 2.547, 2.55)))
def test_parameter_counts_are_the_papers(heads, depth, matrices, paper):
    with torch.device("meta"):
        model = GPT(GPTConfig(width=102 * heads, depth=depth, head_dim=102, vocab_size=100_352, seq_len=4096))
    d, V = 102 * heads, 100_352
    counts = [weight.numel() for weight, _ in model.sphere_weights()]
    assert sum(counts) == 2 * V * d + 12 * depth * d * d                    # 8/3 · d wide MLP: 4 d² + 3 · 8/3 d² a block
    assert float(f"{sum(counts) / 1e9:.4g}") == matrices and round(model.num_params() / 1e9, 2) == paper
    assert sum(counts) < model.num_params() < 1.001 * sum(counts)           # the rescalers
    assert model.num_params() - model.num_params(embeddings=False) == 2 * V * d
    assert model.flops_per_token(1000) == 6 * (V * d + 12 * depth * d * d) + 12 * depth * d * 1000


def test_model_built_on_the_meta_device_is_the_same_model():
    with torch.device("meta"):
        model = small()
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    assert torch.equal(model(batch()[0])[0], small()(batch()[0])[0])


def test_generate_takes_the_likeliest_or_draws_from_the_k_likeliest():
    model, start = off_center(), batch()[0][:, :4]
    likeliest = model.generate(start, 20, temperature=0)                    # 24 tokens, longer than seq_len = 16
    assert likeliest.shape == (2, 24) and torch.equal(likeliest[:, :4], start)
    for i in range(4, 24):
        assert torch.equal(likeliest[:, i], model(likeliest[:, max(0, i - 16):i])[0][:, -1].argmax(-1))
    assert torch.equal(model.generate(start, 20, top_k=1), likeliest)
    logits = model(start[:1])[0][0, -1]
    draw = lambda **how: model.generate(start[:1].expand(4000, 4), 1, **how)[:, -1]         # noqa: E731
    for temperature in (0.5, 2):                                            # 0.05: six standard deviations of a frequency
        frequency = draw(temperature=temperature).bincount(minlength=48) / 4000
        torch.testing.assert_close(frequency, (logits / temperature).softmax(0), rtol=0, atol=0.05)
    assert set(draw(top_k=3, temperature=9).tolist()) == set(logits.topk(3).indices.tolist())


def test_plain_model_is_its_equations():
    """The opponent: h += attention(RMSNorm(h)), h += MLP(RMSNorm(h)), softmax scale 1/√d_head, in fp64."""
    torch.manual_seed(0)
    model = PlainGPT(GPTConfig(width=32, depth=2, head_dim=8, vocab_size=48, seq_len=16, embedding_std=0.8, hidden_std=0.3, unembedding_std=0.4))
    tokens, targets = batch()
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    rms = lambda x: x / x.square().mean(-1, keepdim=True).sqrt()
    angle = torch.arange(16.0).double()[:, None] * 10000.0 ** (-torch.arange(0, 8, 2).double() / 8)
    turn = torch.polar(torch.ones_like(angle), angle)       # channels i and i + 4 as one complex number
    h = w["embedding"][tokens]
    for i in range(2):
        qkv, out, mlp_in, mlp_out = (w[f"blocks.{i}.{name}"] for name in ("qkv", "attn_out", "mlp_in", "mlp_out"))
        heads = []
        for head in range(4):
            q, k, v = (rms(h) @ qkv[32 * part + 8 * head:32 * part + 8 * head + 8].T for part in range(3))
            q, k = (torch.complex(x[..., :4], x[..., 4:]) * turn for x in (q, k))
            scores = (q @ k.conj().transpose(1, 2)).real / 8 ** 0.5
            scores = scores.masked_fill(torch.ones(16, 16, dtype=bool).triu(1), -math.inf)
            heads.append(scores.softmax(-1) @ v)
        h = h + torch.cat(heads, -1) @ out.T
        u, v = (rms(h) @ mlp_in.T).split(model.config.mlp_width, -1)
        h = h + (u * v * torch.sigmoid(v)) @ mlp_out.T
    logits = rms(h) @ w["unembedding"].T
    loss = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
    mine, my_loss = model(tokens, targets)
    assert ((mine - logits).norm() / logits.norm()).item() < 3e-6
    assert my_loss.item() == pytest.approx(loss.item(), rel=3e-6)


def test_plain_columns_are_equal_at_the_base_alone_and_start_as_the_table_says():
    def build(column, width):
        config = train.Config(parametrization=column, width=width, depth=2, head_dim=8, vocab_size=512, seq_len=16, base_width=64,
                              base_depth=2, weight_decay=0.1)
        return train.build(config, torch.device("cpu"))
    for width, equal in ((64, True), (256, False)):
        (sp, sp_adam), (mup, mup_adam) = build("gpt_sp", width), build("gpt_mup", width)
        rates = [[group["lr_scale"] for group in adam.param_groups] for adam in (sp_adam, mup_adam)]
        assert (rates[0] == rates[1]) == equal
        assert all(torch.equal(a, b) for a, b in zip(sp.parameters(), mup.parameters())) == equal
        assert all(group["weight_decay"] == 0.1 for group in sp_adam.param_groups)
        assert sum(len(group["params"]) for group in sp_adam.param_groups) == len(list(sp.parameters())) == 2 + 4 * 2
    # at four times the base: hidden and unembedding rates 1/4; E_out starts at a quarter of its 64^-1/2, hidden matrices at 256^-1/2
    assert rates[1] == [1, 0.25, 0.25]
    block = mup.blocks[0]
    for weight, std in ((mup.embedding, 1), (block.qkv, 1 / 16), (block.mlp_in, 1 / 16), (block.attn_out, 1 / 32), (block.mlp_out, 1 / 32),
                        (mup.unembedding, 1 / 32)):
        assert weight.std().item() == pytest.approx(std, rel=0.02)


def test_bench_compares_the_two_models(capsys):
    config = train.Config(width=32, depth=1, head_dim=8, seq_len=16, vocab_size=64, batch_size=2, device="cpu", dtype="float32", compile=False)
    train.bench(config, *train.open_device(config), repeats=3)
    said = capsys.readouterr().out.splitlines()
    steps = [float(re.search(r"step ([\d.]+) ms", line)[1]) for line in said if "step" in line and "ms" in line]
    assert len(steps) == 2 and float(re.search(r"^ratio: ([\d.]+)", said[-1])[1]) == pytest.approx(steps[0] / steps[1], rel=0.02)


def test_compiled_model_is_the_eager_one():
    model = off_center()
    loss, grads = gradients(model, model, *batch())
    compiled_loss, compiled_grads = gradients(model, torch.compile(model), *batch())
    assert compiled_loss == pytest.approx(loss, rel=1e-6)
    assert max(relative_errors(compiled_grads, grads).values()) < 1e-5


def test_bfloat16_is_float32_to_its_own_width():
    """bf16 keeps 8 bits, so one rounding errs by at most u = 2^-8. A product rounds two factors and itself, and 6 stand in a row
    in a block (qkv, q·k, P·v, W_O, W_u and W_ν, W_oMLP): with the logits 13 in two blocks, and as many backward. Independent
    errors add as a root: √(3·26) u = 0.035 of a gradient, √(3·13) u of a logit, which is typically logit_init / √d. The loss is
    the mean over 128 tokens, each moved by its logits' error times |softmax - onehot| ≤ √2."""
    u, model = 2 ** -8, off_center()
    (tokens, targets), autocast = batch(rows=8), torch.autocast("cpu", torch.bfloat16)
    loss, grads = gradients(model, model, tokens, targets)
    with autocast:
        bf16_loss, bf16_grads = gradients(model, model, tokens, targets)
        torch.testing.assert_close(model.hidden(tokens).norm(dim=-1), torch.ones(8, 16))        # norms and states stay fp32
    assert 0 < abs(bf16_loss - loss) < math.sqrt(2 / 128) * math.sqrt(3 * 13) * u * 6 / math.sqrt(32)
    assert max(relative_errors(bf16_grads, grads).values()) < math.sqrt(3 * 26) * u


# ---------------------------------------------------------------- parametrize.py

# The rules at 4, 9 and 125 times the base's width (1024), depth and steps, by hand; with these, each power has its own prime:
# m_w^-1/2 = 1/2, m_w^-3/4 = 0.3535534, m_w^-1 = 1/4; m_d^-1/2 = 1/3, m_d^-1 = 1/9; m_t^-1/3 = 1/5; c = 1/32, d^-1/2 = 1/64.
BY_HAND = dict(
    # η ×:   embedding  hidden          unembedding    × base  rescalers   init: α   scale: α, s_qk  init: s_z  scale: s_z
    ngpt=(      1,      1,              1,             1,      1,          0.05,     1 / 64,         1,         1 / 64),
    mup=(       1 / 10, 1 / 20,         1 / 10,        0.5,    1 / 5,      0.05 / 9, 1 / 32,         1,         1 / 32),
    depth_mup=( 1 / 10, 0.3535534 / 15, 0.3535534 / 5, 0.5,    1 / 5,      0.05 / 3, 1 / 32,         2,         1 / 32),
    nugpt_full=(1 / 10, 1 / 20,         1 / 20,        0.5,    1 / 5,      0.05 / 9, 1 / 32,         2,         1 / 32),
    nugpt_none=(1 / 10, 1 / 10,         1 / 10,        0.5,    1 / 5,      0.05 / 9, 1 / 32,         2,         1 / 32),
    nugpt=(     1 / 10, 0.3535534 / 5,  0.3535534 / 5, 0.5,    1 / 5,      0.05 / 9, 1 / 32,         2,         1 / 32))


@pytest.mark.parametrize("column", parametrize_py.read_table(parametrize_py.TABLE))
def test_table_gives_the_numbers_worked_out_by_hand(column):
    embedding, hidden, unembedding, tuned, rescalers, alpha, scale, logit, logit_scale = BY_HAND[column]
    values = dict(alpha_init=alpha, alpha_scale=scale, qk_init=1, qk_scale=scale, mlp_init=1, mlp_scale=1, logit_init=logit,
                  logit_scale=logit_scale)
    for mult in (None, 0.3):
        rates = dict(embedding=2 * embedding, hidden=3 * hidden, unembedding=unembedding * (mult or tuned), rescalers=5 * rescalers)
        got = parametrize(column, 4096, 90, 1_250_000, embedding_lr_mult=2, hidden_lr_mult=3, unembedding_lr_mult=mult,
                          rescalers_lr_mult=5)
        assert got[0] == pytest.approx(values) and got[1] == pytest.approx(rates)


def test_unknown_columns_impossible_sizes_and_unreadable_cells_are_refused():
    with pytest.raises(ValueError, match="'sp'.* columns are ngpt, mup, depth_mup, nugpt_full, nugpt_none, nugpt"):
        parametrize("sp", 64, 1, 1)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        parametrize("nugpt", 64, 1, 0)
    for cell in ("m_x^2", "m_w^half", "", "2 m_w", "m_w^1/0"):
        with pytest.raises(ValueError, match="cannot read the factor"):
            value(cell, m_w=2)


def edited(before, after):
    """parametrize.py with one piece of its text replaced, as a user would: its names."""
    source, names = Path(parametrize_py.__file__).read_text(), {"__name__": "edited"}
    assert before in source
    exec(source.replace(before, after, 1), names)
    return names


def test_one_edit_adds_a_column_or_is_refused():
    mine = edited("OWN = {", 'OWN = {"mine": ("nugpt", dict(lr_hidden="m_w^-0.85")),')["parametrize"]("mine", 2048, 20, 80_000)
    nugpt = parametrize("nugpt", 2048, 20, 80_000)
    assert mine[1].pop("hidden") == pytest.approx(0.5 * 2 ** -0.85) != nugpt[1].pop("hidden") and mine == nugpt
    for own in ('("nogpt", {})', '("nugpt", dict(lr_hiden="1"))'):
        with pytest.raises(ValueError, match="'mine'.*(nogpt|lr_hiden)"):
            edited("OWN = {", f'OWN = {{"mine": {own},')
    with pytest.raises(ValueError, match="row 'lr_hidden' .* has 5 cells, but there are 6 columns"):
        edited("| m_w^-3/4 ? · m_d^-1/2   ", "")


def test_at_the_base_every_column_is_the_same_run_and_away_from_it_none_is():
    losses, model = trained("ngpt")
    for column in NORMALIZED:
        same_losses, same = trained(column)
        assert same_losses == losses and all(map(torch.equal, same.parameters(), model.parameters()))
    assert len({trained(column, times=2)[0][-1] for column in NORMALIZED}) == len(NORMALIZED)


def test_parameter_groups_hold_every_parameter_once(monkeypatch):
    model, lr_scale = small(), parametrize("nugpt", 64, 2, 8)[1]
    grouped = [(id(p), group["name"], group["lr_scale"]) for group in param_groups(model, lr_scale) for p in group["params"]]
    classes = {id(p): "rescalers" if name.endswith("raw") else name if "blocks" not in name else "hidden"
               for name, p in model.named_parameters()}
    assert sorted(grouped) == sorted((i, name, lr_scale[name]) for i, name in classes.items())
    monkeypatch.setitem(parametrize_py.TENSOR_CLASSES, "hidden", r"embedding|blocks.*(qkv|attn_out|mlp_in|mlp_out)")
    with pytest.raises(ValueError, match="embedding .* is in embedding and hidden"):
        param_groups(model, lr_scale)
    monkeypatch.undo()
    model.gain = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="gain .* is in none"):
        param_groups(model, lr_scale)


def test_parametrize_prints_the_table_and_one_models_numbers(capsys, monkeypatch):
    for argv, words in (([], ("m_w^-3/4", "nugpt_none")), (["--width=4096", "--steps=80000"], ("0.1768", "nugpt_none"))):
        monkeypatch.setattr(sys, "argv", ["parametrize.py", *argv])
        parametrize_py.main()
        text = capsys.readouterr().out
        assert all(word in text for word in words)
    monkeypatch.setattr(sys, "argv", ["parametrize.py"])
    monkeypatch.setitem(parametrize_py.OWN, "mine", ("nugpt", dict(lr_hidden="m_w^-0.85")))
    parametrize_py.main()
    assert "mine: nugpt, but lr_hidden m_w^-0.85" in capsys.readouterr().out


# ---------------------------------------------------------------- train.py: the loop

def test_train_takes_adams_steps_at_the_tables_rates_on_a_cosine(data, tmp_path):
    mults = dict(embedding_lr_mult=2, hidden_lr_mult=1.5, unembedding_lr_mult=0.7, rescalers_lr_mult=0.6)
    assert run(*options(data, tmp_path, steps=3, learning_rate=0.03, **mults)) == 0
    rescalers, lr_scale = parametrize("nugpt", 32, 2, 3, 16, 1, 4, **mults)
    model, m, v = small(vocab_size=256, **rescalers), {}, {}
    tokens = read_tokens(data / "train.bin").astype(np.int64)
    for t in range(3):
        rows = torch.tensor(np.stack([tokens[s:s + 17] for s in train.batch_starts(0, t, 4, 16, len(tokens))]))
        loss, grads = gradients(model, model, rows[:, :-1], rows[:, 1:])
        rate = 0.03 * (0.1 + 0.9 * (1 + math.cos(math.pi * t / 3)) / 2)                             # cosine to 10 %, no warm-up
        assert log(tmp_path, "learning_rate", "train_loss")[t] == pytest.approx([rate, loss], rel=1e-5)
        for name, p in model.named_parameters():                                                    # Adam, arXiv:1412.6980
            m[name] = 0.9 * m.get(name, 0) + 0.1 * grads[name]
            v[name] = 0.95 * v.get(name, 0) + 0.05 * grads[name] ** 2
            step = m[name] / (1 - 0.9 ** (t + 1)) / ((v[name] / (1 - 0.95 ** (t + 1))).sqrt() + 1e-16)
            tensors = "rescalers" if name.endswith("raw") else name if "blocks" not in name else "hidden"
            p.data -= rate * lr_scale[tensors] * step
        model.normalize_weights()
    for name, p in model.named_parameters():
        torch.testing.assert_close(checkpoint(tmp_path)["model"][name], p.data, rtol=0, atol=1e-5)


def test_frozen_alpha_stays_where_it_starts(data, tmp_path):
    assert run(*options(data, tmp_path, freeze_alpha=True)) == 0 and run(f"--out_dir={tmp_path}", "--resume") == 0
    start = small(vocab_size=256, **parametrize("nugpt", 32, 2, 8, 16, 1, 4)[0]).state_dict()
    same = {name for name, weight in checkpoint(tmp_path)["model"].items() if torch.equal(weight, start[name])}
    assert same == {f"blocks.{i}.{alpha}.raw" for i in (0, 1) for alpha in ("attn_alpha", "mlp_alpha")}


def test_ranks_and_micro_batches_do_not_change_the_losses(data, tmp_path):
    """Real processes, gloo between them. Sums are taken in another order, and log.csv has 6 digits."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", HERE / "train.py")
    done = process(*torchrun, *options(data, tmp_path / "2x2", micro_batch_size=1))
    assert done.returncode == 0 and done.stdout.count("final:") == 1, done.stderr
    for micro in (0, 1, 2):
        assert run(*options(data, tmp_path / f"1x{micro}", micro_batch_size=micro)) == 0
    columns = "step", "tokens", "learning_rate", "train_loss", "val_loss", "attn_alpha", "mlp_alpha", "s_z"
    for other in ("2x2", "1x1", "1x2"):
        np.testing.assert_allclose(log(tmp_path / other, *columns), log(tmp_path / "1x0", *columns), rtol=2e-5)
    assert checkpoint(tmp_path / "2x2")["model"].keys() == small().state_dict().keys()              # no prefix of a wrapper


def test_evaluation_is_the_mean_over_the_stated_windows(data, tmp_path):
    """19 of the 24 windows of val.bin, evenly spread; neither 4 nor 3 sequences at a time divide them."""
    tokens = torch.tensor(read_tokens(data / "val.bin").astype(np.int64))
    windows = (len(tokens) - 1) // 16
    rows = torch.stack([tokens[16 * i:16 * i + 17] for i in (k * windows // 19 for k in range(19))])
    for batch_size in (4, 3):
        assert run(*options(data, tmp_path / f"{batch_size}", batch_size=batch_size)) == 0
        out_dir, model = tmp_path / f"{batch_size}", small(vocab_size=256, **parametrize("nugpt", 32, 2, 8, 16, 1, 4)[0])
        model.load_state_dict(checkpoint(out_dir)["model"])
        val_losses = log(out_dir, "val_loss")[:, 0]
        assert val_losses[-1] == pytest.approx(model(rows[:, :-1], rows[:, 1:])[1].item(), rel=1e-5)
        assert np.isfinite(val_losses).nonzero()[0].tolist() == [3, 7]                              # eval_every=4
        rescalers = [[b.attn_alpha().abs() for b in model.blocks], [b.mlp_alpha().abs() for b in model.blocks], [model.s_z()]]
        means = [torch.cat(values).mean().item() for values in rescalers]
        assert log(out_dir, "attn_alpha", "mlp_alpha", "s_z")[-1] == pytest.approx(means, rel=1e-5)


def test_compiled_run_saves_plain_names(data, tmp_path, monkeypatch):
    assert run(*options(data, tmp_path / "eager")) == 0
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiler(function, backend="eager"))     # the same wrapper, at once
    assert run(*options(data, tmp_path / "wrapped", compile=True)) == 0
    assert checkpoint(tmp_path / "wrapped")["model"].keys() == small().state_dict().keys()
    assert log(tmp_path / "wrapped") == log(tmp_path / "eager")


def test_diverged_run_says_so_and_keeps_the_last_good_checkpoint(data, tmp_path, monkeypatch):
    class Breaks(GPT):
        """Its fourth training step, at which a checkpoint is due, has a finite loss but gradients that are not."""
        def forward(self, *args):
            logits, loss = super().forward(*args)
            if torch.is_grad_enabled():
                self.calls = getattr(self, "calls", 0) + 1
                loss.register_hook(lambda gradient: gradient * (math.nan if self.calls == 4 else 1))
            return logits, loss

    results = tmp_path / "results.csv"
    assert run(*options(data, tmp_path / "rate", learning_rate=1e6, checkpoint_every=1, results=results)) == 3
    monkeypatch.setattr(train, "GPT", Breaks)
    assert run(*options(data, tmp_path / "gradient", checkpoint_every=2, results=results)) == 3
    for name, row in zip(("rate", "gradient"), train.read_csv(results), strict=True):
        assert row["status"] == "diverged" == log(tmp_path / name)[-1]["status"] and row["val_loss"] == "nan"
        assert all(weight.isfinite().all() for weight in checkpoint(tmp_path / name)["model"].values())
    assert checkpoint(tmp_path / "gradient")["step"] == 2


def test_finished_run_leaves_its_files_a_last_line_and_a_sample(data, tmp_path, capsys):
    assert run(*options(data, tmp_path, results=tmp_path / "all.csv", sample_tokens=20)) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith("final: step=8 val_loss=") and "bits_per_byte=" in out[-1] and "sample" in "".join(out)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["config"]["width"] == 32 and config["torch"] == torch.__version__ and "commit" in config
    assert list(log(tmp_path)[0])[0] == "step" and log(tmp_path)[-1]["status"] == "finished"
    row, = train.read_csv(tmp_path / "all.csv")
    assert row["width"] == "32" and row["status"] == "finished" and float(row["seconds"]) > 0
    assert float(row["val_loss"]) == log(tmp_path, "val_loss")[-1]
    before = checkpoint(tmp_path)["model"]["embedding"]
    assert run(f"--out_dir={tmp_path}", "--resume", "--sample_only", "--sample_tokens=9", "--prompt=norm") == 0
    assert "\nnorm" in capsys.readouterr().out and torch.equal(before, checkpoint(tmp_path)["model"]["embedding"])


def test_batches_are_a_function_of_seed_and_step_and_an_epoch_has_every_window_once():
    starts = lambda step, seed=0: train.batch_starts(seed, step, 5, 8, 85)          # noqa: E731  10 windows, 2 steps an epoch
    forward = [starts(step) for step in range(6)]
    assert forward == [starts(step) for step in reversed(range(6))][::-1]
    epochs = [forward[i] + forward[i + 1] for i in (0, 2, 4)]
    for epoch in epochs:
        assert np.diff(sorted(epoch)).tolist() == [8] * 9 and 0 <= min(epoch) and max(epoch) + 8 < 85
    orders = [[(start - min(epoch)) // 8 for start in epoch] for epoch in epochs]
    assert orders[0] != orders[1] != orders[2] != orders[0] and starts(0) != starts(0, seed=1)


# ---------------------------------------------------------------- train.py: alignment exponents

def test_alignment_exponent_of_known_cases():
    """1/2 where weight and input are independent, 1 where the weight has rank one along the input, between them by d_in."""
    torch.manual_seed(0)
    d, x, u = 1024, torch.randn(50, 1024), torch.randn(300)
    assert train.alignment_exponent(torch.randn(300, d), x) == pytest.approx(0.5, abs=0.01)
    assert train.alignment_exponent(torch.outer(u, x[0]), x[:1]) == pytest.approx(1, abs=1e-5)
    block = torch.outer(u, x[0]) * (torch.arange(d) < 256)          # rank one along a quarter of the input
    alpha = 1 + math.log((x[0, :256].square().sum() / x[0].square().sum()).sqrt(), d)
    assert train.alignment_exponent(block, x[:1]) == pytest.approx(alpha, abs=1e-5)
    assert train.alignment_exponent(3 * block, 5 * x[:1]) == pytest.approx(alpha, abs=1e-5)
    x[1] = 0                                                        # a token that has not moved does not count
    assert train.alignment_exponent(torch.outer(u, x[0]), x[:2]) == pytest.approx(1, abs=1e-5)
    x[1] = x[0] * (torch.arange(d) >= 256)                          # nor does one that the weight does not see
    assert train.alignment_exponent(block, x[:2]) == pytest.approx(alpha, abs=1e-5)
    assert math.isnan(train.alignment_exponent(torch.zeros(300, d), x))


def test_alignment_takes_each_map_with_its_own_input():
    """Against the same quantities from the parts of the model, for every map."""
    initial, model, (tokens, targets) = off_center(), off_center(), batch()
    for p, other in zip(model.parameters(), off_center(seed=1).parameters()):
        p.data += 0.3 * other.data
    rows, loss = train.alignment(model, initial, tokens, targets)
    assert loss == pytest.approx(model(tokens, targets)[1].item())

    def maps(model):
        h = model.embedding[tokens]
        for layer, block in enumerate(model.blocks):
            d, m = model.config.width, model.config.mlp_width
            attended = block.attention(h, model.rope)
            mixed = torch.linalg.lstsq(block.attn_out, attended.flatten(0, 1).T).solution.T.view_as(h)  # W_O is square
            for i, name in enumerate(("W_q", "W_k", "W_v")):
                yield layer, name, block.qkv[i * d:(i + 1) * d], h
            yield layer, "W_O", block.attn_out, mixed
            h = norm(h + block.attn_alpha().abs() * (norm(attended) - h))
            u, nu = h @ block.mlp_in[:m].T, h @ block.mlp_in[m:].T
            yield layer, "W_u", block.mlp_in[:m], h
            yield layer, "W_nu", block.mlp_in[m:], h
            gated = torch.nn.functional.silu(nu * block.s_v() * math.sqrt(d)) * u * block.s_u()
            yield layer, "W_oMLP", block.mlp_out, gated
            h = norm(h + block.mlp_alpha().abs() * (norm(gated @ block.mlp_out.T) - h))
        yield len(model.blocks), "E_out", model.unembedding, h

    rms = lambda x: x.square().mean(-1).sqrt()                                                      # noqa: E731
    with torch.no_grad():
        for row, (layer, name, W, x), (_, _, W_0, x_0) in zip(rows, maps(model), maps(initial)):
            assert (row["layer"], row["map"], row["d_in"]) == (layer, name, x.size(-1))
            dW, dx = W - W_0, x - x_0
            for key, a, b in (("alpha", dW, x_0), ("omega", W_0, dx), ("nu", dW, dx)):
                log_ratio = (rms(b @ a.T) / (a.square().mean().sqrt() * rms(b))).log().mean()
                assert row[key] == pytest.approx(log_ratio.item() / math.log(x.size(-1)), abs=1e-4), (key, name)
            expected = dict(rms_dW=rms(dW.flatten()), rms_dx=rms(dx).mean(), rms_y=rms(x @ W.T).mean(),
                            rms_dy=rms(x @ W.T - x_0 @ W_0.T).mean())
            assert {key: row[key] for key in expected} == pytest.approx({key: v.item() for key, v in expected.items()}, rel=1e-3)
        z, z_0 = model(tokens)[0], initial(tokens)[0]
        assert len(rows) == 2 * 7 + 2 and rows[-1]["map"] == "logits"
        assert [rows[-1][key] for key in ("rms_y", "rms_dy")] == pytest.approx([rms(z).mean().item(), rms(z - z_0).mean().item()])


def test_measuring_alignment_changes_no_loss_and_survives_a_kill(data, tmp_path):
    for name, changes in (("without", {}), ("with", dict(alignment_every=3))):
        assert run(*options(data, tmp_path / name, **changes)) == 0
    assert log(tmp_path / "with") == log(tmp_path / "without") and not (tmp_path / "without/alignment.csv").exists()
    rows = train.read_csv(tmp_path / "with/alignment.csv")
    assert [int(row["step"]) for row in rows[::16]] == [0, 1, 2, 3, 6, 8] and len(rows) == 6 * 16
    assert {row["width"] for row in rows} == {"32"} and float(rows[-1]["loss"]) < float(rows[0]["loss"])
    kill = ("import os, sys, train; starts = train.batch_starts\n"
            "train.batch_starts = lambda seed, step, *a: os.kill(os.getpid(), 9) if step == 7 else starts(seed, step, *a)\n"
            "train.main(sys.argv[1:])")
    assert process("-c", kill, *options(data, tmp_path / "killed", alignment_every=3)).returncode == -9
    early = kill.replace("step == 7", "step == 2")       # before the first checkpoint: it begins again
    assert process("-c", early, *options(data, tmp_path / "early", alignment_every=3)).returncode == -9
    assert run(f"--out_dir={tmp_path / 'early'}", "--resume") == 0
    assert train.read_csv(tmp_path / "early/alignment.csv") == rows
    assert "alignment_every=3 (now 2)" in run(f"--out_dir={tmp_path / 'killed'}", "--resume", "--alignment_every=2")
    assert run(f"--out_dir={tmp_path / 'killed'}", "--resume") == 0
    assert train.read_csv(tmp_path / "killed/alignment.csv") == rows


# ---------------------------------------------------------------- train.py: kills, signals and resumed runs

def test_run_killed_anywhere_and_resumed_is_bit_equal_to_one_that_was_not(data, tmp_path):
    """kill -9: first in the middle of writing a checkpoint, then six times wherever it strikes."""
    seed = time.time_ns() % 2 ** 32
    print(f"seed {seed}")                                                                           # seen if the test fails
    rng, whole, killed = np.random.default_rng(seed), tmp_path / "whole", tmp_path / "killed"
    long = dict(steps=150, checkpoint_every=2, eval_every=7, eval_tokens=48)
    assert run(*options(data, whole, **long)) == 0

    def breaks_off(state, file, save=torch.save):
        save(state, file)
        if state["step"] == 6:
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", breaks_off)
        assert outcome(start(*options(data, killed, **long))) == -signal.SIGKILL
    assert checkpoint(killed)["step"] == 4 and len(log(killed)) == 6 and list(killed.glob("ckpt.pt.*.tmp"))

    for _ in range(6):
        started, row = start(f"--out_dir={killed}", "--resume"), checkpoint(killed)["step"] + rng.integers(20)
        while started.is_alive() and (killed / "log.csv").read_bytes().count(b"\n") <= row:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        started.kill()
        assert outcome(started) == -signal.SIGKILL
    assert outcome(start(f"--out_dir={killed}", "--resume")) == 0
    assert_same_run(whole, killed)


def test_run_told_to_stop_says_how_to_go_on_and_that_command_finishes_it_bit_equal(data, tmp_path):
    long = dict(steps=300, checkpoint_every=1000, eval_every=50, results=tmp_path / "results.csv")
    whole, stopped = tmp_path / "whole", tmp_path / "it's stopped"
    assert run(*options(data, whole, **long)) == 0
    started = subprocess.Popen([sys.executable, HERE / "train.py", *options(data, stopped, **long)], stdout=subprocess.PIPE,
                               text=True, cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while started.poll() is None and not ((stopped / "log.csv").exists() and len(log(stopped)) > 3):
        time.sleep(0.005)
    started.send_signal(signal.SIGINT)
    last = started.communicate()[0].splitlines()[-1]
    assert started.returncode == 4 and len(train.read_csv(tmp_path / "results.csv")) == 1           # a row of whole's alone
    assert last.startswith(f"stopped after step {checkpoint(stopped)['step']}; to continue: python ")
    done = process(*shlex.split(last.split("python ")[1]))
    assert done.returncode == 0, done.stderr
    assert_same_run(whole, stopped)
    assert [row["status"] for row in train.read_csv(tmp_path / "results.csv")] == ["finished"] * 2


def test_second_interrupt_ends_the_run_at_once(data, tmp_path):
    def hang(step):
        if step == 2:
            (tmp_path / "hangs").touch()
            time.sleep(60)
    began, started = time.time(), start(*options(data, tmp_path), before=hang)
    while not (tmp_path / "hangs").exists():
        time.sleep(0.01)
    os.kill(started.pid, signal.SIGINT)
    time.sleep(0.5)
    assert started.is_alive()                                                                       # in the step under way
    os.kill(started.pid, signal.SIGINT)
    assert outcome(started) == -signal.SIGINT and time.time() - began < 50


def test_ranks_told_to_stop_at_different_steps_stop_at_one_and_resume_bit_equal(data, tmp_path):
    """Three of them: the sum over two does not depend on an order. One alone gets the signal."""
    def exit_codes(*argv, signaled=lambda step: None):
        with socket.socket() as listener:
            listener.bind(("", 0))
            port = listener.getsockname()[1]
        return [*map(outcome, [start(*argv, rank=rank, ranks=3, port=port, **(dict(before=signaled) if rank == 2 else {}))
                               for rank in range(3)])]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert exit_codes(*options(data, whole, batch_size=6)) == [0, 0, 0]
    assert exit_codes(*options(data, stopped, batch_size=6), signaled=send(signal.SIGTERM, at=4)) == [4, 4, 4]
    assert checkpoint(stopped)["step"] == 5
    assert exit_codes(f"--out_dir={stopped}", "--resume") == [0, 0, 0]
    assert_same_run(whole, stopped)


def test_torchrun_told_to_stop_saves_and_a_rank_that_dies_takes_all_down(data, tmp_path):
    """Three real launches: the second and third go on as the one before says, the last until rank 1 is killed."""
    script, out_dir = tmp_path / "script.py", tmp_path / "out"
    script.write_text("import os, sys, train; starts = train.batch_starts\n"
                      "dies = lambda step: train.rank == 1 and str(step) == os.environ.get('DIES_AT')\n"
                      "kill = lambda: os.kill(os.getpid(), 9)\n"
                      "train.batch_starts = lambda seed, step, *rest: kill() if dies(step) else starts(seed, step, *rest)\n"
                      "sys.exit(train.main(sys.argv[1:]))")
    torchrun = ["-m", "torch.distributed.run", "--standalone"]
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}

    def told(number, *command):
        """Start it, send it the signal after three steps as a terminal would, and return the command that it says continues."""
        before = len(train.read_csv(out_dir / "log.csv"))
        started = subprocess.Popen([sys.executable, *torchrun, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   env={**os.environ, **env}, start_new_session=True)
        while started.poll() is None and len(train.read_csv(out_dir / "log.csv")) <= before + 3:
            time.sleep(0.05)
        at = time.time()
        os.killpg(started.pid, number)
        said, errors = started.communicate()
        assert started.returncode != 0 and time.time() - at < 30, errors                            # 30 s: torchrun kills by then
        assert said.count("stopped after step") == 1, errors
        continues = f"step {checkpoint(out_dir)['step']}; to continue: torchrun --nnodes=1 --nproc_per_node=2 "
        return shlex.split("--nproc_per_node=2 " + said.split(continues)[1])

    command = told(signal.SIGTERM, "--nproc_per_node=2", script, *options(data, out_dir, steps=10 ** 5))
    command, step = told(signal.SIGINT, *command), checkpoint(out_dir)["step"]
    began = time.time()
    done = process(*torchrun, *command, **env, DIES_AT=str(step + 3))
    assert done.returncode != 0 and "exitcode  : -9" in done.stderr and time.time() - began < 60
    assert len(log(out_dir)) == step + 3


def test_full_disk_ends_the_run_in_one_sentence_and_keeps_the_checkpoint_before(data, tmp_path):
    assert outcome(start(*options(data, tmp_path), before=send(signal.SIGKILL, at=6))) == -signal.SIGKILL
    before, half = (tmp_path / "ckpt.pt").read_bytes(), (tmp_path / "ckpt.pt").stat().st_size // 2
    no_room = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (half, half))       # noqa: E731  nearly the error of a full disk
    done = process(HERE / "train.py", f"--out_dir={tmp_path}", "--resume", preexec_fn=no_room)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"[\r\n]train.py: the checkpoint of step 8 could not be written \(\[Errno .*too large\); ", done.stderr)
    assert (tmp_path / "ckpt.pt").read_bytes() == before and not list(tmp_path.glob("*.tmp"))
    with open(tmp_path / "log.csv", "a") as file:
        file.write("1,64,0.0")                                                                      # a row it had no room for
    assert run(f"--out_dir={tmp_path}", "--resume") == 0 and len(log(tmp_path)) == 8


def test_resumed_run_may_change_what_is_not_mathematics_and_nothing_else(data, tmp_path):
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    assert run(*options(data, whole)) == 0
    assert outcome(start(*options(data, changed), before=send(signal.SIGKILL, at=6))) == -signal.SIGKILL
    saved = checkpoint(changed)["config"]
    for key in saved.keys() - set(train.FREE_ON_RESUME):
        other = "other" if isinstance(saved[key], str) else not saved[key] if isinstance(saved[key], bool) else saved[key] + 1
        assert f"{key}={saved[key]} (now {other})" in run(f"--out_dir={changed}", "--resume", f"--{key}={other}")
    shutil.copytree(data, tmp_path / "moved")
    assert run("--resume", *options(tmp_path / "moved", changed, log_every=2, eval_every=3, checkpoint_every=1, dtype="auto",
                                    results=tmp_path / "results.csv", sample_tokens=3, prompt="norm")) == 0
    a, b = checkpoint(whole), checkpoint(changed)
    torch.testing.assert_close(a["model"], b["model"], rtol=0, atol=0)
    assert b["config"] == {**saved, "data": str(tmp_path / "moved"), "log_every": 2, "eval_every": 3, "checkpoint_every": 1,
                           "resume": True, "results": str(tmp_path / "results.csv"), "sample_tokens": 3, "prompt": "norm"}


# ---------------------------------------------------------------- train.py: options, refusals, results

def test_options_take_a_sign_or_a_space_and_booleans_may_stand_bare():
    argv = ["--width", "128", "--resume", "--compile=False", "--seed=3", "--learning_rate=1e-3", "--prompt="]
    assert train.parse_args(argv) == dict(width=128, resume=True, compile=False, seed=3, learning_rate=1e-3, prompt="")


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        train.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for field in fields(train.Config):
        metavar = "[bool]" if field.type is bool else field.type.__name__
        assert f"--{field.name} {metavar} " in text and f"[{field.default!r}]" in text


REFUSALS = {        # option: what the sentence says
    "--widht=64": "did you mean --width", "8": "unknown option", "--width=wide": "whole number", "--steps=1.5": "whole number",
    "--learning_rate=fast": "a number", "--compile=maybe": "True or False", "--width=60": "multiple of head_dim=8",
    "--head_dim=1": "head_dim", "--depth=0": "at least 1", "--steps=0": "at least 1", "--batch_size=0": "at least 1",
    "--base_width=0": "at least 1", "--micro_batch_size=-1": "at least 0", "--seed=-1": "at least 0",
    "--learning_rate=nan": "positive finite", "--learning_rate=inf": "positive finite", "--learning_rate=0": "positive finite",
    "--learning_rate=-0.1": "positive finite", "--embedding_lr_mult=-1": "at least 0", "--beta2=1": "less than 1",
    "--min_lr_ratio=2": "1", "--seed=99999999999999999999": "below 2^63", "--results=runs": ".csv", "--parametrization=sp": "ngpt, mup, depth_mup, nugpt_full, nugpt_none, nugpt",
    "--dtype=float16": "float32", "--device=tpu": "auto, cuda", "--vocab_size=255": "at least 256",
    "--seq_len=4000": "more than seq_len", "--data=nowhere": "prepare_data.py", "--sample_only": "--resume",
    "--alignment_every=-1": "at least 0"}


@pytest.mark.parametrize("option", REFUSALS)
def test_impossible_options_are_refused_in_one_sentence(option, data, tmp_path):
    sentence = run(*options(data, tmp_path), option)
    assert isinstance(sentence, str) and sentence.startswith("train.py: ") and "\n" not in sentence
    assert REFUSALS[option] in sentence and option.lstrip("-").split("=")[0] in sentence and not (tmp_path / "log.csv").exists()


def test_refusal_is_one_line_without_a_traceback(data, tmp_path):
    done = process(HERE / "train.py", *options(data, tmp_path, width=60))
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "multiple of head_dim=8" in done.stderr


def test_batch_that_cannot_be_shared_out_is_refused(monkeypatch):
    monkeypatch.setattr(train, "world_size", 3)
    with pytest.raises(SystemExit, match="multiple of the number of processes, 3, not 4"):
        train.check(train.Config(batch_size=4))


def test_run_is_not_overwritten_nor_resumed_as_another(data, tmp_path):
    assert run(*options(data, tmp_path)) == 0
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "already holds a run" in run(*options(data, tmp_path))
    assert "width=32 (now 64)" in run(*options(data, tmp_path, width=64), "--resume")
    (tmp_path / "other").mkdir()
    text = (data / "words.txt").read_text()
    for other in ("X" + text[1:], text[:-1] + "X"):                                                 # to train on, to validate on
        (tmp_path / "other/text.txt").write_text(other)
        prepare_data.prepare(tmp_path / "other", [Path("text.txt")], tmp_path / "other", progress=False)
        assert "does not hold the tokens" in run(*options(tmp_path / "other", tmp_path), "--resume")
    shutil.copytree(data, tmp_path / "uncounted")
    meta = json.loads((data / "meta.json").read_text())
    meta["val"]["bytes"] = None                 # whether somebody has counted them makes no other data
    (tmp_path / "uncounted/meta.json").write_text(json.dumps(meta))
    assert run(*options(tmp_path / "uncounted", tmp_path), "--resume") == 0
    written |= {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert "does not exist" in run(*options(data, tmp_path / "none"), "--resume", "--sample_only")
    assert run(*options(data, tmp_path), "--bench") == 0
    assert written == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_resumed_run_needs_a_whole_checkpoint_of_the_same_table(data, tmp_path, monkeypatch):
    assert run(*options(data, tmp_path, parametrization="ngpt")) == 0
    whole = (tmp_path / "ckpt.pt").read_bytes()
    for broken in (whole[:len(whole) // 2], b"hello", b""):
        (tmp_path / "ckpt.pt").write_bytes(broken)
        assert "ckpt.pt is damaged" in run(f"--out_dir={tmp_path}", "--resume")
    ours = torch.load(io.BytesIO(whole), weights_only=True)
    renamed = {name.replace("qkv", "wqkv"): weight for name, weight in ours["model"].items()}
    older = ({key: ours[key] for key in ours if key != "seconds"}, {**ours, "model": renamed}, {**ours, "config": dict(size=3)})
    for foreign in (*older, torch.zeros(1), torch.ones(3), [], "text", dict(model=ours["model"], iter_num=5)):
        torch.save(foreign, tmp_path / "ckpt.pt")
        sentence = run(f"--out_dir={tmp_path}", "--resume")
        assert "ckpt.pt is" in sentence and "of another version of this program" in sentence
    (tmp_path / "ckpt.pt").write_bytes(whole)
    monkeypatch.setitem(COLUMNS["ngpt"], "alpha_init", "0.06")
    assert "table in parametrize.py is no longer the one" in run(f"--out_dir={tmp_path}", "--resume")
    monkeypatch.undo()
    (tmp_path / "ckpt.pt").unlink()             # stopped before its first checkpoint: it begins again, with its own options
    assert run(f"--out_dir={tmp_path}", "--resume") == 0
    assert checkpoint(tmp_path)["config"]["width"] == 32 and len(log(tmp_path)) == 8


def test_a_run_whose_vocabulary_cannot_be_loaded_ends_well_without_a_sample(data, tmp_path, monkeypatch, capsys):
    def no_network(name):
        raise ValueError("tiktoken could not load the vocabulary")
    monkeypatch.setattr(train, "get_tokenizer", no_network)
    assert run(*options(data, tmp_path, sample_tokens=5, results=tmp_path / "all.csv")) == 0
    said = capsys.readouterr().out.splitlines()
    assert "no sample: tiktoken" in said[-2] and said[-1].startswith("final: ") and len(train.read_csv(tmp_path / "all.csv")) == 1
    assert "tiktoken could not" in run(f"--out_dir={tmp_path}", "--resume", "--sample_only")


def test_runs_in_one_process_are_those_of_a_process_each(data, tmp_path):
    """Two processes share four lines, one of them impossible; what one run leaves behind does not touch the next."""
    lines = [" ".join(options(data, tmp_path / f"each{i}", seed=i, **changes)) for i, changes in
             enumerate((dict(), dict(parametrization="ngpt"), dict(width=60), dict(learning_rate=1e6)))]
    (tmp_path / "claims").mkdir()
    together = [subprocess.Popen([sys.executable, HERE / "train.py", "--each", tmp_path / "claims"], text=True, cwd=HERE,
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for _ in range(2)]
    [process.stdin.write("\n".join(lines) + "\n") for process in together]
    said = sorted(line for process in together for line in process.communicate()[0].splitlines() if line.startswith("ended"))
    assert said[0] == "ended 1 0" and said[1] == "ended 2 0" and said[3] == "ended 4 3" and len(said) == 4
    assert said[2].startswith("ended 3 train.py: width must be")
    for i, changes in enumerate((dict(), dict(parametrization="ngpt"))):
        assert run(*options(data, tmp_path / f"alone{i}", seed=i, **changes)) == 0
        assert log(tmp_path / f"alone{i}") == log(tmp_path / f"each{i}")


def test_worker_told_to_stop_ends_its_run_without_a_result_and_takes_no_other(data, tmp_path):
    results = tmp_path / "results.csv"
    lines = [shlex.join(options(data, tmp_path / str(i), results=results)) + "\n" for i in range(2)]
    (tmp_path / "claims").mkdir()

    def worker(argv):
        sys.stdin = io.StringIO("".join(lines))
        train.run_each(tmp_path / "claims")
    assert outcome(start(call=worker, before=send(signal.SIGTERM, at=4))) == 4
    assert checkpoint(tmp_path / "0")["step"] == 5 and not results.exists() and not (tmp_path / "1").exists()
    assert run(f"--out_dir={tmp_path / '0'}", "--resume") == 0 and len(train.read_csv(results)) == 1


def append_many(path, writer):
    for i in range(20):
        train.append_result(path, dict(seed=writer, step=i, status="finished"))


def test_results_of_many_processes_are_all_there(tmp_path):
    path, fork = tmp_path / "folder" / "results.csv", multiprocessing.get_context("fork")
    path.parent.mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (path.parent / f"results.csv.{dead.pid}.tmp").write_text("left by a process that was killed")
    writers = [fork.Process(target=append_many, args=(path, writer)) for writer in range(8)]
    [writer.start() for writer in writers]
    [writer.join() for writer in writers]
    rows = sorted((int(row["seed"]), int(row["step"])) for row in train.read_csv(path))
    assert rows == [(writer, i) for writer in range(8) for i in range(20)]
    assert [p.name for p in path.parent.iterdir()] == ["results.csv"]


def test_a_file_is_never_written_in_part(tmp_path):
    path = tmp_path / "file"
    train.write_aside(path, lambda file: file.write(b"old"))
    with pytest.raises(ZeroDivisionError):
        train.write_aside(path, lambda file: (file.write(b"new, in p"), 1 / 0))
    assert list(tmp_path.iterdir()) == [path]
    with open(path) as reader:
        train.write_aside(path, lambda file: file.write(b"new"))
        assert reader.read() == "old" and path.read_text() == "new"


def test_a_file_is_on_the_disk_before_it_replaces_another_and_so_is_its_name_before_the_program_goes_on(tmp_path, monkeypatch):
    events, rename = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("renamed"), rename(*paths)))
    train.write_aside(tmp_path / "file", lambda file: file.write(b"new"))
    assert events == [(tmp_path / "file").stat().st_ino, "renamed", tmp_path.stat().st_ino]


def test_resumed_run_has_one_row_and_results_that_are_none_are_refused_at_the_start(data, tmp_path):
    results = tmp_path / "all.csv"
    for seed in (0, 1):
        assert run(*options(data, tmp_path / f"{seed}", seed=seed, results=results)) == 0
    assert run(f"--out_dir={tmp_path / '0'}", "--resume", f"--results={results}") == 0
    assert sorted(row["seed"] for row in train.read_csv(results)) == ["0", "1"]
    for _ in range(2):      # without an out_dir nothing is resumed: two runs are two rows
        assert run(*options(data, "", results=results)) == 0
    assert sorted(row["seed"] for row in train.read_csv(results)) == ["0", "0", "0", "1"]
    results.write_bytes(b"\xff\xfe" * 100)
    assert f"cannot read {results}" in run(*options(data, "", results=results))
    (tmp_path / "1/log.csv").write_text("a,b\n1,2\n")
    assert "log.csv is damaged" in run(f"--out_dir={tmp_path / '1'}", "--resume", "--results=")


def test_temporary_files_of_the_dead_alone_are_removed(tmp_path):
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = [tmp_path / f"file.{pid}.tmp" for pid in (living.pid, dead.pid)]
    [path.write_text("half") for path in left]
    prepare_data.write_json(tmp_path / "file", 1)
    living.communicate(b"")
    assert [path.exists() for path in left] == [True, False]


def test_results_from_before_an_option_existed_get_its_default(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("width,gone,val_loss\n64,x,1.5\n")
    train.append_result(path, dict(width=128, depth=4, val_loss=1.25))
    old, new = train.read_csv(path)
    assert old == dict(width="64", depth=str(train.Config.depth), gone="x", val_loss="1.5")
    assert new == dict(width="128", depth="4", gone="", val_loss="1.25")


# ---------------------------------------------------------------- prepare_data.py

@pytest.mark.parametrize("vocab_size, dtype, magic", ((65_536, "<u2", (20240520, 1)), (65_537, "<u4", (20240801, 7))))
def test_token_files_come_back_as_written_or_are_refused(tmp_path, vocab_size, dtype, magic):
    path, tokens = tmp_path / "tokens.bin", np.random.default_rng(0).integers(0, vocab_size, 1000)
    tokens[0] = vocab_size - 1
    writer = TokenWriter(path, vocab_size)
    writer.write(tokens[:600])
    writer.write(tokens[600:])
    assert not path.exists()
    writer.close()
    assert np.array_equal(read_tokens(path), tokens) and read_tokens(path).dtype == np.dtype(dtype)
    raw = path.read_bytes()
    assert tuple(np.frombuffer(raw[:12], "<i4")) == (*magic, 1000) and np.array_equal(np.frombuffer(raw[1024:], dtype), tokens)
    for bad, words in ((b"\0" + raw[1:], "not a token file"), (raw[:4] + b"\5" + raw[5:], "not a token file"),
                       (raw[:100], "not a token file"), (raw[:-1], "was cut"), (raw + b"\0", "was cut")):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=words):
            read_tokens(path)
    with pytest.raises(ValueError, match="is missing"):
        read_tokens(tmp_path / "none.bin")


def prepared(monkeypatch, source, out):
    """(train bytes, val bytes, meta) of `python prepare_data.py source --out=out`."""
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", str(source), f"--out={out}"])
    prepare_data.main()
    texts = [bytes(read_tokens(out / f"{split}.bin").astype(np.uint8)) for split in ("train", "val")]
    return *texts, json.loads((out / "meta.json").read_text())


@pytest.mark.parametrize("name", ("text.txt", "text.txt.gz"))
def test_a_text_is_cut_in_two_and_nothing_is_lost(name, tmp_path, monkeypatch):
    text = "".join(f"line {i}: a hidden state, ‖h‖ = 1\n" for i in range(200)).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    monkeypatch.setattr(prepare_data, "CHUNK", 1000)                        # several pieces
    train_text, val_text, meta = prepared(monkeypatch, tmp_path / name, tmp_path / "out")
    assert train_text + val_text == text and 0.04 < len(val_text) / len(text) < 0.06
    assert meta["tokenizer"] == "byte" and meta["vocab_size"] == 256
    for split, part in (("train", train_text), ("val", val_text)):
        digest = hashlib.sha256((tmp_path / f"out/{split}.bin").read_bytes()).hexdigest()
        assert meta[split] == dict(tokens=len(part), bytes=len(part), sha256=digest)


def test_a_text_too_long_for_one_file_goes_to_several(data, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_bytes(bytes(read_tokens(data / "train.bin").astype(np.uint8)) * 3)
    monkeypatch.setattr(prepare_data, "CHUNK", 500)
    one_text = prepared(monkeypatch, tmp_path / "text.txt", tmp_path / "one")[0]
    monkeypatch.setattr(prepare_data, "FILE_TOKENS", 4000)
    prepare_data.prepare(tmp_path, [Path("text.txt")], tmp_path / "several", progress=False)
    stream, _, meta = prepare_data.read_folder(tmp_path / "several")
    assert bytes(stream[0:len(stream)].astype(np.uint8)) == one_text and meta["train"]["bytes"] == len(one_text)
    assert len(meta["train"]["shards"]) >= 5 and max(meta["train"]["shards"].values()) <= 4000 and "shards" not in meta["val"]


def test_a_folders_files_go_whole_to_one_split(tmp_path, monkeypatch):
    texts = [f"[text {i}: {'norm ' * 9}]".encode() for i in range(240)]
    for i, text in enumerate(texts):
        path = tmp_path / "in" / f"{i % 3}" / (f"{i}.txt.gz" if i % 2 else f"{i}.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text) if i % 2 else text)
    train_text, val_text, _ = prepared(monkeypatch, tmp_path / "in", tmp_path / "out")
    assert [(text in train_text) + (text in val_text) for text in texts] == [1] * 240
    assert len(train_text + val_text) == sum(map(len, texts)) and len(val_text) > 0
    for wrong in ("none.txt", "out"):
        with pytest.raises(SystemExit, match="must be a .txt or .txt.gz file, or a folder that holds some"):
            prepared(monkeypatch, tmp_path / wrong, tmp_path / "no")


def test_default_data_is_made_when_missing_and_always_the_same(data, tmp_path, monkeypatch):
    """Once by train.py, once in a process with other string hashes."""
    default = Path(train.Config.data)
    monkeypatch.chdir(tmp_path)
    assert run(*options(default, "out", steps=1)) == 0
    again = process(HERE / "prepare_data.py", f"--out={tmp_path / 'again'}", PYTHONHASHSEED="7")
    assert again.returncode == 0 and (default / "meta.json").read_text() == (tmp_path / "again/meta.json").read_text()
    root, files = prepare_data.stdlib_files()
    assert files == sorted(files) and not any({"test", "site-packages"} & set(file.parts) for file in files)
    assert {length for _, length in prepare_data.documents(root, files, None)} == {0, sys.maxsize}      # each file whole
    assert 0.02 < len(read_tokens(default / "val.bin")) / len(read_tokens(default / "train.bin")) < 0.1
    (default / "val.bin").write_bytes((default / "train.bin").read_bytes())         # a good file, but not the one of meta.json
    assert "val.bin has" in run(*options(default, "out2"))
    (default / "val.bin").write_bytes(b"<html>")
    assert "val.bin is not a token file" in run(*options(default, "out2"))


def sharded(folder, out, cuts):
    """The data of `folder` as shards, cut at the tokens `cuts` of each split."""
    out.mkdir()
    meta = json.loads((folder / "meta.json").read_text())
    for split in ("train", "val"):
        meta[split]["shards"] = {}
        for i, part in enumerate(np.split(read_tokens(folder / f"{split}.bin"), cuts)):
            write_tokens(out / f"{split}_{i}.bin", part)
            meta[split]["shards"][f"{split}_{i}.bin"] = len(part)
    (out / "meta.json").write_text(json.dumps(meta))
    return out


def write_tokens(path, tokens):
    writer = TokenWriter(path, 256)
    writer.write(tokens)
    writer.close()


def test_shards_are_one_stream_wherever_they_are_cut(data, tmp_path):
    """Among the cuts: two within one sequence, an empty shard, one token alone."""
    folder = sharded(data, tmp_path / "shards", [3, 8, 8, 9, 200, 301])
    for whole, stream in zip(prepare_data.read_folder(data), prepare_data.read_folder(folder)[:2]):
        assert len(stream) == len(whole)
        for start, stop in itertools.combinations((0, 1, 3, 8, 9, 10, 200, 250, 301, len(whole)), 2):
            assert np.array_equal(stream[start:stop], whole.arrays[0][start:stop])
    assert run(*options(data, tmp_path / "a")) == 0 and run(*options(folder, tmp_path / "b")) == 0
    assert log(tmp_path / "a") == log(tmp_path / "b")


@pytest.mark.parametrize("damage, words", (
    (lambda raw: raw[:-1], "was cut"), (lambda raw: raw + raw[-2:], "was cut"), (lambda raw: b"\1" + raw[1:], "not a token file"),
    (lambda raw: raw[:1300] + b"\0\1" + raw[1302:], "has the token 256"), (lambda raw: None, "is missing"),
    (lambda raw: raw[:8] + bytes(4) + raw[12:1024], "has 0 tokens, but")))
def test_damaged_shard_is_named_and_refused_before_the_first_step(damage, words, data, tmp_path):
    """Also when the folder was in order at an earlier start."""
    folder = sharded(data, tmp_path / "shards", [200])
    assert run(*options(folder, tmp_path / "run")) == 0
    for path in (folder / "train_1.bin", folder / "val_0.bin"):
        raw = path.read_bytes()
        damaged = damage(raw)
        path.unlink() if damaged is None else path.write_bytes(damaged)
        sentence = run(*options(folder, tmp_path / "bad"))
        assert str(path) in sentence and words in sentence and "\n" not in sentence and not (tmp_path / "bad").exists()
        path.write_bytes(raw)


def test_tokens_are_looked_through_once_for_each_time_a_file_was_changed(tmp_path):
    path = tmp_path / "tokens.bin"
    write_tokens(path, [1, 2, 3])
    prepare_data.check_tokens(path, 4)
    checked = path.stat()
    write_tokens(path, [1, 2, 9])
    os.utime(path, ns=(0, checked.st_mtime_ns))
    prepare_data.check_tokens(path, 4)                                      # nothing tells that it is another
    for change in (lambda: os.utime(path), lambda: (tmp_path / "verified.json").write_text("{"), lambda: None):
        change()
        with pytest.raises(ValueError, match="has the token 9, but its vocabulary ends at 3"):
            prepare_data.check_tokens(path, 4)


def test_bad_data_on_one_rank_makes_all_leave_with_the_sentence(data, tmp_path):
    """Two processes, as on two nodes with a folder each."""
    folder = sharded(data, tmp_path / "shards", [200])
    write_tokens(folder / "val_1.bin", np.full(len(read_tokens(folder / "val_1.bin")), 256))
    with socket.create_server(("127.0.0.1", 0)) as free:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [subprocess.Popen([sys.executable, HERE / "train.py", *options(source, tmp_path / "run")], env={**env, "RANK": rank},
                              cwd=HERE, text=True, stderr=subprocess.PIPE) for rank, source in (("0", data), ("1", folder))]
    try:
        said = [process.communicate(timeout=60)[1] for process in ranks]
    finally:
        [process.kill() for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1] and not (tmp_path / "run").exists()
    assert "val_1.bin has the token 256" in said[0] and "(rank 1)" in said[0] and said[0].count("\n") == 1
    assert said[1] == said[0]       # on each node, since its log may be the only one that is read


def test_bits_per_byte_of_text_whose_bytes_nobody_counted_are_nan(data, tmp_path, capsys):
    folder = sharded(data, tmp_path / "shards", [])
    meta = json.loads((folder / "meta.json").read_text())
    meta["val"]["bytes"] = None
    (folder / "meta.json").write_text(json.dumps(meta))
    for source, name in ((data, "known"), (folder, "unknown")):
        assert run(*options(source, tmp_path / name, results=tmp_path / "all.csv")) == 0
    known, unknown = train.read_csv(tmp_path / "all.csv")
    assert unknown["bits_per_byte"] == "nan" and "bits_per_byte=nan" in capsys.readouterr().out
    assert float(known["bits_per_byte"]) == pytest.approx(float(unknown["val_loss"]) / math.log(2), abs=1e-4)


# ---------------------------------------------------------------- prepare_data.py: text

@pytest.fixture
def tiny_encoding(monkeypatch):
    """A real encoding of tiktoken that needs no network; "gpt2" stands for it."""
    ranks = {bytes([i]): i for i in range(256)} | {b"no": 256, b"rm": 257, b"norm": 258, "ä".encode(): 259}
    encoding = tiktoken.Encoding("tiny", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 260})
    monkeypatch.setattr(prepare_data, "get_encoding", lambda name: encoding)
    return encoding


def test_tokens_of_many_pieces_are_those_of_the_whole_text(tiny_encoding, tmp_path, monkeypatch):
    texts = ["".join(f"norm {i}-{j} ä\n" for j in range(300)) for i in range(3)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    monkeypatch.setattr(prepare_data, "CHUNK", 100)
    meta = prepare_data.prepare(*prepare_data.text_files(tmp_path), tmp_path / "out", tokenizer="gpt2", progress=False)
    splits = []
    for split in ("train", "val"):
        tokens = read_tokens(tmp_path / "out" / f"{split}.bin")
        ends = np.flatnonzero(tokens == 260)
        assert len(ends) == 3 and ends[-1] == len(tokens) - 1
        splits.append([part[:-1] for part in np.split(tokens, ends + 1)[:-1]])
        decoded = b"".join(tiny_encoding.decode_bytes(part) for part in splits[-1])
        assert meta[split]["bytes"] == len(decoded) == prepare_data.count_bytes(tokens, tiny_encoding)
    for text, train_part, val_part in zip(texts, *splits):
        cut = len(tiny_encoding.decode(train_part))
        assert train_part.tolist() == tiny_encoding.encode_ordinary(text[:cut]) and 0.94 < cut / len(text) < 0.96
        assert val_part.tolist() == tiny_encoding.encode_ordinary(text[cut:])


def test_text_is_read_a_few_pieces_ahead_and_a_long_line_is_cut(tmp_path, monkeypatch):
    read = []

    def pieces():
        for i in range(500):
            read.append(i)
            yield "train", str(i)
    ahead = []
    for i, (_, tokens, count) in enumerate(prepare_data.tokenize(pieces(), prepare_data.get_tokenizer("byte")[0], None)):
        assert bytes(tokens.astype(np.uint8)).decode() == str(i) and count == len(str(i))
        ahead.append(len(read) - i)
    assert max(ahead) <= 2 * os.cpu_count() + 1
    monkeypatch.setattr(prepare_data, "CHUNK", 100)
    (tmp_path / "line.txt").write_text("ν" * 1050 + "\n" + "μ" * 30)
    texts = list(prepare_data.text_chunks(tmp_path / "line.txt", prepare_data.bytes_bar(0, "", disable=True)))
    assert "".join(texts) == "ν" * 1050 + "\n" + "μ" * 30 and max(map(len, texts)) <= 200


def test_killed_tokenization_leaves_nothing_that_looks_finished(data, tmp_path):
    """Killed between its two token files, in a new folder and in one that holds other data."""
    shutil.copytree(data, tmp_path / "old")
    (tmp_path / "new.txt").write_text("another text, of another length\n" * 100)
    code = ("import os, sys, prepare_data; close = prepare_data.TokenWriter.close\n"
            "prepare_data.TokenWriter.close = lambda self: (close(self), os.kill(os.getpid(), 9))\nprepare_data.main()")
    for out in (tmp_path / "new", tmp_path / "old"):
        assert process("-c", code, tmp_path / "new.txt", f"--out={out}").returncode == -9 and (out / "train.bin").exists()
        with pytest.raises(ValueError, match="prepare_data.py|but .*meta.json says"):
            prepare_data.read_folder(out)


# ---------------------------------------------------------------- prepare_data.py: downloads, from a server on this machine

class Server(http.server.BaseHTTPRequestHandler):
    """Serves server.files. The faults in server.faults are those of the next answers; server.asked has (file, first byte)."""
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.server.asked.append((self.path[1:], "HEAD"))
        self.send_response(200)
        self.end_headers()

    def do_GET(self):
        name, first = self.path[1:], int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        self.server.asked.append((name, first))
        fault, body = self.server.faults.pop(0) if self.server.faults else "", self.server.files.get(name)
        if fault == "silent":
            return time.sleep(5)
        if fault == "503" or body is None or first >= len(body):
            self.send_response(503 if fault else 404 if body is None else 416)
            return self.end_headers()
        body = dict(page=b"<html>", short=body[:-2], long=body + b"\0\0", foreign=body[:-2] + b"\xff\xff").get(fault, body)
        ranged = fault not in ("no range", "page")
        body = body[first:] if ranged else body
        self.send_response(206 if ranged else 200)
        self.send_header("Content-Length", len(body))
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if fault in ("cut", "stall") else body)
        if fault == "stall":
            time.sleep(5)


@pytest.fixture
def server(monkeypatch):
    """A server with four shards of 100,000 tokens and one for validation; time-outs and pauses are short."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.daemon_threads, server.faults, server.asked, server.files = True, [], [], {}
        server.url = f"http://127.0.0.1:{server.server_port}/"
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, 100_000
        for i, name in enumerate(["edu_fineweb_val_000000.bin"] + [f"edu_fineweb_train_{i:06d}.bin" for i in range(1, 5)]):
            tokens = np.random.default_rng(i).integers(0, 257, 100_000).astype("<u2")
            server.files[name] = header.tobytes() + tokens.tobytes()
        for name, constant in dict(FINEWEB_EDU=server.url, SHAKESPEARE=server.url, SHARD_TOKENS=100_000, SHARDS=4, PATIENCE=0.3,
                                   BACKOFF=0.01).items():
            monkeypatch.setattr(prepare_data, name, constant)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fineweb(monkeypatch, out, tokens=1e5):
    """`python prepare_data.py fineweb_edu` in this process. Returns None, or the sentence with which it refuses."""
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "fineweb_edu", f"--out={out}", f"--tokens={tokens}"])
    try:
        prepare_data.main()
    except SystemExit as end:
        return end.code


def whole(server, out):
    """Whether out holds exactly shards that are those of the server, and the two .json files."""
    files = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".json"}
    return files and files == {name: server.files[name] for name in files}


@pytest.mark.parametrize("faults, resumed", ((["503", "503"], False), (["silent"], False), (["cut"], True), (["stall"], True),
    (["cut", "stall", "cut"], True), (["cut", "no range"], True), (["page"], False), (["short"], False), (["long"], False),
    (["foreign"], False), (["cut", "long"], True), (["cut", "page"], True)))
def test_download_gets_over_what_servers_do(faults, resumed, server, tiny_encoding, tmp_path, monkeypatch):
    server.faults, begun = [*faults], time.time()
    assert fineweb(monkeypatch, tmp_path) is None and whole(server, tmp_path) and time.time() - begun < 4
    firsts = [first for name, first in server.asked if "val" in name and first != "HEAD"]
    assert (0 < firsts[1] <= 100_512) == resumed and len(firsts) == 1 + len([fault for fault in faults if fault != "no range"])


@pytest.mark.parametrize("fault, words", (("503", "says 503"), ("silent", "timed out"), ("page", "not a token file"),
                                          ("short", "was cut"), ("long", "was cut"), ("foreign", "has the token 65,535")))
def test_file_that_cannot_be_had_is_refused_and_has_no_name(fault, words, server, tiny_encoding, tmp_path, monkeypatch):
    server.faults += [fault] * prepare_data.ATTEMPTS
    sentence = fineweb(monkeypatch, tmp_path)
    assert words in sentence and "edu_fineweb_val_000000.bin" in sentence and "\n" not in sentence
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".part"]
    assert fineweb(monkeypatch, tmp_path) is None and whole(server, tmp_path)


def test_only_what_is_asked_for_and_not_there_is_downloaded(server, tiny_encoding, tmp_path, monkeypatch):
    assert fineweb(monkeypatch, tmp_path, 150_001) is None and whole(server, tmp_path)
    val, one, two, three, _ = server.files
    assert {name for name, _ in server.asked} == {val, one, two}
    train_tokens, val_tokens, meta = prepare_data.read_folder(tmp_path)
    assert bytes(train_tokens[0:200_000]) == server.files[one][1024:] + server.files[two][1024:]
    assert len(train_tokens) == 200_000 == meta["train"]["tokens"] and len(val_tokens) == 100_000
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.bin")}
    assert set(json.loads((tmp_path / "verified.json").read_text())) == {val, one, two}     # train.py need not read them again
    server.asked.clear()
    assert fineweb(monkeypatch, tmp_path, 2e5) is None and not server.asked
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.bin")}
    assert fineweb(monkeypatch, tmp_path, 3e5) is None and {name for name, _ in server.asked} == {three}
    server.asked.clear()
    (tmp_path / one).write_bytes(server.files[one][:-2] + b"\xff\xff")      # what train.py refuses is downloaded again
    assert fineweb(monkeypatch, tmp_path, 3e5) is None and {name for name, _ in server.asked} == {one} and whole(server, tmp_path)


def test_bytes_are_counted_once_there_is_a_vocabulary(server, tiny_encoding, tmp_path, monkeypatch, capsys):
    def no_network(name):
        raise ValueError("tiktoken could not load the vocabulary")
    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "get_encoding", no_network)
        assert fineweb(patch, tmp_path) is None and "bits per byte will be unknown" in capsys.readouterr().out
    assert prepare_data.read_folder(tmp_path)[2]["val"]["bytes"] is None
    server.asked.clear()
    assert fineweb(monkeypatch, tmp_path) is None and not server.asked
    _, val_tokens, meta = prepare_data.read_folder(tmp_path)
    assert meta["val"]["bytes"] == len(tiny_encoding.decode_bytes(val_tokens[0:100_000]))


def test_cut_that_only_the_length_tells_of_costs_nothing(server, tiny_encoding, tmp_path, monkeypatch):
    """urllib3 1 takes the end of a connection for the end of the file."""
    def get(url, get=prepare_data.requests.get, **options):
        answer = get(url, **options)
        answer.raw.enforce_content_length = False
        return answer
    monkeypatch.setattr(prepare_data.requests, "get", get)
    server.faults += ["cut"]
    assert fineweb(monkeypatch, tmp_path) is None and whole(server, tmp_path)
    assert [first for name, first in server.asked if "val" in name and first != "HEAD"] == [0, 100_512]


def test_killed_download_goes_on_where_it_was(server, tiny_encoding, tmp_path, monkeypatch):
    server.faults += ["stall"]
    code = f"import prepare_data as p; p.FINEWEB_EDU = '{server.url}'; p.SHARD_TOKENS = 100_000; p.main()"
    killed = subprocess.Popen([sys.executable, "-c", code, "fineweb_edu", "--tokens=1e5", f"--out={tmp_path}"], cwd=HERE)
    part, deadline = tmp_path / "edu_fineweb_val_000000.bin.part", time.time() + 20
    while not (part.exists() and part.stat().st_size) and time.time() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    size = part.stat().st_size
    assert 0 < size < 100_512 and not part.with_suffix("").exists()
    assert fineweb(monkeypatch, tmp_path) is None and whole(server, tmp_path)
    assert [first for name, first in server.asked if name == part.stem and first != "HEAD"] == [0, size]


def test_a_download_that_was_killed_before_its_rename_is_not_repeated(server, tiny_encoding, tmp_path, monkeypatch):
    name = "edu_fineweb_val_000000.bin"
    (tmp_path / f"{name}.part").write_bytes(server.files[name])
    assert fineweb(monkeypatch, tmp_path) is None and whole(server, tmp_path)
    assert [first for asked, first in server.asked if asked == name and first != "HEAD"] == [len(server.files[name])]


def test_download_without_room_or_beside_another_or_of_impossible_size_is_refused(server, tmp_path, monkeypatch):
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    assert "another process is downloading" in fineweb(monkeypatch, tmp_path)
    os.close(folder)
    monkeypatch.setattr(prepare_data.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 6, 0, 402_047))
    assert "402,048 bytes are to be downloaded" in fineweb(monkeypatch, tmp_path) and not server.asked
    for tokens in (0, 400_001, "nan"):
        assert "--tokens must be between 1 and 400,000" in fineweb(monkeypatch, tmp_path, tokens)
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "shakespeare", "--tokens=5"])
    with pytest.raises(SystemExit, match="--tokens goes with fineweb_edu alone"):
        prepare_data.main()
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "fineweb_edu", "--tokenizer=byte"])
    with pytest.raises(SystemExit, match="tokens of gpt2, not of byte"):
        prepare_data.main()


def test_shakespeare_is_tokenized_here_if_it_is_what_it_should_be(server, tmp_path, monkeypatch):
    text = "".join(f"First Citizen {i}:\nBefore we proceed any further, hear me speak.\n\n" for i in range(50)).encode()
    server.files["input.txt"] = text.replace(b"speak", b"smile")
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    with pytest.raises(SystemExit, match="is not the text it should be"):
        prepared(monkeypatch, "shakespeare", tmp_path)
    server.files["input.txt"] = text
    for _ in range(2):
        train_text, val_text, meta = prepared(monkeypatch, "shakespeare", tmp_path)
        assert train_text + val_text == text and meta["tokenizer"] == "byte"
    assert server.asked[-1] == ("input.txt", 0)


@pytest.mark.parametrize("listening", (False, True))
@pytest.mark.parametrize("source, words", ((["fineweb_edu"], "use `python prepare"), (["shakespeare"], "use `python prepare"),
                                           (["text.txt", "--tokenizer=gpt2"], "set TIKTOKEN_CACHE_DIR")))
def test_no_network_is_said_within_ten_seconds(source, words, listening, tmp_path):
    """Of the true addresses. The network is a proxy that nobody listens at, or that lets itself be called and says nothing."""
    (tmp_path / "text.txt").write_text("text\n" * 100)
    code = (f"import os, prepare_data; os.chdir({str(tmp_path)!r}); assert prepare_data.PATIENCE <= 8\n"
            "prepare_data.PATIENCE = 0.5; prepare_data.main()")
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        url = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        if not listening:
            proxy.close()
        begun = time.time()
        done = process("-c", code, *source, "--out=out", HTTPS_PROXY=url, https_proxy=url, NO_PROXY="", no_proxy="",
                       TIKTOKEN_CACHE_DIR=str(tmp_path))
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and words in done.stderr
    assert time.time() - begun < 2.5 and not list(tmp_path.glob("out/*"))


# ---------------------------------------------------------------- the verdict, on synthetic sweeps of known drift and noise

GRID = tuple(np.arange(-8.5, -3.9, 0.5))
CONFIG = dict(parametrization="ngpt", width=48, depth=4, head_dim=24, base_width=48, base_depth=4, base_steps=400,
              embedding_lr_mult=1.0, unembedding_lr_mult=0.5, warmup_steps=0, weight_decay=0.0, learning_rate=0.02, steps=400,
              batch_size=16, seed=0,
              device="cpu", step=400, val_loss=2.0, parameters=1000, status="finished")


def sweep(drifts, sizes=(48, 96, 192), seeds=range(3), grid=GRID, axis="width", best=-6.0, sharpness=0.03, noise=0.0,
          jitter=0.0, shared_jitter=0.0, draw=0):
    """
    Rows of a sweep: parabolas whose optimum moves by drifts[column] octaves a doubling of the size, with noise of each run,
    of each curve's optimum (jitter) and of a seed's optima at all sizes (shared_jitter). Only the first column has the base.
    """
    rng, rows = np.random.default_rng(draw), []
    seed_shift = {seed: shared_jitter * rng.standard_normal() for seed in seeds}
    for name, drift in drifts.items():
        for i, size in enumerate(sizes):
            for seed in seeds:
                optimum = best + drift * math.log2(size / sizes[0]) + seed_shift[seed] + jitter * rng.standard_normal()
                level = 1.9 - 0.1 * i + 0.03 * rng.standard_normal()
                for x in grid if i or name == next(iter(drifts)) else ():
                    loss = level + sharpness * (x - optimum) ** 2 + noise * rng.standard_normal()
                    rows.append({**CONFIG, "parametrization": name, axis: size, "seed": seed,
                                 "learning_rate": 2.0 ** x, "val_loss": loss})
    return rows


def judge(rows, **options):
    return parametrize_py.judge([parametrize_py.read_run(row, parametrize_py.NUMBERS, "test") for row in rows], **options)


def write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def command(*args, stdin="", env=None):
    """`python parametrize.py …`: its output and exit code. In this process, which has imported all there is, unless env is given."""
    argv = ["parametrize.py", *map(str, args)]
    if env:
        return subprocess.run([sys.executable, *argv], input=stdin, capture_output=True, text=True, cwd=HERE, env={**os.environ, **env})
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", argv)
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            parametrize_py.main()
        except SystemExit as end:       # with a sentence, Python prints it and exits with 1
            code = end.code
            if isinstance(code, str):
                code = print(code, file=err) or 1
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


def test_known_drift_without_noise():
    axis, verdicts = judge(sweep(dict(ngpt=-0.5, mup=0.2, nugpt=0.0)))
    assert axis == "width" and list(verdicts) == ["ngpt", "mup", "nugpt"]
    for name, drift in dict(ngpt=-0.5, mup=0.2, nugpt=0.0).items():
        assert verdicts[name]["drift"][:2] == pytest.approx((drift, 0), abs=1e-6)
        best = [one["eta"] for one in verdicts[name]["curves"].values()]
        assert best == pytest.approx([-6 + drift * i for i in range(3)], abs=1e-6)
    assert verdicts["nugpt"]["difference"][:2] == pytest.approx((0.5, 0), abs=1e-6)
    assert verdicts["ngpt"]["difference"] is None
    # the smallest size's η is 2 · 0.5 octaves off at the largest: 0.03 · 1²
    assert verdicts["ngpt"]["regret"]["regret"] == pytest.approx(0.03, abs=1e-6)
    assert verdicts["nugpt"]["regret"]["regret"] == pytest.approx(0, abs=1e-6)
    assert {name: verdict["same"] for name, verdict in verdicts.items()} == dict(ngpt="No", mup="No", nugpt="Yes")


def test_uneven_grids():
    _, verdicts = judge(sweep(dict(ngpt=-0.5), grid=(-8, -7.25, -7, -6.5, -6.25, -6, -5, -4.5, -4)))
    assert verdicts["ngpt"]["drift"][:2] == pytest.approx((-0.5, 0), abs=1e-6)


def test_exponents_implied():
    _, verdicts = judge(sweep(dict(ngpt=-0.5, nugpt=-0.1)))
    powers = dict(embedding=-0.5, hidden=-0.75, unembedding=-0.75, rescalers=0)
    assert verdicts["nugpt"]["powers"] == pytest.approx(powers, abs=1e-9)
    text = parametrize_py.report("width", verdicts)
    assert "-0.75 → -0.85" in text and "+0.00 → -0.50" in text


def test_interval_covers_at_its_nominal_rate():
    """Both kinds of noise: of runs, and of whole curves, which would fool an interval that goes by the single runs."""
    hits, differences, halves, slopes = 0, 0, [], []
    for draw in range(1000, 1500):
        _, verdicts = judge(sweep(dict(ngpt=-0.5, nugpt=-0.1), noise=0.003, jitter=0.15, draw=draw, grid=GRID[1:]))
        slope, half, _ = verdicts["nugpt"]["drift"]
        hits += abs(slope + 0.1) <= half
        difference, its_half, _ = verdicts["nugpt"]["difference"]
        differences += abs(difference - 0.4) <= its_half
        halves.append(half)
        slopes.append(slope)
    assert 0.915 <= hits / 500 <= 0.98          # with the normal's 1.96 instead of t's 2.57 it would be 0.89
    assert 0.93 <= differences / 500 <= 0.995           # the base runs, common to both, make it a little long
    assert np.mean(slopes) == pytest.approx(-0.1, abs=3 * np.std(slopes) / 500 ** 0.5)
    assert np.median(halves) < 3.2 * np.std(slopes)     # t with 5 degrees of freedom is 2.6


def test_interval_of_one_seed_covers_too_but_is_long():
    """It goes by the scatter of the optima about a line, however smooth the curves."""
    hits, halves = 0, []
    for draw in range(300):
        slope, half, seeds = judge(sweep(dict(ngpt=-0.5), seeds=[0], jitter=0.2, draw=draw))[1]["ngpt"]["drift"]
        hits += abs(slope + 0.5) <= half
        halves.append(half)
        assert seeds == 1
    assert 0.915 <= hits / 300 <= 0.985 and np.median(halves) > 0.5
    drift = judge(sweep(dict(ngpt=-0.5), seeds=[0], sizes=(48, 96), jitter=0.2))[1]["ngpt"]["drift"]
    assert drift[1] == math.inf         # two optima are always on a line


def test_a_shift_common_to_all_sizes_of_a_seed_costs_nothing():
    """Seeds are paired: that one seed prefers a larger η at every size says nothing about the drift."""
    _, plain = judge(sweep(dict(ngpt=-0.5), noise=0.002))
    _, shifted = judge(sweep(dict(ngpt=-0.5), noise=0.002, shared_jitter=0.6))
    assert np.ptp([optimum for (size, _), optimum in shifted["ngpt"]["optima"].items() if size == 48]) > 0.3
    assert abs(shifted["ngpt"]["drift"][0] + 0.5) < 0.1 and shifted["ngpt"]["drift"][1] < 2 * plain["ngpt"]["drift"][1]


def test_difference_is_paired():
    """Noise that a column shares with the control at the same size and seed cancels."""
    rows = sweep(dict(ngpt=-0.3), jitter=0.3)
    copy = [{**row, "parametrization": "nugpt"} for row in rows if row["width"] > 48]
    verdict = judge(rows + copy)[1]["nugpt"]
    assert verdict["drift"][1] > 0.05 and verdict["difference"][:2] == pytest.approx((0, 0), abs=1e-9)


@pytest.mark.parametrize("freedom, quantile", [(1, 12.706), (2, 4.303), (5, 2.571), (10, 2.228), (30, 2.042)])
def test_student(freedom, quantile):
    assert parametrize_py.student(freedom) == pytest.approx(quantile, abs=0.001)


def test_base_runs_count_for_every_column():
    _, verdicts = judge(sweep(dict(ngpt=-0.5, mup=0.2, nugpt=0.0), noise=0.01))
    for name in ("mup", "nugpt"):
        assert (verdicts[name]["curves"][48]["loss"] == verdicts["ngpt"]["curves"][48]["loss"]).all()
        assert not verdicts[name]["curves"][48]["own"] and verdicts[name]["curves"][96]["own"]
    # … but not where they are other runs: with the table's own unembedding rate, ngpt's is twice nugpt's
    rows = [{**row, "unembedding_lr_mult": -1} for row in sweep(dict(ngpt=-0.5, nugpt=0.0))]
    assert list(judge(rows)[1]["nugpt"]["curves"]) == [96, 192]


@pytest.mark.parametrize("run_as, other, shift", [("nugpt", "ngpt", -1 / 3), ("ngpt", "nugpt", 1 / 3)])
def test_steps_without_m_t_is_with_shifted(run_as, other, shift):
    axis, verdicts = judge(sweep({run_as: -0.05}, sizes=(400, 800, 1600), axis="steps"))
    assert axis == "steps" and verdicts[run_as]["drift"][0] == pytest.approx(-0.05, abs=1e-3)
    assert verdicts[other]["drift"][0] == pytest.approx(-0.05 + shift, abs=1e-3)
    for verdict in verdicts.values():       # whatever the column, the power that the measurement implies is the same
        power = dict(ngpt=0, nugpt=-1 / 3)[run_as] - 0.05
        assert verdict["powers"]["hidden"] + verdict["drift"][0] == pytest.approx(power, abs=1e-3)


def length_sweep(losses, seeds=(0,), grid=(-7, -6.5, -6, -5.5, -5)):
    """Rows over steps: {column: {steps: best loss}}, all with their best η at 2^-6; each seed has a level of its own."""
    return [{**CONFIG, "parametrization": name, "width": 96, "steps": steps, "seed": seed, "learning_rate": 2.0 ** x,
             "val_loss": best - 0.1 * seed + 0.03 * (x + 6) ** 2}
            for name, lengths in losses.items() for steps, best in lengths.items() for seed in seeds for x in grid]


def test_steps_that_the_control_needs_for_the_same_loss():
    plain = {400: 2.0, 800: 1.9, 1600: 1.8}
    rows = length_sweep(dict(gpt_sp=plain)) + length_sweep(dict(nugpt={200: 2.1, 400: 1.95, 800: 1.9, 1600: 1.75}), seeds=(0, 1))
    _, verdicts = judge(rows, control="gpt_sp")
    assert [(*row[:2], row[3]) for row in parametrize_py.steps_needed(verdicts, "gpt_sp")] == [
        ("nugpt", "200", "< 2.00 × the steps"), ("nugpt", "400", "1.41 × the steps"),       # halfway between 400 and 800, in logs
        ("nugpt", "800", "1.00 × the steps"), ("nugpt", "1,600", "> 1.00 × the steps")]     # and seed 1, which gpt_sp lacks, does not count
    assert "for it gpt_sp needs" in parametrize_py.report("steps", verdicts, "gpt_sp")
    # a control that got worse and better again: what counts is when it had that loss first
    rows = length_sweep(dict(gpt_sp={400: 2.0, 800: 1.9, 1600: 1.95, 3200: 1.8}, nugpt={400: 2.01, 1600: 1.92}))
    needed = [row[3] for row in parametrize_py.steps_needed(judge(rows, control="gpt_sp")[1], "gpt_sp")]
    assert needed == ["< 1.00 × the steps", f"{400 * 2 ** 0.8 / 1600:.2f} × the steps"]
    # one whose best η lies at the edge of its grid is not at its best
    rows = length_sweep(dict(gpt_sp=plain), grid=(-6, -5.5, -5)) + length_sweep(dict(nugpt=plain))
    assert not list(parametrize_py.steps_needed(judge(rows, control="gpt_sp")[1], "gpt_sp"))
    # ngpt's runs are nugpt's, η shifted: nothing to compare; and other axes have no such table
    assert "ngpt needs" not in parametrize_py.report("steps", judge(length_sweep(dict(nugpt=plain)))[1])
    assert "ngpt needs" not in parametrize_py.report("width", judge(sweep(dict(ngpt=-0.5, nugpt=0.0)))[1])


def test_columns_may_have_recipes_of_their_own():
    """gpt_sp and gpt_mup are one model at the base, but not one run if their warm-up differs."""
    rows = sweep(dict(gpt_sp=-0.5, gpt_mup=0.0), seeds=[0])
    for row in rows:
        row.update(weight_decay=0.1, warmup_steps=40 if row["parametrization"] == "gpt_sp" else 100)
    rows += [{**row, "parametrization": "gpt_mup", "warmup_steps": 100, "val_loss": row["val_loss"] + 1} for row in rows
             if row["width"] == 48]
    for order in (rows, rows[::-1]):
        _, verdicts = judge(order, control="gpt_sp")
        bottom = {name: min(verdicts[name]["curves"][48]["mean"]) for name in ("gpt_sp", "gpt_mup")}
        assert bottom["gpt_mup"] == pytest.approx(bottom["gpt_sp"] + 1)
    one, other = (parametrize_py.read_run({**CONFIG, "parametrization": "gpt_sp", "warmup_steps": w}, parametrize_py.RUN, "") for w in (0, 40))
    assert parametrize_py.identity(one) != parametrize_py.identity(other)
    assert parametrize_py.identity(one) == parametrize_py.identity({**one, "parametrization": "gpt_mup"})

def test_a_narrow_grid_is_reported_with_what_to_add():
    rows = sweep(dict(ngpt=-0.75), grid=(-6.5, -6, -5.5, -5))
    one = judge(rows)[1]["ngpt"]["curves"]
    assert sorted({x for x, _ in one[48]["add"]}) == [-7] and one[48]["half"] == 1       # best -6: one more on the left
    assert sorted({x for x, _ in one[192]["add"]}) == [-7.5, -7] and one[192]["half"] == 0
    assert len(one[192]["add"]) == 6                                                     # for every seed
    verdict = judge(rows)[1]["ngpt"]
    assert verdict["same"] == "?"
    assert not any(size == 192 for size, _ in verdict["optima"])     # never extrapolated
    assert "add 2^-7.5 2^-7" in parametrize_py.report("width", {"ngpt": verdict})
    right = judge(sweep(dict(ngpt=0), best=-5, grid=(-6.5, -6, -5.5, -5)))[1]["ngpt"]
    assert sorted({x for x, _ in right["curves"][96]["add"]}) == [-4.5, -4]
    assert "regret" not in right["regret"]      # the smallest size's η* is not known


def test_diverged_runs():
    rows = sweep(dict(ngpt=0.0))
    for row in rows:
        if row["learning_rate"] > 2 ** -5.25:      # the second above the best, and all beyond
            row.update(status="diverged", val_loss="nan")
    one = judge(rows)[1]["ngpt"]["curves"][96]
    assert one["half"] == 1 and one["add"] == [] and one["eta"] == pytest.approx(-6, abs=1e-6)      # window stays symmetric
    for row in rows:
        if row["learning_rate"] > 2 ** -5.75:
            row.update(status="diverged", val_loss="nan")
    verdict = judge(rows)[1]["ngpt"]
    assert verdict["drift"] is None and "diverges near the best" in parametrize_py.report("width", {"ngpt": verdict})
    rows = [row for row in rows if row["learning_rate"] < 2 ** -5.25]      # the grid ends with a divergence: far enough
    assert judge(rows)[1]["ngpt"]["curves"][96]["add"] == []
    for row in rows:
        if row["width"] == 192:
            row.update(status="diverged", val_loss="nan")
    one = judge(rows)[1]["ngpt"]["curves"][192]     # nothing survives: look further left
    assert {x for x, _ in one["add"]} == {-9, -9.5}


def test_regret_where_the_small_size_s_rate_diverges():
    rows = sweep(dict(ngpt=-1.0))
    for row in rows:
        if row["width"] == 192 and row["learning_rate"] > 2 ** -6.25:
            row.update(status="diverged", val_loss="nan")
    verdict = judge(rows)[1]["ngpt"]
    assert verdict["regret"]["regret"] == math.inf and "diverges" in parametrize_py.report("width", {"ngpt": verdict}).split("drift")[0]


def test_one_seed_that_diverges_makes_the_point_diverged():
    rows = sweep(dict(ngpt=0.0))
    for row in rows:
        if row["width"] == 96 and row["seed"] == 1 and row["learning_rate"] == 2 ** -5:
            row["status"] = "diverged"
    one = judge(rows)[1]["ngpt"]["curves"][96]
    assert one["half"] == 1 and np.isinf(one["mean"]).sum() == 1


def test_regret_outside_the_grid_is_a_lower_bound():
    rows = [row for row in sweep(dict(ngpt=-1.0)) if row["width"] < 192 or row["learning_rate"] < 2 ** -6.75]
    verdict = judge(rows)[1]["ngpt"]       # best at -8 and the grid ends at -7, but the smallest size's η is -6
    assert verdict["curves"][192]["regret"] == pytest.approx(0.03, abs=1e-6) and verdict["curves"][192]["bound"]
    assert "> 0.0300" in parametrize_py.report("width", {"ngpt": verdict})


def test_worst_regret_is_a_lower_bound_if_any_is():
    rows = sweep(dict(ngpt=-1.0), sizes=(48, 96, 192, 384), best=-5)
    verdict = judge([row for row in rows if row["width"] < 384 or row["learning_rate"] < 2 ** -6.75])[1]["ngpt"]
    # the optima are -5, -6, -7, -8; the widest's grid ends at -7, and its regret at -5 may be more than 192's 0.12
    assert verdict["curves"][384]["regret"] == pytest.approx(0.03, abs=1e-6)
    assert verdict["regret"] == dict(regret=pytest.approx(0.12, abs=1e-6), bound=True)


def test_a_best_outside_its_window_is_said():
    """A curve that is steep on one side, judged with the curvature of others."""
    rows = sweep(dict(ngpt=0.0), seeds=[0])
    steep = {-7: 1.85, -6.5: 1.81, -6: 1.80, -5.5: 2.3, -5: 2.8}
    rows = [row for row in rows if row["width"] < 192] + [{**CONFIG, "width": 192, "learning_rate": 2.0 ** x, "val_loss": loss}
                                                        for x, loss in steep.items()]
    verdict = judge(rows)[1]["ngpt"]
    one = verdict["curves"][192]
    assert one["outside"] == (not -7 <= one["eta"] <= -5)
    assert verdict["same"] == "?" and "outside its window" in parametrize_py.report("width", {"ngpt": verdict})


def test_an_unfinished_seed_does_not_misplace_the_best():
    """A seed with a lower loss has run only at one η far from the best: that must not become the best."""
    rows = sweep(dict(ngpt=0.0), seeds=[0, 1])
    rows += [{**row, "seed": 2, "val_loss": row["val_loss"] - 0.2}
             for row in rows if row["seed"] == 0 and row["learning_rate"] == 2 ** -7]
    one = judge(rows)[1]["ngpt"]["curves"][96]
    assert one["x"][one["best"]] == -6 and one["seeds"] == [0, 1, 2] and one["complete"] == [0, 1]
    assert one["add"] == [(x, 2) for x in (-6.5, -6, -5.5, -5)]


def test_more_seeds_at_small_sizes():
    rows = [row for row in sweep(dict(ngpt=-0.5), seeds=range(6), noise=0.002) if row["width"] < 192 or row["seed"] < 3]
    verdict = judge(rows)[1]["ngpt"]
    assert len(verdict["optima"]) == 15 and abs(verdict["drift"][0] + 0.5) < verdict["drift"][1] < 0.1


def test_joint_axis_and_bad_axes():
    rows = sweep(dict(ngpt=-0.5))
    for row in rows:
        row.update(depth=row["width"] // 12, parameters=12 * row["width"] ** 2 * row["width"] // 12)
    axis, verdicts = judge(rows)
    assert axis == "parameters" and verdicts["ngpt"]["drift"][0] == pytest.approx(-0.5 / 3, abs=1e-6)
    assert judge(rows, axis="width")[1]["ngpt"]["drift"][0] == pytest.approx(-0.5, abs=1e-6)
    with pytest.raises(ValueError, match="width = 48 differ in depth"):
        judge(rows + [{**rows[0], "depth": 9}], axis="width")


def class_sweep(drifts, grid=(-2, -1, 0, 1, 2), sizes=(48, 192), seeds=range(3)):
    """Rows at one η: {tensor class: drift of its best multiplier, in octaves a doubling of the width}; runs at the center once."""
    center, rows = dict(embedding_lr_mult=1.0, hidden_lr_mult=1.0, unembedding_lr_mult=0.5, rescalers_lr_mult=1.0), {}
    for width in sizes:
        best = {f"{name}_lr_mult": drift * math.log2(width / sizes[0]) for name, drift in drifts.items()}
        for key, seed, x in itertools.product(best, seeds, grid):
            mults = {**center, key: center[key] * 2.0 ** x}
            off = {other: math.log2(mults[other] / center[other]) - best[other] for other in best}
            loss = 2 + 0.1 * seed + 0.03 * sum(distance ** 2 for distance in off.values())
            row = {**CONFIG, "parametrization": "nugpt", "width": width, "seed": seed, "val_loss": loss, **mults}
            rows[width, seed, *mults.values()] = row
    return list(rows.values())


def test_one_tensor_class_at_a_time(tmp_path):
    rows = class_sweep(dict(embedding=0.2, unembedding=-0.25))
    assert len(rows) == 2 * 3 * 9
    _, verdicts = judge(rows)
    assert list(verdicts) == ["embedding", "unembedding"] and verdicts["embedding"]["difference"] is None
    for name, power, drift, center in (("embedding", -0.5, 0.2, 0), ("unembedding", -0.75, -0.25, -1)):
        assert verdicts[name]["drift"][:2] == pytest.approx((drift, 0), abs=1e-6)
        assert verdicts[name]["powers"] == pytest.approx({name: power})
        assert [one["eta"] for one in verdicts[name]["curves"].values()] == pytest.approx([center, center + 2 * drift])
    text = parametrize_py.report("width", verdicts)
    assert "-0.75 → -1.00" in text and "-0.50 → -0.30" in text and "×*" in text and "η*  " not in text
    with pytest.raises(ValueError, match="must be of one column"):
        judge(rows + [{**rows[0], "parametrization": "ngpt"}])
    # what is missing: half of the grid, then, as the best lie near its edges, one more multiplier on either side
    rows = class_sweep(dict(embedding=-0.4, hidden=-0.6), grid=(-2, -1, 0, 1))
    assert "add 2^-3" in command(write(tmp_path / "a.csv", rows)).stdout
    keys = ("parametrization", *parametrize_py.RUN, "batch_size", "head_dim")
    lines = ["".join(f"--{key}={row[key]} " for key in keys).strip() for row in rows]
    half = [row for row in rows if row["hidden_lr_mult"] >= 1]
    assert command(write(tmp_path / "b.csv", half), "--missing", stdin="\n".join(lines)).stdout.splitlines() == [
        line for line, row in zip(lines, rows) if row not in half]
    more = command(tmp_path / "a.csv", "--missing", stdin="\n".join(lines)).stdout.splitlines()
    added = [(run["width"], run["embedding_lr_mult"], run["hidden_lr_mult"], run["seed"]) for run in
             (dict(word[2:].split("=") for word in line.split()) for line in more)]
    assert added == [(*point, seed) for point in (("48", "4.0", "1.0"), ("192", "0.125", "1.0"), ("48", "1.0", "4.0"),
                                                  ("192", "1.0", "0.125")) for seed in "012"]


def test_command_prints_the_verdict_and_draws(tmp_path):
    pytest.importorskip("matplotlib")
    results = write(tmp_path / "a.csv", sweep(dict(ngpt=-0.5, nugpt=0.0), noise=0.002))
    done = command(results, f"--plot={tmp_path}/new/a.png")
    assert done.returncode == 0, done.stderr
    assert "-0.5" in done.stdout and "wide enough" in done.stdout and "Yes" in done.stdout
    assert (tmp_path / "new/a.png").read_bytes()[:4] == b"\x89PNG"


def measurements(tmp_path, names=("nugpt",), power=0.8, noise=0.0):
    """An alignment.csv as of runs whose RMS(W x) / (RMS(W) RMS(x)) is 3 d^power at step 1, 3 d^(power - 0.2) at step 10."""
    rng, rows = np.random.default_rng(0), []
    for name, width, seed, step in itertools.product(names, (48, 96, 192), (0, 1), (0, 1, 10)):
        for layer, map_, d_in in ((0, "W_q", width), (0, "W_oMLP", 2.5 * width), (1, "W_q", width), (2, "E_out", width), (2, "logits", "")):
            exponent = "" if map_ == "logits" else power - 0.2 * (step == 10) + math.log(3, d_in) + noise * rng.standard_normal()
            rows.append(dict(parametrization=name, width=width, depth=2, steps=10, seed=seed, step=step, loss={0: 6, 1: 3, 10: 2}[step],
                             layer=layer, map=map_, d_in=d_in, alpha=exponent, omega=exponent, nu=exponent, rms_dW=width ** -0.75,
                             rms_dx=width ** -0.5, rms_y=1, rms_dy=width ** 0.5))
    return write(tmp_path / "alignment.csv", rows)


def test_slopes_of_alignment_are_free_of_constants_and_means_are_loss_weighted(tmp_path):
    path = measurements(tmp_path)
    runs = parametrize_py.read_alignment(parametrize_py.read_rows(path), path)
    for step, power in ((1, 0.8), (10, 0.6)):
        for tensors in ("hidden", "unembedding"):
            slopes = parametrize_py.slopes(runs, "nugpt", lambda run: parametrize_py.log_ratio(run[step], tensors, "alpha"))
            assert slopes == pytest.approx([power, power], abs=1e-6)
    at = runs["nugpt", 48, 0][1]        # its layer 1 has W_q alone
    assert parametrize_py.log_ratio(at, "hidden", "nu", 1) == pytest.approx([0.8 * math.log(48) + math.log(3), math.log(48)])
    text = command(path).stdout.splitlines()
    # 3 nats were won by step 1, 1 nat from there to step 10: 0.75 · 0.8 + 0.25 · 0.6
    assert "all, loss-weighted" in text[8] and text[8].split()[3:] == ["0.75", "±", "0.00"] * 6
    logs = [math.log(48)] * 2 + [math.log(120)]     # a class's exponent is its mean logarithm over that of d_in
    assert text[1].split()[3] == f"{0.75 + math.log(3) / np.mean(logs):.2f}"


def test_coordinate_check_gives_powers_of_the_width(tmp_path):
    done = command(measurements(tmp_path, ("ngpt", "nugpt")))
    assert [line.split() for line in done.stdout.splitlines()[1:5]] == [
        [name, step, "-0.25", "+0.00", "+0.50"] for name in ("ngpt", "nugpt") for step in ("1", "10")]


def test_alignment_is_drawn_and_bad_files_are_refused(tmp_path):
    pytest.importorskip("matplotlib")
    for names in (("nugpt",), ("ngpt", "nugpt")):
        path = measurements(tmp_path, names, noise=0.02)
        head, *lines = path.read_text().splitlines(True)
        path.write_text("".join((head, *lines[:60], head, *lines[60:])))        # files put one behind the other, each with its head
        done = command(path, f"--plot={tmp_path}/{len(names)}.png")
        assert done.returncode == 0 and (tmp_path / f"{len(names)}.png").read_bytes()[:4] == b"\x89PNG", done.stderr
    for other in (lines, [line.replace(",2,10,0,", ",2,40,7,") for line in lines if ",2,10,0," in line]):    # the same runs; runs of another length
        (tmp_path / "twice.csv").write_text("".join((head, *lines, *other)))
        assert "is there twice, or in another depth or number of steps" in command(tmp_path / "twice.csv").stderr
    (tmp_path / "one.csv").write_text("".join((head, *(line for line in lines if line.startswith("ngpt,48,")))))
    done = command(tmp_path / "one.csv", f"--plot={tmp_path}/one.png")      # a single width has exponents, but no slope
    assert done.returncode == 0 and done.stderr == "" and done.stdout.splitlines()[4].split()[2:] == ["-"] * 6
    (tmp_path / "one.csv").write_text("".join((head, *(line for line in lines if ",48,2,10," in line))))
    assert "needs more than one width of ngpt and nugpt" in command(tmp_path / "one.csv").stderr
    cut = [line for line in path.read_text().splitlines(True) if ",0,6," in line or not line.startswith("ngpt")]    # step 0 alone
    (tmp_path / "cut.csv").write_text("".join(cut))
    assert "must have step 0 and a later one in common, but have only [0]" in command(tmp_path / "cut.csv").stderr
    path.write_text(path.read_text().replace("W_q,48", "W_q,wide"))
    done = command(path)
    assert done.returncode == 1 and "line 2 is not as train.py --alignment_every writes it" in done.stderr


def test_missing_matplotlib_is_said(tmp_path):
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib/__init__.py").write_text("raise ImportError('none')")
    results = write(tmp_path / "a.csv", sweep(dict(ngpt=-0.5)))
    done = command(results, f"--plot={tmp_path}/a.png", env=dict(PYTHONPATH=str(tmp_path)))
    assert done.returncode == 1 and "drift" in done.stdout
    assert done.stderr == "parametrize.py: the picture needs matplotlib: pip install matplotlib\n"


def line(**options):
    run = {key: CONFIG[key] for key in ("parametrization", *parametrize_py.RUN, "batch_size", "head_dim") if key in CONFIG} | options
    return " ".join(f"--{key}={value}" for key, value in run.items()) + "\n"


def test_missing_runs(tmp_path):
    results = tmp_path / "a.csv"
    base = line(learning_rate=2.0 ** -6) + line(learning_rate=2.0 ** -6, parametrization="nugpt")
    wide = line(learning_rate=2.0 ** -6, width=96) + line(learning_rate=2.0 ** -6, width=96, parametrization="nugpt")
    # no results yet: all, but the two columns' common run at the base once
    assert command(results, "--missing", stdin=base + wide).stdout == base.splitlines(True)[0] + wide
    write(results, [{**CONFIG, "parametrization": "nugpt", "learning_rate": 2.0 ** -6},
                    {**CONFIG, "parametrization": "ngpt", "learning_rate": 2.0 ** -6, "width": 96}])
    # the base run is there under the other name; ngpt at 96, too
    assert command(results, "--missing", stdin=base + wide).stdout == wide.splitlines(True)[1]
    # a plain GPT may have warm-up where nGPT has none, but all its runs of a length the same
    write(results, [CONFIG, {**CONFIG, "parametrization": "gpt_sp", "warmup_steps": 40, "learning_rate": 2.0 ** -6}])
    more = line(parametrization="gpt_sp", warmup_steps=40, learning_rate=2.0 ** -7)
    assert command(results, "--missing", stdin=more).stdout == more
    for other in (more.replace("warmup_steps=40", "warmup_steps=50"), more.replace("--warmup_steps=40 ", "")):
        done = command(results, "--missing", stdin=other)
        assert done.returncode == 1 and "gpt_sp has warmup_steps and weight_decay of (40, 0.0)" in done.stderr
    # what a narrow grid lacks has the recipe of its own column, whichever comes first at that size
    rows = sweep(dict(ngpt=0.0, gpt_sp=0.0), sizes=(48, 96), seeds=[0], grid=(-7, -6.5, -6, -5.5))
    rows = [{**row, "warmup_steps": 40 * (row["parametrization"] == "gpt_sp")} for row in rows]
    lines = command(write(results, rows), "--missing", stdin=line(learning_rate=2.0 ** -6)).stdout.splitlines()
    assert [("=gpt_sp" in text, "--warmup_steps=40 " in text) for text in lines] == [(False, False)] * 2 + [(True, True)]
    done = command(results, "--missing", stdin=line(batch_size=32))
    assert done.returncode == 1 and "batch_size=16, not batch_size=32" in done.stderr and done.stderr.count("\n") == 1
    # an option that one of the two leaves at its default makes it another sweep, too
    frozen = line().strip() + " --freeze_alpha"
    assert "of freeze_alpha=False, not freeze_alpha=True" in command(results, "--missing", stdin=frozen).stderr
    write(results, [{**CONFIG, "freeze_alpha": "True"}])
    assert "of freeze_alpha=True, not freeze_alpha=False" in command(results, "--missing", stdin=line()).stderr
    added = command(results, "--missing", stdin=frozen).stdout.splitlines()
    assert len(added) == 4 and all("--freeze_alpha=True" in text for text in added)     # more η for the narrow grid of one


def test_missing_runs_of_a_narrow_grid(tmp_path):
    rows = sweep(dict(ngpt=-0.5, nugpt=0.0), sizes=(48, 96), seeds=[0, 1], grid=(-7, -6.5, -6, -5.5, -5))
    results, wanted = write(tmp_path / "a.csv", rows), line(learning_rate=2.0 ** -6)
    lines = command(results, "--missing", stdin=wanted).stdout.splitlines()
    lines = [dict(word[2:].split("=") for word in text.split()) for text in lines]
    assert [(run["parametrization"], run["width"], run["seed"], float(run["learning_rate"])) for run in lines] == [
        ("ngpt", "96", seed, 2 ** -7.5) for seed in "01"]
    assert all(run["batch_size"] == "16" for run in lines)      # whatever else the sweep gives its runs, these get, too
    # runs of the first grid come first: before they are done, nobody knows where the best is
    more = line(learning_rate=2.0 ** -6, seed=9)
    assert command(results, "--missing", stdin=wanted + more).stdout == more


def test_missing_runs_have_the_name_of_those_that_are_there(tmp_path):
    rows = sweep(dict(nugpt=0.0), sizes=(400, 1600), axis="steps", seeds=[0], grid=(-7, -6.5, -6, -5.5))
    lines = command(write(tmp_path / "a.csv", rows), "--missing").stdout.splitlines()
    assert len(lines) == 2      # ngpt's runs are nugpt's, η shifted: it asks for none of its own
    assert all({"--parametrization=nugpt", f"--learning_rate={2.0 ** -5}"} <= set(text.split()) for text in lines)


def test_sweep_runs_what_is_missing_names_what_failed_and_ends_with_the_verdict(data, tmp_path):
    pytest.importorskip("matplotlib")
    results = tmp_path / "a.csv"

    def sweep(**env):
        settings = dict(SIZES="16:1:4 32:1:4 20:1:4", BASE="16:1:4", RULES="ngpt nugpt", SEEDS="0", GRID="-6 -5 20", ROUNDS="0", GPUS="", JOBS="2",
                        HEAD_DIM="8", SEQ_LEN="16", BATCH_SIZE="4", EVAL_TOKENS="304", DATA=data, RESULTS=results, PYTHON=sys.executable,
                        TRAIN_OPTIONS="--device=cpu --dtype=float32 --compile=False")
        return subprocess.run(["bash", HERE / "sweep.sh", "width"], capture_output=True, text=True,
                              env={**os.environ, **{key: str(setting) for key, setting in {**settings, **env}.items()}})

    # three η at width 16, where the columns are one, and three a column at each other width
    dry = sweep(DRY=1).stdout.splitlines()
    assert len(dry) == 15 and not results.exists() and all(command.startswith("OMP_NUM_THREADS=1 ") for command in dry)
    subprocess.run(["bash", "-c", dry[0]], cwd=HERE, check=True, capture_output=True)       # a command from the list, run elsewhere
    done = sweep()
    rows = train.read_csv(results)
    assert done.returncode == 1, done.stderr                # width 20 is no multiple of head_dim, and stops nobody
    assert done.stdout.startswith("14 runs to do, 2 at a time") and "\n14 of 14 runs done, about 0 min left" in done.stdout
    assert done.stdout.count("FAILED: train.py: width must be a positive multiple of head_dim=8, not 20") == 6
    assert done.stdout.split("failed, and tried again by the same command:")[1].count("width=20") == 6
    assert sorted((row["width"], row["status"]) for row in rows) == sorted(
        [("16", "finished")] * 2 + [("16", "diverged")] + [("32", "finished")] * 4 + [("32", "diverged")] * 2)
    assert "same best η?" in done.stdout and (tmp_path / "a.png").exists()
    # the grid is there: what runs now is one more η on the side of the best, which is 2^-5, the second from the edge
    done = sweep(SIZES="16:1:4 32:1:4")
    assert done.returncode == 0 and done.stdout.startswith("3 runs to do") and train.read_csv(results)[:9] == rows
    assert [float(row["learning_rate"]) for row in train.read_csv(results)[9:]] == [2 ** -7] * 3


def test_tables_in_the_readme_are_what_the_commands_print():
    """Under each `python parametrize.py assets/….csv` of the README that is followed by a block stands what it prints, or some lines."""
    readme = (HERE / "README.md").read_text()
    blocks = re.findall(r"`python (parametrize\.py assets/[^`]*)`[^`]*?\n```\n(.*?)```", readme, re.S)
    assert len(blocks) >= 2
    for command, block in blocks:
        printed = process(*shlex.split(command)).stdout.splitlines()
        assert [line for line in block.splitlines() if line not in printed] == [], command


def bad_files(tmp_path):
    rows = sweep(dict(ngpt=0.0))
    yield "cannot read", tmp_path / "none.csv"
    (tmp_path / "empty.csv").write_text("")
    yield "has no rows", tmp_path / "empty.csv"
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    yield "cannot read", tmp_path / "binary.csv"
    yield "no column parametrization", write(tmp_path / "other.csv", [dict(a=1, b=2)])
    yield "line 2: seed must be a possible number, not 'x'", write(tmp_path / "word.csv", [{**rows[0], "seed": "x"}])
    yield "must be a possible number, not -1.0", write(tmp_path / "negative.csv", [{**rows[0], "learning_rate": -1}])
    yield "mixes runs with batch_size = 16 and 32", write(tmp_path / "mixed.csv", [*rows, {**rows[0], "batch_size": 32}])
    yield "in runs of 400 steps", write(tmp_path / "recipe.csv", [*rows, {**rows[0], "warmup_steps": 40}])
    yield "mixes runs with hidden_lr_mult = 1 and 2", write(tmp_path / "mult.csv", [
        {"hidden_lr_mult": 1 + (row["width"] == 96), **row} for row in rows])
    yield "no parametrization 'mine'", write(tmp_path / "mine.csv", [*rows, {**rows[0], "parametrization": "mine"}])
    yield "width must be at least 1", write(tmp_path / "zero.csv", [{**rows[0], "width": 0}])


def test_bad_input_gets_one_sentence(tmp_path):
    for words, path in bad_files(tmp_path):
        done = command(path)
        assert done.returncode == 1 and done.stdout == "", words
        assert done.stderr.count("\n") == 1 and words in done.stderr, done.stderr
    results = write(tmp_path / "a.csv", sweep(dict(ngpt=0.0)))
    for words, option in (("--axis", "--axis=height"), ("--control", "--control=mine"), ("unrecognized", "--plott=a.png")):
        done = command(results, option)
        assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1
    done = command(results, f"--plot={tmp_path}/a.jpegg")
    assert done.returncode == 1 and "jpegg" in done.stderr and done.stderr.count("\n") == 1
