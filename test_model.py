"""
What model.py, parametrize.py, train.py and prepare_data.py promise: `python -m pytest`, without a
network or a GPU. What the laboratory promises stands in results/test_*.py.

Each test states one claim, and was seen to fail with the code that it guards broken. Sizes are
tiny, since a wrong factor or axis is as wrong at width 32 as at 4096.
"""
import codecs
import csv
import errno
import fcntl
import gzip
import hashlib
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
from pathlib import Path

import numpy as np
import pytest
import requests
import tiktoken
import torch
from packaging.requirements import Requirement

import parametrize as parametrize_py
import prepare_data
import train
from model import GPT, GPTConfig
from parametrize import COLUMNS
from parametrize import parametrize
from prepare_data import fingerprint, read_folder, read_tokens

HERE = Path(train.__file__).resolve().parent
SCRIPTS = ["train.py", "model.py", "parametrize.py", "prepare_data.py"]
VAL = "fineweb_val_000000.bin"
TRAIN = [f"fineweb_train_{number:06d}.bin" for number in range(1, 5)]
GERMAN = "Der Fluß trägt alte Boote.\n" * 200
torch.set_num_threads(1)        # as in the processes below: sums are taken in the same order


# ------------------------------------------------------------------------------------------------
# Helpers: models

# Settings in which every factor counts: no init or scale is 1.
OFF_CENTER = {"alpha_A_init": 0.3, "alpha_A_scale": 0.2, "alpha_M_init": 0.25, "alpha_M_scale": 0.3,
              "s_qk_init": 1.3, "s_qk_scale": 0.4, "s_u_init": 0.7, "s_u_scale": 0.5,
              "s_nu_init": 1.2, "s_nu_scale": 0.6, "s_z_init": 6.0, "s_z_scale": 0.6}


def small_model(**changes):
    torch.manual_seed(0)
    sizes = {"width": 32, "depth": 2, "head_dim": 8, "vocab_size": 48, "seq_len": 16}
    return GPT(GPTConfig(OFF_CENTER, **{**sizes, **changes}))


def off_center_model():
    """A small model whose rescalers have moved, some α to below 0."""
    model = small_model()
    for name, parameter in model.named_parameters():
        if name.endswith("raw"):
            parameter.data *= torch.empty_like(parameter).uniform_(0.5, 1.5)
        if "alpha" in name:
            parameter.data *= torch.rand_like(parameter).sub(0.3).sign()
    return model


def batch(rows=2, length=16):
    """Tokens and targets, both (rows, length)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(48, (2, rows, length), generator=generator)


def gradients(model, forward, tokens, targets):
    """(loss, {name: gradient}) of a model, by way of forward."""
    model.zero_grad()
    _, loss = forward(tokens, targets)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def largest_error(a, b):
    """The largest relative error of a tensor in a, {name: tensor}, against b."""
    return max(((a[name] - b[name]).norm() / b[name].norm()).item() for name in b)


# ------------------------------------------------------------------------------------------------
# Helpers: runs


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data folder of 8,000 bytes."""
    folder = tmp_path_factory.mktemp("data")
    words = "norm sphere rescaler alpha residual width depth head".split()
    return make_data(folder, " ".join(np.random.default_rng(0).choice(words, 2000))[:8000])


def make_data(folder, text):
    """The data folder of a text."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "words.txt").write_text(text)
    prepare_data.prepare_text(folder / "words.txt", folder / "tokens", progress=False)
    return folder / "tokens"


def options(data, out_dir, **changes):
    """Options of a run of a fraction of a second: 8 steps of 4 sequences, twice the base's size."""
    tiny = {"width": 32, "depth": 2, "head_dim": 8, "seq_len": 16, "steps": 8, "batch_size": 4,
            "base_width": 16, "base_depth": 1, "base_steps": 4, "base_batch_size": 2,
            "data": data, "out_dir": out_dir, "device": "cpu", "dtype": "float32", "compile": False,
            "log_every": 1, "eval_every": 4, "eval_tokens": 304, "checkpoint_every": 4,
            "sample_tokens": 0}
    return [f"--{name}={value}" for name, value in {**tiny, **changes}.items()]


def run(*argv):
    """train.py in this process. Returns its exit code, or the sentence with which it leaves."""
    try:
        return train.main(list(argv))
    except SystemExit as end:
        return end.code


def initial_model(**changes):
    """The model with which a run of `options` begins."""
    config = train.load_config(train.parse_args(options("", "", vocab_size=256, **changes)))
    model, _ = train.build(config, torch.device("cpu"))
    return model


def process(*argv, **env):
    """A finished process of Python, in the repository."""
    return subprocess.run([sys.executable, *map(str, argv)], cwd=HERE, capture_output=True,
                          text=True, errors="surrogateescape",
                          env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def start(*argv, before_step=None, rank=0, ranks=1, port=0, folder=None):
    """train.py in a forked process, which need not import PyTorch again. before_step(step) is
    called as each step starts. folder: where else the scripts stand."""
    def main():
        if folder:
            for script in SCRIPTS:
                sys.modules.pop(script.removesuffix(".py"), None)
            sys.path.insert(0, str(folder))
            os.chdir(folder)
        import train
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        train.rank = rank
        train.local_rank = rank
        train.world_size = ranks
        if before_step:
            batch_starts = train.batch_starts

            def watched(seed, step, *rest):
                before_step(step)
                return batch_starts(seed, step, *rest)
            train.batch_starts = watched
        sys.exit(train.main(list(map(str, argv))))

    started = multiprocessing.get_context("fork").Process(target=main)
    started.start()
    return started


def outcome(started):
    """Exit code of a process from `start`; minus the signal's number if a signal ended it."""
    started.join(300)       # far more than any of them needs
    started.kill()
    started.join()
    return started.exitcode


def send(at, *numbers):
    """For `start`: the process sends itself signals as step `at` begins."""
    def before_step(step):
        if step == at:
            for number in numbers:
                os.kill(os.getpid(), number)
    return before_step


def signaled(at, number, *argv):
    """Exit code of train.py in a process that gets the signal in step `at`."""
    return outcome(start(*argv, before_step=send(at, number)))


def free_port():
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def ranks(*argvs, before_step=None):
    """Exit codes of ranks, each with its own options. before_step is the last rank's."""
    port = free_port()
    started = []
    for rank, argv in enumerate(argvs):
        hook = before_step if rank == len(argvs) - 1 else None
        started.append(start(*argv, before_step=hook, rank=rank, ranks=len(argvs), port=port))
    return [outcome(one) for one in started]


def log(out_dir):
    """Rows of log.csv, less what a clock says."""
    if not (out_dir / "log.csv").exists():
        return []
    with open(out_dir / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["train_seconds"], row["tokens_per_second"]
    return rows


def log_numbers(out_dir, *columns):
    """Some columns of log.csv as numbers, (rows, columns)."""
    return np.array([[float(row[column] or "nan") for column in columns] for row in log(out_dir)])


def checkpoint(out_dir):
    return torch.load(out_dir / "ckpt.pt", weights_only=True)


def steps_saved(out_dir):
    return checkpoint(out_dir)["progress"]["step"]


def weights(out_dir):
    return checkpoint(out_dir)["model"]


def assert_same_run(one, other):
    """Weights, Adam's state and log are the same to the bit, and only the three files were left."""
    assert len(log(one)) > 0
    assert log(one) == log(other)
    a = checkpoint(one)
    b = checkpoint(other)
    torch.testing.assert_close(a["model"], b["model"], rtol=0, atol=0)
    torch.testing.assert_close(a["optimizer"]["state"], b["optimizer"]["state"], rtol=0, atol=0)
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    for name in ("step", "train_loss", "val_loss"):
        assert a["progress"][name] == b["progress"][name]
    assert sorted(path.name for path in other.iterdir()) == ["ckpt.pt", "config.json", "log.csv"]


def is_sentence(text):
    """Whether a run left with one sentence of train.py."""
    return isinstance(text, str) and text.startswith("train.py: ") and "\n" not in text


# ------------------------------------------------------------------------------------------------
# model.py


def unit(y):
    return y / (y * y).sum(-1, keepdim=True).sqrt()


def turn_by_position(x):
    """RoPE as a complex number: channels i and i + D/2 of x (B, T, D), turned by
    t · 10000^(-2i/D)."""
    _, T, D = x.shape
    frequencies = 10000 ** (-torch.arange(0, D, 2).double() / D)
    angles = torch.arange(T).double()[:, None] * frequencies
    real, imaginary = x.chunk(2, -1)
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), -1)


def logits_by_the_book(model, tokens):
    """Logits by the equations of section 2, head by head, in fp64. Only weights and sizes come from
    model.py."""
    w = {name: parameter.double() for name, parameter in model.state_dict().items()}
    c = model.config
    D = c.head_dim
    T = tokens.size(1)
    future = torch.ones(T, T).triu(1).bool()

    def rescaler(name):
        kind = name.split(".")[-1]
        return w[f"{name}.raw"] * OFF_CENTER[f"{kind}_init"] / OFF_CENTER[f"{kind}_scale"]

    h = w["embedding"][tokens]
    for i in range(c.depth):
        block = f"blocks.{i}."
        s_qk = rescaler(block + "s_qk")
        heads = []
        for j in range(c.width // D):
            rows = slice(j * D, (j + 1) * D)
            q = unit(turn_by_position(h @ w[block + "W_q"][rows].T)) * s_qk[j]
            k = unit(turn_by_position(h @ w[block + "W_k"][rows].T)) * s_qk[j]
            v = h @ w[block + "W_v"][rows].T
            scores = (math.sqrt(D) * q @ k.mT).masked_fill(future, -math.inf)
            heads.append(scores.softmax(-1) @ v)
        y = torch.cat(heads, -1) @ w[block + "W_O"]
        h = unit(h + rescaler(block + "alpha_A").abs() * (unit(y) - h))

        u = (h @ w[block + "W_u"].T) * rescaler(block + "s_u")
        nu = (h @ w[block + "W_nu"].T) * rescaler(block + "s_nu") * math.sqrt(c.width)
        y = (u * nu / (1 + torch.exp(-nu))) @ w[block + "W_oMLP"]
        h = unit(h + rescaler(block + "alpha_M").abs() * (unit(y) - h))
    return (h @ w["unembedding"].T) * rescaler("s_z")


def test_model_is_the_equations():
    model = off_center_model()
    tokens, _ = batch()
    book = logits_by_the_book(model, tokens)
    logits, loss = model(tokens)
    tens_of_roundings = 50 * 2 ** -24 * book.abs().max().item()
    torch.testing.assert_close(logits.double(), book, rtol=0, atol=tens_of_roundings)
    assert loss is None


def test_loss_is_the_mean_over_targets_that_count():
    model = off_center_model()
    tokens, targets = batch()
    targets[0, 3:9] = -1
    logits, loss = model(tokens, targets)
    likelihood = logits.double().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(loss.double(), -likelihood[targets >= 0].mean(), rtol=1e-5, atol=0)


def test_weights_are_unit_vectors_before_and_after_training(data, tmp_path):
    assert run(*options(data, tmp_path)) == 0
    for state in (initial_model().state_dict(), weights(tmp_path)):
        for name, weight in state.items():
            if not name.endswith("raw"):
                assert weight.size(1) == 32, name
                torch.testing.assert_close(weight.norm(dim=1), torch.ones(len(weight)))


@pytest.mark.parametrize("heads, depth, billions", [
    (8, 12, 0.26), (40, 12, 3.22), (12, 8, 0.39), (12, 128, 2.55)])
def test_parameter_counts_are_the_papers(heads, depth, billions):
    sizes = {"width": 102 * heads, "depth": depth, "head_dim": 102, "vocab_size": 100_352}
    with torch.device("meta"):
        model = GPT(GPTConfig(OFF_CENTER, **sizes))
    assert round(model.num_params() / 1e9, 2) == billions


def test_generate_takes_the_likeliest_at_temperature_0():
    model = off_center_model()
    tokens, _ = batch()
    start = tokens[:, :4]
    drawn = model.generate(start, 20, temperature=0)        # 24 tokens: longer than seq_len, 16
    assert torch.equal(drawn[:, :4], start)
    for i in range(4, 24):
        logits, _ = model(drawn[:, max(0, i - 16):i])
        assert torch.equal(drawn[:, i], logits[:, -1].argmax(-1))
    assert torch.equal(model.generate(start, 20, top_k=1), drawn)


def test_generate_draws_by_temperature_from_the_k_likeliest():
    model = off_center_model()
    start = batch()[0][:1, :4]
    logits = model(start)[0][0, -1]

    def frequencies(**how):
        drawn = model.generate(start.expand(4000, 4), 1, **how)[:, -1]
        return drawn.bincount(minlength=48) / 4000

    for temperature in (0.5, 2):
        expected = (logits / temperature).softmax(0)
        drawn = frequencies(temperature=temperature)
        six_deviations = 0.05
        torch.testing.assert_close(drawn, expected, rtol=0, atol=six_deviations)
    drawn = frequencies(top_k=3, temperature=9).nonzero().flatten().tolist()
    assert set(drawn) == set(logits.topk(3).indices.tolist())


def test_compiled_model_is_the_eager_one():
    model = off_center_model()
    loss, grads = gradients(model, model, *batch())
    compiled_loss, compiled_grads = gradients(model, torch.compile(model), *batch())
    assert compiled_loss == pytest.approx(loss, rel=1e-5)
    assert largest_error(compiled_grads, grads) < 1e-4


def test_bfloat16_is_float32_to_its_own_width():
    """bf16 keeps 8 bits, so a rounding errs by at most u = 2^-8. A product rounds two factors and
    itself. 6 stand in a row in a block (q, q·k, P·v, W_O, u, W_oMLP); with the logits 13 in two
    blocks, and as many backward. Independent errors add as a root: √(3·26) u of a gradient, √(3·13)
    u of a logit, which is typically s_z / √d. The loss is a mean over 128 tokens, each moved by its
    logits' error times |softmax - onehot| ≤ √2."""
    u = 2 ** -8
    model = off_center_model()
    tokens, targets = batch(rows=8)
    loss, grads = gradients(model, model, tokens, targets)
    with torch.autocast("cpu", torch.bfloat16):
        bf16_loss, bf16_grads = gradients(model, model, tokens, targets)
        length = model.hidden(tokens).norm(dim=-1)
    error = math.sqrt(2 / 128) * math.sqrt(3 * 13) * u * 6 / math.sqrt(32)
    assert 0 < abs(bf16_loss - loss) < error
    assert largest_error(bf16_grads, grads) < math.sqrt(3 * 26) * u
    torch.testing.assert_close(length, torch.ones(8, 16))       # norms and hidden states stay fp32


# ------------------------------------------------------------------------------------------------
# parametrize.py

# The factors of η and the initial values at two sizes over a base of width 1024, 10 blocks,
# 10,000 steps and batch 64. The first size is 4, 9, 125 and 8 times that base.
PUBLISHED = """
                          rate of η for                              init       scale
column      width depth steps  batch embedding hidden unembedding rescalers α s_z
ngpt         4096  90 1250000  512  1 1 1 1 0.05 0.015625
ngpt          384   3    2700    8  1 1 1 1 0.05 0.051031
mup          4096  90 1250000  512  0.1 0.05 0.1 0.2 0.00555556 0.03125
mup           384   3    2700    8  2.52656 4.12586 2.52656 1.5472 0.166667 0.03125
nugpt        4096  90 1250000  512  0.1 0.0707107 0.0707107 0.2 0.00555556 0.03125
nugpt         384   3    2700    8  2.52656 3.22866 3.22866 1.5472 0.166667 0.03125
nugpt_full   4096  90 1250000  512  0.1 0.05 0.05 0.2 0.00555556 0.03125
nugpt_full    384   3    2700    8  2.52656 4.12586 4.12586 1.5472 0.166667 0.03125
nugpt_none   4096  90 1250000  512  0.1 0.1 0.1 0.2 0.00555556 0.03125
nugpt_none    384   3    2700    8  2.52656 2.52656 2.52656 1.5472 0.166667 0.03125
depth_mup    4096  90 1250000  512  0.1 0.0235702 0.0707107 0.2 0.0166667 0.03125
depth_mup     384   3    2700    8  2.52656 5.89469 3.22866 1.5472 0.0912871 0.03125
nugpt_batch  4096  90 1250000  512  0.141421 0.1 0.1 0.282843 0.00555556 0.03125
nugpt_batch   384   3    2700    8  1.78655 2.28301 2.28301 1.09403 0.166667 0.03125
"""
BASE = {"base_width": 1024, "base_depth": 10, "base_steps": 10_000, "base_batch_size": 64}
LARGE = {"width": 4096, "depth": 90, "steps": 1_250_000, "batch_size": 512, **BASE}


@pytest.mark.parametrize("line", PUBLISHED.strip().splitlines()[2:])
def test_every_cell_gives_the_published_number(line):
    column, *numbers = line.split()
    width, depth, steps, batch_size = map(int, numbers[:4])
    embedding, hidden, unembedding, rescalers, alpha, scale = map(float, numbers[4:])
    settings, lr_factors = parametrize(column, width=width, depth=depth, steps=steps,
                                       batch_size=batch_size, **BASE)
    expected = {"embedding": embedding, "hidden": hidden, "unembedding": unembedding,
                "rescalers": rescalers}
    assert lr_factors == pytest.approx(expected, rel=1e-5)
    of_one = ["s_qk_init", "s_u_init", "s_nu_init", "s_z_init", "s_u_scale", "s_nu_scale"]
    assert settings == pytest.approx({
        "alpha_A_init": alpha, "alpha_M_init": alpha,
        "alpha_A_scale": scale, "alpha_M_scale": scale, "s_qk_scale": scale, "s_z_scale": scale,
        **dict.fromkeys(of_one, 1)}, rel=1e-5)


def test_nugpt_z_starts_the_logits_at_the_root_of_the_width():
    settings, _ = parametrize("nugpt_z", **LARGE)
    assert settings["s_z_init"] == 2


def test_constants_multiply_the_rate_of_their_class(monkeypatch):
    """Also with a class added in the middle: nothing goes by position."""
    classes = {"embedding": ["embedding"], "gates": ["gate"], **parametrize_py.TENSOR_CLASSES}
    monkeypatch.setattr(parametrize_py, "TENSOR_CLASSES", classes)
    monkeypatch.setitem(COLUMNS["nugpt"], "lr_gates", "m_w^-1/2")
    _, plain = parametrize("nugpt", **LARGE)
    constants = {"embedding": 2, "hidden": 3, "unembedding": 0.3, "rescalers": 5}
    _, changed = parametrize("nugpt", lr_mults=constants, **LARGE)
    ratios = {name: changed[name] / plain[name] for name in plain}
    assert ratios == pytest.approx({**constants, "gates": 1})
    assert plain["gates"] == pytest.approx(0.5 / 5)


def test_a_class_without_its_name_is_not_dropped_in_silence(monkeypatch):
    classes = {**parametrize_py.TENSOR_CLASSES}
    classes["blocks"] = classes.pop("hidden")
    monkeypatch.setattr(parametrize_py, "TENSOR_CLASSES", classes)
    with pytest.raises(ValueError, match="column 'ngpt' sets 'lr_hidden', which is neither"):
        parametrize_py.build_columns()
    with pytest.raises(ValueError, match="hidden_lr_mult is 0.5, but .* has no class 'hidden'"):
        parametrize("nugpt", lr_mults={"hidden": 0.5}, **LARGE)


def test_a_variant_sets_nothing_that_does_not_exist(monkeypatch):
    monkeypatch.setitem(parametrize_py.VARIANTS, "mine", ("nugpt", {"s_zz_init": "2"}))
    with pytest.raises(ValueError, match="column 'mine' sets 's_zz_init', which is neither"):
        parametrize_py.build_columns()


@pytest.mark.parametrize("cell", ["m_x^2", "m_w^half", "", "2 m_w", "m_w^1/0"])
def test_unreadable_cells_are_refused(cell):
    with pytest.raises(ValueError, match="cannot read .* a factor is"):
        parametrize_py.value(cell, {"m_w": 2})


def test_every_parameter_has_one_class():
    names = [name for name, _ in small_model().named_parameters()]
    classes = [parametrize_py.class_of(name) for name in names]
    counts = {name: classes.count(name) for name in parametrize_py.TENSOR_CLASSES}
    assert counts == {"embedding": 1, "hidden": 2 * 7, "unembedding": 1, "rescalers": 2 * 5 + 1}


def test_at_the_base_every_column_is_the_same_run(data, tmp_path):
    at_base = {"base_width": 32, "base_depth": 2, "base_steps": 8, "base_batch_size": 4}
    for column in COLUMNS:
        assert run(*options(data, tmp_path / column, parametrization=column, **at_base)) == 0
        assert log(tmp_path / column) == log(tmp_path / "ngpt")
        torch.testing.assert_close(weights(tmp_path / column), weights(tmp_path / "ngpt"),
                                   rtol=0, atol=0)


def test_away_from_the_base_no_two_columns_are_the_same_run(data, tmp_path):
    losses = set()
    for column in COLUMNS:
        assert run(*options(data, tmp_path / column, parametrization=column)) == 0
        losses.add(log(tmp_path / column)[-1]["val_loss"])
    assert len(losses) == len(COLUMNS)


def test_parametrize_prints_the_table_and_one_models_numbers():
    table = process("parametrize.py").stdout
    assert "m_w^-3/4" in table
    assert "nugpt_none is nugpt, but lr_hidden m_w^-1/2" in table
    assert "0.1768" in process("parametrize.py", "--width=4096", "--steps=80000").stdout
    wrong = process("parametrize.py", "--width=0")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)


def test_the_readmes_table_is_the_one_that_is_used():
    shown = {}
    for line in (HERE / "README.md").read_text().splitlines():
        row, *cells = [cell.strip(" *`") for cell in line.strip("|").split("|")]
        if row in parametrize_py.TABLE:
            shown[row] = cells[:3]
    assert shown == parametrize_py.TABLE


# Somebody's own nGPT: other names, nn.Linear, u and ν as the halves of one matrix.
OWN_CLASSES = {
    "embedding": ["wte"],
    "hidden": ["query", "key", "value", "att_c_proj", "c_fc", "mlp_c_proj"],
    "unembedding": ["lm_head"],
    "rescalers": ["attn_alpha", "mlp_alpha", "sqk", "suv", "sz"],
}


def own_ngpt(d):
    def linear(wide):
        return torch.nn.Linear(d, wide, bias=False)

    block = {name: linear(d) for name in ("query", "key", "value", "att_c_proj", "mlp_c_proj")}
    block["c_fc"] = linear(8 * d)
    vectors = torch.nn.ParameterDict({name: torch.ones(d) for name in OWN_CLASSES["rescalers"]})
    return torch.nn.ModuleDict({"wte": torch.nn.Embedding(48, d), "h": torch.nn.ModuleDict(block),
                                "lm_head": linear(48), "vectors": vectors})


def own_rates(monkeypatch, width):
    """(settings, {parameter's name: rate}, {name: largest change by one step}) for own_ngpt, by
    the recipe of the README, at η = 0.01."""
    monkeypatch.setattr(parametrize_py, "TENSOR_CLASSES", OWN_CLASSES)
    monkeypatch.setattr(parametrize_py, "SHARED_ROWS", {
        "alpha_init": ["attn_alpha_init", "mlp_alpha_init"],
        "s_init": ["sqk_init", "suv_init", "sz_init"],
        "scale": ["attn_alpha_scale", "mlp_alpha_scale", "sqk_scale", "sz_scale"],
        "mlp_scale": ["suv_scale"]})
    monkeypatch.setattr(parametrize_py, "VARIANTS", {})
    settings, lr_factors = parametrize("nugpt", width=width, depth=2, steps=8, base_width=16,
                                       base_depth=2, base_steps=8,
                                       columns=parametrize_py.build_columns())
    model = own_ngpt(width)
    groups = parametrize_py.param_groups(model, lr_factors)
    for group in groups:
        group["lr"] = 0.01 * group["lr_factor"]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.Adam(groups, eps=1e-16)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    change = {name: (parameter.detach() - before[name]).abs().max().item()
              for name, parameter in model.named_parameters()}
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    named = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    return settings, named, change


def test_the_table_serves_another_ngpt_at_its_base(monkeypatch):
    settings, rates, _ = own_rates(monkeypatch, 16)
    assert set(rates.values()) == {0.01}
    assert settings["sz_scale"] == settings["attn_alpha_scale"] == 16 ** -0.5
    assert settings["mlp_alpha_init"] == 0.05


def test_the_table_serves_another_ngpt_four_times_as_wide(monkeypatch):
    settings, rates, change = own_rates(monkeypatch, 64)
    assert settings["sz_scale"] == 16 ** -0.5
    expected = {"wte.weight": 4 ** -0.5, "h.c_fc.weight": 4 ** -0.75, "h.query.weight": 4 ** -0.75,
                "lm_head.weight": 4 ** -0.75, "vectors.suv": 1, "vectors.sz": 1}
    for name, factor in expected.items():
        assert rates[name] == pytest.approx(0.01 * factor)
        assert change[name] == pytest.approx(0.01 * factor, rel=1e-3)


# ------------------------------------------------------------------------------------------------
# train.py: the loop


def factors(schedule, **changes):
    config = train.Config(schedule=schedule, steps=10, **changes)
    return [train.schedule(step, config) for step in (0, 1, 5, 8, 9)]


def test_schedules_are_the_curves_worked_out_by_hand():
    assert factors("linear") == pytest.approx([1, 0.91, 0.55, 0.28, 0.19])
    assert factors("wsd") == pytest.approx([1, 1, 1, 1, 0.55])
    assert factors("wsd", decay_fraction=0.4, min_lr_ratio=0) == pytest.approx([1, 1, 1, 0.5, 0.25])
    assert factors("cosine")[2] == pytest.approx(0.55)
    warm = factors("linear", warmup_steps=2, min_lr_ratio=0)
    assert warm == pytest.approx([1 / 3, 2 / 3, 0.5, 0.2, 0.1])


def test_train_takes_adams_steps_at_the_tables_rates(data, tmp_path):
    """Three steps, written out: the model of init, batches of batch_starts, Adam (arXiv:1412.6980)
    and AdamW's decay, at the rates of the table on a cosine to 10 %."""
    constants = {"embedding": 2, "hidden": 1.5, "unembedding": 0.7, "rescalers": 0.6}
    changes = {f"{tensor_class}_lr_mult": constant for tensor_class, constant in constants.items()}
    changes.update(steps=3, learning_rate=0.03, weight_decay=0.1)
    assert run(*options(data, tmp_path, **changes)) == 0

    _, lr_factors = parametrize("nugpt", lr_mults=constants, width=32, depth=2, steps=3,
                                batch_size=4, base_width=16, base_depth=1, base_steps=4,
                                base_batch_size=2)
    model = initial_model(**changes)
    tokens = read_tokens(data / "train.bin").astype(int)
    m = {}
    v = {}
    for t in range(3):
        starts = train.batch_starts(0, t, 4, 16, len(tokens))
        rows = torch.tensor(np.stack([tokens[start:start + 17] for start in starts]))
        loss, grads = gradients(model, model, rows[:, :-1], rows[:, 1:])
        rate = 0.03 * (0.1 + 0.9 * (1 + math.cos(math.pi * t / 3)) / 2)
        logged = log_numbers(tmp_path, "learning_rate", "train_loss")[t]
        assert logged == pytest.approx([rate, loss], rel=1e-5)
        for name, parameter in model.named_parameters():
            m[name] = 0.9 * m.get(name, 0) + 0.1 * grads[name]
            v[name] = 0.95 * v.get(name, 0) + 0.05 * grads[name] ** 2
            unbiased_m = m[name] / (1 - 0.9 ** (t + 1))
            unbiased_v = v[name] / (1 - 0.95 ** (t + 1))
            step = unbiased_m / (unbiased_v.sqrt() + 1e-16)
            decay = 0 if name.endswith("raw") else 0.1
            scale = lr_factors[parametrize_py.class_of(name)]
            parameter.data -= rate * scale * (step + decay * parameter.data)
        model.normalize_weights()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(weights(tmp_path)[name], parameter.data, rtol=0, atol=1e-4)


def test_ranks_and_micro_batches_do_not_change_the_losses(data, tmp_path):
    """Micro-batches of 3 leave one sequence over. Sums are taken in another order."""
    command = options(data, tmp_path / "2 ranks", micro_batch_size=1)
    assert ranks(command, command) == [0, 0]
    for micro in (0, 1, 3):
        assert run(*options(data, tmp_path / f"{micro}", micro_batch_size=micro)) == 0
    columns = ["step", "tokens", "learning_rate", "train_loss", "val_loss", *train.LOGGED_RESCALERS]
    whole = log_numbers(tmp_path / "0", *columns)
    for other in ("2 ranks", "1", "3"):
        np.testing.assert_allclose(log_numbers(tmp_path / other, *columns), whole, rtol=1e-4)


def test_weights_of_a_checkpoint_have_no_prefix_of_a_wrapper(data, tmp_path, monkeypatch):
    command = options(data, tmp_path / "ddp")
    assert ranks(command, command) == [0, 0]
    compiler = torch.compile        # the same wrapper, at once
    monkeypatch.setattr(torch, "compile", lambda part, **_: compiler(part, backend="eager"))
    assert run(*options(data, tmp_path / "compiled", compile=True)) == 0
    for folder in ("ddp", "compiled"):
        assert weights(tmp_path / folder).keys() == small_model().state_dict().keys()


def test_evaluation_is_the_mean_over_evenly_spread_windows(data, tmp_path):
    """19 of the 24 windows of val.bin. Neither 4 nor 3 sequences at a time divide them."""
    tokens = torch.tensor(read_tokens(data / "val.bin").astype(int))
    windows = (len(tokens) - 1) // 16
    starts = [16 * (k * windows // 19) for k in range(19)]
    rows = torch.stack([tokens[start:start + 17] for start in starts])
    for micro in (3, 4):
        out_dir = tmp_path / f"{micro}"
        assert run(*options(data, out_dir, micro_batch_size=micro, eval_every=3)) == 0
        model = initial_model()
        model.load_state_dict(weights(out_dir))
        _, loss = model(rows[:, :-1], rows[:, 1:])
        val_loss = log_numbers(out_dir, "val_loss")[:, 0]
        assert val_loss[-1] == pytest.approx(loss.item(), rel=1e-5)
        assert (np.flatnonzero(np.isfinite(val_loss)) + 1).tolist() == [3, 6, 8]


def test_log_has_the_means_of_the_rescalers(data, tmp_path):
    assert run(*options(data, tmp_path)) == 0
    model = initial_model()
    model.load_state_dict(weights(tmp_path))
    alpha_A = torch.cat([block.alpha_A().abs() for block in model.blocks]).mean().item()
    alpha_M = torch.cat([block.alpha_M().abs() for block in model.blocks]).mean().item()
    expected = [alpha_A, alpha_M, model.s_z().mean().item()]
    logged = log_numbers(tmp_path, *train.LOGGED_RESCALERS)[-1]
    assert logged == pytest.approx(expected, rel=1e-5)


def test_a_batch_is_a_function_of_seed_and_step():
    forward = [train.batch_starts(0, step, 5, 8, 85) for step in range(6)]
    backward = [train.batch_starts(0, step, 5, 8, 85) for step in reversed(range(6))]
    assert forward == backward[::-1]
    assert forward[0] != train.batch_starts(1, 0, 5, 8, 85)


def test_an_epoch_has_every_window_once_in_an_order_of_its_own():
    """10 windows of 8 tokens, two batches of 5 an epoch."""
    orders = []
    for step in (0, 2, 4):
        starts = train.batch_starts(0, step, 5, 8, 85) + train.batch_starts(0, step + 1, 5, 8, 85)
        assert np.diff(sorted(starts)).tolist() == [8] * 9
        assert 0 <= min(starts) and max(starts) + 8 < 85
        orders.append([(start - min(starts)) // 8 for start in starts])
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_train_is_a_function_that_calls_after_every_step(data, capsys):
    config = train.load_config(train.parse_args(options(data, "")))
    seen = []
    outcome = train.train(config, after_step=lambda step, model: seen.append(step))
    assert seen == list(range(9))
    assert (outcome["status"], outcome["step"]) == ("finished", 8)
    assert "no --base was given" not in capsys.readouterr().out     # its numbers were


def test_a_compiler_that_fails_is_said_and_the_run_goes_on(data, tmp_path, monkeypatch, capsys):
    def broken(model, **options):
        def forward(*batch):
            raise RuntimeError("g++: no such file\nand a hundred lines more")
        return forward
    monkeypatch.setattr(torch, "compile", broken)
    assert run(*options(data, tmp_path / "tried", compile=True)) == 0
    said = capsys.readouterr().out
    assert "uncompiled, since torch.compile failed: RuntimeError: g++: no such file\n" in said
    assert run(*options(data, tmp_path / "uncompiled")) == 0
    assert log(tmp_path / "tried") == log(tmp_path / "uncompiled")


def test_a_diverged_run_says_so_and_keeps_the_last_checkpoint(data, tmp_path, monkeypatch):
    # a NaN as learning rate: what a large one does depends on the processor
    monkeypatch.setattr(train, "schedule", lambda step, config: math.nan if step == 5 else 1.0)
    assert run(*options(data, tmp_path, checkpoint_every=1)) == 3
    assert [row["status"] for row in log(tmp_path)] == [""] * 5 + ["diverged"]
    assert steps_saved(tmp_path) == 5
    assert all(weight.isfinite().all() for weight in weights(tmp_path).values())


def test_a_run_says_its_rates_first_and_its_results_last(data, tmp_path, capsys):
    assert run(*options(data, tmp_path, sample_tokens=20)) == 0
    said = capsys.readouterr().out
    assert "m_w=2 m_d=2 m_t=2; η=0.0028 becomes embedding 0.00157, " in said
    *_, last = said.splitlines()
    assert last.startswith("final: step=8 val_loss=")
    assert "bits_per_byte=" in last
    assert last.endswith(f"s_z={log(tmp_path)[-1]['s_z']}")
    record = json.loads((tmp_path / "config.json").read_text())
    assert (record["config"]["width"], record["config"]["dtype"]) == (32, "float32")
    assert (record["torch"], record["data"]["tokenizer"]) == (torch.__version__, "byte")


# ------------------------------------------------------------------------------------------------
# train.py: kills, signals and resumed runs


def breaks_off_while_saving(state, file, save=torch.save):
    """torch.save that is killed in the middle of the checkpoint of step 6."""
    save(state, file)
    if state["progress"]["step"] == 6:
        file.truncate(file.tell() // 2)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_killed_anywhere_and_resumed_is_bit_equal(data, tmp_path, monkeypatch):
    """kill -9: before the first step, in the middle of writing a checkpoint, then six times
    wherever it strikes."""
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    resumed = [f"--out_dir={killed}", "--resume"]
    long = {"steps": 150, "checkpoint_every": 2, "eval_every": 7, "eval_tokens": 48}
    assert run(*options(data, whole, **long)) == 0

    assert signaled(0, signal.SIGKILL, *options(data, killed, **long)) == -signal.SIGKILL
    assert steps_saved(killed) == 0
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", breaks_off_while_saving)
        assert outcome(start(*resumed)) == -signal.SIGKILL
    assert steps_saved(killed) == 4
    assert (killed / "ckpt.pt.tmp").exists()

    seed = time.time_ns() % 2 ** 32
    print(f"seed {seed}")       # seen if the test fails
    rng = np.random.default_rng(seed)
    for _ in range(6):
        row = steps_saved(killed) + rng.integers(20)
        started = start(*resumed)
        while started.is_alive() and (killed / "log.csv").read_bytes().count(b"\n") <= row:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        started.kill()
        assert outcome(started) == -signal.SIGKILL
    assert outcome(start(*resumed)) == 0
    assert_same_run(whole, killed)


STOPPING = [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]


@pytest.mark.parametrize("numbers", [[signal.SIGINT], *([number] * 3 for number in STOPPING)])
def test_a_signal_saves_and_resume_is_bit_equal(numbers, data, tmp_path, capfd):
    """Schedulers and torchrun both pass signals on: any number of them is as one."""
    whole = tmp_path / "whole"
    stopped = tmp_path / "stopped"
    command = options(data, stopped)
    assert run(*options(data, whole)) == 0
    assert outcome(start(*command, before_step=send(2, *numbers))) == 4
    *_, last = capfd.readouterr().out.splitlines()
    assert last == "stopped after step 3; the same command with --resume continues"
    assert run(*command, "--resume") == 0
    assert_same_run(whole, stopped)


def test_a_second_ctrl_c_ends_at_once_and_damages_nothing(data, tmp_path):
    twice = send(5, signal.SIGINT, signal.SIGINT)
    assert outcome(start(*options(data, tmp_path), before_step=twice)) == 130
    assert steps_saved(tmp_path) == 4
    assert run(f"--out_dir={tmp_path}", "--resume") == 0


def test_ctrl_c_without_a_folder_or_in_a_sample_is_quiet(data, trained, monkeypatch, capfd):
    assert outcome(start(*options(data, ""), before_step=send(2, signal.SIGINT))) == 130
    assert "Traceback" not in capfd.readouterr().err

    def interrupted(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(GPT, "generate", interrupted)
    assert run(f"--out_dir={trained}", "--sample_only", "--device=cpu") == 130


def test_an_ignored_signal_stays_ignored(data, tmp_path):
    def nohup(step):
        if step == 2:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert outcome(start(*options(data, tmp_path), before_step=nohup)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_given_back_and_a_thread_sets_none(data, tmp_path):
    numbers = [signal.SIGINT, *STOPPING]
    before = [signal.getsignal(number) for number in numbers]
    assert run(*options(data, tmp_path / "main")) == 0
    assert [signal.getsignal(number) for number in numbers] == before
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run(*options(data, tmp_path / "thread"))))
    thread.start()
    thread.join()
    assert codes == [0]


def test_ranks_told_to_stop_at_different_steps_stop_at_one(data, tmp_path):
    """One of three ranks gets the signal. A resumed run agrees but for rounding."""
    whole = options(data, tmp_path / "whole", batch_size=6)
    command = options(data, tmp_path / "stopped", batch_size=6)
    assert ranks(whole, whole, whole) == [0, 0, 0]
    at_4 = send(4, signal.SIGTERM)
    assert ranks(command, command, command, before_step=at_4) == [4, 4, 4]
    assert steps_saved(tmp_path / "stopped") == 5
    again = [f"--out_dir={tmp_path / 'stopped'}", "--resume"]
    assert ranks(again, again, again) == [0, 0, 0]
    losses = [log_numbers(tmp_path / name, "train_loss") for name in ("whole", "stopped")]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_torchrun_and_its_workers_told_to_stop_save(data, tmp_path):
    """A real launch. A scheduler signals every process, and torchrun passes its own signal on."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    command = [sys.executable, *torchrun, *options(data, tmp_path, steps=10 ** 5)]
    started = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while started.poll() is None and len(log(tmp_path)) <= 3:
        time.sleep(0.05)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    for pid in [started.pid, *map(int, children)]:
        os.kill(pid, signal.SIGTERM)
    said, errors = started.communicate()
    assert started.returncode != 0
    last = f"stopped after step {steps_saved(tmp_path)}; the same command with --resume"
    assert said.count(last) == 1, errors


@pytest.mark.parametrize("changes, words", [
    ({"learning_rate": 0.5}, "rank 1 has learning_rate=0.5, but rank 0 has 0.0028"),
    ({"out_dir": ""}, "rank 1 has checkpoint of step=None, but rank 0 has 8"),
    ({"data": "other"}, "rank 1 has data=t"),
])
def test_ranks_that_differ_are_refused(changes, words, data, tmp_path, capfd):
    changes = dict(changes)
    if "data" in changes:
        changes["data"] = make_data(tmp_path / "other", "other words\n" * 800)
    out = tmp_path / "out"
    resumes = "out_dir" in changes
    if resumes:
        assert run(*options(data, out)) == 0
        before = (out / "ckpt.pt").read_bytes()
    first = options(data, out, resume=resumes)
    second = options(**{"data": data, "out_dir": out, **changes})
    assert ranks(first, second) == [1, 1]
    assert words in capfd.readouterr().err
    if resumes:
        assert (out / "ckpt.pt").read_bytes() == before
    else:
        assert not out.exists()


def test_a_full_disk_is_a_sentence_and_keeps_the_checkpoint(data, tmp_path, capfd):
    assert signaled(6, signal.SIGKILL, *options(data, tmp_path)) == -signal.SIGKILL
    before = (tmp_path / "ckpt.pt").read_bytes()
    limit = len(before) // 2

    def no_room(step):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    capfd.readouterr()
    assert outcome(start(f"--out_dir={tmp_path}", "--resume", before_step=no_room)) == 1
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert re.search(r"train.py: .*ckpt.pt could not be written .*; the last is untouched", said)
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_a_log_is_cut_by_rows_whatever_a_spreadsheet_made_of_it(data, tmp_path):
    assert signaled(6, signal.SIGKILL, *options(data, tmp_path)) == -signal.SIGKILL
    path = tmp_path / "log.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"7,64,0.0")
    assert run(f"--out_dir={tmp_path}", "--resume") == 0
    with open(path, newline="", encoding="utf-8-sig") as file:
        assert [row["step"] for row in csv.DictReader(file)] == list("12345678")


def test_a_disk_without_locks_is_said_and_trained_on(data, tmp_path, monkeypatch, capsys):
    def flock(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr(fcntl, "flock", flock)
    assert run(*options(data, tmp_path)) == 0
    assert "is not locked (Function not implemented)" in capsys.readouterr().out


def test_two_processes_cannot_train_in_one_folder(data, tmp_path):
    assert run(*options(data, tmp_path, steps=4)) == 0
    with open(tmp_path / "log.csv", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = (tmp_path / "log.csv").read_bytes()
        assert "another process is training in" in run(f"--out_dir={tmp_path}", "--resume")
    assert (tmp_path / "log.csv").read_bytes() == before
    assert run(f"--out_dir={tmp_path}", "--resume") == 0        # the lock died with its holder


def test_a_resumed_run_cannot_change_an_option_that_makes_it(data, tmp_path):
    assert signaled(6, signal.SIGKILL, *options(data, tmp_path)) == -signal.SIGKILL
    saved = checkpoint(tmp_path)["config"]
    for name in train.options_of_a_run(train.Config):
        old = saved[name]
        new = "other" if isinstance(old, str) else old + 1
        sentence = run(f"--out_dir={tmp_path}", "--resume", f"--{name}={new}")
        assert is_sentence(sentence)
        assert f"has {name}={old}, which a resumed run cannot change; another --out_dir" in sentence


def test_a_resumed_run_may_change_everything_else(data, tmp_path):
    whole = tmp_path / "whole"
    changed = tmp_path / "changed"
    assert run(*options(data, whole)) == 0
    assert signaled(6, signal.SIGKILL, *options(data, changed)) == -signal.SIGKILL
    shutil.copytree(data, tmp_path / "moved")
    free = {"data": tmp_path / "moved", "log_every": 2, "eval_every": 3, "checkpoint_every": 1,
            "sample_tokens": 3, "prompt": "norm"}
    assert run("--resume", *options(out_dir=changed, **free)) == 0
    torch.testing.assert_close(weights(whole), weights(changed), rtol=0, atol=0)


SOMEBODYS_FILES = {     # name: its content, and what the sentence says
    "log.csv": ("epoch,loss\n1,2.5\n", "log.csv was not written by this train.py"),
    "config.json": ('{"name": "my app"}', "nor of a run of train.py"),
    "ckpt.pt": ("weights of another program", "already holds a run; continue it with --resume"),
}


@pytest.mark.parametrize("name", SOMEBODYS_FILES)
def test_a_folder_with_other_files_is_not_written_to(name, data, tmp_path):
    content, words = SOMEBODYS_FILES[name]
    (tmp_path / name).write_text(content)
    assert words in run(*options(data, tmp_path))
    assert (tmp_path / name).read_text() == content


def test_the_log_of_a_run_without_its_checkpoint_is_kept(data, tmp_path):
    assert run(*options(data, tmp_path)) == 0
    (tmp_path / "ckpt.pt").unlink()
    text = (tmp_path / "log.csv").read_text()
    for option in ("--resume=False", "--resume"):
        assert "log.csv of a run whose ckpt.pt is gone" in run(*options(data, tmp_path), option)
        assert (tmp_path / "log.csv").read_text() == text


@pytest.mark.parametrize("place", [0, -1], ids=["training", "validation"])
def test_a_run_is_not_resumed_on_other_data(place, data, tmp_path):
    text = list((data.parent / "words.txt").read_text())
    text[place] = "X"
    other = make_data(tmp_path / "other", "".join(text))
    assert run(*options(data, tmp_path / "out")) == 0
    assert "was trained with another data" in run(*options(other, tmp_path / "out"), "--resume")


def damaged_checkpoints(whole, ours):
    """Bytes of files that are no checkpoint of ours."""
    yield whole[:len(whole) // 2]
    yield b""
    for foreign in ({**ours, "config": {"size": 3}}, {"model": ours["model"], "iter_num": 5}, []):
        buffer = io.BytesIO()
        torch.save(foreign, buffer)
        yield buffer.getvalue()


def test_a_damaged_or_foreign_checkpoint_is_refused(data, tmp_path):
    assert run(*options(data, tmp_path)) == 0
    path = tmp_path / "ckpt.pt"
    for content in damaged_checkpoints(path.read_bytes(), checkpoint(tmp_path)):
        path.write_bytes(content)
        sentence = run(f"--out_dir={tmp_path}", "--resume")
        assert is_sentence(sentence)
        assert "ckpt.pt is no checkpoint of" in sentence
        assert path.read_bytes() == content


@pytest.mark.parametrize("row, cell, words", [
    ("alpha_A_init", "0.06", "has a model with settings={'alpha_A_init': 0.05"),
    ("lr_hidden", "m_w^-0.8", "was trained with other learning rates"),
])
def test_a_run_is_not_resumed_with_another_table(row, cell, words, data, tmp_path, monkeypatch):
    assert run(*options(data, tmp_path, parametrization="ngpt")) == 0
    monkeypatch.setitem(COLUMNS["ngpt"], row, cell)
    assert words in run(f"--out_dir={tmp_path}", "--resume")


def test_resume_without_a_checkpoint_says_that_a_new_run_begins(data, tmp_path, capsys):
    assert run(*options(data, tmp_path), "--resume") == 0
    assert f"{tmp_path}/ckpt.pt is not there: a new run begins" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# train.py: initial weights, samples and the base


def test_init_from_starts_with_the_weights_of_another_run(data, tmp_path):
    other = make_data(tmp_path / "other", (data.parent / "words.txt").read_text()[::-1])
    first = tmp_path / "first"
    second = tmp_path / "second"
    assert run(*options(data, first)) == 0
    assert run(*options(other, second, init_from=first, learning_rate=1e-30)) == 0
    torch.testing.assert_close(weights(second), weights(first), rtol=0, atol=1e-6)
    assert log(second)[0]["step"] == "1"
    sentence = run(*options(data, tmp_path / "third", init_from=first, width=64))
    assert "has a model with width=32, " in sentence
    assert f"--base={first} takes its numbers" in sentence


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """The folder of a trained run, whose data are gone."""
    folder = tmp_path_factory.mktemp("trained")
    moved = shutil.copytree(data, folder / "data")
    assert run(*options(moved, folder / "run", steps=20)) == 0
    shutil.rmtree(moved)
    return folder / "run"


def sampled(capsys, folder, *argv):
    """The text of a sample of the model in a folder."""
    capsys.readouterr()
    command = [f"--out_dir={folder}", "--sample_only", "--device=cpu", "--sample_tokens=60"]
    assert run(*command, *argv) == 0
    return capsys.readouterr().out


def test_a_sample_begins_with_its_prompt_and_changes_no_file(trained, capsys):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    text = sampled(capsys, trained, "--prompt=norm\x1b[2J")
    assert "\nnorm\ufffd[2J" in text        # what a terminal takes for a command is no text
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before


def test_another_seed_temperature_or_top_k_draws_another_sample(trained, capsys):
    texts = [sampled(capsys, trained, option)
             for option in ("--seed=0", "--seed=1", "--temperature=0", "--top_k=2", "--seed=0")]
    assert len(set(texts)) == 4
    assert texts[0] == texts[-1]


def no_network(name):
    raise ValueError("tiktoken has no network")


def test_a_missing_model_or_tokenizer_ends_sample_only_with_1(trained, tmp_path, monkeypatch):
    assert "cannot be read" in run(f"--out_dir={tmp_path}", "--sample_only")
    monkeypatch.setattr(train, "get_tokenizer", no_network)
    assert run(f"--out_dir={trained}", "--sample_only", "--device=cpu") == (
        "train.py: no sample: tiktoken has no network")


def test_a_token_in_a_vocabularys_gap_is_no_traceback(data, monkeypatch, capsys):
    def decode(self, tokens):
        raise KeyError(200)
    monkeypatch.setattr(prepare_data.ByteTokenizer, "decode", decode)
    assert run(*options(data, "", sample_tokens=5)) == 0
    assert "no sample: byte has no token 200" in capsys.readouterr().out


def test_a_run_ends_well_without_its_sample(data, monkeypatch, capsys):
    monkeypatch.setattr(train, "get_tokenizer", no_network)
    assert run(*options(data, "", sample_tokens=5)) == 0
    said = capsys.readouterr().out
    assert "no sample: tiktoken has no network" in said
    assert said.splitlines()[-1].startswith("final: ")


BASE_NUMBERS = {"width": 16, "depth": 1, "steps": 4, "batch_size": 2, "head_dim": 8, "seq_len": 16,
                "learning_rate": 0.02, "embedding_lr_mult": 0.25, "schedule": "linear"}


def write_base(path, **changes):
    content = {"config": {**BASE_NUMBERS, **changes}, "data": {"tokenizer": "byte"}}
    path.write_text(json.dumps(content))
    return path


def test_a_base_gives_what_the_command_leaves_out(tmp_path):
    base = write_base(tmp_path / "base.json")
    given = train.parse_args([f"--base={base}", "--width=64", "--schedule=wsd"])
    config = train.load_config(given)
    assert (config.width, config.depth, config.schedule) == (64, 1, "wsd")
    assert (config.learning_rate, config.embedding_lr_mult) == (0.02, 0.25)
    assert [getattr(config, name) for name in train.SIZES[4:]] == [16, 1, 4, 2]


def test_a_run_is_a_base_by_its_folder_or_its_config_json(trained):
    for base in (trained, trained / "config.json"):
        config = train.load_config(train.parse_args([f"--base={base}", "--width=64"]))
        assert (config.width, config.steps, config.seed, config.out_dir) == (64, 20, 0, "out")
        # the run stood away from its own base, at which its η was stated
        assert (config.base_width, config.base_steps) == (16, 4)


def test_what_the_rule_does_not_carry_is_said(data, tmp_path, capsys):
    few = {"device": "cpu", "dtype": "float32", "compile": False, "sample_tokens": 0,
           "out_dir": "", "data": data, "base": write_base(tmp_path / "base.json")}

    def said(**changes):
        assert run(*(f"--{name}={value}" for name, value in {**few, **changes}.items())) == 0
        return capsys.readouterr().out

    words = "note: the rule does not carry η over head_dim (8 → 16), batch_size (2 → 4): the best"
    assert words in said(width=32, head_dim=16, batch_size=4)
    assert "note:" not in said(width=32, batch_size=4, parametrization="nugpt_batch")
    # a run's η belongs to the batch of the run's own base
    own = write_base(tmp_path / "run.json", batch_size=4, base_batch_size=2)
    assert "note: the rule does not carry η over batch_size (2 → 4)" in said(base=own)


BAD_BASES = {       # content of the file: what the sentence says
    "": "is no base", "{": "is no base", '{"width": 48}': "is no base",
    '{"config": [1]}': "is no base", '{"config": {"width": 16}}': "has no depth",
}
for option, value, words in [
        ("widht", 3, "unknown option, widht"), ("width", 16.5, "width must be of type int"),
        ("width", 20, "width must be a positive multiple"),
        ("schedule", "step", "schedule must be"),
        ("learning_rate", -1, "must be above 0"), ("parametrization", "sp", "no parametrization")]:
    BAD_BASES[json.dumps({"config": {**BASE_NUMBERS, option: value}})] = words


@pytest.mark.parametrize("content", BAD_BASES, ids=lambda content: content[-40:])
def test_a_bad_base_is_refused_and_nothing_begins(content, data, tmp_path):
    (tmp_path / "base.json").write_text(content)
    few = [f"--data={data}", "--device=cpu", f"--out_dir={tmp_path / 'out'}"]
    sentence = run(f"--base={tmp_path / 'base.json'}", *few)
    assert is_sentence(sentence)
    assert BAD_BASES[content] in sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["laptop.json", "gpu.json"])
def test_the_bases_that_come_with_the_code_are_bases(name):
    config = train.load_config({"base": str(HERE / "results" / name)})
    train.check(config)
    assert (config.base_width, config.base_steps) == (config.width, config.steps)


# ------------------------------------------------------------------------------------------------
# train.py: options and refusals


def test_options_are_written_as_people_write_them():
    argv = ["--width", "128", "--resume", "--compile=False", "--learning_rate=2^-7", "--prompt=",
            "--steps=1e4", "--data=~/text//"]
    assert train.parse_args(argv) == {
        "width": 128, "resume": True, "compile": False, "learning_rate": 2 ** -7, "prompt": "",
        "steps": 10_000, "data": os.path.expanduser("~/text")}


REFUSALS = {        # option: what the sentence says
    "--widht=64": "unrecognized", "8": "unrecognized", "--width=wide": "of type int",
    "--width=1.5": "of type int", "--compile=maybe": "of type bool", "--base=nowhere": "cannot be",
    "--learning_rate=0.1,0.2": "of type float", "--learning_rate=0^-1": "of type float",
    "--learning_rate=nan": "finite", "--learning_rate=-1": "above 0", "--beta2=1": "beta",
    "--width=60": "multiple of head_dim=8", "--head_dim=1": "head_dim", "--steps=0": "at least 1",
    "--base_width=0": "at least 1", "--depth=0": "at least 1", "--eps=-1": "epsilon",
    "--decay_fraction=2": "at most 1", "--dtype=float16": "one of auto, float32, bfloat16",
    "--schedule=step": "one of cosine, linear, wsd", "--warmup_steps=8": "the rate never reaches η",
    "--parametrization=sp": "the columns are ngpt, mup, nugpt", "--device=cuda": "PyTorch sees 0",
    "--seq_len=4000": "more than seq_len", "--data=nowhere": "prepare_data.py",
}


@pytest.mark.parametrize("option", REFUSALS)
def test_impossible_options_are_refused_in_one_sentence(option, data, tmp_path):
    sentence = run(*options(data, tmp_path), option)
    assert is_sentence(sentence)
    assert REFUSALS[option] in sentence
    assert not (tmp_path / "log.csv").exists()


def test_a_batch_that_ranks_cannot_share_is_refused(data, tmp_path):
    command = options(data, tmp_path, batch_size=4)
    assert ranks(command, command, command) == [1, 1, 1]


@pytest.mark.parametrize("env", [{"WORLD_SIZE": "2", "RANK": "0"}, {"RANK": "1"}])
def test_a_schedulers_variables_without_torchrun_get_a_sentence(env, data):
    done = process("train.py", *options(data, ""), **env)
    assert done.returncode == 1
    assert is_sentence(done.stderr.strip())


def test_memory_that_cannot_be_had_is_a_sentence(data, monkeypatch):
    def out_of_memory(*args):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(train, "evaluate", out_of_memory)
    assert "train.py: out of memory: a smaller --micro_batch_size" in run(*options(data, ""))


def test_a_terminal_that_lacks_letters_does_not_end_a_run(data):
    done = process("train.py", *options(data, "", sample_tokens=30), PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].startswith("final: ")


@pytest.mark.parametrize("redirection", ["| true", ">&- 2>&-"], ids=["closed pipe", "no streams"])
def test_a_run_needs_nobody_who_listens(redirection, data, tmp_path):
    words = shlex.join([sys.executable, "train.py", *options(data, tmp_path)])
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    subprocess.run(["bash", "-c", f"{words} {redirection}"], cwd=HERE, env=env, check=True)
    assert log(tmp_path)[-1]["status"] == "finished"


def test_paths_may_hold_anything_and_never_reach_a_shell(data, tmp_path):
    odd = tmp_path / "Anna's; touch ran; 'R&D' back\\slash"
    copy_scripts(odd)
    moved = shutil.copytree(data, odd / "my data")
    command = options(moved, odd / "my run", steps=1)
    assert outcome(start(*command, folder=odd)) == 0
    assert (odd / "my run" / "ckpt.pt").exists()
    assert not (odd / "ran").exists()


# ------------------------------------------------------------------------------------------------
# One edit each, as a fork would make it


def copy_scripts(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for script in SCRIPTS:
        shutil.copy(HERE / script, folder)


def fork(folder, *edits):
    """A copy of the scripts with edits: (file, text before, text after), …"""
    copy_scripts(folder)
    for file, before, after in edits:
        text = (folder / file).read_text()
        assert text.count(before) == 1, f"{before!r} is {text.count(before)} times in {file}"
        (folder / file).write_text(text.replace(before, after))
    return folder


MUON = '''
class Muon(torch.optim.AdamW):
    """Adam, but for the blocks' matrices the momentum, orthogonalized by Newton and Schulz."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if group["name"] == "hidden":
                for parameter in group["params"]:
                    state = self.state[parameter]
                    state.setdefault("step", torch.zeros(()))       # AdamW looks for it on --resume
                    momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                    momentum.mul_(0.95).add_(parameter.grad)
                    x = momentum / momentum.norm()
                    for _ in range(5):
                        a = x @ x.mT
                        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
                    parameter.sub_(group["lr"] * x)
                    parameter.grad = None       # Adam leaves a parameter without a gradient alone
        super().step()


def make_optimizer('''
VARIANT = ("parametrize.py", "VARIANTS = {")

ABLATIONS = {       # name: its edits, each (file, text before, text after)
    "another rule for α₀, with α_A and α_M apart": [
        (*VARIANT, 'VARIANTS = {\n    "mine": ("nugpt", {"alpha_A_init": "α₀·m_d^-1/2", '
                   '"alpha_M_init": "0.1·m_d^-1"}),'),
    ],
    "tied embeddings": [
        ("model.py", "self.unembedding = nn.Parameter(torch.empty(V, d)) ",
         "self.unembedding = self.embedding "),
    ],
    "no s_qk": [
        ("model.py", "norm(rope(q, cos_sin)) * self.s_qk()\n"
                     "        k = norm(rope(k, cos_sin)) * self.s_qk()",
         "norm(rope(q, cos_sin))\n        k = norm(rope(k, cos_sin))"),
        ("model.py", '        self.s_qk = Rescaler("s_qk", config.settings, H, 1, D)\n', ""),
    ],
    "gradient clipping": [
        ("train.py", "        optimizer.step()\n",
         "        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)\n"
         "        optimizer.step()\n"),
    ],
    "ReLU² in the MLP": [
        ("model.py", "(u * F.silu(nu))", "(u * F.relu(nu).square())"),
    ],
    "a rate for each layer": [
        ("parametrize.py", "        lr_factor = lr_factors[tensor_class]",
         '        lr_factor = lr_factors[tensor_class] * (0.5 if "blocks.0." in name else 1)'),
    ],
    "another class of tensors, with its rate": [
        ("parametrize.py", '"W_nu", "W_oMLP"],', '"W_nu"],\n    "outputs": ["W_oMLP"],'),
        (*VARIANT, 'VARIANTS = {\n    "mine": ("nugpt", {"lr_outputs": "m_w^-1"}),'),
    ],
    "frozen α": [
        (*VARIANT, 'VARIANTS = {\n    "mine": ("nugpt", {"lr_alphas": "0"}),'),
        ("parametrize.py", '"s_z", "alpha_A", "alpha_M"],',
         '"s_z"],\n    "alphas": ["alpha_A", "alpha_M"],'),
    ],
    "Muon for the blocks' matrices": [
        ("train.py", "def make_optimizer(", MUON),
        ("train.py", "torch.optim.AdamW(groups,", "Muon(groups,"),
    ],
    "another schedule": [
        ("train.py", "SCHEDULES = {",
         'SCHEDULES = {\n    "steep": lambda done, config: (1 - done) ** 2,'),
    ],
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_is_a_few_edits_and_changes_the_run(name, data, tmp_path):
    changes = {}
    if "mine" in str(ABLATIONS[name]):
        changes["parametrization"] = "mine"
    if "schedule" in name:
        changes["schedule"] = "steep"
    folder = fork(tmp_path / "fork", *ABLATIONS[name])
    assert outcome(start(*options(data, tmp_path / "changed", **changes), folder=folder)) == 0
    assert run(*options(data, tmp_path / "plain")) == 0
    changed = log_numbers(tmp_path / "changed", "val_loss")[-1]
    assert np.isfinite(changed).all()
    assert changed != log_numbers(tmp_path / "plain", "val_loss")[-1]
    assert outcome(start(f"--out_dir={tmp_path / 'changed'}", "--resume", folder=folder)) == 0


def test_a_class_without_parameters_is_said(data, tmp_path, capfd):
    folder = fork(tmp_path, *ABLATIONS["tied embeddings"])
    assert outcome(start(*options(data, ""), folder=folder)) == 0
    said = capfd.readouterr().out
    assert "no parameter is of the class unembedding: its rate is not used" in said


def test_the_gradients_norm_in_the_log_is_two_edits(data, tmp_path):
    line = "        metrics = {}        # a fork's own numbers of this step, as floats; "
    norm = ('        metrics = {"norm": torch.cat([p.grad.flatten() for p in model.parameters()])'
            ".norm().item()}     # ")
    folder = fork(tmp_path / "fork", ("train.py", line, norm),
                  ("train.py", 'RESCALERS, "status"]', 'RESCALERS, "norm", "status"]'))
    assert outcome(start(*options(data, tmp_path / "out"), folder=folder)) == 0
    assert all(float(row["norm"]) > 0 for row in log(tmp_path / "out"))


WINDOW = [
    ("train.py", "    # optimization: Adam", "    window: int = 0\n\n    # optimization: Adam"),
    ("model.py", "    mlp_ratio: float", "    window: int = 0\n    mlp_ratio: float"),
    ("model.py", "        B, T, d = h.shape\n",
     "        B, T, d = h.shape\n        assert self.window in (0, 8)\n"),
    ("model.py", "        self.head_dim = D\n",
     "        self.head_dim = D\n        self.window = config.window\n"),
]


def test_an_option_of_the_model_is_a_line_of_each_config_and_its_use(data, tmp_path, capfd):
    old = tmp_path / "old"
    new = tmp_path / "new"
    assert run(*options(data, old)) == 0
    folder = fork(tmp_path / "fork", *WINDOW)
    assert outcome(start(*options(data, new), "--window=8", folder=folder)) == 0
    assert json.loads((new / "config.json").read_text())["model_config"]["window"] == 8
    assert outcome(start(f"--out_dir={new}", "--resume", "--window=0", folder=folder)) == 1
    assert "has window=8, which a resumed run cannot change" in capfd.readouterr().err
    # a run that is older than the option goes on: the option is at its default there
    assert outcome(start(f"--out_dir={old}", "--resume", folder=folder)) == 0


def test_a_run_of_another_model_py_is_refused_in_one_sentence(data, tmp_path, capfd):
    assert run(*options(data, tmp_path / "out")) == 0
    folder = fork(tmp_path / "fork", *ABLATIONS["no s_qk"])
    for option in ("--resume", "--sample_only"):
        assert outcome(start(f"--out_dir={tmp_path / 'out'}", option, folder=folder)) == 1
        sentence = capfd.readouterr().err.splitlines()[-1]
        assert sentence.endswith("has other parameters than the model: has model.py changed?")


def extra_matrix(shape):
    """Edits that add a matrix to each block, and use it."""
    place = "        self.s_qk = Rescaler("
    extra = f"        self.extra = nn.Parameter(torch.empty({shape}))\n"
    return [("model.py", place, extra + place),
            ("model.py", "norm(self.mlp(h))", "norm(self.mlp(F.linear(h, self.extra)))")]


def test_an_extra_matrix_needs_a_class_and_initial_values(data, tmp_path, capfd):
    classed = ("parametrize.py", '"W_nu", "W_oMLP"],', '"W_nu", "W_oMLP", "extra"],')
    folder = fork(tmp_path / "whole", *extra_matrix("d, d"), classed)
    assert outcome(start(*options(data, ""), folder=folder)) == 0
    folder = fork(tmp_path / "no class", *extra_matrix("d, d"))
    assert outcome(start(*options(data, ""), folder=folder)) == 1
    assert "blocks.0.extra is in no tensor class; name it in one line" in capfd.readouterr().err
    folder = fork(tmp_path / "no values", *extra_matrix("d, 1, d"), classed)
    assert outcome(start(*options(data, ""), folder=folder)) == 1
    assert "nobody initialized blocks.0.extra: do it in draw_weights" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------
# requirements.txt


@pytest.mark.parametrize("wrong", ["2.5.1", "2.6.0"])
def test_requirements_refuse_versions_with_a_wrong_gradient(wrong):
    """Compiled for one CPU thread, these compute another gradient of the embedding."""
    lines = [line.split("#")[0] for line in (HERE / "requirements.txt").read_text().splitlines()]
    allowed = {wanted.name: wanted.specifier for wanted in map(Requirement, lines)}
    assert torch.__version__.split("+")[0] in allowed["torch"]
    assert wrong not in allowed["torch"]


# ------------------------------------------------------------------------------------------------
# prepare_data.py: helpers


def prepared(out, *argv):
    """`python prepare_data.py … --out=out` in this process. Returns None, or the sentence with
    which it refuses."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["prepare_data.py", *map(str, argv), f"--out={out}"])
            prepare_data.main()
    except SystemExit as end:
        assert end.code.startswith("prepare_data.py: ") and "\n" not in end.code
        return end.code
    return None


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, in which the test works."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(files):
    """Writes files, {path: text or bytes}."""
    for name, content in files.items():
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def content():
    """{path: bytes} of all files here."""
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def made(files, *argv, out="out"):
    """[train, val]: the tokens that prepare_data.py makes of files."""
    put(files)
    assert prepared(out, *argv) is None
    return all_tokens(out)


def all_tokens(folder):
    """[train, val]: the tokens of a data folder as lists."""
    train, val, _ = read_folder(folder)
    return [train[0:len(train)].tolist(), val[0:len(val)].tolist()]


def text_of(splits):
    """The text of [train, val] if tokens are bytes."""
    return bytes(splits[0] + splits[1]).decode()


def token_file(*tokens, magic=20240520, version=1, dtype="<u2"):
    """Content of a token file in llm.c's format."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens)
    return header.tobytes() + raw(*tokens, dtype=dtype)


def raw(*tokens, dtype="<u2"):
    """Content of a token file of nanoGPT."""
    return np.array(tokens, dtype).tobytes()


def ended(*functions):
    """Exit codes of processes that run functions at once."""
    processes = [multiprocessing.get_context("fork").Process(target=run) for run in functions]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


@pytest.fixture
def tiny_encoding(monkeypatch):
    """A real encoding of tiktoken that needs no network; "gpt2" stands for it."""
    ranks = {bytes([i]): i for i in range(256)}
    ranks.update({b"no": 256, b"rm": 257, b"norm": 258, "ä".encode(): 259})
    tiny = tiktoken.Encoding("tiny", pat_str=r"\S+|\s+", mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 260})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: tiny)
    return tiny


# ------------------------------------------------------------------------------------------------
# prepare_data.py: texts


STORED = {      # a file's name: what it holds
    "plain.txt": GERMAN.encode(),
    "marked.txt": codecs.BOM_UTF8 + GERMAN.encode(),
    "windows.txt": GERMAN.replace("\n", "\r\n").encode(),
    "notepad.txt": codecs.BOM_UTF16_LE + GERMAN.encode("utf-16-le"),
    "big_endian.txt": codecs.BOM_UTF16_BE + GERMAN.encode("utf-16-be"),
    "packed_without_saying_so.txt": gzip.compress(GERMAN.encode("utf-16")),
    "not_packed.txt.gz": GERMAN.encode(),
    "UPPER.MD.GZ": gzip.compress(GERMAN.encode()),
    "lines.jsonl": "\n" + json.dumps({"text": GERMAN.replace("\n", "\r\n")}) + "\r\n\r\n",
    "lines.JSONL.gz": gzip.compress(json.dumps({"text": GERMAN}).encode("utf-16")),
    "Anna's \"A & B\" [1]*/\\ünï/" + os.fsdecode(b"\xfc.txt"): GERMAN,
}


@pytest.mark.parametrize("name", STORED)
def test_a_text_is_read_however_it_is_stored(name, here):
    for out in ("out", f"{name}.data"):
        assert text_of(made({name: STORED[name]}, name, out=out)) == GERMAN


TEXT = {"a.txt": "norm\n" * 100}
BOTH = {"train.bin": token_file(1, 2), "val.bin": token_file(1, 2)}
REFUSED = (     # (files, options, words of the sentence)
    # not in a known encoding
    ({"a.txt": GERMAN.encode("latin-1")}, "a.txt", "a.txt, line 1: this is neither UTF-8 nor"),
    ({"a.txt": b"norm\r\nnorm\n\xe4\n"}, "a.txt", "a.txt, line 3: this is neither UTF-8 nor"),
    ({"a.txt": "norm".encode("utf-16-le")}, "a.txt", "nor UTF-16 with a byte order mark"),
    ({"a.txt": "norm".encode("utf-32")}, "a.txt", "iconv"),
    ({"a.txt": b"norm", "b.txt": b"\xff"}, ".", "b.txt, line 1: "),
    ({"a.gz.txt": gzip.compress(b"\n\xff")}, "a.gz.txt", "a.gz.txt, line 2: "),
    # damaged
    ({"a.txt": "a\nb".encode("utf-16") + b"c"}, "a.txt", "a.txt is damaged after line "),
    ({"a.txt": gzip.compress(b"norm" * 99)[:-9]}, "a.txt", "is damaged after line "),
    ({"a.txt": b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + b"\xff" * 99}, "a.txt", "is damaged after line "),
    # not the text in a line of .jsonl
    ({"a.jsonl": '{"text": "norm"}\nnorm'}, "a.jsonl", "a.jsonl, line 2: no JSON object"),
    ({"a.jsonl": "[" * 10 ** 5}, "a.jsonl", "no JSON object"),
    ({"a.jsonl": '{"no": "norm"}'}, "a.jsonl", 'with a text "text" (--field=NAME chooses'),
    ({"a.jsonl": '{"text": null}'}, "a.jsonl --field=text", 'with a text "text"'),
    ({"a.jsonl": '{"text": "\\ud83d"}'}, "a.jsonl", "line 1: half of a surrogate pair"),
    # too little, or not there
    ({"a.txt": b"", "b.txt": b""}, ".", "a.txt on, is empty or too short"),
    ({"a.txt": b"a"}, "a.txt", "none is left for val"),
    ({"a.text": b"norm"}, "a.text", "name ends in .txt, .md or .jsonl"),
    ({}, "misisng.txt", "there is no file or folder misisng.txt"),
    (TEXT, "a.txt --val=none.txt", "there is no file or folder none.txt"),
    (TEXT, "a.txt --val=a.txt", "has no text beside that of a.txt"),
    # token files
    (BOTH, "train.bin", "of token files (*train*.bin, *val*.bin) give the folder"),
    (BOTH, ".", "take them with --tokenizer=NAME, or with --vocab_size=N"),
    ({"a_train.bin": token_file(1)}, ". --vocab_size=9", "none for val: a *val*.bin is missing"),
    ({"a_train_val.bin": token_file(1)}, ". --vocab_size=9", "which split is it for"),
    ({**BOTH, "val.bin": raw(1, 300)}, ". --tokenizer=byte",
     "val.bin has the token 300, but a vocabulary of 256 ends at 255"),
    ({**BOTH, "train.bin": raw(*range(99), dtype="<u4")}, ". --vocab_size=99",
     "seems to have tokens of four bytes"),
    ({**BOTH, "train.bin": token_file()}, ". --vocab_size=9", "has no token for train"),
    ({**BOTH, "train2.bin": raw(1)}, ". --vocab_size=9", "train2.bin is not a token file"),
    # options
    (TEXT, "a.txt --tokenizer=gpt7", "no tokenizer 'gpt7'"),
    (TEXT, "a.txt --over", "unrecognized"),
    (TEXT, "a.txt --vocab_size=9", "--vocab_size does not go with a.txt"),
    (TEXT, "shakespeare --tokens=5", "--tokens does not go with shakespeare"),
    (TEXT, "fineweb --tokens=0", "between 1 and 10,300,000,000"),
    (TEXT, "fineweb --tokens=nan", "between 1 and"),
)


@pytest.mark.parametrize("case", REFUSED, ids=[f"{case[1]}: {case[2]}" for case in REFUSED])
def test_what_is_not_right_is_refused_in_one_sentence(case, here):
    files, options, words = case
    put(files)
    before = content()
    assert words in prepared("out", *options.split())
    assert content() == before


def test_another_field_of_jsonl_can_be_the_text(here):
    files = {"a.jsonl": '{"text": "no", "content": "norm\\nνορμ"}\n\n' * 9}
    assert text_of(made(files, "a.jsonl", "--field=content")) == "norm\nνορμ" * 9


def test_a_folder_gives_its_texts_also_the_linked_ones(here):
    put({"in/a.txt": "1" * 99, "in/deep/B.TXT": "2" * 99, "far/c.md": "3" * 99})
    put({"in/pretrained.bin": "no tokens"})
    os.symlink(here / "far", "in/linked")
    os.symlink(here / "far", "in/linked_again")
    os.symlink(here / "in", "in/itself")
    assert sorted(text_of(made({}, "in"))) == sorted("123" * 99)


def test_what_is_left_out_of_a_folder_is_named(here, capsys):
    files = {f"in/{name}": b"\0" for name in ("0.pdf", ".git/a.txt", "b/._a.txt", "__MACOSX/c.txt")}
    Path("in").mkdir()
    Path("in/broken.txt").symlink_to("nowhere.txt")
    assert text_of(made({**files, "in/a.txt": GERMAN, "in/empty.txt": ""}, "in")) == GERMAN
    said = capsys.readouterr().out
    assert "left out (hidden): in/.git, in/__MACOSX, in/b/._a.txt\n" in said
    assert "left out (neither .txt nor .md nor .jsonl): in/0.pdf, in/broken.txt\n" in said
    assert "left out (empty): in/empty.txt\n" in said


def test_the_report_ends_with_a_whole_character(here, capsys):
    made({"a.txt": "a" + "ν" * 200}, "a.txt")
    assert f"it begins: {'a' + 31 * 'ν'!r}\n" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# prepare_data.py: splits, documents and tokens


def test_each_of_many_files_goes_to_one_split_for_good(here):
    files = {f"in/{number}.txt": f"[{number}]" for number in range(240)}
    _, val = made({**files, os.fsdecode(b"in/\xfc.txt"): "norm"}, "in")
    numbers = [58, 110, 114, 162, 183, 184, 187, 201, 207, 219]
    assert sorted(bytes(val).decode()[1:-1].split("][")) == sorted(map(str, numbers))


@pytest.fixture
def library(here, monkeypatch):
    """A small standard library. Returns its texts, as they were ever read."""
    files = {"a.py": "# ünï\r\n".encode() * 50, "b.py": "# ünï\n".encode("latin-1") * 50}
    others = {"test/c.py": "norm", "site-packages/d.py": "norm", "e.txt": "norm", "f.py": ""}
    put({f"lib/{name}": text for name, text in {**files, **others}.items()})
    monkeypatch.setattr(prepare_data.sysconfig, "get_paths", lambda: {"stdlib": "lib"})
    return ["# ünï\n" * 50, "# \ufffdn\ufffd\n" * 50]


def test_standard_library_is_read_as_ever(library):
    """Measurements rest on these bytes."""
    prepare_data.prepare_stdlib("out", progress=False)
    train, val = all_tokens("out")
    assert bytes(train).decode() == "".join(text[:285] for text in library)
    assert bytes(val).decode() == "".join(text[285:] for text in library)


def test_two_processes_may_prepare_the_library_at_once(library, monkeypatch):
    both = multiprocessing.get_context("fork").Barrier(2)
    measure = prepare_data.measure

    def measure_at_once(*args):
        both.wait()
        measure(*args)

    monkeypatch.setattr(prepare_data, "measure", measure_at_once)
    assert ended(prepare_data.prepare_stdlib, prepare_data.prepare_stdlib) == [0, 0]
    assert text_of(all_tokens("data/stdlib")) and os.listdir("data") == ["stdlib"]


def test_tokens_of_many_pieces_are_those_of_the_text(tiny_encoding, here, monkeypatch):
    """Of few files the last part of each is for validation; both parts end with end-of-text."""
    monkeypatch.setattr(prepare_data, "CHUNK", 100)
    texts = ["norm ä\n" * 400, "ä" * 999 + "\n"]
    train, val = made({"in/a.txt": texts[0], "in/b.txt": texts[1]}, "in", "--tokenizer=gpt2")
    encode = tiny_encoding.encode
    assert train == encode(texts[0][:2660]) + [260] + encode(texts[1][:950]) + [260]
    assert val == encode(texts[0][2660:]) + [260] + encode(texts[1][950:]) + [260]


def test_meta_json_tells_what_the_token_files_hold(tiny_encoding, here):
    splits = made({"a.txt": "ä" * 100}, "a.txt", "--tokenizer=gpt2")
    for split, tokens in zip(("train", "val"), splits):
        digest = hashlib.sha256(token_file(*tokens)).hexdigest()
        assert json.loads(Path("out/meta.json").read_text())[split] == {
            "tokens": len(tokens), "bytes": 2 * len(tokens) - 2, "largest": 260, "sha256": digest}


@pytest.mark.parametrize("vocab_size, size", ((2 ** 16, 2), (2 ** 16 + 1, 4)))
def test_tokens_of_a_large_vocabulary_take_four_bytes(vocab_size, size, here, monkeypatch):
    monkeypatch.setattr(prepare_data.ByteTokenizer, "vocab_size", vocab_size)
    monkeypatch.setattr(prepare_data.ByteTokenizer, "encode", lambda self, text: [vocab_size - 1])
    put(TEXT)
    prepare_data.prepare_text("a.txt", "out", progress=False)
    assert all_tokens("out") == [[vocab_size - 1]] * 2
    assert read_tokens("out/val.bin").itemsize == size


def test_more_tokens_than_a_file_holds_are_refused(here, monkeypatch):
    monkeypatch.setattr(prepare_data, "MAX_TOKENS", 474)
    put(TEXT)
    assert "475 tokens for train are too many" in prepared("out", "a.txt")


SEPARATED = {       # a file's name: what it holds, of 40 times the document "norm"
    "marks.txt": "norm\n<|endoftext|>\n" * 39 + "norm\n",
    "marks_twice.txt": "<|endoftext|>\r\nnorm\n<|endoftext|> \n" * 40,
    "lines.jsonl": '{"text": "norm\\n"}\n' * 40,
    "some_empty.jsonl": '{"text": ""}\n\n{"text": "norm\\n"}\n' * 40,
}


@pytest.mark.parametrize("name", SEPARATED)
def test_each_document_ends_with_the_end_of_text_token(name, tiny_encoding, here):
    document = tiny_encoding.encode("norm\n") + [260]
    assert made({name: SEPARATED[name]}, name, "--tokenizer=gpt2") == [document * 38, document * 2]


def test_a_document_across_the_border_becomes_two(tiny_encoding, here):
    train, val = made({"a.jsonl": '{"text": "ä ä ä"}\n' * 8}, "a.jsonl", "--tokenizer=gpt2")
    assert [train[-5:], val] == [[260, 259, 32, 259, 260], [32, 259, 260]]


@pytest.mark.parametrize("text, tokenizer", (("norm\n<|endoftext|>\n", "byte"),
                                             ("norm<|endoftext|>\n", "gpt2")))
def test_marks_that_stay_text_are_counted(text, tokenizer, tiny_encoding, here, capsys):
    made({"a.txt": text * 50}, "a.txt", f"--tokenizer={tokenizer}")
    assert "<|endoftext|> stays text in 50 places" in capsys.readouterr().out


def test_an_encoding_without_end_of_text_has_no_separators(tiny_encoding, here, monkeypatch):
    monkeypatch.setattr(prepare_data, "MARK", "<another>")
    train, val = made({"a.jsonl": '{"text": "ä"}\n' * 20}, "a.jsonl", "--tokenizer=gpt2")
    assert train + val == [259] * 20


def test_a_prompt_may_name_the_end_of_text(tiny_encoding):
    prompt = "norm<|endoftext|>norm"
    assert prepare_data.get_tokenizer("gpt2").encode_prompt(prompt) == [258, 260, 258]
    assert bytes(prepare_data.get_tokenizer("byte").encode_prompt(prompt)).decode() == prompt


def test_half_a_million_blanks_are_refused_by_name(tiny_encoding, here):
    put({"a.txt": " " * 10 ** 6})
    assert "a.txt: 500,000 blanks or more" in prepared("out", "a.txt", "--tokenizer=gpt2")


def test_validation_text_of_ones_own_is_all_of_it(here):
    """Also if it lies in the folder of the text: then it is not trained on."""
    files = {"in/train.txt": "norm", "in/val/a.md": "sphere"}
    assert list(map(bytes, made(files, "in", "--val=in/val"))) == [b"norm", b"sphere"]


# ------------------------------------------------------------------------------------------------
# prepare_data.py: data folders


WHOLE = token_file(*range(256))


def by_hand(val={}, **meta):
    """Makes the folder d as someone may by hand, of byte tokens from 0 to 255. val: more of its
    entry; meta: more of meta.json."""
    entry = {"tokens": 256}
    meta = {"vocab_size": 256, "train": entry, "val": {**entry, **val}, **meta}
    put({"d/train.bin": WHOLE, "d/val.bin": WHOLE, "d/meta.json": json.dumps(meta)})


def test_shards_are_one_stream_wherever_they_are_cut():
    """Twice within one sequence, an empty shard, one token alone."""
    stream = prepare_data.Stream(np.split(np.arange(400), [3, 8, 8, 9, 200, 301]))
    for start, stop in itertools.combinations((0, 1, 3, 8, 9, 10, 200, 250, 301, 400), 2):
        assert stream[start:stop].tolist() == list(range(start, stop))


def test_token_files_may_be_more_than_can_be_open(here):
    files = {f"in/train_{number}.bin": token_file(1, 2, 3) for number in range(300)}

    def prepare_and_read():
        resource.setrlimit(resource.RLIMIT_NOFILE, (250, 250))
        made({**files, "in/val.bin": token_file(1)}, "in", "--vocab_size=4")
        train, _, _ = read_folder("out")
        assert train[0:900].tolist() == [1, 2, 3] * 300 and train[2:4].tolist() == [3, 1]

    assert ended(prepare_and_read) == [0]


@pytest.mark.parametrize("wrong", ({}, {"bytes": 0}, {"largest": "3", "sha256": 3}))
def test_what_meta_json_lacks_is_filled_in(wrong, here):
    by_hand(wrong)
    digest = hashlib.sha256(WHOLE).hexdigest()
    whole = {"tokens": 256, "bytes": None, "largest": 255, "sha256": digest}
    assert read_folder("d")[2]["val"] == whole


WRONG = (       # what is edited in meta.json, its values
    ("vocab_size", (None, "256", 0, -3, 2.5, True, [])),
    ("train", (None, 3, [], {"tokens": "256"}, {"tokens": 255}, {"format": "uint8"},
               {"shards": {}}, {"shards": ["val.bin"]}, {"shards": {"train.bin": "256"}})),
)


@pytest.mark.parametrize("key, values", WRONG)
def test_a_wrong_field_of_meta_json_is_refused(key, values, here):
    for value in values:
        by_hand(**{key: value})
        with pytest.raises(ValueError, match="meta.json"):
            read_folder("d")


@pytest.mark.parametrize("content", ("{", "[]", "\0"))
def test_a_damaged_meta_json_is_refused(content, here):
    put({"d/meta.json": content})
    with pytest.raises(ValueError, match="d/meta.json is damaged"):
        read_folder("d")


DAMAGED = {     # what a token file holds: words of the sentence
    b"\0" + WHOLE[1:]: "is not a token file",
    WHOLE[:4] + b"\5" + WHOLE[5:]: "is not a token file",
    WHOLE[:100]: "is not a token file",
    WHOLE[:-1]: "was cut",
    WHOLE + b"\0": "was cut",
    token_file(): "has 0 tokens, but meta.json says 256",
}


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_token_file_is_refused_by_name(content, here):
    by_hand()
    put({"d/val.bin": content})
    with pytest.raises(ValueError, match=f"^d/val.bin {DAMAGED[content]}"):
        read_folder("d")


def test_tokens_beyond_the_vocabulary_are_refused(here):
    by_hand({"largest": 255, "sha256": "0"}, vocab_size=255, train={"shards": {"0.bin": 1}})
    put({"d/0.bin": token_file(1)})
    with pytest.raises(ValueError, match="d/val.bin has the token 255, but a vocab"):
        read_folder("d")


@pytest.mark.parametrize("name", ("meta.json", "val.bin"))
def test_a_missing_file_is_refused_by_name(name, here):
    by_hand()
    os.remove(f"d/{name}")
    with pytest.raises(ValueError, match=name):
        read_folder("d")


def test_tokens_are_not_read_again_if_known(here, monkeypatch):
    known = {"largest": 255, "sha256": "0"}
    by_hand(known, train=known)
    monkeypatch.setattr(prepare_data, "scan", None)
    read_folder("d")


def test_fingerprint_is_that_of_the_tokens(here):
    by_hand()
    before = fingerprint(read_folder("d")[2])
    put({"d/val.bin": token_file(*[0] * 256)})
    assert re.fullmatch("t[0-9a-f]{15}", before) and fingerprint(read_folder("d")[2]) != before


TOKENS = (      # what a folder of tokens that people have holds
    {"in/a_train_1.bin": token_file(1, 260), "in/a_train_2.bin": token_file(3, 4),
     "in/Valid.bin": token_file(258, 260)},
    {"in/train.bin": raw(1, 260, 3, 4), "in/val.bin": raw(258, 260), "in/input.txt": b"norm",
     "in/._train.bin": b"hidden"},
)


@pytest.mark.parametrize("files", TOKENS, ids=["llm.c", "nanoGPT"])
@pytest.mark.parametrize("option, num_bytes", (("tokenizer=gpt2", 4), ("vocab_size=261", None)))
@pytest.mark.parametrize("out", ("in", "out"))
def test_token_files_become_data_as_they_are(files, option, num_bytes, out, tiny_encoding, here):
    for _ in range(2):      # the same command again is fine
        assert made(files, "in", f"--{option}", out=out) == [[1, 260, 3, 4], [258, 260]]
    assert read_folder(out)[2]["val"]["bytes"] == num_bytes
    assert content().keys() == {*files, f"{out}/meta.json"}
    assert files.items() <= content().items()
    Path(out).rename("moved")
    assert all_tokens("moved")[1] == [258, 260]


# ------------------------------------------------------------------------------------------------
# prepare_data.py: nothing of the user's is overwritten


@pytest.mark.parametrize("command, names", (
    ("a.txt", ["train.bin", "val.bin"]), ("shakespeare", ["val.bin"]), ("fineweb", ["meta.json"])))
def test_files_that_we_did_not_write_are_kept(command, names, here):
    put({**TEXT, **{f"out/{name}": "mine" for name in names}})
    before = content()
    held = " and ".join(names)
    assert f"out holds {held}, not made by prepare_data.py; " in prepared("out", command)
    assert content() == before


@pytest.mark.parametrize("options", ("b.txt", "a.txt --tokenizer=gpt2", "a.txt --val=b.txt"))
def test_data_of_another_command_are_kept(options, tiny_encoding, here):
    made({**TEXT, "b.txt": GERMAN}, "a.txt")
    before = content()
    made_by = f"prepare_data.py {here}/a.txt --tokenizer=byte"
    assert f"out holds the data of `{made_by}`" in prepared("out", *options.split())
    assert content() == before


def test_overwrite_replaces_data_and_nothing_else(here):
    files = {"a.txt": GERMAN, "out/train.bin": b"mine", "out/notes": b"mine"}
    assert text_of(made(files, "a.txt", "--overwrite")) == GERMAN
    assert Path("out/notes").read_bytes() == b"mine"


def test_files_that_come_meanwhile_are_kept(here, monkeypatch):
    put(TEXT)
    write_json = prepare_data.write_json

    def write_late(*args):
        write_json(*args)
        put({"out/train.bin": b"mine"})

    monkeypatch.setattr(prepare_data, "write_json", write_late)
    assert "out holds train.bin, not made by" in prepared("out", "a.txt")
    assert content() == {"a.txt": TEXT["a.txt"].encode(), "out/train.bin": b"mine"}


def test_a_folder_of_texts_may_hold_its_own_data(here):
    for _ in range(2):
        assert text_of(made({"in/a.txt": GERMAN}, "in", out="in")) == GERMAN


def test_unchanged_data_stay_and_damaged_ones_are_mended(here):
    made(TEXT, "a.txt")
    before = os.stat("out/train.bin").st_ino
    made(TEXT, "a.txt")
    assert os.stat("out/train.bin").st_ino == before
    whole = content()
    put({"out/train.bin": whole["out/train.bin"][:-1] + b"\xff"})
    made(TEXT, "a.txt")
    assert content() == whole


@pytest.mark.parametrize("number", range(7))
def test_a_kill_leaves_nothing_that_looks_finished(number, here, capsys):
    """Before one of the renames, of a text as long as before. The same command mends it."""
    made({"a.txt": "norm" * 99}, "a.txt")
    put({"a.txt": "form" * 99})
    replace = os.replace
    calls = itertools.count()

    def replace_or_die(*paths):
        if next(calls) == number:
            os.kill(os.getpid(), 9)
        replace(*paths)

    def prepare_and_die():
        os.rename = replace_or_die
        os.replace = replace_or_die
        prepared("out", "a.txt")

    assert ended(prepare_and_die) == [-9 if number < 6 else 0]
    if number < 3:
        assert text_of(all_tokens("out")) == "norm" * 99
    elif number < 6:
        with pytest.raises(ValueError, match="out is not finished; repeat its command: python "):
            read_folder("out")
    assert text_of(made({}, "a.txt")) == "form" * 99
    assert ("remove what a killed one left: out/.out." in capsys.readouterr().out) == (number < 6)


def test_a_data_folder_given_as_a_source_is_said_to_be_one(here):
    made(TEXT, "a.txt")
    assert "out is a data folder already" in prepared("again", "out")
    made(TOKENS[0], "in", "--vocab_size=261", out="in")
    assert "in is a data folder already" in prepared("again", "in", "--vocab_size=261")


def test_a_file_is_on_the_disk_before_its_name_is(here, monkeypatch):
    events = []
    monkeypatch.setattr(prepare_data, "sync", events.append)
    monkeypatch.setattr(os, "replace", lambda *paths: events.append(paths))
    prepare_data.write_aside("file", lambda file: file.write(b"new"))
    assert events == [Path("file.tmp"), (Path("file.tmp"), "file"), Path()]


def test_a_folder_that_cannot_be_synced_is_no_error(here, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    prepare_data.sync(".")
    put(TEXT)
    with pytest.raises(OSError):
        prepare_data.sync("a.txt")


# ------------------------------------------------------------------------------------------------
# prepare_data.py: terminals


def test_the_default_folder_has_the_sources_name(here, monkeypatch):
    put({"a.b.TXT.gz": GERMAN})
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "~/a.b.TXT.gz"])
    prepare_data.main()
    assert text_of(all_tokens("~/data/a.b")) == GERMAN


def test_any_terminal_and_windows_line_ends_do(here):
    script = (HERE / "prepare_data.py").read_bytes().replace(b"\n", b"\r\n")
    put({"prepare_data.py": script, "in/Fluß-ν.pdf": "", "in/a.txt": GERMAN})
    done = process("-OO", here / "prepare_data.py", here / "in", f"--out={here}/out",
                   PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "it begins: 'Der Flu" in done.stdout


def test_a_closed_pipe_ends_it_quietly(here):
    put(TEXT)
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, HERE / "prepare_data.py", "a.txt"], stdout=writing,
                          stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "prepare_data.py" not in done.stderr


def test_closed_outputs_do_not_matter(here, monkeypatch):
    put(TEXT)
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert prepared("out", "a.txt") is None


# ------------------------------------------------------------------------------------------------
# prepare_data.py: downloads from an imitated server


class Broken(io.BytesIO):
    """The body of an answer whose connection breaks."""

    def read(self, size):
        block = super().read(size)
        if not block:
            raise requests.ConnectionError("broken")
        return block


class Server:
    """Has four shards of 1,000 tokens and one for validation."""

    def __init__(self):
        self.files = {name: token_file(*[7] * 1000) for name in (VAL, *TRAIN)}
        self.faults = []        # in the next answers
        self.asked = []         # (file, first byte, authorization) of each request

    def get(self, url, headers, stream, timeout):
        name = url.split("/")[-1]
        first = int(headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.asked.append((name, first, headers.get("Authorization")))
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "silent":
            raise requests.Timeout("timed out")
        body = self.files[name][first:]
        answer = requests.Response()
        answer.status_code = 206 if body else 416
        if fault in ("429", "503"):
            answer.status_code = int(fault)
            answer.headers["Retry-After"] = {"429": "3600", "503": "soon"}[fault]
        if fault in ("whole", "page"):
            answer.status_code = 200
            body = self.files[name] if fault == "whole" else b"<html>"
        answer.raw = io.BytesIO(body)
        if fault == "cut":
            answer.raw = Broken(body[:99])
        if fault == "long":
            answer.raw = io.BytesIO(body + b"no")
        return answer


@pytest.fixture
def server(here, monkeypatch, tiny_encoding):
    server = Server()
    monkeypatch.setattr(requests, "get", server.get)
    monkeypatch.setattr(requests, "head", lambda url: None)
    monkeypatch.setattr(prepare_data, "SHARD_TOKENS", 1000)
    monkeypatch.setattr(prepare_data, "BACKOFF", 0)
    return server


@pytest.mark.parametrize("faults, first", (
    ("503 503", [0, 0, 0]), ("silent", [0, 0]), ("cut whole", [0, 99]), ("page", [0, 0]),
    ("cut cut long", [0, 99, 198, 0]), ("cut page", [0, 99, 0])))
def test_download_gets_over_what_servers_do(faults, first, server):
    """It goes on where it was, and begins again if what came is not right."""
    server.faults += faults.split()
    assert made({}, "fineweb", "--tokens=1e3") == [[7] * 1000] * 2
    assert [asked[1] for asked in server.asked] == [*first, 0]


def test_download_waits_up_to_a_minute_if_asked_to(server, monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server.faults += ["429"]
    made({}, "fineweb", "--tokens=1e3")
    assert 60 in waits and "the server is busy; waiting for 60 s" in capsys.readouterr().out


def test_download_says_what_is_wrong_and_goes_on_later(server):
    server.faults += ["503"] * prepare_data.ATTEMPTS
    refusal = prepared("out", "fineweb", "--tokens=1e3")
    assert "503" in refusal and VAL in refusal and not os.path.exists("out/meta.json")
    made({}, "fineweb", "--tokens=1e3")


def test_only_what_is_missing_is_downloaded(server):
    """Also after a kill, be it between a file's last byte and its name."""
    put({f"out/{VAL}.part": server.files[VAL][:99], f"out/{TRAIN[0]}.part": server.files[VAL]})
    assert len(made({}, "fineweb", "--tokens=1001")[0]) == 2000
    assert len(made({}, "fineweb", "--tokens=3e3")[0]) == 3000
    asked = [(VAL, 99), (TRAIN[0], 3024), (TRAIN[1], 0), (TRAIN[2], 0)]
    assert [request[:2] for request in server.asked] == asked


@pytest.mark.parametrize("command, sent", (("fineweb --tokens=1e3", "Bearer secret"),
                                           ("shakespeare", None)))
def test_the_token_goes_to_hugging_face_alone(command, sent, server, monkeypatch):
    server.files["input.txt"] = b"norm"
    monkeypatch.setenv("HF_TOKEN", "secret")
    prepared("out", *command.split())
    assert {request[2] for request in server.asked} == {sent}


def test_a_mirror_can_take_the_place_of_hugging_face(here, monkeypatch):
    asked = []
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror/of/it")
    monkeypatch.setattr(requests, "head", asked.append)
    monkeypatch.setattr(prepare_data, "download", lambda *args: asked.append(args[0]))
    prepared("out", "fineweb", "--tokens=1")
    assert {url.partition("/datasets/kjj0/")[0] for url in asked} == {"http://mirror/of/it"}


def test_bytes_are_counted_once_there_is_a_vocabulary(server, tiny_encoding, monkeypatch, capsys):
    for vocabulary, num_bytes in (("/none", None), ("/dev/null", 1000)):
        def get_encoding(name):
            open(vocabulary)
            return tiny_encoding

        monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
        made({}, "fineweb", "--tokens=1e3")
        assert read_folder("out")[2]["val"]["bytes"] == num_bytes
    assert "bits per byte will be unknown" in capsys.readouterr().out


@pytest.mark.parametrize("lacking", (0, 1))
def test_the_disk_must_have_room_for_what_is_missing(lacking, server, monkeypatch):
    put({f"out/{VAL}.part": server.files[VAL][:99]})
    free = shutil._ntuple_diskusage(0, 0, 2 * 3024 - 99 - lacking)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    refusal = prepared("out", "fineweb", "--tokens=1e3") or ""
    assert ("5,949 bytes are to be downloaded" in refusal) == bool(lacking) == (not server.asked)


def test_shakespeare_is_tokenized_if_it_is_what_it_should_be(server, monkeypatch):
    server.files["input.txt"] = b"smile" * 50
    digest = hashlib.sha256(b"speak" * 50).hexdigest()
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_SHA256", digest)
    assert "is not the text of Shakespeare's" in prepared("out", "shakespeare")
    server.files["input.txt"] = b"speak" * 50
    for _ in range(2):
        assert text_of(made({}, "shakespeare")) == "speak" * 50


def test_another_input_txt_is_not_taken_for_shakespeare(server):
    put({"out/input.txt": "mine"})
    assert "input.txt is not the text of Shakespeare's" in prepared("out", "shakespeare")
    assert content() == {"out/input.txt": b"mine"}


def refuse(*args, **options):
    raise socket.gaierror("Name or service not known")


@pytest.mark.parametrize("name_server", (refuse, lambda *args, **options: time.sleep(9)))
@pytest.mark.parametrize("command, words", (
    ("fineweb", "without a network, use `python prepare_data.py`"),
    ("a.txt --tokenizer=gpt2", "set TIKTOKEN_CACHE_DIR")))
def test_no_network_is_said_in_one_sentence(command, words, name_server, here, monkeypatch):
    put(TEXT)
    monkeypatch.setattr(prepare_data, "PATIENCE", 0.5)
    monkeypatch.setattr(socket, "getaddrinfo", name_server)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(here))
    assert words in prepared("out", *command.split())
