"""
What model.py, parametrize.py, train.py and prepare_data.py promise: `python -m pytest`, without a
network or a GPU. What the laboratory promises stands in results/test_*.py.

Each test states one claim, and was seen to fail with the code that it guards broken. Sizes are tiny,
since a wrong factor or axis is as wrong at width 32 as at 4096.
"""
import codecs
import csv
import errno
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
from pathlib import Path

import numpy as np
import pytest
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
torch.set_num_threads(1)        # as in the processes below, so that sums are taken in the same order


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
    """Options of a run of a fraction of a second: 8 steps of 4 sequences, at twice the base size."""
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
        model = GPT(GPTConfig({}, **sizes))
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
    assert lr_factors == pytest.approx({"embedding": embedding, "hidden": hidden,
                                        "unembedding": unembedding, "rescalers": rescalers}, rel=1e-5)
    assert settings == pytest.approx({
        "alpha_A_init": alpha, "alpha_M_init": alpha, "alpha_A_scale": scale,
        "alpha_M_scale": scale, "s_qk_scale": scale, "s_z_scale": scale}, rel=1e-5)


def test_nugpt_z_starts_the_logits_at_the_root_of_the_width():
    settings, _ = parametrize("nugpt_z", **LARGE)
    assert settings["s_z_init"] == 2
    settings, _ = parametrize("nugpt_h", **LARGE)
    assert settings["s_z_init"] / settings["s_z_scale"] == 32        # as at the base


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


# Somebody's own nGPT: other names, another layout (u and ν are the halves of one matrix), nn.Linear.
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
        "scale": ["attn_alpha_scale", "mlp_alpha_scale", "sqk_scale", "sz_scale"]})
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
    """kill -9: before the first step, in the middle of writing a checkpoint, then six times wherever
    it strikes."""
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
        ("width", 20, "width must be a positive multiple"), ("schedule", "step", "schedule must be"),
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
         "        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)\n        optimizer.step()\n"),
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
        ("train.py", "SCHEDULES = {", 'SCHEDULES = {\n    "steep": lambda done, config: (1 - done) ** 2,'),
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
    assert "no parameter is of the class unembedding: its rate is not used" in capfd.readouterr().out


def test_the_gradients_norm_in_the_log_is_two_edits(data, tmp_path):
    line = "        metrics = {}        # a fork's own numbers of this step; name them in LOG\n"
    norm = '        metrics["norm"] = train_norm(model)\n'.replace(
        "train_norm(model)", "sum(p.grad.square().sum() for p in model.parameters()).sqrt().item()")
    folder = fork(tmp_path / "fork", ("train.py", line, line + norm),
                  ("train.py", '*LOGGED_RESCALERS, "status"]', '*LOGGED_RESCALERS, "norm", "status"]'))
    assert outcome(start(*options(data, tmp_path / "out"), folder=folder)) == 0
    assert all(float(row["norm"]) > 0 for row in log(tmp_path / "out"))


WINDOW = [
    ("train.py", "    # optimization: Adam", "    window: int = 0\n\n    # optimization: Adam"),
    ("model.py", "    mlp_ratio: float", "    window: int = 0\n    mlp_ratio: float"),
    ("model.py", "        B, T, d = h.shape\n",
     "        B, T, d = h.shape\n        assert self.window in (0, 8)\n"),
    ("model.py", "        self.head_dim = D\n", "        self.head_dim = D\n        self.window = config.window\n"),
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
    return [("model.py", place, f"        self.extra = nn.Parameter(torch.empty({shape}))\n{place}"),
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


def forked(function):
    """A started process that runs function, without importing everything again."""
    started = multiprocessing.get_context("fork").Process(target=function)
    started.start()
    return started


def killed_at_rename(number, out, *argv):
    """prepare_data.py in another process, killed right after it has renamed so many files."""
    def main():
        rename = os.replace
        renamed = []

        def rename_and_die(*paths):
            rename(*paths)
            renamed.append(paths)
            if len(renamed) == number:
                os.kill(os.getpid(), 9)

        os.replace = rename_and_die
        prepared(out, *argv)

    started = forked(main)
    started.join()
    assert started.exitcode == -9


def token_file(tokens, magic=20240520, version=1, dtype="<u2"):
    """Content of a token file in llm.c's format."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens)
    return header.tobytes() + np.asarray(tokens, dtype).tobytes()


def all_tokens(folder):
    """[train, val]: the tokens of a data folder as lists."""
    train, val, _ = read_folder(folder)
    return [train[0:len(train)].tolist(), val[0:len(val)].tolist()]


def text_of(folder):
    """[train, val]: the bytes of a data folder whose tokens are bytes."""
    return [bytes(tokens) for tokens in all_tokens(folder)]


def documents_of(tokens, end=260):
    """The documents in a list of tokens, as lists of tokens. Each must end with end-of-text."""
    documents = []
    document = []
    for token in tokens:
        if token == end:
            documents.append(document)
            document = []
        else:
            document.append(token)
    assert document == []
    return documents


def content_of(folder):
    """{path: bytes} of all files below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shards_folder(folder, vocab_size=261, **counts):
    """Makes a folder with so many of llm.c's shards a split. Returns {file's name: tokens}."""
    folder.mkdir()
    random = np.random.default_rng(0)
    shards = {}
    for split, count in counts.items():
        for number in range(count):
            tokens = random.integers(0, vocab_size, 300).tolist()
            shards[f"web_{split}_{number:06d}.bin"] = tokens
            (folder / f"web_{split}_{number:06d}.bin").write_bytes(token_file(tokens))
    return shards


def nanogpt_folder(folder, vocab_size=65, dtype="<u2"):
    """A data folder of nanoGPT: [tokens for training, tokens for validation], without a header."""
    folder.mkdir(parents=True)
    tokens = np.random.default_rng(0).integers(0, vocab_size, 1000).astype(dtype)
    tokens[:900].tofile(folder / "train.bin")
    tokens[900:].tofile(folder / "val.bin")
    (folder / "input.txt").write_text("First Citizen: speak.\n" * 20)
    (folder / "meta.pkl").write_bytes(b"\x80\x04}.")
    return [tokens[:900].tolist(), tokens[900:].tolist()]


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
# prepare_data.py: what a text may look like


STORED = {      # a file's name: what it holds
    "plain.txt": GERMAN.encode(),
    "marked.txt": codecs.BOM_UTF8 + GERMAN.encode(),
    "windows.txt": GERMAN.replace("\n", "\r\n").encode(),
    "notepad.txt": codecs.BOM_UTF16_LE + GERMAN.encode("utf-16-le"),
    "big_endian.txt": codecs.BOM_UTF16_BE + GERMAN.encode("utf-16-be"),
    "wide.txt": GERMAN.encode("utf-32"),
    "packed.txt.gz": gzip.compress(GERMAN.encode()),
    "packed_without_saying_so.txt": gzip.compress(GERMAN.encode("utf-16")),
    "not_packed.txt.gz": GERMAN.encode(),
    "UPPER.TXT": GERMAN.encode(),
    "UPPER.MD.GZ": gzip.compress(GERMAN.encode()),
    "notes.md": GERMAN.encode(),
    "lines.jsonl": json.dumps({"text": GERMAN}).encode(),
    "windows.jsonl": json.dumps({"text": GERMAN.replace("\n", "\r\n")}).encode(),
    "lines.JSONL.gz": gzip.compress(json.dumps({"text": GERMAN}).encode("utf-16")),
}


@pytest.mark.parametrize("name", STORED)
def test_a_text_is_read_however_it_is_stored(name, tmp_path):
    (tmp_path / name).write_bytes(STORED[name])
    assert prepared(tmp_path / "out", tmp_path / name) is None
    assert b"".join(text_of(tmp_path / "out")) == GERMAN.encode()


REFUSED = {     # a file's name: (what it holds, words of the sentence)
    "latin.txt": (GERMAN.encode("latin-1"), "not UTF-8 at line 1, byte 8 (0xdf)"),
    "later.txt": (b"norm\nnorm\n" + "ä".encode() + b"\xe4\n", "at line 3, byte 13 (0xe4)"),
    "marked.txt": (codecs.BOM_UTF8 + b"\n\xff", "not UTF-8 at line 2, byte 5 (0xff)"),
    "half.txt": ("ä".encode()[:1], "not UTF-8 at line 1, byte 1"),
    "packed.txt.gz": (gzip.compress(b"\n\xff"), "not UTF-8 at line 2, byte 2"),
    "odd.txt": ("a\nb".encode("utf-16") + b"c", "not UTF-16 at line 2, byte 9"),
    "lonely.txt": (codecs.BOM_UTF16_LE + b"\n\0\0\xd8a\0", "not UTF-16 at line 2, byte 5"),
    "unmarked.txt": ("norm".encode("utf-16-le"), "iconv -f utf-16le"),
    "unmarked_be.txt": ("norm".encode("utf-16-be"), "iconv -f utf-16be"),
    "word.txt": (b"PK\x03\x04norm", "a zip file"),
    "page.txt": (b"%PDF-1.7", "a PDF file"),
    "tar.txt": (b"\xfd7zXZ\x00norm", "an xz file"),
    "web.txt": (b"\x28\xb5\x2f\xfdnorm", "a zstd file"),
    "old.txt": (b"BZh91AY&SYnorm", "a bzip2 file"),
    "twice.txt.gz": (gzip.compress(gzip.compress(b"norm")), "by gzip twice"),
    "cut.txt.gz": (gzip.compress(b"norm\n" * 100)[:-9], "damaged or cut short"),
    "wrong.txt.gz": (gzip.compress(b"norm\n" * 100)[:-6] + b"wrong!", "damaged or cut short"),
    "rubbish.txt.gz": (b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + b"\xff" * 99, "damaged or cut short"),
    "empty.txt": (b"", "is empty"),
    "empty.md.gz": (gzip.compress(b""), "is empty"),
    "empty.jsonl": (b"\n\n", "is empty"),
    "short.txt": (b"a", "none is left for val"),
    "book.text": (b"norm", "ends in .txt, .md or .jsonl"),
    "tokens.bin": (token_file([1, 2]), "of token files give the folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_text_is_refused_by_name_and_place(name, tmp_path):
    content, words = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    sentence = prepared(tmp_path / "out", tmp_path / name)
    assert words in sentence and f"{tmp_path / name}" in sentence
    assert not list(tmp_path.glob("out/[a-z]*"))


@pytest.mark.parametrize("name, pack", (("Anna's & B.txt", bytes), ("b.TXT.gz", gzip.compress)))
def test_the_command_that_is_printed_converts_the_file(name, pack, tmp_path):
    if not shutil.which("iconv"):
        pytest.skip("there is no iconv")
    (tmp_path / name).write_bytes(pack(GERMAN.encode("cp1252")))
    sentence = prepared(tmp_path / "out", tmp_path / name)
    command = re.search("Windows-1252, (.*) converts it", sentence)[1]
    subprocess.run(command, shell=True, check=True)
    converted, = tmp_path.glob("*.utf8.txt")
    assert converted.read_text() == GERMAN


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    sentence = prepared(tmp_path / "out", tmp_path / "misisng.txt")
    assert f"there is no file or folder {tmp_path}/misisng.txt" in sentence


BAD_LINES = {       # the second line of a .jsonl file: words of the sentence
    "norm": "no JSON object",
    "[1]": "no JSON object",
    '{"content": "norm"}': 'with a text "text" (--field=NAME',
    '{"text": null}': 'with a text "text"',
    '{"text": "\\ud83d"}': "half of a surrogate pair",
    "[" * 10 ** 5: "no JSON object",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_line_of_jsonl_without_the_text_is_named(line, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "norm"}\n' + line + "\n")
    sentence = prepared(tmp_path / "out", tmp_path / "a.jsonl")
    assert f"{tmp_path}/a.jsonl, line 2: {BAD_LINES[line]}" in sentence or (
        f"{tmp_path}/a.jsonl, line 2: " in sentence and BAD_LINES[line] in sentence)


def test_another_field_of_jsonl_can_be_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "no", "content": "norm\\nνορμ"}\n\n' * 9)
    assert prepared(tmp_path / "out", tmp_path / "a.jsonl", "--field=content") is None
    assert b"".join(text_of(tmp_path / "out")).decode() == "norm\nνορμ" * 9


def test_a_folder_gives_its_texts_and_names_what_it_leaves_out(tmp_path, capsys):
    source = tmp_path / "in"
    (source / "deep").mkdir(parents=True)
    (tmp_path / "far").mkdir()
    for path in ("in/a.txt", "in/deep/B.TXT", "in/c.md", "far/d.txt"):
        (tmp_path / path).write_text(f"[{path}]" + "norm\n" * 40)
    (source / "e.jsonl").write_text('{"text": "[in/e.jsonl]norm"}')
    (source / "linked").symlink_to(tmp_path / "far")
    (source / "empty.txt").touch()
    (source / "broken.txt").symlink_to("nowhere.txt")
    for number in range(7):
        (source / f"{number}.pdf").write_bytes(b"%PDF-1.7")
    assert prepared(tmp_path / "out", source) is None
    text = b"".join(text_of(tmp_path / "out"))
    for path in ("in/a.txt", "in/deep/B.TXT", "in/c.md", "far/d.txt", "in/e.jsonl"):
        assert text.count(f"[{path}]".encode()) == 1
    said = capsys.readouterr().out
    names = "0.pdf, 1.pdf, 2.pdf, 3.pdf, 4.pdf and 2 more"
    assert f"left out (not .txt, .md or .jsonl): {names}\n" in said
    assert "left out (empty): empty.txt\n" in said
    assert "left out (no file, or a broken link): broken.txt\n" in said


def test_a_folder_that_links_to_itself_is_read_once(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text(GERMAN)
    (tmp_path / "in/again").symlink_to(tmp_path / "in")
    assert prepared(tmp_path / "out", tmp_path / "in") is None
    assert b"".join(text_of(tmp_path / "out")) == GERMAN.encode()


@pytest.mark.parametrize("holds, words", (
    ({}, "has no text (.txt, .md or .jsonl) and no token files"),
    ({"a.pdf": b"%PDF-"}, "has no text"),
    ({"a.txt": b"", "b.txt": b""}, "is empty"),
    ({"a.txt": b"norm", "b.txt": b"\xff"}, "b.txt is not UTF-8"),
))
def test_a_folder_without_a_right_text_is_refused(holds, words, tmp_path):
    (tmp_path / "in").mkdir()
    for name, content in holds.items():
        (tmp_path / "in" / name).write_bytes(content)
    assert words in prepared(tmp_path / "out", tmp_path / "in")


def test_the_report_tells_files_encodings_and_the_first_words(tiny_encoding, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("Once upon a ν.\n" * 50)
    (tmp_path / "in/b.txt").write_text("norm\n" * 50, encoding="utf-16")
    assert prepared(tmp_path / "out", tmp_path / "in", "--tokenizer=gpt2") is None
    train, val = all_tokens(tmp_path / "out")
    said = capsys.readouterr().out
    assert f"{tmp_path}/out: 2 file(s) (1 in utf-8, 1 in utf-16), 1,000 characters, " in said
    assert f"{len(train):,} tokens to train on and {len(val):,} to validate on" in said
    assert "it begins: 'Once upon a ν.\\nOnce" in said


def test_the_first_words_end_with_a_whole_character(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a" + "ν" * 200)
    assert prepared(tmp_path / "out", tmp_path / "a.txt") is None
    assert f"it begins: {'a' + 31 * 'ν'!r}\n" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# prepare_data.py: splits, documents and tokens


def test_of_many_files_each_goes_to_one_split_and_stays_there(tmp_path):
    texts = []
    for number in range(240):
        texts.append(f"[text {number}: {'norm ' * 9}]".encode())
        folder = tmp_path / f"in/{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.txt").write_bytes(texts[-1])
    splits = []
    for _ in range(2):
        assert prepared(tmp_path / "out", tmp_path / "in") is None
        train, val = text_of(tmp_path / "out")
        splits.append([text in val for text in texts])
        for text, in_val in zip(texts, splits[-1]):
            assert (text in train) == (not in_val)
        (tmp_path / "in/0/another.txt").write_text("norm")
    assert splits[0] == splits[1] and 0 < sum(splits[0]) < 30


def test_standard_library_is_always_split_the_same(tmp_path):
    """Once here, once in a process with other string hashes."""
    meta = prepare_data.prepare_stdlib(tmp_path / "a", progress=False)
    done = process(HERE / "prepare_data.py", f"--out={tmp_path / 'b'}", PYTHONHASHSEED="7")
    assert done.returncode == 0
    assert meta == read_folder(tmp_path / "a")[2] == read_folder(tmp_path / "b")[2]


def test_standard_library_is_read_as_ever_even_if_it_is_not_utf8(tmp_path, monkeypatch):
    """Measurements rest on these bytes."""
    (tmp_path / "lib/test").mkdir(parents=True)
    contents = {
        "a.py": "# ünï\r\nnorm\n".encode() * 50,
        "latin.py": "# -*- coding: latin-1 -*-\n# ünï\n".encode("latin-1") * 50,
        "marked.py": codecs.BOM_UTF8 + b"norm\n" * 50,
    }
    for name, content in contents.items():
        (tmp_path / "lib" / name).write_bytes(content)
        (tmp_path / "lib/test" / name).write_text("not this one")
    monkeypatch.setattr(prepare_data.sysconfig, "get_paths", lambda: {"stdlib": tmp_path / "lib"})
    prepare_data.prepare_stdlib(tmp_path / "out", progress=False)
    expected = [content.decode("utf-8", "replace").replace("\r\n", "\n")
                for content in contents.values()]
    train, val = text_of(tmp_path / "out")
    cuts = [round(len(text) * 0.95) for text in expected]
    assert train.decode() == "".join(text[:cut] for text, cut in zip(expected, cuts))
    assert val.decode() == "".join(text[cut:] for text, cut in zip(expected, cuts))


def test_names_that_are_not_utf8_are_split_too():
    texts = [prepare_data.Text(None, os.fsdecode(b"%d-\xfc.txt" % number), characters=10)
             for number in range(prepare_data.SPLIT_BY_FILE_FROM)]
    prepare_data.share_out(texts)
    assert {text.for_training for text in texts} == {0, 10}


def test_standard_library_is_there_once_without_what_is_installed_beside_it(tmp_path):
    meta = prepare_data.prepare_stdlib(tmp_path, progress=False)
    text = b"".join(text_of(tmp_path))
    for module, times in ((os, 1), (json, 1), (pytest, 0)):
        assert text.count(Path(module.__file__).read_bytes()) == times
    assert 0.02 < meta["val"]["bytes"] / len(text) < 0.1


def test_tokens_of_many_pieces_are_those_of_the_whole_text(tiny_encoding, tmp_path, monkeypatch):
    """Of few files the last part of each is for validation; both parts end with end-of-text."""
    texts = []
    (tmp_path / "in").mkdir()
    for number in range(3):
        texts.append("".join(f"norm {number}-{line} ä\n" for line in range(300)))
        (tmp_path / f"in/{number}.txt").write_text(texts[-1])
    monkeypatch.setattr(prepare_data, "CHUNK", 100)
    assert prepared(tmp_path / "out", tmp_path / "in", "--tokenizer=gpt2") is None
    train, val = map(documents_of, all_tokens(tmp_path / "out"))
    assert len(train) == len(val) == 3
    for text, train_part, val_part in zip(texts, train, val):
        beginning = tiny_encoding.decode(train_part)
        assert beginning + tiny_encoding.decode(val_part) == text
        assert 0.94 < len(beginning) / len(text) < 0.96
        assert train_part == tiny_encoding.encode_ordinary(beginning)
        assert val_part == tiny_encoding.encode_ordinary(text[len(beginning):])


def test_meta_json_tells_what_the_token_files_hold(tiny_encoding, tmp_path):
    (tmp_path / "a.txt").write_text("norm ä " * 100)
    assert prepared(tmp_path / "out", tmp_path / "a.txt", "--tokenizer=gpt2") is None
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert (meta["tokenizer"], meta["vocab_size"]) == ("gpt2", 261)
    for split in ("train", "val"):
        tokens = read_tokens(tmp_path / f"out/{split}.bin")
        text = tiny_encoding.decode_bytes(tokens[tokens != 260].tolist())
        assert meta[split] == {"tokens": len(tokens), "bytes": len(text), "largest": 260,
                               "sha256": hashlib.sha256(token_file(tokens)).hexdigest()}


def test_a_long_line_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "CHUNK", 100)
    (tmp_path / "a.txt").write_text("ν" * 1050 + "\n" + "μ" * 30)
    with open(tmp_path / "a.txt") as file:
        lengths = [len(piece) for piece in prepare_data.text_pieces(file)]
    assert sum(lengths) == 1081 and max(lengths) <= 200


@pytest.mark.parametrize("size, dtype", ((2 ** 16, np.uint16), (2 ** 16 + 1, np.uint32)))
def test_tokens_of_a_large_vocabulary_take_four_bytes(size, dtype, tmp_path, monkeypatch):
    tokenizer = prepare_data.ByteTokenizer()
    tokenizer.vocab_size = size
    tokenizer.encode = lambda texts: [[size - 1] * len(text) for text in texts]
    monkeypatch.setattr(prepare_data, "get_tokenizer", lambda name: tokenizer)
    (tmp_path / "a.txt").write_text("norm " * 100)
    prepare_data.prepare_text(tmp_path / "a.txt", tmp_path / "out", progress=False)
    tokens = read_tokens(tmp_path / "out/train.bin")
    assert tokens.dtype == dtype and tokens.tolist() == [size - 1] * 475


SEPARATED = {       # a file's name: what it holds, of the documents "norm 0", "norm 1", …
    "marks.txt": "\n<|endoftext|>\n".join(f"norm {i}" for i in range(40)),
    "marks_to_the_end.txt": "".join(f"norm {i}\n<|endoftext|>\n" for i in range(40)),
    "marks_twice.txt": "".join(f"<|endoftext|>\nnorm {i}\n<|endoftext|> \n" for i in range(40)),
    "lines.jsonl": "".join(json.dumps({"text": f"norm {i}"}) + "\n" for i in range(40)),
    "lines_some_empty.jsonl": "".join('{"text": ""}\n\n' + json.dumps({"text": f"norm {i}"}) + "\n"
                                      for i in range(40)),
}


@pytest.mark.parametrize("name", SEPARATED)
def test_each_document_ends_with_the_end_of_text_token(name, tiny_encoding, tmp_path):
    """One of them is cut where validation begins, so that its parts count as two."""
    (tmp_path / name).write_text(SEPARATED[name])
    assert prepared(tmp_path / "out", tmp_path / name, "--tokenizer=gpt2") is None
    train, val = map(documents_of, all_tokens(tmp_path / "out"))
    texts = [tiny_encoding.decode(document) for document in train + val]
    cut = len(train) - 1
    if len(texts) == 41:
        texts[cut:cut + 2] = [texts[cut] + texts[cut + 1]]
    assert [text.strip() for text in texts] == [f"norm {i}" for i in range(40)]
    assert 1 <= len(val) <= 4


def test_validation_may_begin_with_a_document(tiny_encoding, tmp_path):
    """Then no empty document is written before it."""
    (tmp_path / "a.jsonl").write_text('{"text": "norm norm"}\n' * 20)
    assert prepared(tmp_path / "out", tmp_path / "a.jsonl", "--tokenizer=gpt2") is None
    document = tiny_encoding.encode_ordinary("norm norm") + [260]
    assert all_tokens(tmp_path / "out") == [document * 19, document]


def test_marks_stay_text_for_a_tokenizer_without_end_of_text_and_that_is_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(SEPARATED["marks.txt"])
    assert prepared(tmp_path / "out", tmp_path / "a.txt") is None
    assert b"".join(text_of(tmp_path / "out")).decode() == SEPARATED["marks.txt"]
    assert "<|endoftext|> stays text in 39 places" in capsys.readouterr().out


def test_marks_within_a_line_stay_text_and_that_is_said(tiny_encoding, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("norm <|endoftext|>\n" * 50 + "norm")
    assert prepared(tmp_path / "out", tmp_path / "a.txt", "--tokenizer=gpt2") is None
    assert "<|endoftext|> stays text in 50 places" in capsys.readouterr().out


def test_an_encoding_without_end_of_text_has_no_separators(tmp_path, monkeypatch):
    encoding = tiktoken.Encoding("none", pat_str=r"\S+|\s+", special_tokens={"<s>": 256},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    (tmp_path / "a.jsonl").write_text('{"text": "norm"}\n' * 50)
    assert prepared(tmp_path / "out", tmp_path / "a.jsonl", "--tokenizer=gpt2") is None
    assert b"".join(text_of(tmp_path / "out")) == b"norm" * 50


def test_half_a_million_blanks_are_refused_by_name_of_the_file(tiny_encoding, tmp_path):
    (tmp_path / "a.txt").write_text("norm" + " " * 10 ** 6 + "norm")
    sentence = prepared(tmp_path / "out", tmp_path / "a.txt", "--tokenizer=gpt2")
    assert f"{tmp_path}/a.txt: 500,000 blanks or more" in sentence


def test_a_text_at_which_tiktoken_panics_is_named(tmp_path, monkeypatch):
    class PanicException(BaseException):
        pass

    class Panics:
        n_vocab = 256
        special_tokens_set = set()

        def encode_ordinary(self, text):
            raise PanicException("StackOverflow")

    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: Panics())
    (tmp_path / "a.txt").write_text("norm " * 50)
    sentence = prepared(tmp_path / "out", tmp_path / "a.txt", "--tokenizer=gpt2")
    assert f"{tmp_path}/a.txt: tiktoken cannot take this text (StackOverflow)" in sentence


@pytest.mark.parametrize("val", ("val.txt", "val"))
def test_validation_text_of_ones_own_is_all_that_is_validated_on(val, tmp_path):
    """Also if it lies in the folder of the text: then it is not trained on."""
    (tmp_path / "in/val").mkdir(parents=True)
    (tmp_path / "in/train.txt").write_text("norm\n" * 40)
    (tmp_path / "in/val.txt").write_text("sphere\n" * 9)
    shutil.copy(tmp_path / "in/val.txt", tmp_path / "in/val/a.md")
    (tmp_path / "in" / ("val/a.md" if val == "val.txt" else "val.txt")).unlink()
    assert prepared(tmp_path / "out", tmp_path / "in", f"--val={tmp_path}/in/{val}") is None
    assert text_of(tmp_path / "out") == [b"norm\n" * 40, b"sphere\n" * 9]


# ------------------------------------------------------------------------------------------------
# prepare_data.py: data folders


def test_shards_are_one_stream_wherever_they_are_cut(tmp_path):
    """Twice within one sequence, an empty shard, one token alone."""
    tokens = np.random.default_rng(0).integers(0, 2 ** 16, 400)
    shards = {}
    for number, part in enumerate(np.split(tokens, [3, 8, 8, 9, 200, 301])):
        (tmp_path / f"{number}.bin").write_bytes(token_file(part))
        shards[f"{number}.bin"] = len(part)
    (tmp_path / "val.bin").write_bytes(token_file(tokens + 2 ** 16, 20240801, 7, "<u4"))
    meta = {"vocab_size": 2 ** 17, "val": {"tokens": 400}, "train": {"shards": shards}}
    prepare_data.write_json(tmp_path / "meta.json", meta)
    train, val, _ = read_folder(tmp_path)
    assert len(train) == len(val) == 400 and np.array_equal(val[0:400], tokens + 2 ** 16)
    for start, stop in itertools.combinations((0, 1, 3, 8, 9, 10, 200, 250, 301, 400), 2):
        assert np.array_equal(train[start:stop], tokens[start:stop])


@pytest.fixture
def by_hand(tmp_path):
    """A data folder as someone may write it by hand: byte tokens from 0 to 255."""
    for split in ("train", "val"):
        (tmp_path / f"{split}.bin").write_bytes(token_file(range(256)))
    (tmp_path / "meta.json").write_text('{"vocab_size": 256, "train": {"tokens": 256}, '
                                        '"val": {"tokens": 256}}')
    return tmp_path


def edited(folder, **changes):
    """Edits meta.json, as in edited(folder, vocab_size=3, train_tokens=4). None: without it."""
    meta = json.loads((folder / "meta.json").read_text())
    for key, value in changes.items():
        entry = meta
        split, _, rest = key.partition("_")
        if split in ("train", "val") and rest:
            entry = meta[split]
            key = rest
        entry[key] = value
        if value is None:
            del entry[key]
    (folder / "meta.json").write_text(json.dumps(meta))


def test_what_meta_json_may_lack_is_filled_in(by_hand):
    _, _, meta = read_folder(by_hand)
    assert meta["tokenizer"] is None
    digest = hashlib.sha256(token_file(range(256))).hexdigest()
    entry = {"tokens": 256, "bytes": None, "largest": 255, "sha256": digest}
    assert meta["train"] == meta["val"] == entry


WRONG = {       # what is edited in meta.json: words of the sentence
    "vocab_size": (None, "256", 0, -3, 2.5, True, []),
    "tokenizer": ("gpt7", 3, ["byte"]),
    "train": (None, 3, []),
    "val": (None, "val.bin"),
    "train_tokens": (None, "256", -1, 2.0, 255),
    "val_bytes": ("1", 0, 1.5, False),
    "val_shards": ({}, [], ["val.bin"], {"val.bin": "256"}, {"val.bin": None}, 3),
    "train_format": ("uint8", 3),
    "train_largest": ("3", -1, 2.5),
    "val_sha256": (3, ["a"]),
}


@pytest.mark.parametrize("key, value", [(key, value) for key in WRONG for value in WRONG[key]])
def test_a_wrong_field_of_meta_json_is_refused_by_its_name(key, value, by_hand):
    edited(by_hand, **{key: value})
    with pytest.raises(ValueError) as refusal:
        read_folder(by_hand)
    sentence = str(refusal.value)
    assert str(by_hand) in sentence and key.split("_")[-1] in sentence and "\n" not in sentence


def test_shards_must_have_as_many_tokens_as_their_split_says(by_hand):
    edited(by_hand, train_shards={"train.bin": 256}, train_tokens=300)
    with pytest.raises(ValueError, match='"tokens" is 300, but its shards have 256'):
        read_folder(by_hand)


@pytest.mark.parametrize("content, words", (
    ("{", "meta.json is damaged"), ("[]", "meta.json is damaged"), ("\0", "meta.json is damaged"),
    (None, "is no data folder"),
))
def test_a_damaged_or_missing_meta_json_is_refused(content, words, by_hand):
    (by_hand / "meta.json").unlink()
    if content is not None:
        (by_hand / "meta.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        read_folder(by_hand)


HEADER = token_file(range(256))[:1024]
DAMAGED = {     # what a token file holds: words of the sentence
    b"\0" + token_file(range(256))[1:]: "is not a token file",
    HEADER[:4] + b"\5" + token_file(range(256))[5:]: "is not a token file",
    HEADER[:100]: "is not a token file",
    b"": "is not a token file",
    token_file(range(256))[:-1]: "was cut",
    token_file(range(256)) + b"\0": "was cut",
    token_file([]): "has 0 tokens, but meta.json says 256",
}


@pytest.mark.parametrize("name", ("train.bin", "val.bin"))
@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_token_file_is_refused_by_name_and_nobody_says_delete(content, name, by_hand):
    (by_hand / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{by_hand / name} {DAMAGED[content]}") as refusal:
        read_folder(by_hand)
    assert "delete" not in str(refusal.value)


def test_a_missing_token_file_is_refused_by_name(by_hand):
    (by_hand / "val.bin").unlink()
    with pytest.raises(ValueError, match=f"^{by_hand}/val.bin is missing"):
        read_folder(by_hand)


@pytest.mark.parametrize("recorded", (None, 255))
def test_a_vocabulary_too_small_for_its_tokens_is_found_by_file_and_token(recorded, by_hand):
    edited(by_hand, vocab_size=255)
    if recorded:
        edited(by_hand, train_largest=recorded, train_sha256="0" * 64)
    with pytest.raises(ValueError, match=f"^{by_hand}/train.bin has the token 255, but a vocab"):
        read_folder(by_hand)


def test_a_file_that_cannot_be_read_is_a_ValueError_too(by_hand, monkeypatch):
    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(prepare_data, "read_json", forbidden)
    with pytest.raises(ValueError, match=f"Permission denied: '{by_hand}/meta.json'"):
        read_folder(by_hand)


def test_tokens_are_not_read_again_where_meta_json_has_what_they_are(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(GERMAN)
    assert prepared(tmp_path / "out", tmp_path / "a.txt") is None
    monkeypatch.setattr(prepare_data, "scan", None)
    read_folder(tmp_path / "out")


def test_fingerprint_is_that_of_the_tokens_wherever_they_are(tmp_path):
    for name, text in (("a", GERMAN), ("b", GERMAN), ("c", GERMAN[1:])):
        (tmp_path / f"{name}.txt").write_text(text)
        assert prepared(tmp_path / name, tmp_path / f"{name}.txt") is None
    a, b, c = [fingerprint(read_folder(tmp_path / name)[2]) for name in "abc"]
    assert a == b != c and re.fullmatch("t[0-9a-f]{15}", a)


# ------------------------------------------------------------------------------------------------
# prepare_data.py: tokens that people have


@pytest.mark.parametrize("option, tokenizer", (("--tokenizer=gpt2", "gpt2"),
                                               ("--vocab_size=300", None)))
def test_shards_become_a_data_folder_and_stay_what_they_are(option, tokenizer, tiny_encoding,
                                                             tmp_path):
    shards = shards_folder(tmp_path / "shards", train=3, val=1)
    before = content_of(tmp_path / "shards")
    assert prepared(tmp_path / "out", tmp_path / "shards", option) is None
    assert content_of(tmp_path / "shards") == before
    train, val = all_tokens(tmp_path / "out")
    assert val == shards.pop("web_val_000000.bin") and train == sum(shards.values(), [])
    meta = read_folder(tmp_path / "out")[2]
    assert meta["tokenizer"] == tokenizer
    text = tiny_encoding.decode_bytes([token for token in val if token != 260])
    assert meta["val"]["bytes"] == (len(text) if tokenizer else None)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock", "meta.json"}


def test_nanogpts_folder_becomes_a_data_folder_and_stays_what_it_is(tmp_path, capsys):
    tokens = nanogpt_folder(tmp_path / "nano")
    before = content_of(tmp_path / "nano")
    assert prepared(tmp_path / "out", tmp_path / "nano", "--vocab_size=65") is None
    assert all_tokens(tmp_path / "out") == tokens and content_of(tmp_path / "nano") == before
    said = capsys.readouterr().out
    assert "left out (not *train*.bin or *val*.bin): input.txt, meta.pkl\n" in said


def test_the_meta_json_may_lie_beside_the_tokens_if_out_says_so(tmp_path):
    tokens = nanogpt_folder(tmp_path / "nano")
    for _ in range(2):      # and the same command again is fine
        assert prepared(tmp_path / "nano", tmp_path / "nano", "--vocab_size=65") is None
    shutil.move(tmp_path / "nano", tmp_path / "moved")
    assert all_tokens(tmp_path / "moved") == tokens


def test_it_does_not_lie_there_by_default(tmp_path, monkeypatch):
    nanogpt_folder(tmp_path / "data/nano")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "data/nano", "--vocab_size=65"])
    with pytest.raises(SystemExit, match="data/nano is the folder of your token files"):
        prepare_data.main()
    assert not (tmp_path / "data/nano/meta.json").exists()


@pytest.mark.parametrize("name", ("web_valid_0.bin", "Validation-1.bin", "tokens.val.bin"))
def test_validation_tokens_have_several_names(name, tmp_path):
    shards_folder(tmp_path / "shards", train=1)
    (tmp_path / "shards" / name).write_bytes(token_file([1, 2, 3]))
    assert prepared(tmp_path / "out", tmp_path / "shards", "--vocab_size=261") is None
    assert all_tokens(tmp_path / "out")[1] == [1, 2, 3]


def raw(*tokens, dtype="<u2"):
    return np.array(tokens, dtype).tobytes()


GOOD = token_file([1, 2, 3])
TOKENS_REFUSED = (      # (what the folder holds, options, words of the sentence)
    ({"train.bin": GOOD, "val.bin": GOOD}, "", "take them with --tokenizer=NAME, or"),
    ({"train.bin": raw(1, 2), "input.txt": b"norm"}, "", "holds token files (train.bin)"),
    ({"a_train.bin": GOOD}, "--vocab_size=9", "none for val: a *val*.bin is missing"),
    ({"a_val.bin": GOOD}, "--vocab_size=9", "none for train: a *train*.bin is missing"),
    ({"train.bin": raw(1, 2)}, "--vocab_size=9", "none for val"),
    ({"train.bin": GOOD, "val.bin": GOOD}, "--vocab_size=3",
     "train.bin has the token 3, but a vocabulary of 3 ends at 2"),
    ({"train.bin": GOOD, "val.bin": raw(1, 300)}, "--tokenizer=byte", "val.bin has the token 300"),
    ({"train.bin": b"123", "val.bin": raw(1, 2)}, "--vocab_size=9", "train.bin has 3 bytes"),
    ({"train.bin": b"", "val.bin": raw(1, 2)}, "--vocab_size=9", "train.bin has 0 bytes"),
    ({"train.bin": raw(*range(99), dtype="<u4"), "val.bin": raw(1)}, "--vocab_size=99",
     "seems to have tokens of four bytes"),
    ({"train.bin": token_file([]), "val.bin": GOOD}, "--vocab_size=9", "has no token for train"),
    ({"a_train.bin": GOOD[:-1], "a_val.bin": GOOD}, "--vocab_size=9", "a_train.bin was cut"),
    ({"a_train.bin": raw(1, 2), "a_val.bin": GOOD}, "--vocab_size=9", "is not a token file"),
    ({"a_train_val.bin": GOOD}, "--vocab_size=9", "its name says both"),
    ({"train.bin": GOOD, "val.bin": GOOD}, "--tokenizer=gpt7", "there is no tokenizer 'gpt7'"),
    ({"train.bin": GOOD, "val.bin": GOOD}, "--vocab_size=0", "--vocab_size must be more than 0"),
    ({"train.bin": GOOD, "val.bin": GOOD}, "--vocab_size=9 --tokenizer=byte", "not both"),
    ({"train.bin": GOOD, "val.bin": GOOD}, "--vocab_size=9 --field=a", "with your own text"),
)


@pytest.mark.parametrize("case", TOKENS_REFUSED, ids=range(len(TOKENS_REFUSED)))
def test_tokens_that_are_not_right_are_refused_and_nothing_is_changed(case, tmp_path):
    holds, options, words = case
    (tmp_path / "in").mkdir()
    for name, content in holds.items():
        (tmp_path / "in" / name).write_bytes(content)
    before = content_of(tmp_path / "in")
    assert words in prepared(tmp_path / "out", tmp_path / "in", *options.split())
    assert content_of(tmp_path / "in") == before
    assert not (tmp_path / "out/meta.json").exists()


def test_files_of_another_kind_do_not_make_a_folder_of_texts_one_of_tokens(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text(GERMAN)
    (tmp_path / "in/pretrained.bin").write_bytes(b"PK\x03\x04" * 500)
    assert prepared(tmp_path / "out", tmp_path / "in") is None
    assert b"".join(text_of(tmp_path / "out")) == GERMAN.encode()


# ------------------------------------------------------------------------------------------------
# prepare_data.py: nothing of the user's is overwritten


def write_texts(folder):
    (folder / "a.txt").write_text(GERMAN)
    (folder / "b.txt").write_text("norm\n" * 400)


FOREIGN = {     # what the output folder holds
    "token files": {"train.bin": b"mine", "val.bin": b"mine"},
    "one of them": {"val.bin": b"mine"},
    "meta.json": {"meta.json": b'{"vocab_size": 5}'},
    "a damaged meta.json": {"meta.json": b"{", "train.bin": b"mine"},
}


@pytest.mark.parametrize("foreign", FOREIGN)
def test_files_that_we_did_not_write_are_not_overwritten(foreign, tmp_path):
    write_texts(tmp_path)
    (tmp_path / "out").mkdir()
    for name, content in FOREIGN[foreign].items():
        (tmp_path / "out" / name).write_bytes(content)
    before = content_of(tmp_path / "out")
    sentence = prepared(tmp_path / "out", tmp_path / "a.txt")
    for words in (*FOREIGN[foreign], "not made by prepare_data.py", "--out=", "--overwrite"):
        assert words in sentence
    assert content_of(tmp_path / "out") == before and "delete" not in sentence
    assert prepared(tmp_path / "out", tmp_path / "a.txt", "--overwrite") is None
    assert b"".join(text_of(tmp_path / "out")) == GERMAN.encode()


@pytest.mark.parametrize("options", ("b.txt", "a.txt --tokenizer=gpt2", "a.txt --val=b.txt",
                                     "a.txt --field=content"))
def test_data_of_another_command_are_not_overwritten(options, tiny_encoding, tmp_path, monkeypatch):
    write_texts(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert prepared("out", "a.txt") is None
    before = content_of(tmp_path / "out")
    sentence = prepared("out", *options.split())
    assert f"out holds the data of `prepare_data.py {tmp_path}/a.txt --tokenizer=byte`" in sentence
    assert "--out=" in sentence and "--overwrite" in sentence
    assert content_of(tmp_path / "out") == before
    assert prepared("out", *options.split(), "--overwrite") is None


def test_a_folder_of_texts_may_hold_its_own_data(tmp_path):
    (tmp_path / "notes.txt").write_text(GERMAN)
    for _ in range(2):
        assert prepared(tmp_path, tmp_path) is None
        assert b"".join(text_of(tmp_path)) == GERMAN.encode()
    assert (tmp_path / "notes.txt").read_text() == GERMAN


def test_a_changed_text_replaces_its_own_data(tmp_path):
    write_texts(tmp_path)
    for text in (GERMAN, "norm\n" * 400):
        (tmp_path / "a.txt").write_text(text)
        assert prepared(tmp_path / "out", tmp_path / "a.txt") is None
        assert b"".join(text_of(tmp_path / "out")) == text.encode()


def test_unchanged_data_stay_where_they_are_read_and_damaged_ones_are_mended(tmp_path):
    write_texts(tmp_path)
    assert prepared(tmp_path / "out", tmp_path / "a.txt") is None
    path = tmp_path / "out/train.bin"
    inode = path.stat().st_ino
    assert prepared(tmp_path / "out", tmp_path / "a.txt") is None and path.stat().st_ino == inode
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\xff")
    assert prepared(tmp_path / "out", tmp_path / "a.txt") is None and path.read_bytes() == whole


def test_a_refused_text_leaves_its_old_data_whole(tmp_path):
    write_texts(tmp_path)
    assert prepared(tmp_path / "out", tmp_path / "a.txt") is None
    before = content_of(tmp_path / "out")
    (tmp_path / "a.txt").write_bytes(GERMAN.encode("latin-1"))
    assert "not UTF-8" in prepared(tmp_path / "out", tmp_path / "a.txt")
    assert content_of(tmp_path / "out") == before


@pytest.mark.parametrize("renamed, whole", ((1, b"norm\n"), (2, None), (3, None), (4, b"form\n")))
def test_killed_tokenization_leaves_nothing_that_looks_finished(renamed, whole, tmp_path):
    """Of a text with as many tokens as the text before. The same command mends it."""
    (tmp_path / "a.txt").write_text("norm\n" * 100)
    assert prepared(tmp_path / "out", tmp_path / "a.txt") is None
    (tmp_path / "a.txt").write_text("form\n" * 100)
    killed_at_rename(renamed, tmp_path / "out", tmp_path / "a.txt")
    if whole:
        assert b"".join(text_of(tmp_path / "out")) == whole * 100
    else:
        with pytest.raises(ValueError, match="is not finished; repeat its command: python prepare"):
            read_folder(tmp_path / "out")
    assert prepared(tmp_path / "out", tmp_path / "a.txt") is None
    assert b"".join(text_of(tmp_path / "out")) == b"form\n" * 100
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {".lock", "meta.json", "train.bin", "val.bin"}


def test_a_data_folder_given_as_a_source_is_said_to_be_one(tmp_path, monkeypatch):
    write_texts(tmp_path)
    assert prepared(tmp_path / "out", tmp_path / "a.txt") is None
    assert "out is a data folder already" in prepared(tmp_path / "again", tmp_path / "out")


def test_a_file_is_on_the_disk_before_it_replaces_another_and_then_its_name_is(tmp_path,
                                                                                monkeypatch):
    events = []
    rename = os.replace

    def note_rename(*paths):
        events.append("renamed")
        rename(*paths)

    monkeypatch.setattr(os, "fsync", lambda number: events.append(os.fstat(number).st_ino))
    monkeypatch.setattr(os, "replace", note_rename)
    prepare_data.write_aside(tmp_path / "file", lambda file: file.write(b"new"))
    assert events == [(tmp_path / "file").stat().st_ino, "renamed", tmp_path.stat().st_ino]


def test_a_second_process_in_one_folder_is_refused(tmp_path):
    write_texts(tmp_path)
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sentence = prepared(tmp_path / "out", tmp_path / "a.txt")
    assert f"another process is writing to {tmp_path}/out" in sentence
    assert prepared(tmp_path / "out", tmp_path / "a.txt") is None


def test_a_second_process_waits_for_the_standard_library(tmp_path):
    """As trainings do that start at once."""
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def prepare():
            lock.close()        # inherited: else it would wait for itself
            prepare_data.prepare_stdlib(tmp_path, progress=False)

        waiting = forked(prepare)
        waiting.join(1)
        assert waiting.is_alive() and not (tmp_path / "meta.json").exists()
    waiting.join()
    assert waiting.exitcode == 0 and len(read_folder(tmp_path)[0]) > 0


def test_what_another_process_wrote_meanwhile_is_not_overwritten(tmp_path, monkeypatch):
    write_texts(tmp_path)
    path = tmp_path / "out/train.bin"
    monkeypatch.setattr(fcntl, "flock", lambda lock, how: path.write_bytes(b"mine"))
    assert "out holds train.bin" in prepared(tmp_path / "out", tmp_path / "a.txt")
    assert path.read_bytes() == b"mine"


# ------------------------------------------------------------------------------------------------
# prepare_data.py: paths, terminals and options


@pytest.mark.parametrize("name", ("two words", "Anna's \"A & B\"", "back\\slash", "$(touch run)",
                                  "ünï", os.fsdecode(b"latin-\xfc")))
def test_a_path_may_have_any_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / name
    source.mkdir()
    (source / f"{name}.txt").write_text(GERMAN)
    out = source / "out"
    for _ in range(2):
        assert prepared(out, source) is None
    assert b"".join(text_of(out)) == GERMAN.encode()
    tokens = source / "tokens"
    assert prepared(tokens, out, "--vocab_size=256") is not None      # it is a data folder already
    shards_folder(source / "shards", 256, train=1, val=1)
    assert prepared(tokens, source / "shards", "--tokenizer=byte") is None
    assert len(all_tokens(tokens)[0]) == 300
    assert not Path("run").exists()


def test_a_tilde_is_the_home_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_texts(tmp_path)
    assert prepared("~/out", "~/a.txt", "--val=~/b.txt") is None
    train, val, _ = read_folder("~/out")
    assert len(train) == len(GERMAN.encode()) and len(val) == 2000
    assert (tmp_path / "out/meta.json").exists()


def test_the_default_folder_has_the_sources_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.b.TXT.gz").write_bytes(gzip.compress(GERMAN.encode()))
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "a.b.TXT.gz"])
    prepare_data.main()
    assert b"".join(text_of(tmp_path / "data/a.b")) == GERMAN.encode()


def test_any_terminal_shows_the_report_and_a_script_without_docstrings_works(tmp_path):
    name = os.fsdecode("Fluß-ν-".encode() + b"\xfc.pdf")
    (tmp_path / name).touch()
    (tmp_path / "a.txt").write_text(GERMAN)
    for encoding, flag in (("ascii", "-OO"), ("latin-1", "-O")):
        done = process(flag, HERE / "prepare_data.py", tmp_path, f"--out={tmp_path}/out",
                       PYTHONIOENCODING=encoding)
        assert done.returncode == 0 and "it begins: 'Der Flu" in done.stdout
        assert "left out (not .txt, .md or .jsonl): " in done.stdout


def test_a_closed_pipe_ends_it_quietly(tmp_path):
    write_texts(tmp_path)
    done = process("-c", "import subprocess, sys; "
                   "child = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE); "
                   "child.stdout.close(); sys.exit(child.wait())",
                   sys.executable, HERE / "prepare_data.py", tmp_path / "a.txt",
                   f"--out={tmp_path}/out")
    assert done.returncode == 1
    assert "prepare_data.py" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("argv, words", (
    ("a.txt --tokenizer=gpt7", "no tokenizer 'gpt7'"),
    ("a.txt", "475 tokens for train are too many: a file can hold 474"),
    ("--width=3", "unrecognized"),
    ("a.txt --over", "unrecognized"),
    ("a.txt --vocab_size=x", "invalid int"),
    ("a.txt --vocab_size=9", "with a folder of token files"),
    ("a.txt --tokens=5", "with fineweb"),
    ("shakespeare --tokens=5", "with fineweb"),
    ("--val=a.txt", "with your own text"),
    ("a.txt --val=none.txt", "there is no file or folder none.txt"),
    ("a.txt --val=a.txt", "has no text beside that of a.txt"),
    ("fineweb_edu --tokenizer=byte", "of gpt2"),
    ("fineweb --tokens=0", "between 1 and 10,300,000,000"),
    ("fineweb --tokens=1.04e10", "between 1 and"),
    ("fineweb_edu --tokens=1.002e11", "between 1 and"),
    ("fineweb --tokens=nan", "between 1 and"),
))
def test_impossible_options_get_one_sentence(argv, words, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("norm\n" * 100)
    monkeypatch.setattr(prepare_data, "MAX_TOKENS", 474)
    monkeypatch.chdir(tmp_path)
    assert words in prepared("out", *argv.split())
    assert not list(tmp_path.glob("out/[a-z]*"))


def test_a_folder_that_cannot_be_written_gets_one_sentence(tmp_path):
    write_texts(tmp_path)
    assert "File exists" in prepared(tmp_path / "b.txt", tmp_path / "a.txt")
    assert (tmp_path / "b.txt").read_text() == "norm\n" * 400


# ------------------------------------------------------------------------------------------------
# prepare_data.py: downloads from a local server


class Server(http.server.BaseHTTPRequestHandler):
    """Serves server.files, with server.faults in the next answers. server.asked: {file: [first
    byte of each request]}."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        name = self.path[1:]
        first = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        server.asked.setdefault(name, []).append(first)
        fault = ""
        if server.faults:
            fault = server.faults.pop(0)
        if fault == "silent":
            server.end.wait()
            return

        whole = server.files[name]
        contents = {
            "page": b"<html>",
            "short": whole[:-2],
            "long": whole + b"\0\0",
            "foreign": whole[:-2] + b"\xff\xff",
        }
        body = contents.get(fault, whole)
        status = 200
        if fault not in ("rangeless", "page"):
            body = body[first:]
            status = 206
            if body == b"":
                status = 416
        if fault == "503":
            status = 503
            body = b""
        self.send_response(status)
        self.send_header("Content-Length", len(body))
        self.end_headers()
        if fault in ("cut", "stall"):
            body = body[:len(body) // 2]
        self.wfile.write(body)
        if fault == "stall":
            server.end.wait()


@pytest.fixture
def server(monkeypatch, tiny_encoding):
    """A server with four shards of 100,000 tokens and one for validation."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.daemon_threads = True
        server.end = threading.Event()
        server.faults = []
        server.asked = {}
        random = np.random.default_rng(0)
        server.files = {name: token_file(random.integers(0, 261, 100_000))
                        for name in (VAL, *TRAIN)}
        url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setitem(prepare_data.FINEWEB, "fineweb",
                            (url, "fineweb_{split}_{number:06d}.bin", len(TRAIN)))
        monkeypatch.setattr(prepare_data, "SHAKESPEARE", url)
        monkeypatch.setattr(prepare_data, "SHARD_TOKENS", 100_000)
        monkeypatch.setattr(prepare_data, "PATIENCE", 30)
        monkeypatch.setattr(prepare_data, "BACKOFF", 0.01)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.end.set()
        server.shutdown()


def fineweb(server, out, tokens=1e5):
    """None, if out holds shards that are the server's; else the sentence of the refusal."""
    server.asked.clear()
    refusal = prepared(out, "fineweb", f"--tokens={tokens}")
    if refusal is None:
        for path in out.glob("*.bin*"):
            assert path.read_bytes() == server.files[path.name]
    return refusal


@pytest.mark.parametrize("faults, requests", (
    ("503 503", 3), ("cut rangeless", 2), ("page", 2), ("short", 2), ("foreign", 2),
    ("cut long", 3), ("cut page", 3)))
def test_download_gets_over_what_servers_do(faults, requests, server, tmp_path):
    """It goes on where it was, and begins again if what came is not right."""
    server.faults += faults.split()
    assert fineweb(server, tmp_path) is None
    assert len(server.asked[VAL]) == requests
    assert (0 < server.asked[VAL][1] <= 100_512) == faults.startswith("cut")


@pytest.mark.parametrize("faults", ("silent", "stall", "cut stall cut"))
def test_download_gets_over_servers_that_fall_silent(faults, server, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "PATIENCE", 1)
    server.faults += faults.split()
    assert fineweb(server, tmp_path) is None


@pytest.mark.parametrize("fault, words", (
    ("503", "503"), ("silent", "timed out"), ("page", "not a token file"), ("long", "was cut"),
    ("foreign", "has the token 65,535")))
def test_download_says_what_is_wrong_and_goes_on_later(fault, words, server, tmp_path, monkeypatch):
    if fault == "silent":
        monkeypatch.setattr(prepare_data, "PATIENCE", 1)
        monkeypatch.setattr(prepare_data, "ATTEMPTS", 2)
    server.faults += [fault] * prepare_data.ATTEMPTS
    refusal = fineweb(server, tmp_path)
    assert words in refusal and VAL in refusal
    assert {path.name for path in tmp_path.iterdir()} <= {".lock", f"{VAL}.part"}
    monkeypatch.setattr(prepare_data, "PATIENCE", 30)
    assert fineweb(server, tmp_path) is None


def test_only_what_is_asked_for_and_not_there_is_downloaded(server, tmp_path):
    assert fineweb(server, tmp_path, 150_001) is None
    assert set(server.asked) == {VAL, *TRAIN[:2]}
    assert fineweb(server, tmp_path, 2e5) is None and not server.asked
    train, val, meta = read_folder(tmp_path)
    shards = server.files[TRAIN[0]][1024:] + server.files[TRAIN[1]][1024:]
    assert train[0:200_000].tobytes() == shards
    assert len(train) == 200_000 == meta["train"]["tokens"] and len(val) == 100_000
    assert fineweb(server, tmp_path, 3e5) is None and set(server.asked) == {TRAIN[2]}
    assert len(read_folder(tmp_path)[0]) == 300_000


def test_bytes_are_counted_once_there_is_a_vocabulary(server, tiny_encoding, tmp_path, monkeypatch,
                                                      capsys):
    with monkeypatch.context() as patch:
        patch.setattr(tiktoken, "get_encoding", lambda name: open("/none/vocabulary"))
        assert fineweb(server, tmp_path) is None
    assert read_folder(tmp_path)[2]["val"]["bytes"] is None
    assert "bits per byte will be unknown" in capsys.readouterr().out
    assert fineweb(server, tmp_path) is None
    val = all_tokens(tmp_path)[1]
    text = tiny_encoding.decode_bytes([token for token in val if token != 260])
    assert read_folder(tmp_path)[2]["val"]["bytes"] == len(text)


def test_killed_download_goes_on_where_it_was(server, tmp_path):
    """Also one that was killed between a file's last byte and its name."""
    server.faults += ["stall"]
    child = forked(lambda: prepared(tmp_path, "fineweb", "--tokens=1e5"))
    part = tmp_path / f"{VAL}.part"
    while not (part.exists() and part.stat().st_size) and child.is_alive():
        time.sleep(0.01)
    assert "another process is writing" in fineweb(server, tmp_path)
    child.kill()
    child.join()
    size = part.stat().st_size
    assert 0 < size < 100_512 and not (tmp_path / VAL).exists()
    (tmp_path / f"{TRAIN[0]}.part").write_bytes(server.files[TRAIN[0]])
    assert fineweb(server, tmp_path) is None
    assert server.asked == {VAL: [size], TRAIN[0]: [201_024]}


@pytest.mark.parametrize("lacking", (0, 1))
def test_the_disk_must_have_room_for_what_is_not_there_yet(lacking, server, tmp_path, monkeypatch):
    (tmp_path / f"{VAL}.part").write_bytes(server.files[VAL][:1000])
    needed = 2 * 201_024 - 1000
    free = shutil._ntuple_diskusage(0, 0, needed - lacking)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    refusal = fineweb(server, tmp_path)
    if lacking:
        assert f"{needed:,} bytes are to be downloaded" in refusal and not server.asked
    else:
        assert refusal is None


def test_downloaded_shards_are_a_data_folder_already(server, tmp_path):
    assert fineweb(server, tmp_path) is None
    for argv in ((tmp_path,), (tmp_path, "--tokenizer=gpt2")):
        assert "is a data folder already" in prepared(tmp_path / "other", *argv)


def test_downloads_leave_a_foreign_meta_json_alone(server, tmp_path):
    (tmp_path / "meta.json").write_text('{"mine": 1}')
    assert "meta.json, not made by prepare_data.py" in fineweb(server, tmp_path)
    assert (tmp_path / "meta.json").read_text() == '{"mine": 1}' and not server.asked


def test_shakespeare_is_tokenized_here_if_it_is_what_it_should_be(server, tmp_path, monkeypatch):
    text = b"First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 50
    server.files["input.txt"] = text.replace(b"speak", b"smile")
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    assert "is not the text of Shakespeare's" in prepared(tmp_path, "shakespeare")
    assert not (tmp_path / "input.txt").exists()
    server.files["input.txt"] = text
    server.asked.clear()
    for _ in range(2):
        assert prepared(tmp_path, "shakespeare") is None
        assert b"".join(text_of(tmp_path)) == text
    assert server.asked == {"input.txt": [0]}


def test_another_input_txt_is_not_taken_for_shakespeare(server, tmp_path):
    (tmp_path / "input.txt").write_text("mine")
    assert "input.txt is not the text of Shakespeare's" in prepared(tmp_path, "shakespeare")
    assert (tmp_path / "input.txt").read_text() == "mine"


@pytest.mark.parametrize("network", ("refuses", "says nothing", "has a name server that hangs"))
@pytest.mark.parametrize("source, words", (
    ("fineweb", "without a network, use `python prepare_data.py`"),
    ("requirements.txt --tokenizer=gpt2", "set TIKTOKEN_CACHE_DIR")))
def test_no_network_is_said_in_one_sentence(source, words, network, tmp_path):
    """Of the true addresses, by a proxy that nobody listens at or that says nothing, or with a name
    server that hangs for longer than this test may last."""
    assert prepare_data.PATIENCE <= 8
    hang = ""
    code = "import socket, time, prepare_data as p; p.PATIENCE = 0.5; {}; p.main()"
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        url = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        if network == "refuses":
            proxy.close()
        if network == "has a name server that hangs":
            url = ""
            hang = "socket.getaddrinfo = lambda *args, **options: time.sleep(999)"
        done = process("-c", code.format(hang or "pass"), *source.split(), f"--out={tmp_path}/out",
                       HTTPS_PROXY=url, https_proxy=url, NO_PROXY="", no_proxy="",
                       TIKTOKEN_CACHE_DIR=str(tmp_path))
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and words in done.stderr
    assert not list(tmp_path.glob("out/[a-z]*"))
