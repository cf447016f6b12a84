"""
Tests of all that can be tested without a network or a GPU: `python -m pytest`, about two minutes on two CPU cores.

Every test states one claim, and was seen to fail with the code it guards broken. Sizes are tiny, since a wrong factor
or axis is as wrong at width 32 as at 4096. Sections are those of νGPT (arXiv:2604.27077).
"""
import csv, gzip, hashlib, http.server, io, itertools, json, math, multiprocessing, os, re, resource, runpy, shutil
import signal, socket, subprocess, sys, threading, time
from dataclasses import fields
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiktoken
import torch
from packaging.requirements import Requirement

import parametrize as parametrize_py
import prepare_data
import train
from model import GPT, GPTConfig, PlainGPT
from parametrize import COLUMNS, param_groups, parametrize, value
from prepare_data import read_folder, read_tokens

HERE = Path(train.__file__).parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", HERE / "train.py")
NORMALIZED = [name for name, rows in COLUMNS.items() if "alpha_init" in rows]           # columns for GPT
VAL, *TRAIN = SHARDS = ["edu_fineweb_val_000000.bin", *(f"edu_fineweb_train_{i:06d}.bin" for i in range(1, 5))]
torch.set_num_threads(1)        # as in the subprocesses below, so that sums are taken in the same order


# ---------------------------------------------------------------- helpers

def small(seed=0, kind=GPT, **changes):
    torch.manual_seed(seed)
    return kind(GPTConfig(**{**dict(width=32, depth=2, head_dim=8, vocab_size=48, seq_len=16), **changes}))


def untrained():
    """The model with which a run of `options` begins."""
    return small(vocab_size=256, **parametrize("nugpt", 32, 2, 8, 16, 1, 4)[0])


def off_center(seed=0):
    """A model in which every factor counts: no init or scale is 1, raw values differ, and some α are negative."""
    model = small(seed, alpha_init=0.3, alpha_scale=0.2, qk_init=1.3, qk_scale=0.4, mlp_init=0.7, mlp_scale=0.5,
                  logit_init=6.0, logit_scale=0.6)
    for name, p in model.named_parameters():
        if name.endswith("raw"):
            p.data *= torch.empty_like(p).uniform_(0.5, 1.5)
        if "alpha" in name:
            p.data *= torch.rand_like(p).sub(0.3).sign()
    return model


def batch(seed=0, rows=2, length=16):
    return torch.randint(48, (2, rows, length), generator=torch.Generator().manual_seed(seed))      # tokens, targets


def tensor_class(name):
    return "rescalers" if name.endswith("raw") else "hidden" if "blocks" in name else name


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
    assert prepared(folder, folder / "words.txt") is None
    return folder


def options(data, out_dir, **changes):
    """Options of a run of 8 steps of 4 sequences that takes a fraction of a second, at twice the base size."""
    tiny = dict(width=32, depth=2, head_dim=8, seq_len=16, steps=8, batch_size=4, base_width=16, base_depth=1,
                base_steps=4, base_batch_size=2, data=data, out_dir=out_dir, device="cpu", dtype="float32",
                compile=False, log_every=1, eval_every=4, eval_tokens=304, checkpoint_every=4, sample_tokens=0)
    return [f"--{key}={value}" for key, value in {**tiny, **changes}.items()]


def run(*argv):
    """train.py in this process. Returns its exit code, or the sentence with which it refuses."""
    with pytest.raises(SystemExit) as end:
        sys.exit(train.main(list(argv)))
    return end.value.code or 0


def prepared(out, *argv):
    """`python prepare_data.py … --out=out` in this process. Returns None, or the sentence with which it refuses."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["prepare_data.py", *map(str, argv), f"--out={out}"])
        sys.exit(prepare_data.main())
    assert "\n" not in (end.value.code or "")
    return end.value.code


def process(*argv, preexec_fn=None, **env):
    return subprocess.run([sys.executable, *map(str, argv)], cwd=HERE, capture_output=True, text=True, timeout=120,
                          preexec_fn=preexec_fn, env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def start(*argv, before=lambda step: None, rank=0, ranks=1, port=0):
    """train.py in a forked process, which need not import PyTorch again. Calls before(step) as each step starts."""
    def main():
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        train.rank, train.local_rank, train.world_size, starts = rank, rank, ranks, train.batch_starts
        train.batch_starts = lambda seed, step, *rest: (before(step), starts(seed, step, *rest))[1]
        sys.exit(train.main(list(argv)))
    started = multiprocessing.get_context("fork").Process(target=main)
    started.start()
    return started


def free_port():
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def outcome(started):
    """Exit code of a process from `start`: minus the signal's number if one ended it."""
    started.join(60)
    started.kill()      # if it hangs
    started.join()
    return started.exitcode


def send(number, at):
    """For `start`: the process gets this signal in step `at`."""
    return lambda step: os.kill(os.getpid(), number) if step == at else None


def signaled(number, at, *argv):
    """Exit code of train.py in a process that gets this signal in step `at`."""
    return outcome(start(*argv, before=send(number, at)))


def fork(folder, file, *edits):
    """train.py in a folder with the scripts, in one of which text is replaced, as a user would: (before, after), …"""
    for name in ("train.py", "model.py", "parametrize.py", "prepare_data.py"):
        shutil.copy(HERE / name, folder)
    text = (folder / file).read_text()
    for before, after in edits:
        assert before in text
        text = text.replace(before, after, 1)
    (folder / file).write_text(text)
    return folder / "train.py"


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def log(out_dir, *columns):
    """Rows of log.csv, less what a clock says, or only some columns as numbers."""
    rows = read_csv(out_dir / "log.csv") if (out_dir / "log.csv").exists() else []
    if columns:
        return np.array([[float(row[column] or "nan") for column in columns] for row in rows])
    return [{key: cell for key, cell in row.items() if key not in ("seconds", "tokens_per_second")} for row in rows]


def checkpoint(out_dir):
    return torch.load(out_dir / "ckpt.pt", weights_only=True)


def assert_same_run(one, other):
    """The weights, Adam's state and the log are the same to the bit, and only the three files were left."""
    assert log(one) == log(other) and len(log(one)) > 0
    a, b = checkpoint(one), checkpoint(other)
    for tensors in (lambda c: c["model"], lambda c: c["optimizer"]["state"]):
        torch.testing.assert_close(tensors(a), tensors(b), rtol=0, atol=0)
    assert all(a["progress"][key] == b["progress"][key] for key in ("step", "train_loss", "val_loss"))
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    assert sorted(path.name for path in other.iterdir()) == ["ckpt.pt", "config.json", "log.csv"]


# ---------------------------------------------------------------- model.py

def test_weights_are_stacks_of_unit_vectors_of_the_hidden_states_length(data, tmp_path):
    assert run(*options(data, tmp_path)) == 0
    for name, weight in (*untrained().state_dict().items(), *checkpoint(tmp_path)["model"].items()):
        if not name.endswith("raw"):
            assert weight.size(1) == 32
            torch.testing.assert_close(weight.norm(dim=1), torch.ones(len(weight)))


def unit(y):
    return y / (y * y).sum(-1, keepdim=True).sqrt()


def heads_by_the_book(h, qkv, D, scale, after_rope):
    """Causal attention, head by head. after_rope(x, i): what becomes of the turned queries and keys of head i."""
    (_, T, d), heads = h.shape, []
    angles = torch.arange(T).double()[:, None] / 10000 ** (torch.arange(0, D, 2).double() / D)
    turn = torch.polar(torch.ones_like(angles), angles)             # of channels i and i + D/2 as a complex number
    for i in range(d // D):
        q, k, v = (h @ qkv[j * d + i * D:j * d + (i + 1) * D].T for j in range(3))
        q, k = (torch.view_as_real(torch.complex(*x.chunk(2, -1)) * turn).mT.flatten(-2) for x in (q, k))
        scores = scale * after_rope(q, i) @ after_rope(k, i).mT
        heads.append(scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1) @ v)
    return torch.cat(heads, -1)


def by_the_book(model, tokens):
    """Logits by the equations of section 2, in fp64. Only the weights and sizes come from model.py."""
    w, c = {name: p.double() for name, p in model.state_dict().items()}, model.config
    d, D, h = c.width, c.head_dim, w["embedding"][tokens]
    for layer in range(c.depth):
        block = {name: w[f"blocks.{layer}.{name}"] for name in ("qkv", "attn_out", "mlp_in", "mlp_out")}
        s_qk, s_u, s_nu, alpha_A, alpha_M = (
            w[f"blocks.{layer}.{name}.raw"] * getattr(c, kind + "_init") / getattr(c, kind + "_scale") for name, kind in
            (("s_qk", "qk"), ("s_u", "mlp"), ("s_v", "mlp"), ("attn_alpha", "alpha"), ("mlp_alpha", "alpha")))
        y = heads_by_the_book(h, block["qkv"], D, math.sqrt(D), lambda x, i: unit(x) * s_qk[i]) @ block["attn_out"]
        h = unit(h + abs(alpha_A) * (unit(y) - h))
        W_u, W_nu = block["mlp_in"].chunk(2)
        u, nu = h @ W_u.T * s_u, h @ W_nu.T * s_nu * math.sqrt(d)
        h = unit(h + abs(alpha_M) * (unit(nu / (1 + torch.exp(-nu)) * u @ block["mlp_out"]) - h))
    return h @ w["unembedding"].T * (w["s_z.raw"] * c.logit_init / c.logit_scale)


def plain_by_the_book(model, tokens):
    """Logits of the opponent: h += attention(RMSNorm(h)), h += MLP(RMSNorm(h)), softmax scale 1/√D."""
    w, c = {name: p.double() for name, p in model.state_dict().items()}, model.config
    rms, h = lambda x: unit(x) * math.sqrt(c.width), w["embedding"][tokens]
    for i in range(c.depth):
        qkv, out, mlp_in, mlp_out = (w[f"blocks.{i}.{name}"] for name in ("qkv", "attn_out", "mlp_in", "mlp_out"))
        h = h + heads_by_the_book(rms(h), qkv, c.head_dim, c.head_dim ** -0.5, lambda x, i: x) @ out
        u, v = (rms(h) @ mlp_in.T).chunk(2, -1)
        h = h + (u * v / (1 + torch.exp(-v))) @ mlp_out
    return rms(h) @ w["unembedding"].T


def plain():
    return small(kind=PlainGPT, embedding_std=0.8, hidden_std=0.3, unembedding_std=0.4)


@pytest.mark.parametrize("make, equations", ((off_center, by_the_book), (plain, plain_by_the_book)))
def test_model_is_the_equations(make, equations):
    model, (tokens, targets) = make(), batch()
    targets[0, 3:9] = -1                                                    # does not count
    logits, loss = model(tokens, targets)
    book = equations(model, tokens)
    fp32 = 50 * 2 ** -24 * book.abs().max().item()                          # tens of roundings
    torch.testing.assert_close(logits.double(), book, rtol=0, atol=fp32)
    likelihood = book.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(loss.double(), -likelihood[targets >= 0].mean(), rtol=1e-5, atol=0)
    assert model(tokens)[1] is None


def test_plain_model_starts_with_the_standard_deviations_given():
    stds = dict(embedding=0.8, unembedding=0.4, qkv=0.3, mlp_in=0.3, attn_out=0.15, mlp_out=0.15)   # 0.3 / √(2 · depth)
    for name, weight in plain().named_parameters():
        assert weight.std().item() == pytest.approx(stds[name.split(".")[-1]], rel=0.1)


@pytest.mark.parametrize("heads, depth, billions", ((8, 12, 0.26), (40, 12, 3.22), (12, 8, 0.39), (12, 128, 2.55)))
def test_parameter_counts_are_the_papers(heads, depth, billions):
    with torch.device("meta"):
        model = GPT(GPTConfig(width=102 * heads, depth=depth, head_dim=102, vocab_size=100_352, seq_len=4096))
    d, V = 102 * heads, 100_352
    counts = [weight.numel() for weight in model.matrices()]
    assert sum(counts) == 2 * V * d + 12 * depth * d * d                    # a block: 4 d² + 3 · 8/3 d²
    assert round(model.num_params() / 1e9, 2) == billions
    assert sum(counts) < model.num_params() < 1.001 * sum(counts)           # the rescalers
    assert model.flops_per_token() == 6 * (V * d + 12 * depth * d * d) + 12 * depth * d * 4096


def test_generate_takes_the_likeliest_or_draws_from_the_k_likeliest():
    model, start = off_center(), batch()[0][:, :4]
    likeliest = model.generate(start, 20, temperature=0)                    # 24 tokens, longer than seq_len = 16
    assert likeliest.shape == (2, 24) and torch.equal(likeliest[:, :4], start)
    for i in range(4, 24):
        assert torch.equal(likeliest[:, i], model(likeliest[:, max(0, i - 16):i])[0][:, -1].argmax(-1))
    assert torch.equal(model.generate(start, 20, top_k=1), likeliest)
    logits = model(start[:1])[0][0, -1]
    draw = lambda **how: model.generate(start[:1].expand(4000, 4), 1, **how)[:, -1]         # noqa: E731
    for temperature in (0.5, 2):
        frequency = draw(temperature=temperature).bincount(minlength=48) / 4000             # 0.05: six deviations
        torch.testing.assert_close(frequency, (logits / temperature).softmax(0), rtol=0, atol=0.05)
    assert set(draw(top_k=3, temperature=9).tolist()) == set(logits.topk(3).indices.tolist())


def test_compiled_model_is_the_eager_one():
    model = off_center()
    loss, grads = gradients(model, model, *batch())
    compiled_loss, compiled_grads = gradients(model, torch.compile(model), *batch())
    assert compiled_loss == pytest.approx(loss, rel=1e-6)
    assert max(relative_errors(compiled_grads, grads).values()) < 1e-5


def test_bfloat16_is_float32_to_its_own_width():
    """bf16 keeps 8 bits, so one rounding errs by at most u = 2^-8. A product rounds two factors and itself, and 6 stand
    in a row in a block (qkv, q·k, P·v, W_O, W_u and W_ν, W_oMLP): with the logits 13 in two blocks, as many backward.
    Independent errors add as a root: √(3·26) u = 0.035 of a gradient, √(3·13) u of a logit, typically logit_init / √d.
    The loss is the mean over 128 tokens, each moved by its logits' error times |softmax - onehot| ≤ √2."""
    u, model = 2 ** -8, off_center()
    (tokens, targets), autocast = batch(rows=8), torch.autocast("cpu", torch.bfloat16)
    loss, grads = gradients(model, model, tokens, targets)
    with autocast:
        bf16_loss, bf16_grads = gradients(model, model, tokens, targets)
        torch.testing.assert_close(model.hidden(tokens).norm(dim=-1), torch.ones(8, 16))    # norms and states stay fp32
    assert 0 < abs(bf16_loss - loss) < math.sqrt(2 / 128) * math.sqrt(3 * 13) * u * 6 / math.sqrt(32)
    assert max(relative_errors(bf16_grads, grads).values()) < math.sqrt(3 * 26) * u


# ---------------------------------------------------------------- parametrize.py

# The rules at 4, 9 and 125 times the base's width (1024), depth and steps, by hand; each power has its own prime:
# m_w^-1/2 = 1/2, m_w^-3/4 = 0.3535534, m_w^-1 = 1/4; m_d^-1/2 = 1/3, m_d^-1 = 1/9; m_t^-1/3 = 1/5; c = 1/32, d = 64².
BY_HAND = dict(
    # η × embedding  hidden          unembedding    × base  rescalers   init: α   scale: α, s_qk  init: s_z  scale: s_z
    ngpt=(      1,      1,              1,             1,      1,          0.05,     1 / 64,         1,         1 / 64),
    mup=(       1 / 10, 1 / 20,         1 / 10,        0.5,    1 / 5,      0.05 / 9, 1 / 32,         1,         1 / 32),
    depth_mup=( 1 / 10, 0.3535534 / 15, 0.3535534 / 5, 0.5,    1 / 5,      0.05 / 3, 1 / 32,         2,         1 / 32),
    nugpt_full=(1 / 10, 1 / 20,         1 / 20,        0.5,    1 / 5,      0.05 / 9, 1 / 32,         2,         1 / 32),
    nugpt_none=(1 / 10, 1 / 10,         1 / 10,        0.5,    1 / 5,      0.05 / 9, 1 / 32,         2,         1 / 32),
    nugpt=(     1 / 10, 0.3535534 / 5,  0.3535534 / 5, 0.5,    1 / 5,      0.05 / 9, 1 / 32,         2,         1 / 32))


@pytest.mark.parametrize("column", parametrize_py.read_table(parametrize_py.TABLE))
def test_table_gives_the_numbers_worked_out_by_hand(column):
    embedding, hidden, unembedding, tuned, rescalers, alpha, scale, logit, logit_scale = BY_HAND[column]
    values = dict(alpha_init=alpha, alpha_scale=scale, qk_init=1, qk_scale=scale, mlp_init=1, mlp_scale=1,
                  logit_init=logit, logit_scale=logit_scale)
    for mults, factors in ((dict(embedding_lr_mult=2, unembedding_lr_mult=0.3), (2, 0.3)), ({}, (1, tuned))):
        rates = dict(embedding=factors[0] * embedding, hidden=3 * hidden, unembedding=factors[1] * unembedding,
                     rescalers=5 * rescalers)
        got = parametrize(column, 4096, 90, 1_250_000, hidden_lr_mult=3, rescalers_lr_mult=5, **mults)
        assert got[0] == pytest.approx(values) and got[1] == pytest.approx(rates)
    other_start = parametrize(column, 4096, 90, 1_250_000, alpha_init=0.2)[0]
    assert other_start == pytest.approx({**values, "alpha_init": 4 * alpha})


def test_a_class_added_in_the_middle_takes_no_other_classs_constant(monkeypatch):
    classes = {"embedding": r"embedding", "gates": r"gate", **parametrize_py.TENSOR_CLASSES}
    monkeypatch.setattr(parametrize_py, "TENSOR_CLASSES", classes)
    monkeypatch.setitem(COLUMNS["nugpt"], "lr_gates", "m_w^-1/2")
    changes = dict(embedding_lr_mult=2, hidden_lr_mult=3, unembedding_lr_mult=0.3, rescalers_lr_mult=5)
    rates = parametrize("nugpt", 4096, 90, 1_250_000, **changes)[1]
    assert list(rates) == ["embedding", "gates", "hidden", "unembedding", "rescalers"]
    assert rates == pytest.approx(dict(embedding=0.2, gates=0.1, hidden=0.3535534 * 0.6,
                                       unembedding=0.3535534 * 0.06, rescalers=1))


def test_plain_columns_give_the_numbers_worked_out_by_hand_and_are_equal_at_the_base():
    for column, rate, unembedding_std in (("gpt_sp", 1, 1 / 64), ("gpt_mup", 1 / 4, 1 / 128)):
        initial, lr_scale = parametrize(column, 4096, 90, 1_250_000)
        assert initial == dict(embedding_std=1, hidden_std=1 / 64, unembedding_std=unembedding_std)
        assert lr_scale == dict(embedding=1, hidden=rate, unembedding=rate)
    assert parametrize("gpt_sp", 1024, 90, 9) == parametrize("gpt_mup", 1024, 90, 9)


@pytest.mark.parametrize("cell", ("m_x^2", "m_w^half", "", "2 m_w", "m_w^1/0"))
def test_unreadable_cells_are_refused(cell):
    with pytest.raises(ValueError, match="cannot read .* a factor is"):
        value(cell, m_w=2)


def test_one_edit_adds_a_column_or_is_refused(tmp_path):
    def edited(*edit):
        return runpy.run_path(fork(tmp_path, "parametrize.py", edit).with_name("parametrize.py"))["parametrize"]
    own = edited("OWN = {", 'OWN = {"mine": ("nugpt", dict(lr_hidden="m_w^-0.85")),')
    mine, nugpt = own("mine", 2048, 20, 80_000), parametrize("nugpt", 2048, 20, 80_000)
    batch = parametrize("nugpt_batch", 2048, 20, 80_000, batch_size=512, base_batch_size=8)[1]      # m_b = 2^6
    assert batch == pytest.approx({tensors: 2 * rate for tensors, rate in nugpt[1].items()})
    assert mine[1].pop("hidden") == pytest.approx(0.5 * 2 ** -0.85) != nugpt[1].pop("hidden") and mine == nugpt
    for own in ('("nogpt", {})', '("nugpt", dict(lr_hiden="1"))'):
        with pytest.raises(SystemExit, match="your column 'mine' must start from one of ngpt, .* change some of lr, "):
            edited("OWN = {", f'OWN = {{"mine": {own},')
    with pytest.raises(SystemExit, match="row 'lr_hidden' has 5 cells, but there are 6 columns"):
        edited("| m_w^-3/4?·m_d^-1/2 ", "")


def test_at_the_base_every_column_is_the_same_run_and_away_from_it_none_is(data, tmp_path):
    def trained(column, **base):
        out = tmp_path / column / "at_base" if base else tmp_path / column
        assert run(*options(data, out, parametrization=column, unembedding_lr_mult=0.5, **base)) == 0
        return log(out), checkpoint(out)["model"]
    runs = [trained(column, base_width=32, base_depth=2, base_steps=8, base_batch_size=4)
            for column in NORMALIZED]
    for rows, model in runs:
        assert rows == runs[0][0] and all(map(torch.equal, model.values(), runs[0][1].values()))
    assert len({trained(column)[0][-1]["val_loss"] for column in NORMALIZED}) == len(NORMALIZED)


def test_parametrize_prints_the_table_and_one_models_numbers(capsys, monkeypatch):
    monkeypatch.setitem(parametrize_py.OWN, "mine", ("nugpt", dict(lr_hidden="m_w^-0.85")))
    for argv, words in (([], ("m_w^-3/4", "nugpt_none", "mine: nugpt, but lr_hidden m_w^-0.85")),
                        (["--width=4096", "--steps=80000"], ("0.1768", "nugpt_none"))):
        monkeypatch.setattr(sys, "argv", ["parametrize.py", *argv])
        parametrize_py.main()
        text = capsys.readouterr().out
        assert all(word in text for word in words)


# ---------------------------------------------------------------- train.py: the loop

def test_schedules_are_the_curves_worked_out_by_hand():
    def rates(schedule, **changes):
        config = train.Config(schedule=schedule, steps=10, **changes)
        return pytest.approx([train.schedule(step, config) for step in (0, 1, 5, 8, 9)])
    assert [1, 0.91, 0.55, 0.28, 0.19] == rates("linear")
    assert [1, 1, 1, 1, 0.55] == rates("wsd")
    assert [1, 1, 1, 0.5, 0.25] == rates("wsd", decay_fraction=0.4, min_lr_ratio=0)
    assert [1 / 3, 2 / 3, 0.5, 0.2, 0.1] == rates("linear", warmup_steps=2, min_lr_ratio=0)


@pytest.mark.parametrize("freeze_alpha", (False, True))
def test_train_takes_adams_steps_at_the_tables_rates_on_a_cosine(freeze_alpha, data, tmp_path):
    changes = dict(embedding_lr_mult=2, hidden_lr_mult=1.5, unembedding_lr_mult=0.7, rescalers_lr_mult=0.6)
    lr_scale = parametrize("nugpt", 32, 2, 3, 16, 1, 4, **changes)[1]
    changes |= dict(freeze_alpha=freeze_alpha, steps=3, learning_rate=0.03, weight_decay=0.1)
    assert run(*options(data, tmp_path, **changes)) == 0
    model, tokens, m, v = untrained(), read_tokens(data / "train.bin").astype(int), {}, {}
    for t in range(3):
        rows = torch.tensor(np.stack([tokens[s:s + 17] for s in train.batch_starts(0, t, 4, 16, len(tokens))]))
        loss, grads = gradients(model, model, rows[:, :-1], rows[:, 1:])
        rate = 0.03 * (0.1 + 0.9 * (1 + math.cos(math.pi * t / 3)) / 2)     # cosine to 10 %, no warm-up
        assert log(tmp_path, "learning_rate", "train_loss")[t] == pytest.approx([rate, loss], rel=1e-5)
        for name, p in model.named_parameters():                            # Adam, arXiv:1412.6980, and AdamW's decay
            m[name] = 0.9 * m.get(name, 0) + 0.1 * grads[name]
            v[name] = 0.95 * v.get(name, 0) + 0.05 * grads[name] ** 2
            step = m[name] / (1 - 0.9 ** (t + 1)) / ((v[name] / (1 - 0.95 ** (t + 1))).sqrt() + 1e-16)
            decay = 0 if name.endswith("raw") else 0.1
            if not (freeze_alpha and "alpha" in name):
                p.data -= rate * lr_scale[tensor_class(name)] * (step + decay * p.data)
        model.normalize_weights()
    for name, p in model.named_parameters():
        torch.testing.assert_close(checkpoint(tmp_path)["model"][name], p.data, rtol=0, atol=1e-5)


def test_ranks_and_micro_batches_do_not_change_the_losses(data, tmp_path):
    """Real processes, gloo between them. Sums are taken in another order, and log.csv has 6 digits."""
    done = process(*TORCHRUN, *options(data, tmp_path / "2x2", micro_batch_size=1))
    assert done.returncode == 0 and done.stdout.count("final:") == 1, done.stderr
    for micro in (0, 1, 2):
        assert run(*options(data, tmp_path / f"1x{micro}", micro_batch_size=micro)) == 0
    columns = "step", "tokens", "learning_rate", "train_loss", "val_loss", "attn_alpha", "mlp_alpha", "s_z"
    for other in ("2x2", "1x1", "1x2"):
        np.testing.assert_allclose(log(tmp_path / other, *columns), log(tmp_path / "1x0", *columns), rtol=2e-5)
    assert checkpoint(tmp_path / "2x2")["model"].keys() == small().state_dict().keys()      # no prefix of a wrapper


def test_evaluation_is_the_mean_over_the_stated_windows(data, tmp_path):
    """19 of the 24 windows of val.bin, evenly spread; neither 4 nor 3 sequences at a time divide them."""
    tokens = torch.tensor(read_tokens(data / "val.bin").astype(int))
    windows = (len(tokens) - 1) // 16
    rows = torch.stack([tokens[16 * i:16 * i + 17] for i in (k * windows // 19 for k in range(19))])
    for out_dir, batch_size in ((tmp_path / "4", 4), (tmp_path / "3", 3)):
        assert run(*options(data, out_dir, batch_size=batch_size)) == 0
        model = untrained()
        model.load_state_dict(checkpoint(out_dir)["model"])
        val_losses = log(out_dir, "val_loss")[:, 0]
        assert val_losses[-1] == pytest.approx(model(rows[:, :-1], rows[:, 1:])[1].item(), rel=1e-5)
        assert np.isfinite(val_losses).nonzero()[0].tolist() == [3, 7]                      # eval_every=4
        alphas = [[getattr(b, name)().abs() for b in model.blocks] for name in ("attn_alpha", "mlp_alpha")]
        means = [torch.cat(values).mean().item() for values in (*alphas, [model.s_z()])]
        assert log(out_dir, "attn_alpha", "mlp_alpha", "s_z")[-1] == pytest.approx(means, rel=1e-5)


def test_compiled_run_saves_plain_names(data, tmp_path, monkeypatch):
    assert run(*options(data, tmp_path / "eager")) == 0
    compiler = torch.compile                                                # the same wrapper, at once:
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiler(f, backend="eager", **options))
    assert run(*options(data, tmp_path / "wrapped", compile=True)) == 0
    assert checkpoint(tmp_path / "wrapped")["model"].keys() == small().state_dict().keys()
    assert log(tmp_path / "wrapped") == log(tmp_path / "eager")


def test_without_python_h_a_run_says_so_and_goes_on_uncompiled(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "sysconfig", mock.Mock(get_paths=lambda: {"include": str(tmp_path)}))
    assert run(*options(data, "", compile=True)) == 0
    assert f"{tmp_path}/Python.h (python3-dev): going on uncompiled" in capsys.readouterr().out


def test_diverged_run_says_so_and_keeps_the_last_good_checkpoint(data, tmp_path):
    assert run(*options(data, tmp_path, learning_rate=1e6, checkpoint_every=1)) == 3
    assert log(tmp_path)[-1]["status"] == "diverged"
    assert all(weight.isfinite().all() for weight in checkpoint(tmp_path)["model"].values())


def test_finished_run_leaves_its_files_a_last_line_and_a_sample(data, tmp_path, capsys):
    assert run(*options(data, tmp_path, results=tmp_path / "all.csv", sample_tokens=20)) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith("final: step=8 val_loss=") and "bits_per_byte=" in out[-1] and "sample" in "".join(out)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["config"]["width"] == 32 and config["torch"] == torch.__version__ and "commit" in config
    assert list(log(tmp_path)[0])[0] == "step" and log(tmp_path)[-1]["status"] == "finished"
    row, = read_csv(tmp_path / "all.csv")
    assert row["width"] == "32" and row["status"] == "finished" and float(row["seconds"]) > 0
    assert float(row["val_loss"]) == log(tmp_path, "val_loss")[-1]
    before = checkpoint(tmp_path)["model"]["embedding"]
    assert run(f"--out_dir={tmp_path}", "--resume", "--sample_only", "--sample_tokens=9", "--prompt=norm") == 0
    assert "\nnorm" in capsys.readouterr().out and torch.equal(before, checkpoint(tmp_path)["model"]["embedding"])


def test_batches_are_a_function_of_seed_and_step_and_an_epoch_has_every_window_once():
    starts = lambda step, seed=0: train.batch_starts(seed, step, 5, 8, 85)  # noqa: E731  10 windows, 2 steps an epoch
    forward = [starts(step) for step in range(6)]
    assert forward == [starts(step) for step in reversed(range(6))][::-1]
    epochs = [forward[i] + forward[i + 1] for i in (0, 2, 4)]
    for epoch in epochs:
        assert np.diff(sorted(epoch)).tolist() == [8] * 9 and 0 <= min(epoch) and max(epoch) + 8 < 85
    orders = [[(start - min(epoch)) // 8 for start in epoch] for epoch in epochs]
    assert orders[0] != orders[1] != orders[2] != orders[0] and starts(0) != starts(0, seed=1)


def test_snapshots_are_the_weights_after_1_2_4_steps_every_n_and_the_last_and_change_no_loss(data, tmp_path):
    for name, changes in (("without", {}), ("with", dict(snapshot_every=3))):
        assert run(*options(data, tmp_path / name, **changes)) == 0
    assert log(tmp_path / "with") == log(tmp_path / "without")
    snapshots = [torch.load(path, weights_only=True) for path in sorted((tmp_path / "with").glob("snapshot_*.pt"))]
    assert [snapshot["step"] for snapshot in snapshots] == [0, 1, 2, 3, 6, 8]
    torch.testing.assert_close(snapshots[-1]["model"], checkpoint(tmp_path / "with")["model"], rtol=0, atol=0)
    torch.testing.assert_close(snapshots[0]["model"], untrained().state_dict(), rtol=0, atol=0)


# ---------------------------------------------------------------- train.py: kills, signals and resumed runs

def test_run_killed_anywhere_and_resumed_is_bit_equal_to_one_that_was_not(data, tmp_path):
    """kill -9: before the first step, in the middle of writing a checkpoint, then six times wherever it strikes."""
    seed = time.time_ns() % 2 ** 32
    print(f"seed {seed}")       # seen if the test fails
    rng, whole, killed = np.random.default_rng(seed), tmp_path / "whole", tmp_path / "killed"
    resumed = f"--out_dir={killed}", "--resume"
    long = dict(steps=150, checkpoint_every=2, eval_every=7, eval_tokens=48)
    assert run(*options(data, whole, **long)) == 0
    assert signaled(signal.SIGKILL, 0, *options(data, killed, **long)) == -signal.SIGKILL
    assert checkpoint(killed)["progress"]["step"] == 0

    def breaks_off(state, file, save=torch.save):
        save(state, file)
        if state["progress"]["step"] == 6:
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", breaks_off)
        assert outcome(start(*resumed)) == -signal.SIGKILL
    assert checkpoint(killed)["progress"]["step"] == 4 and len(log(killed)) == 6 and (killed / "ckpt.pt.tmp").exists()
    for _ in range(6):
        started, row = start(*resumed), checkpoint(killed)["progress"]["step"] + rng.integers(20)
        while started.is_alive() and (killed / "log.csv").read_bytes().count(b"\n") <= row:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        started.kill()
        assert outcome(started) == -signal.SIGKILL
    assert outcome(start(*resumed)) == 0
    assert_same_run(whole, killed)


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_run_told_to_stop_says_how_to_go_on_and_that_finishes_it_bit_equal(number, data, tmp_path, capfd):
    whole, stopped, results = tmp_path / "whole", tmp_path / "stopped", tmp_path / "results.csv"
    command = options(data, stopped, results=results)
    assert run(*options(data, whole)) == 0
    assert signaled(number, 2, *command) == 4 and read_csv(results) == []
    said = capfd.readouterr().out.splitlines()
    assert said[-1] == "stopped after step 3; the same command with --resume continues"
    assert run(*command, "--resume") == 0
    assert_same_run(whole, stopped)
    assert [row["status"] for row in read_csv(results)] == ["finished"]


def test_ranks_told_to_stop_at_different_steps_stop_at_one_and_resume_bit_equal(data, tmp_path):
    """Three of them: the sum over two does not depend on an order. One alone gets the signal."""
    def exit_codes(*argv, signal_at=None):
        port = free_port()
        before = [send(signal.SIGTERM, signal_at if rank == 2 else None) for rank in range(3)]
        return [*map(outcome, [start(*argv, before=before[rank], rank=rank, ranks=3, port=port) for rank in range(3)])]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert exit_codes(*options(data, whole, batch_size=4)) == [1, 1, 1]         # 4 cannot be shared out
    assert exit_codes(*options(data, whole, batch_size=6)) == [0, 0, 0]
    assert exit_codes(*options(data, stopped, batch_size=6), signal_at=4) == [4, 4, 4]
    assert checkpoint(stopped)["progress"]["step"] == 5
    assert exit_codes(f"--out_dir={stopped}", "--resume") == [0, 0, 0]
    assert_same_run(whole, stopped)


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_torchrun_told_to_stop_saves(number, data, tmp_path):
    """Real launches. The signal goes to the whole group, as a terminal would send it."""
    started = subprocess.Popen([sys.executable, *TORCHRUN, *options(data, tmp_path, steps=10 ** 5)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    while started.poll() is None and len(log(tmp_path)) <= 3:
        time.sleep(0.05)
    at = time.time()
    os.killpg(started.pid, number)
    said, errors = started.communicate()
    assert started.returncode != 0 and time.time() - at < 30, errors        # 30 s: torchrun kills by then
    last = f"stopped after step {checkpoint(tmp_path)['progress']['step']}; the same command with --resume continues"
    assert said.count("stopped after step") == said.count(last) == 1, errors


def test_full_disk_ends_the_run_in_one_sentence_and_keeps_the_checkpoint_before(data, tmp_path):
    assert signaled(signal.SIGKILL, 6, *options(data, tmp_path)) == -signal.SIGKILL
    before, half = (tmp_path / "ckpt.pt").read_bytes(), (tmp_path / "ckpt.pt").stat().st_size // 2
    done = process(HERE / "train.py", f"--out_dir={tmp_path}", "--resume",      # nearly the error of a full disk:
                   preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (half, half)))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"(?m)^train.py: .*ckpt.pt could not be .*Errno .*too large.; the last is untouched", done.stderr)
    assert (tmp_path / "ckpt.pt").read_bytes() == before and not list(tmp_path.glob("*.tmp"))
    with open(tmp_path / "log.csv", "a") as file:
        file.write("1,64,0.0")      # a row that the disk had no room for
    assert run(f"--out_dir={tmp_path}", "--resume") == 0 and len(log(tmp_path)) == 8


@pytest.mark.parametrize("disk_is_full", (False, True))
def test_ranks_wait_for_a_checkpoint_longer_than_for_a_sum_and_all_leave_if_it_cannot_be_written(
        disk_is_full, data, tmp_path, monkeypatch, capfd):
    def slow(content, file, save=torch.save):
        if content["progress"]["step"] == 4:
            time.sleep(4)
            if disk_is_full:
                raise OSError("disk is full")
        save(content, file)
    begin = torch.distributed.init_process_group
    monkeypatch.setattr(torch, "save", slow)
    monkeypatch.setattr(torch.distributed, "init_process_group",
                        lambda *args, **options: begin(*args, **{**options, "timeout": timedelta(seconds=2)}))
    port = free_port()
    started = [start(*options(data, tmp_path), rank=rank, ranks=2, port=port) for rank in range(2)]
    assert [*map(outcome, started)] == ([1, 1] if disk_is_full else [0, 0])
    assert checkpoint(tmp_path)["progress"]["step"] == (0 if disk_is_full else 8)
    assert ("ckpt.pt could not be written (disk is full); the last" in capfd.readouterr().err) == disk_is_full


def test_a_file_is_on_the_disk_before_it_replaces_another_and_then_its_name_is(tmp_path, monkeypatch):
    events, rename = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("renamed"), rename(*paths)))
    prepare_data.write_aside(tmp_path / "file", lambda file: file.write(b"new"))
    assert events == [(tmp_path / "file").stat().st_ino, "renamed", tmp_path.stat().st_ino]


def test_resumed_run_may_change_what_is_not_mathematics_and_nothing_else(data, tmp_path):
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    assert run(*options(data, whole)) == 0
    assert signaled(signal.SIGKILL, 6, *options(data, changed)) == -signal.SIGKILL
    saved = checkpoint(changed)["config"]
    for key in set(train.MATHEMATICS) - {"data"}:
        old = saved[key]
        new = "other" if isinstance(old, str) else not old if isinstance(old, bool) else old + 1
        assert f"has {key}={old}, which a resumed run cannot change" in run(
            f"--out_dir={changed}", "--resume", f"--{key}={new}")
    shutil.copytree(data, tmp_path / "moved")
    free = dict(data=str(tmp_path / "moved"), log_every=2, eval_every=3, checkpoint_every=1, sample_tokens=3,
                prompt="norm", results=str(tmp_path / "results.csv"))
    assert run("--resume", *options(out_dir=changed, dtype="auto", **free)) == 0
    torch.testing.assert_close(checkpoint(whole)["model"], checkpoint(changed)["model"], rtol=0, atol=0)
    assert checkpoint(changed)["config"] == {**saved, **free, "resume": True}


def test_wsd_goes_on_to_another_horizon_before_its_decay_and_is_bit_equal_to_that_run(data, tmp_path):
    branch, short = tmp_path / "branch", tmp_path / "short"
    def horizon(folder, n):
        return options(data, folder, schedule="wsd", decay_fraction=0.5, steps=n, base_steps=n)
    assert run(*horizon(short, 8)) == 0
    assert signaled(signal.SIGKILL, 5, *horizon(branch, 16)) == -signal.SIGKILL     # its checkpoint is of step 4
    for other in ("--steps=4", "--steps=8", "--base_steps=0", "--decay_fraction=0.8"):  # over, other m_t, in the decay
        assert "which a resumed run cannot change" in run(f"--out_dir={branch}", "--resume", other)
    assert run("--resume", *horizon(branch, 8)) == 0
    assert_same_run(short, branch)
    assert "has base_steps=8, steps=8" in run("--resume", *horizon(branch, 16))         # after its decay


# ---------------------------------------------------------------- train.py: options, refusals, results

def test_options_take_a_sign_or_a_space_and_booleans_may_stand_bare():
    argv = ["--width", "128", "--resume", "--compile=False", "--learning_rate=1e-3", "--prompt="]
    assert train.parse_args(argv) == [dict(width=128, resume=True, compile=False, learning_rate=1e-3, prompt="")]


REFUSALS = {        # option: what the sentence says
    "--widht=64": "unrecognized", "8": "unrecognized", "--width=wide": "of type int", "--compile=maybe": "of type bool",
    "--learning_rate=fast": "of type float", "--learning_rate=0.1,": "of type float", "--beta2=1": "beta",
    "--learning_rate=nan": "more than 0", "--width=60": "multiple of head_dim=8", "--head_dim=1": "head_dim",
    "--steps=0": "more than 0", "--base_width=0": "at least 1", "--seed=-1": "at least 0", "--eps=-1": "epsilon",
    "--batch_size=0": "more than 0", "--micro_batch_size=-1": "at least 0", "--weight_decay=-1": "weight_decay",
    "--embedding_lr_mult=-2": "at least 0, or -1", "--dtype=float16": "float32", "--device=tpu": "auto, cuda",
    "--parametrization=sp": "ngpt, mup, depth_mup, nugpt_full, nugpt_none, nugpt", "--device=cuda": "sees 0",
    "--seq_len=4000": "more than seq_len", "--data=nowhere": "prepare_data.py",
    "--schedule=step": "cosine, linear or wsd", "--decay_fraction=0": "at most 1", "--depth=0": "at least 1",
    "--snapshot_every=-1": "at least 0", "--sample_only": "--resume"}


@pytest.mark.parametrize("option", REFUSALS)
def test_impossible_options_are_refused_in_one_sentence(option, data, tmp_path):
    sentence = run(*options(data, tmp_path), option)
    assert isinstance(sentence, str) and sentence.startswith("train.py: ") and "\n" not in sentence
    assert REFUSALS[option] in sentence and not (tmp_path / "log.csv").exists()


def test_run_is_not_overwritten_nor_resumed_on_other_data(data, tmp_path):
    assert run(*options(data, tmp_path)) == 0
    other, meta = shutil.copytree(data, tmp_path / "other"), json.loads((data / "meta.json").read_text())
    meta["val"]["bytes"] = None                                 # whether somebody has counted them makes no other data
    (other / "meta.json").write_text(json.dumps(meta))
    assert run(*options(other, tmp_path), "--resume") == 0
    written, text = (tmp_path / "ckpt.pt").read_bytes(), (data / "words.txt").read_text()
    for changed in ("X" + text[1:], text[:-1] + "X"):           # to train on, to validate on
        (other / "words.txt").write_text(changed)
        assert prepared(other, other / "words.txt") is None
        assert "was trained with another data" in run(*options(other, tmp_path), "--resume")
    assert "has no trained model" in run(*options(data, tmp_path / "none"), "--resume", "--sample_only")
    assert "already holds a run" in run(*options(data, tmp_path))
    assert (tmp_path / "ckpt.pt").read_bytes() == written and len(log(tmp_path)) == 8


def test_resumed_run_needs_a_whole_checkpoint_of_the_same_table(data, tmp_path, monkeypatch):
    assert run(*options(data, tmp_path, parametrization="ngpt")) == 0
    whole, ours = (tmp_path / "ckpt.pt").read_bytes(), checkpoint(tmp_path)
    files = [whole[:len(whole) // 2], b"hello", b""]
    for foreign in ({**ours, "config": dict(size=3)}, dict(model=ours["model"], iter_num=5), []):
        torch.save(foreign, buffer := io.BytesIO())
        files.append(buffer.getvalue())
    for content in files:
        (tmp_path / "ckpt.pt").write_bytes(content)
        assert "ckpt.pt is damaged, or of another version" in run(f"--out_dir={tmp_path}", "--resume")
    (tmp_path / "ckpt.pt").write_bytes(whole)
    monkeypatch.setitem(COLUMNS["ngpt"], "alpha_init", "0.06")
    assert "was trained with another model_config" in run(f"--out_dir={tmp_path}", "--resume")


def test_a_run_whose_vocabulary_cannot_be_loaded_ends_well_without_a_sample(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "get_tokenizer", mock.Mock(side_effect=ValueError("tiktoken has no network")))
    assert run(*options(data, tmp_path, sample_tokens=5)) == 0
    said = capsys.readouterr().out.splitlines()
    assert any("no sample: tiktoken" in line for line in said) and said[-1].startswith("final: ")


def test_a_list_of_runs_makes_each_once_and_goes_on_where_it_was_stopped(data, tmp_path, capsys):
    results = tmp_path / "folder" / "all.csv"
    command = options(data, "", learning_rate="0.01,1e6,0.03", seed="0,1", results=results)
    assert signaled(signal.SIGKILL, 5, *command) == -signal.SIGKILL and read_csv(results) == []
    assert run(*command) == 3                                                           # one rate diverges
    rows = read_csv(results)
    assert [(row["seed"], row["status"]) for row in rows] == [
        (seed, status) for seed in "01" for status in ("finished", "diverged", "finished")]
    assert [row["val_loss"] == "nan" for row in rows] == [False, True, False] * 2
    assert run(*options(data, tmp_path / "alone", learning_rate=0.03, seed=1)) == 0     # no run touches the next
    assert f"{float(rows[-1]['val_loss']):.6f}" == f"{log(tmp_path / 'alone', 'val_loss')[-1, 0]:.6f}"
    results.write_text("".join(line for i, line in enumerate(results.read_text().splitlines(True)) if i != 3))
    capsys.readouterr()
    assert run(*command, "--log_every=3") == 3                                          # no part of the mathematics
    said, val_loss = capsys.readouterr().out, rows[-1]["val_loss"]
    assert len(read_csv(results)) == 6 and said.count("skipped") == 5 and said.count("final:") == 1
    assert f"seed=1 val_loss={val_loss}" in said
    assert "already holds a run" in run(*options(data, tmp_path / "list", seed="0,1"))


def test_results_of_many_processes_are_all_there(tmp_path):
    fork = multiprocessing.get_context("fork")
    together = fork.Barrier(8, timeout=20)
    def append(writer):
        for i in range(200):
            together.wait()         # so that all find the file empty
            train.append_row(tmp_path / f"{i}.csv", train.RESULTS, dict(seed=writer))
    writers = [fork.Process(target=append, args=(writer,)) for writer in range(8)]
    [writer.start() for writer in writers]
    [writer.join() for writer in writers]
    for i in range(200):
        assert sorted(row["seed"] for row in read_csv(tmp_path / f"{i}.csv")) == list("01234567")


@pytest.mark.parametrize("content", (b"width,gone,val_loss\n64,x,1.5\n", b"\xff\xfe" * 100, b"no table"))
def test_results_with_other_columns_are_refused_at_the_start_and_left_as_they_are(content, data, tmp_path):
    (tmp_path / "results.csv").write_bytes(content)
    sentence = run(*options(data, tmp_path / "out", results=tmp_path / "results.csv"))
    assert "results.csv has other columns (" in sentence and "give another --results" in sentence
    assert not (tmp_path / "out").exists() and (tmp_path / "results.csv").read_bytes() == content


def test_a_run_of_many_epochs_says_so_and_where_new_text_is(data, tmp_path, capsys):
    assert run(*options(data, "", steps=500, eval_every=1000)) == 0
    said = capsys.readouterr().out
    assert f"{500 * 64 / 7600:.1f} epochs" in said and "prepare_data.py fineweb_edu --tokens=3e+04" in said


# ---------------------------------------------------------------- one edit each, as a fork would make it

def test_a_new_field_of_config_is_in_the_help_the_record_and_the_results_and_makes_another_run(data, tmp_path):
    script = fork(tmp_path, "train.py", ("    freeze_alpha: bool", "    twist: float = 0.5\n    freeze_alpha: bool"))
    results, out = tmp_path / "results.csv", tmp_path / "out"
    for twist, said in (("0.25", "final: "), ("0.25", "skipped"), ("0.75", "final: ")):
        done = process(script, *options(data, f"{out}{twist}", results=results), f"--twist={twist}", "--resume")
        assert done.returncode == 0 and said in done.stdout, done.stderr
    assert [row["twist"] for row in read_csv(results)] == ["0.25", "0.75"]
    assert json.loads(Path(f"{out}0.25/config.json").read_text())["config"]["twist"] == 0.25
    assert "has twist=0.25, which" in process(script, f"--out_dir={out}0.25", "--resume", "--twist=1").stderr
    assert "twist: float = 0.5" in process(script, "--help").stdout


def test_an_extra_linear_map_is_trained_and_what_nobody_initialized_or_classed_is_refused(data, tmp_path):
    def first_said(*edits):
        done = process(fork(tmp_path, "model.py", *edits), *options(data, ""))
        return done.stdout if done.returncode == 0 else done.stderr
    def extra(line, shape):
        return line, f"        self.extra = nn.Parameter(torch.empty({shape}))\n{line}"
    in_block, in_model = "        self.s_qk = Rescaler(", "        self.s_z = "
    used = ("norm(self.mlp(h))", "norm(self.mlp(F.linear(h, self.extra)))")
    assert "status=finished" in first_said(extra(in_block, "d, d"), used)
    said = first_said(extra(in_block, "d"))
    assert said == "train.py: nobody initialized blocks.0.extra: do it in draw_weights, model.py\n"
    said = first_said(extra(in_model, "config.seq_len, config.width"))
    assert said.startswith("train.py: parameter extra is in no tensor class; name it in one pattern of TENSOR_CLASSES")


# ---------------------------------------------------------------- sweep.sh and README.md

def test_sweep_prints_or_runs_its_grid_names_what_failed_and_goes_on(data, tmp_path):
    def sweep(axis="width", **env):
        env = dict(SIZES="16:1:4 32:1:4 20:1:4", RULES="ngpt nugpt", SEEDS="0 1", GRID="-6 -5 20", NGPT_GRID="-7 -6",
                   GPUS="", HEAD_DIM=8, SEQ_LEN=16, BATCH_SIZE=4, DATA=data, JOBS=2, RESULTS=tmp_path / "a.csv",
                   PYTHON=sys.executable, TRAIN_OPTIONS="--device=cpu --dtype=float32 --compile=False") | env
        return subprocess.run(["bash", HERE / "sweep.sh", axis], capture_output=True, text=True, timeout=100,
                              env={**os.environ, **{key: str(setting) for key, setting in env.items()}})
    dry = sweep(DRY=1).stdout.splitlines()
    sizes = [re.search(r"=(\w+) --width=(\d+) .*=(\S+) --seed=(\d)", command).groups() for command in dry]
    nugpt, ngpt = "0.015625,0.03125,1048576", "0.0078125,0.015625"      # ngpt has a grid of its own, but at the base
    both = lambda width, ngpt=ngpt: [("ngpt", width, ngpt), ("nugpt", width, nugpt)]
    assert sizes == [(*size, seed) for size in (*both("32"), *both("20"), *both("16", nugpt)) for seed in "01"]
    batches = sweep("batch", DRY=1, SIZES="16:1:8:2 16:1:4:4", RULES="nugpt", SEEDS=0).stdout
    assert re.findall(r"base_batch_size=(\d) .* --steps=(\d) --batch_size=(\d)", batches) == [(*"282",), (*"244",)]
    for _ in range(2):
        done = sweep(SEEDS="0", RULES="nugpt")
        failed = done.stdout.split("failed, and tried again")[1]        # width 20 is no multiple, and stops nobody
        assert done.returncode == failed.count("train.py: width must be a positive multiple of head_dim=8") == 1
        assert len(read_csv(tmp_path / "a.csv")) == 6 and "best η?" in done.stdout and (tmp_path / "a.png").exists()
    assert done.stdout.count("skipped") == 6 and not done.stdout.count("final:")
    base = sweep("base", N=6, SIZES="16:1:4", RULES="nugpt", RANGES="learning_rate=-7:-5 alpha_init=-5:-2",
                 RESULTS=tmp_path / "base.csv")
    rows = read_csv(tmp_path / "base.csv")
    assert base.returncode == 0 and (tmp_path / "base.png").exists()
    tried = [len({row["alpha_init"] for row in rows if row["seed"] == seed}) for seed in "012"]
    assert tried[0] == 6 and tried[1] >= 5 and tried[2] == 0


def test_the_readmes_table_is_the_one_that_is_used():
    text, shown, table = (HERE / "README.md").read_text(), {}, parametrize_py.read_table(parametrize_py.TABLE)
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    head = next(i for i, cells in enumerate(lines) if "**nugpt**" in cells)
    columns = [name.strip("*") for name in lines[head]]
    for rows, *cells in lines[head + 1:]:
        if len(cells) != len(columns) or rows.split(", ")[0] not in COLUMNS["nugpt"]:
            break
        shown |= {row: dict(zip(columns, cells)) for row in rows.split(", ")}
    assert columns == list(table) and shown == {row: {name: table[name][row] for name in table} for row in shown}
    assert {row for row in table["nugpt"] if any(table[name][row] != "1" for name in table)} <= shown.keys()


def test_requirements_allow_what_runs_here_and_not_what_is_known_to_fail():
    lines = [line.split("#")[0] for line in (HERE / "requirements.txt").read_text().splitlines()]
    allowed = {wanted.name: wanted.specifier for wanted in map(Requirement, lines)}
    assert allowed.keys() == set("torch numpy tiktoken requests tqdm pytest matplotlib".split())
    assert all(version(name) in specifier for name, specifier in allowed.items())
    for wrong in ("2.5.1", "2.6.0"):        # the embedding's gradient is wrong if compiled for one CPU thread
        assert wrong not in allowed["torch"]


# ---------------------------------------------------------------- prepare_data.py: text and token files

def text_of(folder):
    return [bytes(read_tokens(folder / f"{split}.bin").astype(np.uint8)) for split in ("train", "val")]


def token_file(tokens, magic=20240520, version=1, dtype="<u2"):
    """Content of a token file in llm.c's format."""
    return np.array([magic, version, len(tokens)] + [0] * 253, "<i4").tobytes() + np.asarray(tokens, dtype).tobytes()


@pytest.fixture
def tiny_encoding(monkeypatch):
    """A real encoding of tiktoken that needs no network; "gpt2" stands for it."""
    ranks = {bytes([i]): i for i in range(256)} | {b"no": 256, b"rm": 257, b"norm": 258, "ä".encode(): 259}
    tiny = tiktoken.Encoding("tiny", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 260})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: tiny)
    return tiny


def test_a_folders_files_go_whole_to_one_split_and_stay_there(tmp_path):
    texts, splits = [f"[text {i}: {'norm ' * 9}]".encode() for i in range(240)], []
    for i, text in enumerate(texts):
        path = tmp_path / "in" / f"{i % 3}" / (f"{i}.txt.gz" if i % 2 else f"{i}.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text) if i % 2 else text)
    for i in range(2):
        assert prepared(tmp_path / "out", tmp_path / "in") is None
        assert sum(map(len, text_of(tmp_path / "out"))) == sum(map(len, texts)) + 4 * i
        splits.append([[text in part for text in texts] for part in text_of(tmp_path / "out")])
        (tmp_path / "in/0/another.txt").write_text("norm")
    assert splits[0] == splits[1] and 0 < sum(splits[0][1]) < 30 and np.sum(splits[0], axis=0).tolist() == [1] * 240


def test_standard_library_is_always_split_the_same(tmp_path):
    """Once here, once in a process with other string hashes."""
    meta = prepare_data.prepare_stdlib(tmp_path / "a", progress=False)
    assert process(HERE / "prepare_data.py", f"--out={tmp_path / 'b'}", PYTHONHASHSEED="7").returncode == 0
    assert meta == read_folder(tmp_path / "a")[2] == read_folder(tmp_path / "b")[2]
    text = b"".join(text_of(tmp_path / "a"))
    assert [text.count(Path(module.__file__).read_bytes()) for module in (os, json, pytest)] == [1, 1, 0]
    assert 0.02 < meta["val"]["bytes"] / len(text) < 0.1


def test_tokens_of_many_pieces_are_those_of_the_whole_text(tiny_encoding, tmp_path, monkeypatch):
    """Also: end-of-text ends each part of a text."""
    texts, parts = ["".join(f"norm {i}-{j} ä\n" for j in range(300)).encode() for i in range(3)], []
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_bytes(text)
    monkeypatch.setattr(prepare_data, "CHUNK", 100)
    assert prepared(tmp_path / "out", tmp_path, "--tokenizer=gpt2") is None
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    for split in ("train", "val"):
        tokens = read_tokens(tmp_path / f"out/{split}.bin")
        parts.append(np.split(tokens, np.flatnonzero(tokens == 260) + 1))
        assert meta[split] == dict(tokens=len(tokens), bytes=len(tiny_encoding.decode_bytes(tokens[tokens != 260])),
                                   sha256=hashlib.sha256(token_file(tokens)).hexdigest())
    for text, *split in zip(texts, *parts):
        decoded = [tiny_encoding.decode_bytes(part[:-1]) for part in split]
        assert b"".join(decoded) == text and 0.94 < len(decoded[0]) / len(text) < 0.96
        for part, part_text in zip(split, decoded):
            assert part[:-1].tolist() == tiny_encoding.encode_ordinary(part_text.decode())
    assert meta["vocab_size"] == 261 and [len(split) for split in parts] == [4, 4]
    (tmp_path / "line.txt").write_text("ν" * 1050 + "\n" + "μ" * 30)        # a long line is cut
    lengths = [len(text) for text in prepare_data.text_chunks(tmp_path / "line.txt")]
    assert sum(lengths) == 1081 and max(lengths) <= 200


def test_tokens_of_a_large_vocabulary_take_four_bytes(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("norm " * 100)
    for size, dtype in ((2 ** 16, np.uint16), (2 ** 16 + 1, np.uint32)):
        tokenizer = lambda texts: [[size - 1] * len(text) for text in texts], None, size, None
        monkeypatch.setattr(prepare_data, "get_tokenizer", lambda name: tokenizer)
        assert prepared(tmp_path, tmp_path / "text.txt") is None
        tokens = read_tokens(tmp_path / "train.bin")
        assert tokens.dtype == dtype and tokens.tolist() == [size - 1] * 475


def test_bad_input_gets_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("norm\n" * 100)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.txt.gz").write_bytes(gzip.compress(b"norm\n" * 100)[:-9])
    monkeypatch.setattr(prepare_data, "MAX_TOKENS", 474)
    monkeypatch.chdir(tmp_path)
    for argv, words in (
            ("none.txt", "must be a .txt"), ("text.txt --tokenizer=gpt7", "no tokenizer 'gpt7'"),
            ("empty.txt", "0 tokens of text for train"), ("text.txt", "475 tokens of text for train; 1 to 474 fit"),
            ("bad.txt.gz", "end-of-stream"), ("--width=3", "unrecognized"), ("shakespeare --tokens=5", "with fineweb"),
            ("fineweb_edu --tokenizer=byte", "of gpt2"), ("fineweb_edu --tokens=0", "between 1 and"),
            ("fineweb_edu --tokens=1.002e11", "between 1 and"), ("fineweb_edu --tokens=nan", "between 1 and")):
        assert words in prepared("out", *argv.split()) and not list(tmp_path.glob("out/[a-z]*"))


def test_killed_tokenization_leaves_nothing_that_looks_finished(tmp_path):
    """Killed between its two token files, in a folder of other data. The same command mends it."""
    (tmp_path / "old.txt").write_text("norm\n" * 100)
    (tmp_path / "new.txt").write_text("another text, of another length\n" * 100)
    kills = "os.replace = lambda *paths: (replace(*paths), os.kill(os.getpid(), 9))"
    out, code = tmp_path / "out", f"import os, prepare_data; replace = os.replace; {kills}; prepare_data.main()"
    assert prepared(out, tmp_path / "old.txt") is None
    assert process("-c", code, tmp_path / "new.txt", f"--out={out}").returncode == -9 and list(out.glob("*.tmp"))
    with pytest.raises(ValueError, match="but meta.json says"):
        read_folder(out)
    assert prepared(out, tmp_path / "new.txt") is None and len(read_folder(out)[0]) == 3040
    assert not list(out.glob("*.tmp"))


def test_folders_come_back_as_written_or_are_refused_by_the_name_of_the_file(tmp_path):
    """Shards are one stream wherever they are cut: twice within one sequence, an empty shard, one token alone."""
    tokens, cuts = np.random.default_rng(0).integers(0, 2 ** 16, 400), [3, 8, 8, 9, 200, 301]
    shards = {f"{i}.bin": part for i, part in enumerate(np.split(tokens, cuts))}
    for name, part in shards.items():
        (tmp_path / name).write_bytes(token_file(part))
    (tmp_path / "val.bin").write_bytes(token_file(tokens + 2 ** 16, 20240801, 7, "<u4"))
    meta = dict(vocab_size=2 ** 17, val=dict(tokens=400), train=dict(shards={key: len(shards[key]) for key in shards}))
    prepare_data.write_json(tmp_path / "meta.json", meta)
    train, val, read = read_folder(tmp_path)
    assert read == meta and len(train) == len(val) == 400 and np.array_equal(val[0:400], tokens + 2 ** 16)
    for start, stop in itertools.combinations((0, 1, 3, 8, 9, 10, 200, 250, 301, 400), 2):
        assert np.array_equal(train[start:stop], tokens[start:stop])
    for path, raw in ((path, path.read_bytes()) for path in (tmp_path / "4.bin", tmp_path / "val.bin")):
        for bad, words in ((b"\0" + raw[1:], "is not a token file"), (raw[:4] + b"\5" + raw[5:], "is not a token file"),
                           (raw[:100], "is not a token file"), (raw[:-1], "was cut"), (raw + b"\0", "was cut"),
                           (raw[:8] + bytes(4) + raw[12:1024], "has 0 tokens, but meta.json"), (None, "is missing")):
            path.unlink() if bad is None else path.write_bytes(bad)
            with pytest.raises(ValueError, match=f"^{path} {words}"):
                read_folder(tmp_path)
        path.write_bytes(raw)
    for bad in ("{", "[]", '{"train": 3}', "\0", '{"tokenizer": "byte"}', None):
        (tmp_path / "meta.json").unlink() if bad is None else (tmp_path / "meta.json").write_text(bad)
        with pytest.raises(ValueError, match="meta.json is damaged" if bad else "is no data folder"):
            read_folder(tmp_path)


# ---------------------------------------------------------------- prepare_data.py: downloads from a local server

class Server(http.server.BaseHTTPRequestHandler):
    """Serves server.files, with server.faults in the next answers. server.asked: file -> first byte of each request."""
    log_message = lambda *args: None

    def do_GET(self):
        name, first = self.path[1:], int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        self.server.asked.setdefault(name, []).append(first)
        fault, whole = self.server.faults.pop(0) if self.server.faults else "", self.server.files[name]
        if fault == "silent":
            return time.sleep(5)
        bad = dict(page=b"<html>", short=whole[:-2], long=whole + b"\0\0", foreign=whole[:-2] + b"\xff\xff")
        ranged, whole = fault not in ("rangeless", "page"), bad.get(fault, whole)
        body = whole[first:] if ranged else whole
        status = 503 if fault == "503" else 416 if body == b"" else 206 if ranged else 200
        self.send_response(status)
        self.send_header("Content-Length", len(body))
        self.end_headers()
        self.wfile.write(b"" if status > 400 else body[:len(body) // 2] if fault in ("cut", "stall") else body)
        time.sleep(5 if fault == "stall" else 0)


@pytest.fixture
def server(monkeypatch, tiny_encoding):
    """A server with four shards of 100,000 tokens and one for validation; time-outs and pauses are short."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.daemon_threads, server.faults, server.asked = True, [], {}
        server.url = f"http://127.0.0.1:{server.server_port}/"
        tokens = np.random.default_rng(0).integers(0, 261, (len(SHARDS), 100_000))
        server.files = {name: token_file(shard) for name, shard in zip(SHARDS, tokens)}
        for name, constant in dict(FINEWEB_EDU=server.url, SHAKESPEARE=server.url, SHARD_TOKENS=100_000, SHARDS=4,
                                   PATIENCE=0.4, BACKOFF=0.01).items():
            monkeypatch.setattr(prepare_data, name, constant)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def fineweb(server, out, tokens=1e5):
    """None, and out holds exactly shards that are the server's; or the sentence with which fineweb_edu is refused."""
    server.asked.clear()
    refusal = prepared(out, "fineweb_edu", f"--tokens={tokens}")
    files = {path.name: path.read_bytes() for path in out.iterdir() if path.name not in ("meta.json", ".lock")}
    assert refusal or files and files == {name: server.files[name] for name in files}
    return refusal


@pytest.mark.parametrize("faults, words", (
    *((faults, "") for faults in ("503 503", "silent", "stall", "cut stall cut", "cut rangeless", "page", "short",
                                  "foreign", "cut long", "cut page")),
    ("503 " * 5, "503"), ("silent " * 5, "timed out"), ("page " * 5, "not a token file"), ("long " * 5, "was cut"),
    ("foreign " * 5, "has the token 65,535")))
def test_download_gets_over_what_servers_do_or_says_what_it_was(faults, words, server, tmp_path):
    server.faults += faults.split()
    begun = time.time()
    if words:
        refusal = fineweb(server, tmp_path)
        assert words in refusal and VAL in refusal
        assert {path.name for path in tmp_path.iterdir()} <= {".lock", f"{VAL}.part"}      # no file of its own name
    assert fineweb(server, tmp_path) is None and time.time() - begun < 5
    if not words:
        assert (0 < server.asked[VAL][1] <= 100_512) == faults.startswith(("cut", "stall"))
        assert len(server.asked[VAL]) == 1 + len(faults.replace("rangeless", "").split())


def test_only_what_is_asked_for_and_not_there_is_downloaded(server, tiny_encoding, tmp_path, monkeypatch, capsys):
    """And the bytes are counted once there is a vocabulary."""
    with monkeypatch.context() as patch:
        patch.setattr(tiktoken, "get_encoding", lambda name: open("/none/vocabulary"))
        assert fineweb(server, tmp_path, 150_001) is None and set(server.asked) == {VAL, *TRAIN[:2]}
    assert read_folder(tmp_path)[2]["val"]["bytes"] is None and "bits per byte will be" in capsys.readouterr().out
    assert fineweb(server, tmp_path, 2e5) is None and not server.asked
    train, val, meta = read_folder(tmp_path)
    assert bytes(train[0:200_000]) == server.files[TRAIN[0]][1024:] + server.files[TRAIN[1]][1024:]
    assert len(train) == 200_000 == meta["train"]["tokens"] and len(val) == 100_000
    tokens = val[0:100_000]
    assert meta["val"]["bytes"] == len(tiny_encoding.decode_bytes(tokens[tokens != 260]))
    assert fineweb(server, tmp_path, 3e5) is None and set(server.asked) == {TRAIN[2]}


def test_killed_download_goes_on_where_it_was(server, tmp_path, monkeypatch):
    """Also one that was killed between a file's last byte and its name. Before that, nobody else may write there."""
    server.faults += ["stall"]
    code = f"import prepare_data as p; p.FINEWEB_EDU = '{server.url}'; p.SHARD_TOKENS = 100_000; p.main()"
    child = subprocess.Popen([sys.executable, "-c", code, "fineweb_edu", "--tokens=1e5", f"--out={tmp_path}"], cwd=HERE)
    part, deadline = tmp_path / f"{VAL}.part", time.time() + 20
    while not (part.exists() and part.stat().st_size) and time.time() < deadline:
        time.sleep(0.01)
    assert "another process is writing" in fineweb(server, tmp_path)
    child.kill()
    child.wait()
    size = part.stat().st_size
    assert 0 < size < 100_512 and not (tmp_path / VAL).exists()
    (tmp_path / f"{TRAIN[0]}.part").write_bytes(server.files[TRAIN[0]])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 201_024 - size - 1))
    assert f"{201_024 - size:,} bytes are to be downloaded" in fineweb(server, tmp_path) and not server.asked
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 201_024 - size))
    assert fineweb(server, tmp_path) is None and server.asked == {VAL: [size], TRAIN[0]: [201_024]}


def test_shakespeare_is_tokenized_here_if_it_is_what_it_should_be(server, tmp_path, monkeypatch):
    text = b"First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 50
    server.files["input.txt"] = text.replace(b"speak", b"smile")
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    assert "has not the sha256" in prepared(tmp_path, "shakespeare") and not (tmp_path / "input.txt").exists()
    server.files["input.txt"] = text
    for _ in range(2):
        assert prepared(tmp_path, "shakespeare") is None and b"".join(text_of(tmp_path)) == text
    assert server.asked == {"input.txt": [0] * (prepare_data.ATTEMPTS + 1)}
    (tmp_path / "input.txt").write_bytes(text[:-1])
    assert "input.txt has not the sha256" in prepared(tmp_path, "shakespeare")


@pytest.mark.parametrize("network", ("refuses", "says nothing", "has a name server that hangs"))
@pytest.mark.parametrize("source, words", (
    ("fineweb_edu", "use `python"), ("requirements.txt --tokenizer=gpt2", "TIKTOKEN_")))
def test_no_network_is_said_within_ten_seconds(source, words, network, tmp_path):
    """Of the true addresses, by a proxy that nobody listens at or that says nothing, or with a hanging name server."""
    hang = "socket.getaddrinfo = lambda *args, **options: time.sleep(30)" if "name" in network else ""
    code = f"import socket, time, prepare_data as p; assert p.PATIENCE <= 8; p.PATIENCE = 0.5\n{hang}\np.main()"
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        url = "" if hang else f"http://127.0.0.1:{proxy.getsockname()[1]}"
        proxy.close() if network == "refuses" else None
        begun = time.time()
        done = process("-c", code, *source.split(), f"--out={tmp_path}/out", HTTPS_PROXY=url, https_proxy=url,
                       NO_PROXY="", no_proxy="", TIKTOKEN_CACHE_DIR=str(tmp_path))
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and words in done.stderr
    assert time.time() - begun < 8 and not list(tmp_path.glob("out/[a-z]*"))
