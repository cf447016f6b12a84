"""Tests of results/alignment.py and results/bench.py. Each was seen to fail with the code that it guards broken."""
import csv
import itertools
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
import alignment
import bench
import train
from model import GPT, Block, GPTConfig, norm
from parametrize import TENSOR_CLASSES
from prepare_data import prepare, read_folder

torch.set_num_threads(1)


def off_center(seed=0):
    """A model in which every factor counts: no init or scale is 1, each raw value is its own, some α are negative."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(width=32, depth=2, head_dim=8, vocab_size=48, seq_len=16, alpha_init=0.3, alpha_scale=0.2,
                          qk_init=1.3, qk_scale=0.4, mlp_init=0.7, mlp_scale=0.5, logit_init=6.0, logit_scale=0.6))
    for name, p in model.named_parameters():
        if name.endswith("raw"):
            p.data *= torch.empty_like(p).uniform_(0.5, 1.5)
            p.data *= torch.rand_like(p).sub(0.3).sign() if "alpha" in name else 1
    return model


def moved():
    """(initial model, the same model after a change of all parameters, (tokens, targets))."""
    initial, model = off_center(), off_center()
    for p, other in zip(model.parameters(), off_center(seed=1).parameters()):
        p.data += 0.3 * other.data
    return initial, model, torch.randint(48, (2, 2, 16), generator=torch.Generator().manual_seed(0))


def by_hand(W, W_0, x, x_0):
    """{column: number} of the map y = W x, written out from the definition."""
    def rms(x):
        return x.square().mean(-1).sqrt()
    dW, dx, numbers = W - W_0, x - x_0, {}
    for key, a, b in (("alpha", dW, x_0), ("omega", W_0, dx), ("nu", dW, dx)):
        log_ratio = (rms(b @ a.T) / (a.square().mean().sqrt() * rms(b))).log().mean()
        numbers[key] = log_ratio.item() / math.log(x.size(-1))
    return numbers | dict(rms_dW=dW.square().mean().sqrt().item(), rms_dx=rms(dx).mean().item(),
                          rms_y=rms(x @ W.T).mean().item(), rms_dy=rms(x @ W.T - x_0 @ W_0.T).mean().item())


def measurements(folder, names=("nugpt",), power=0.8, noise=0.0):
    """A .csv as of runs whose RMS(W x) / (RMS(W) RMS(x)) is 3 d^power at step 1, 3 d^(power - 0.2) at step 10."""
    rng, rows = np.random.default_rng(0), []
    for name, width, seed, step in itertools.product(names, (48, 96, 192), (0, 1), (0, 1, 10)):
        for layer, map_, d_in in ((0, "W_q", width), (0, "W_oMLP", 2.5 * width), (1, "W_q", width), (2, "E_out", width),
                                  (2, "logits", "")):
            exponent = "" if map_ == "logits" else power - 0.2 * (step == 10) + math.log(3, d_in) + noise * rng.normal()
            rows.append(dict(parametrization=name, width=width, depth=2, steps=10, seed=seed, step=step,
                             loss={0: 6, 1: 3, 10: 2}[step], layer=layer, map=map_, d_in=d_in, alpha=exponent,
                             omega=exponent, nu=exponent, rms_dW=width ** -0.75, rms_dx=width ** -0.5, rms_y=1,
                             rms_dy=width ** 0.5))
    with open(folder / "measured.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder / "measured.csv"


def val_tokens(run):
    """The tokens of the windows on which the fixture's runs are measured: 304 in 19 windows, spread evenly."""
    val = read_folder(run.parent)[1]
    starts = [i * ((len(val) - 1) // 16) // 19 * 16 for i in range(19)]
    return torch.stack([torch.from_numpy(val[start:start + 16].astype(int)) for start in starts])


@pytest.fixture
def say(capsys, monkeypatch):
    """A function: what alignment.py or bench.py prints with some arguments, or the sentence with which it leaves."""
    def run(script, *args):
        monkeypatch.setattr(sys, "argv", ["", *map(str, args)])
        try:
            script.main()
        except SystemExit as end:
            return end.code
        return capsys.readouterr().out
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two folders of runs of 6 steps with snapshots, of widths 16 and 32."""
    folder = tmp_path_factory.mktemp("runs")
    words = np.random.default_rng(0).choice("norm sphere rescaler alpha residual width depth head".split(), 2000)
    (folder / "words.txt").write_text(" ".join(words)[:8000])
    prepare(folder, [Path("words.txt")], folder, progress=False)
    for width in (16, 32):
        options = dict(width=width, depth=2, head_dim=8, seq_len=16, batch_size=4, steps=6, base_width=16, base_depth=2,
                       base_steps=6, eval_tokens=304, sample_tokens=0, data=folder, out_dir=folder / str(width),
                       snapshot_every=4, device="cpu", dtype="float32", compile=False)
        assert train.main([f"--{key}={value}" for key, value in options.items()]) == 0
    return folder / "16", folder / "32"


def test_alignment_exponent_of_known_cases():
    """1/2 where weight and input are independent, 1 where the weight has rank one along the input."""
    torch.manual_seed(0)
    d, x, u = 1024, torch.randn(50, 1024), torch.randn(300)
    assert alignment.alignment_exponent(torch.randn(300, d), x) == pytest.approx(0.5, abs=0.01)
    assert alignment.alignment_exponent(torch.outer(u, x[0]), x[:1]) == pytest.approx(1, abs=1e-5)
    quarter = torch.outer(u, x[0]) * (torch.arange(d) < 256)        # rank one along a quarter of the input
    alpha = 1 + math.log((x[0, :256].square().sum() / x[0].square().sum()).sqrt(), d)
    assert alignment.alignment_exponent(3 * quarter, 5 * x[:1]) == pytest.approx(alpha, abs=1e-5)
    x[1] = 0                                                        # a token that has not moved does not count
    assert alignment.alignment_exponent(torch.outer(u, x[0]), x[:2]) == pytest.approx(1, abs=1e-5)
    x[1] = x[0] * (torch.arange(d) >= 256)                          # nor does one that the weight does not see
    assert alignment.alignment_exponent(quarter, x[:2]) == pytest.approx(alpha, abs=1e-5)
    assert math.isnan(alignment.alignment_exponent(torch.zeros(300, d), x))


def test_each_map_is_taken_with_its_own_input():
    """Against the definition, with inputs from the parts of the model, for every map."""
    initial, model, (tokens, targets) = moved()
    rows, loss = alignment.measure(model, initial, tokens, targets)
    assert loss == pytest.approx(model(tokens, targets)[1].item())

    def maps(model):
        h, d, m = model.embedding[tokens], model.config.width, model.config.mlp_width
        for layer, block in enumerate(model.blocks):
            attended = block.attention(h, model.rope)
            mixed = attended @ torch.linalg.inv(block.attn_out)         # the input of W_O, which is square
            yield from ((layer, name, W, h) for name, W in zip(("W_q", "W_k", "W_v"), block.qkv.split(d)))
            yield layer, "W_O", block.attn_out.T, mixed
            h = norm(h + block.attn_alpha().abs() * (norm(attended) - h))
            u, nu = block.mlp_in[:m], block.mlp_in[m:]
            yield from ((layer, "W_u", u, h), (layer, "W_nu", nu, h))
            gated = F.silu(h @ nu.T * block.s_v() * math.sqrt(d)) * (h @ u.T * block.s_u())
            yield layer, "W_oMLP", block.mlp_out.T, gated
            h = norm(h + block.mlp_alpha().abs() * (norm(gated @ block.mlp_out) - h))
        yield len(model.blocks), "E_out", model.unembedding, h

    with torch.no_grad():
        for row, (layer, name, W, x), (_, _, W_0, x_0) in zip(rows, maps(model), maps(initial)):
            assert (row["layer"], row["map"], row["d_in"]) == (layer, name, x.size(-1))
            expected = by_hand(W, W_0, x, x_0)
            assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-3), name
        z, dz = model(tokens)[0], model(tokens)[0] - initial(tokens)[0]
    assert len(rows) == 2 * 7 + 2 and rows[-1] == dict(layer=2, map="logits", rms_y=pytest.approx(
        z.square().mean(-1).sqrt().mean().item()), rms_dy=pytest.approx(dz.square().mean(-1).sqrt().mean().item()))


def test_snapshots_give_the_definition_and_the_csv_the_same_report(runs, say, tmp_path):
    report = say(alignment, *runs, f"--csv={tmp_path}/a.csv")
    assert say(alignment, tmp_path / "a.csv") == report and "slope over widths" in report
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [*rows[0]] == alignment.FIELDS and [int(row["step"]) for row in rows[::16]] == 2 * [0, 1, 2, 4, 6]
    (W, h), (W_0, h_0) = ((state["blocks.0.qkv"][:32], state["embedding"][val_tokens(runs[1])]) for state in (
        torch.load(runs[1] / f"snapshot_{step:08d}.pt", weights_only=True)["model"] for step in (6, 0)))
    row = next(row for row in rows if (row["width"], row["step"], row["layer"], row["map"]) == ("32", "6", "0", "W_q"))
    expected = by_hand(W, W_0, h, h_0)
    assert {key: float(row[key]) for key in expected} == pytest.approx(expected, rel=1e-3)


def test_another_matrix_in_a_block_gets_its_own_name_and_counts_as_hidden(monkeypatch):
    class Gated(Block):
        def __init__(self, config):
            super().__init__(config)
            self.gate = torch.nn.Parameter(torch.empty(config.width, config.width))

        def attention(self, h, table):
            return super().attention(h, table) * torch.sigmoid(F.linear(h, 0.1 * self.gate))

    initial, model = (GPT(GPTConfig(width=16, depth=1, head_dim=8, vocab_size=48, seq_len=16), Gated) for _ in range(2))
    tokens, targets = torch.randint(48, (2, 2, 16))
    rows, _ = alignment.measure(model, initial, tokens, targets)
    assert [row["map"] for row in rows] == "W_q W_k W_v W_O gate W_u W_nu W_oMLP E_out logits".split()
    (W, h), (W_0, h_0) = ((part.blocks[0].gate, part.embedding[tokens]) for part in (model, initial))
    expected = by_hand(W, W_0, h, h_0)
    assert {key: rows[4][key] for key in expected} == pytest.approx(expected, rel=1e-3)
    maps = ["blocks.0.gate", "blocks.0.W_u", "blocks.1.W_oMLP", "E_out", "logits", "adapter"]
    assert [*map(alignment.is_hidden, maps)] == [True] * 3 + [False] * 3
    monkeypatch.setitem(TENSOR_CLASSES, "hidden", r"blocks\.\d+\.(qkv|mlp_in)")      # the gate in a class of its own
    assert [*map(alignment.is_hidden, maps)] == [False] + [True] * 2 + [False] * 3
    for weight, said in ((lambda block: block.gate.T, "no parameter as a whole"),
                         (lambda block: block.gate[:4], "no parameter as a whole"),
                         (lambda block: block.attn_out, "blocks.0.attn_out again")):
        monkeypatch.setattr(Gated, "attention", lambda self, h, table: Block.attention(self, h, table) + F.linear(
            h, weight(self)).mean(-1, keepdim=True))
        with pytest.raises(ValueError, match=said):
            alignment.measure(model, initial, tokens, targets)


def test_slopes_are_free_of_constants_and_means_weighted_by_the_loss(tmp_path, say):
    path = measurements(tmp_path)
    nugpt = alignment.read_runs(alignment.read_csv(path))["nugpt"]
    slopes = alignment.slope(nugpt.widths, nugpt.log_ratios)
    assert slopes[:, 0] == pytest.approx(np.full((2, 6), 0.8)) and slopes[:, 1] == pytest.approx(np.full((2, 6), 0.6))
    text = say(alignment, path).splitlines()
    # 3 nats were won by step 1, 1 nat from there to step 10: 0.75 · 0.8 + 0.25 · 0.6
    assert "all, loss-weighted" in text[8] and text[8].split()[3:] == ["0.75", "±", "0.00"] * 6
    logs = [math.log(48)] * 2 + [math.log(120)]     # a class's exponent is its mean logarithm over that of d_in
    assert text[1].split()[3] == f"{0.75 + math.log(3) / np.mean(logs):.2f}"


def test_coordinate_check_gives_powers_of_the_width(tmp_path, say):
    text = say(alignment, measurements(tmp_path, ("nugpt", "ngpt")))
    assert [line.replace("-0.00", "+0.00").split() for line in text.splitlines()[1:5]] == [
        [name, step, "-0.25", "+0.00", "+0.50"] for name in ("ngpt", "nugpt") for step in ("1", "10")]


def test_pictures_are_drawn_and_bad_input_is_refused_in_a_sentence(tmp_path, say, runs):
    for names in (("nugpt",), ("ngpt", "nugpt")):
        path = measurements(tmp_path, names, noise=0.02)
        assert "power of width" in say(alignment, path, f"--plot={tmp_path}/{len(names)}.png")
        assert (tmp_path / f"{len(names)}.png").read_bytes()[:4] == b"\x89PNG"
    head, *lines = path.read_text().splitlines(True)

    def refused(*lines):
        (tmp_path / "bad.csv").write_text("".join((head, *lines)))
        return say(alignment, tmp_path / "bad.csv")
    assert "slope" in refused(*(line for line in lines if line.startswith("ngpt,48,")))     # one width has no slope
    assert "is there twice" in refused(*lines, head, lines[0])      # files put one behind the other have two heads
    assert "another depth or length" in refused(*lines, lines[0].replace("ngpt,48,2,10,0,0", "ngpt,48,2,40,0,7"))
    assert "needs more than one width of ngpt and nugpt" in refused(*(line for line in lines if ",48,2,10," in line))
    assert "have only [0]" in refused(*(line for line in lines if line[:4] != "ngpt" or line.split(",")[5] == "0"))
    assert "line 2 is not as" in refused(lines[0].replace("W_q,48", "W_q,wide"))
    assert "No such file" in say(alignment, tmp_path / "none.csv")
    assert "none/config.json" in say(alignment, tmp_path / "none")
    shutil.copytree(runs[0], tmp_path / "run")
    (tmp_path / "run/snapshot_00000004.pt").write_bytes((runs[0] / "snapshot_00000004.pt").read_bytes()[:5000])
    assert "run cannot be measured" in say(alignment, tmp_path / "run")
    (tmp_path / "run/config.json").write_text("{")
    assert "run cannot be measured" in say(alignment, tmp_path / "run")
    shutil.copy(runs[0] / "config.json", tmp_path / "run/config.json")
    for path in sorted((tmp_path / "run").glob("snapshot_0000000[04].pt")):
        path.unlink()
    assert "has no snapshot of step 0" in say(alignment, tmp_path / "run")


def test_bench_prints_both_models_and_their_ratio(say, monkeypatch):
    options = ("--width=32 --depth=1 --head_dim=8 --seq_len=16 --vocab_size=64 --batch_size=2 --device=cpu "
               "--dtype=float32 --compile=False").split()
    lines = say(bench, *options).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:3]] == ["normalized", "plain"]
    kept = [int(re.search(r"([\d,]+) = [\d.]+·d bytes", line)[1].replace(",", "")) for line in lines[1:3]]
    assert kept[0] > kept[1] > 32 * 4 * 10      # the plain block keeps more than 10 vectors of d fp32 numbers
    calls = []
    with monkeypatch.context() as patch:        # a clock that shows how often the function was called
        patch.setattr(bench.time, "perf_counter", lambda: len(calls))
        assert bench.seconds(lambda: calls.append(1), torch.device("cpu")) == 1 and len(calls) == 1 + bench.GROUP
    clock, timed = iter([0.3, 0.2, 0.01, 0.004, 0.2, 0.1, 0.005, 0.004]), []
    monkeypatch.setattr(bench, "seconds", lambda function, device: (timed.append(function), function(), next(clock))[2])
    monkeypatch.setattr(bench, "TURNS", 1)
    lines = say(bench, *options).splitlines()
    assert lines[0].endswith(f": {2 * 2048 ** 3 / 0.004 / 1e12:.3f} TFLOP/s") and len(timed) == 8
    assert "step 300.00 ms, of which the update 10.00; 107 tokens/s" in lines[1]
    parts = 2 ** 19 / 32
    assert lines[3].startswith(f"ratio normalized/plain: 1.500 for this step of 32 tokens, "
                               f"{(0.2 * parts + 0.01) / (0.1 * parts + 0.005):.3f} for")
    assert "head_dim" in say(bench, *options, "--width=33")
