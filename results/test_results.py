"""Tests of the laboratory: `python -m pytest results`. Sweeps are synthetic, of known drift and noise."""
import importlib, itertools, math, re, shlex, sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
import alignment, bench, show, train, verdict
from alignment import rms
from model import GPT, GPTConfig, norm
from prepare_data import prepare, read_folder

torch.set_num_threads(1)
RUN = {**vars(train.Config()), "parametrization": "ngpt", "width": 48, "depth": 4, "base_width": 48, "base_depth": 4,
       "base_steps": 400, "steps": 400, "embedding_lr_mult": 1, "unembedding_lr_mult": 0.5, "dtype": "float32",
       "val_loss": 2.0, "parameters": 1000, "status": "finished", "attn_alpha": 0.2, "mlp_alpha": 0.2}


def write(path, rows):
    path.write_text("")
    for row in rows:
        train.append_row(path, rows[0], row)
    return path


@pytest.fixture
def say(capsys, monkeypatch):
    """A function: what `python results/….py …` prints (its picture is drawn), or the sentence with which it leaves."""
    def run(line):
        script, *args = shlex.split(line)
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [script, *args])
        capsys.readouterr()
        try:
            importlib.import_module(Path(script).stem).main()
        except SystemExit as end:
            assert end.code.startswith(f"{Path(script).name}: ") and "\n" not in end.code
            return end.code
        for picture in re.findall(r"--plot=(\S+)", line):
            assert Path(picture).read_bytes()[:4] == b"\x89PNG"
        return capsys.readouterr().out
    return run


def quoted():
    """(command, block) for each untagged code block of a README with `python results/….py …` in the text before it."""
    for path in (ROOT / "README.md", ROOT / "results/README.md"):
        text, *parts = re.split(r"^```(\S*)\n(.*?)^```$", path.read_text(), flags=re.M | re.S)
        for tag, block, following in zip(parts[::3], parts[1::3], parts[2::3]):
            commands = re.findall(r"`python (results/\w+\.py [^`]+)`", text)
            if commands and not tag:
                yield commands[-1], block
            text = following


@pytest.mark.parametrize("line, block", list(quoted()), ids=lambda text: text[:40])
def test_quoted_tables_are_what_the_commands_print(say, line, block):
    out = say(line)
    assert "\n" + block in "\n" + out, f"`python {line}` prints\n{out}"


def sweep(drifts, sizes=(48, 96, 192), seeds=range(3), grid=np.arange(-8.5, -3.9, 0.5), axis="width", best=-6.0,
          noise=0.0, jitter=0.0, shared_jitter=0.0, draw=0):
    """Rows of a sweep: parabolas whose optimum moves by drifts[column] octaves a doubling, with noise of each run,
    of each curve's optimum (jitter) and of a seed's optima at all sizes. Only the first column has runs at the base."""
    rng, rows = np.random.default_rng(draw), []
    seed_shift = {seed: shared_jitter * rng.standard_normal() for seed in seeds}
    for (name, drift), size, seed in itertools.product(drifts.items(), sizes, seeds):
        doublings = math.log2(size / sizes[0])
        optimum = best + drift * doublings + seed_shift[seed] + jitter * rng.standard_normal()
        level = 1.9 - 0.1 * doublings + 0.03 * rng.standard_normal()
        for x in grid if size > sizes[0] or name == next(iter(drifts)) else ():
            loss = level + 0.03 * (x - optimum) ** 2 + noise * rng.standard_normal()
            rows.append({**RUN, "parametrization": name, axis: size, "seed": seed, "learning_rate": 2.0 ** x,
                         "val_loss": loss})
    return rows


def judge(rows, control="ngpt"):
    return verdict.judge(rows, control=control)[1]


def text_of(rows, control="ngpt"):
    return show.report(*verdict.judge(rows, control=control), control)


def test_known_drift_without_noise():
    drifts = dict(ngpt=-0.5, mup=0.2, nugpt=0.0)
    rows = sweep(drifts, grid=(-8, -7.25, -7, -6.5, -6.25, -6, -5.5, -5, -4.5, -4))
    verdicts = judge(rows)
    assert list(verdicts) == list(drifts) and text_of(rows).split()[:2] == ["column", "width"]
    for name, drift in drifts.items():
        assert verdicts[name].drift == pytest.approx((drift, 0), abs=1e-6)
        optima = [curve.optimum for curve in verdicts[name].curves.values()]
        assert optima == pytest.approx([-6 + drift * i for i in range(3)], abs=1e-6)
    assert verdicts["nugpt"].difference == pytest.approx((0.5, 0), abs=1e-6) and verdicts["ngpt"].difference is None
    # the smallest size's η is 2 · 0.5 octaves off at the largest: 0.03 · 1²
    assert [verdicts[name].regret for name in ("ngpt", "nugpt")] == pytest.approx([0.03, 0], abs=1e-6)
    assert [verdicts[name].same for name in drifts] == ["No", "No", "Yes"]
    assert verdicts["nugpt"].powers == pytest.approx(dict(embedding=-0.5, hidden=-0.75, unembedding=-0.75, rescalers=0))
    axis, verdicts = verdict.judge(sweep(dict(nugpt=0.4), sizes=(4, 16, 64), axis="batch_size"))
    assert axis == "batch_size" and verdicts["nugpt"].drift == pytest.approx((0.4, 0), abs=1e-6)


@pytest.mark.parametrize("seeds, draws, longest", [(3, 300, 3.2), (1, 200, 20)])
def test_interval_covers_at_its_nominal_rate(seeds, draws, longest):
    """Both kinds of noise: of runs, and of whole curves, which would fool an interval that goes by single runs."""
    drifts = []
    for draw in range(1000, 1000 + draws):
        verdicts = judge(sweep(dict(ngpt=-0.5, nugpt=-0.1), seeds=range(seeds), noise=0.003, jitter=0.15, draw=draw))
        drifts.append((*verdicts["nugpt"].drift, *verdicts["nugpt"].difference))
    slope, half, difference, half_difference = np.transpose(drifts)
    assert 0.91 <= np.mean(abs(slope + 0.1) <= half) <= 0.99        # with 1.96 instead of t's 2.57 it would be 0.88
    assert 0.92 <= np.mean(abs(difference - 0.4) <= half_difference) <= 0.997   # long: the base runs are common
    assert np.mean(slope) == pytest.approx(-0.1, abs=3 * np.std(slope) / draws ** 0.5)
    assert np.median(half) < longest * np.std(slope)


def test_seeds_are_paired():
    """What a seed has in common at all sizes, or in two columns, cancels."""
    plain, shifted = (judge(sweep(dict(ngpt=-0.5), noise=0.002, shared_jitter=by))["ngpt"] for by in (0, 0.6))
    assert abs(shifted.drift[0] + 0.5) < 0.1 and shifted.drift[1] < 2 * plain.drift[1]
    rows = sweep(dict(ngpt=-0.3), jitter=0.3)
    copy = judge(rows + [{**row, "parametrization": "nugpt"} for row in rows if row["width"] > 48])["nugpt"]
    assert copy.drift[1] > 0.05 and copy.difference == pytest.approx((0, 0), abs=1e-9)


def test_base_runs_count_for_every_column_with_the_same_options():
    rows = sweep(dict(ngpt=-0.5, nugpt=0.0), noise=0.01)
    verdicts = judge(rows)
    assert (verdicts["nugpt"].curves[48].loss == verdicts["ngpt"].curves[48].loss).all()
    # not where -1 leaves the unembedding to the table, which gives ngpt twice nugpt's, and not with another warm-up
    for other in ([{**row, "unembedding_lr_mult": -1} for row in rows],
                  [{**row, "warmup_steps": 40 * (row["parametrization"] == "nugpt")} for row in rows]):
        assert list(judge(other)["nugpt"].curves) == [96, 192] and list(judge(other)["ngpt"].curves) == [48, 96, 192]


def test_over_steps_columns_differ_by_a_shift():
    for run_as, other, shift in (("nugpt", "ngpt", -1 / 3), ("ngpt", "nugpt", 1 / 3)):
        rows = sweep({run_as: -0.05}, sizes=(400, 800, 1600), axis="steps")
        drifts = [judge(rows)[name].drift[0] for name in (run_as, other)]
        assert drifts == pytest.approx([-0.05, -0.05 + shift], abs=1e-3)
        assert list(judge([{**row, "base_width": 96} for row in rows])) == [run_as]     # not off the base width


def test_narrow_grids_are_said_and_bound_the_regret():
    judged = judge(sweep(dict(ngpt=-0.75), grid=(-6.5, -6, -5.5, -5)))["ngpt"]
    assert [curve.grid for curve in judged.curves.values()] == ["add 2^-7", "add 2^-7.5 2^-7", "add 2^-7.5 2^-7"]
    assert judged.same == "?" and not any(size == 192 for size, _ in judged.optima)      # never extrapolated
    assert judge(sweep(dict(ngpt=0), best=-5, grid=(-6.5, -6, -5.5, -5)))["ngpt"].regret is None
    rows = sweep(dict(ngpt=-1.0), sizes=(48, 96, 192, 384), best=-5)
    rows = [row for row in rows if row["width"] < 384 or row["learning_rate"] < 2 ** -6.75]
    judged = judge(rows)["ngpt"]     # the optima are -5, -6, -7, -8; the widest's grid ends at -7
    assert judged.curves[384].regret == pytest.approx(0.03, abs=1e-6) and judged.curves[384].bound
    assert judged.regret == pytest.approx(0.12, abs=1e-6) and judged.bound and "> 0.1200" in text_of(rows)
    rows = sweep(dict(ngpt=0.0), seeds=[0, 1])      # a third seed at one η only is said, and does not move the best
    rows += [{**row, "seed": 2, "val_loss": 1.0} for row in rows if (row["seed"], row["learning_rate"]) == (0, 2 ** -7)]
    curve = judge(rows)["ngpt"].curves[96]
    assert curve.x[curve.best] == -6 and curve.complete == [0, 1] and curve.grid == "add 2^-6.5 2^-6 2^-5.5 2^-5"


def test_diverged_runs():
    def judged(diverges, drift=0.0, end=-4):
        rows = sweep(dict(ngpt=drift), grid=np.arange(-8.5, end + 0.1, 0.5))
        return judge([{**row, "val_loss": math.inf} if diverges(row) else row for row in rows])["ngpt"]

    curve = judged(lambda row: row["learning_rate"] > 2 ** -5.25).curves[96]
    assert (curve.radius, curve.add) == (1, []) and curve.optimum == pytest.approx(-6, abs=1e-6)    # symmetric window
    hot = judged(lambda row: row["learning_rate"] > 2 ** -5.75)
    assert hot.drift is None and hot.curves[96].grid == "diverges near the best"
    assert judged(lambda row: row["learning_rate"] > 2 ** -5.75, end=-5.5).curves[96].add == []     # far enough
    dead = judged(lambda row: row["width"] == 192).curves[192]
    assert dead.add == [-9.5, -9] and dead.regret == math.inf       # nothing survives: look further left
    curve = judged(lambda row: row["seed"] == 1 and row["learning_rate"] == 2 ** -5).curves[96]
    assert curve.radius == 1 and np.isinf(curve.mean).sum() == 1        # one seed makes the point diverged
    assert judged(lambda row: row["width"] == 192 and row["learning_rate"] > 2 ** -6.25, drift=-1).regret == math.inf


def test_one_tensor_class_at_a_time():
    drifts, rows = dict(embedding=0.2, unembedding=-0.25), []
    for width, name, seed, x in itertools.product((48, 192), drifts, range(3), (-2, -1, 0, 1, 2)):
        shifts = {**dict.fromkeys(drifts, 0), name: x}
        off = [shifts[other] - drifts[other] * math.log2(width / 48) for other in drifts]
        rows.append({**RUN, "parametrization": "nugpt", "width": width, "seed": seed,
                     "embedding_lr_mult": 2.0 ** shifts["embedding"],
                     "unembedding_lr_mult": 2.0 ** shifts["unembedding"] / 2,
                     "val_loss": 2 + 0.1 * seed + 0.03 * np.dot(off, off)})
    verdicts = judge(rows)
    for name, power in dict(embedding=-0.5, unembedding=-0.75).items():
        assert verdicts[name].drift == pytest.approx((drifts[name], 0), abs=1e-6)
        assert verdicts[name].powers == pytest.approx({name: power})
    assert "-0.75 → -1.00" in text_of(rows) and "×*" in text_of(rows)


def test_steps_that_the_control_needs():
    def rows(name, losses, seeds=(0,), grid=(-7, -6.5, -6, -5.5, -5)):
        return [{**RUN, "parametrization": name, "width": 96, "steps": steps, "seed": seed, "learning_rate": 2.0 ** x,
                 "embedding_lr_mult": 2 if name == "nugpt" else 16, "val_loss": best - 0.1 * seed + 0.03 * (x + 6) ** 2}
                for steps, best in losses.items() for seed in seeds for x in grid]

    def needed(rows):
        return [row[3].removesuffix(" × the steps") for row in show.steps_needed(judge(rows, "gpt_sp"), "gpt_sp")]

    plain = {400: 2.0, 800: 1.9, 1600: 1.8}     # 1.41: halfway between 400 and 800 in logs. Seed 1 does not count
    both = rows("gpt_sp", plain) + rows("nugpt", {200: 2.1, 400: 1.95, 800: 1.9, 1600: 1.75}, seeds=(0, 1))
    assert needed(both) == ["< 2.00", "1.41", "1.00", "> 1.00"] and "for it gpt_sp needs" in text_of(both, "gpt_sp")
    assert not needed(rows("gpt_sp", plain, grid=(-6, -5.5, -5)) + rows("nugpt", plain))      # best at the edge


def search(seeds=(0,)):
    """Rows of a random search: 2 + 0.1 · (log2 distances from lr 2^-6 and alpha_init 0.4, the end of its range)²."""
    rng, settings = np.random.default_rng(0), np.random.default_rng(1).uniform((-8, -6), (-4, -1.3), (40, 2)).tolist()
    return [{**RUN, "learning_rate": 2 ** x, "alpha_init": 2 ** a, "seed": seed,
             "val_loss": 2 + 0.1 * ((x + 6) ** 2 + (a + 1.3) ** 2) + 0.05 * seed + 0.01 * rng.standard_normal()}
            for i, (x, a) in enumerate(settings) for seed in (seeds if i < 6 else seeds[:1])]


def test_search_report(tmp_path, say):
    rows, keys = search(), ["learning_rate", "alpha_init"]
    best = min(rows, key=lambda row: row["val_loss"])
    out = say(f"results/verdict.py {write(tmp_path / 'a.csv', rows)} --plot={tmp_path}/a.png")
    assert out.splitlines()[1].split() == [f"{best['val_loss']:.4f}", "0.0000", "1", *(
        f"--{key}={best[key]:.4g}" for key in (*keys, "embedding_lr_mult", "unembedding_lr_mult"))]   # all to paste
    assert "in nats" in out and "widen alpha_init upwards" in out and "widen learning_rate" not in out
    ranked, scatter = verdict.rank(search(seeds=(0, 1, 2)), keys)
    assert 0.006 < scatter < 0.015 and sum(seeds == 3 for _, seeds, _ in ranked) == 6
    assert "scatters of a seed" in show.report_search(ranked, scatter, keys)


def test_the_last_row_of_a_run_counts_and_a_missing_column_is_the_default(tmp_path, say):
    rows = sweep(dict(ngpt=-0.5, mup=0.2, nugpt=0.0), noise=0.002)
    rows = [{**rows[0], "val_loss": 0.4, "log_every": 1}, *rows, {**rows[-1], "dtype": "bfloat16"},
            {**rows[0], "learning_rate": 2.0 ** -3, "val_loss": 0.5, "status": "diverged"}]
    path = write(tmp_path / "a.csv", [{key: row[key] for key in row if key != "beta1"} for row in rows])
    out = say(f"results/verdict.py {path} --columns=ngpt,nugpt --plot={tmp_path}/a.png")
    assert "wide enough" in out and "Yes" in out and not any(words in out for words in ("\nmup ", "0.4000", "0.5000"))
    assert "bfloat16 and float32 stand side by side" in out


def test_without_matplotlib_the_tables_are_printed(capsys, monkeypatch, say):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for line in ("verdict.py results/laptop.csv", "alignment.py results/coordinates.csv"):
        assert say(f"results/{line} --plot=x.png").endswith(".py: the picture needs matplotlib: pip install matplotlib")
        assert capsys.readouterr().out


def adapted(seed):
    """A model with one more linear map, the adapter, in which no factor is 1 and some are negative."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(width=32, depth=2, head_dim=8, vocab_size=48, seq_len=16, alpha_init=0.3))
    model.adapter = torch.nn.Parameter(torch.randn(32, 32))
    model.unembed = lambda h: GPT.unembed(model, F.linear(h, 0.5 * model.adapter))
    for p in model.parameters():
        p.data *= torch.empty_like(p).uniform_(-0.5, 1.5)
    return model


def by_hand(W, W_0, x, x_0):
    """{column: number} of the map y = W x, written out from the definition."""
    dW, dx, y, y_0 = W - W_0, x - x_0, x @ W.T, x_0 @ W_0.T
    pairs = dict(alpha=(dW, x_0), omega=(W_0, dx), nu=(dW, dx))
    exponents = {key: (rms(x @ W.T) / (rms(W.flatten()) * rms(x))).log().mean() / math.log(W.size(1))
                 for key, (W, x) in pairs.items()}
    sizes = dict(rms_dW=rms(dW.flatten()), rms_dx=rms(dx).mean(), rms_y=rms(y).mean(), rms_dy=rms(y - y_0).mean())
    return {key: number.item() for key, number in (exponents | sizes).items()}


def test_alignment_exponent_of_known_cases():
    """1/2 where weight and input are independent, 1 where the weight has rank one along the input."""
    torch.manual_seed(0)
    d, x, u = 1024, torch.randn(50, 1024), torch.randn(300)
    assert alignment.alignment_exponent(torch.randn(300, d), x) == pytest.approx(0.5, abs=0.01)
    quarter = torch.outer(u, x[0]) * (torch.arange(d) < 256)    # rank one along a quarter of the input
    alpha = 1 + math.log(x[0, :256].norm() / x[0].norm(), d)
    x[1] = x[0] * (torch.arange(d) >= 256)      # a token that the weight does not see does not count
    x[2] = 0                                    # nor does one that has not moved
    assert alignment.alignment_exponent(3 * quarter, 5 * x[:3]) == pytest.approx(alpha, abs=1e-5)
    assert math.isnan(alignment.alignment_exponent(torch.zeros(300, d), x))


def test_each_map_is_taken_with_its_own_input():
    """Against the definition, with inputs from the parts of the model, for every map."""
    initial, model, (tokens, targets) = adapted(0), adapted(1), torch.randint(48, (2, 2, 16))
    rows, loss = alignment.measure(model, initial, tokens, targets)
    assert loss == pytest.approx(model(tokens, targets)[1].item())

    def maps(model):
        h, d, m = model.embedding[tokens], model.config.width, model.config.mlp_width
        for layer, block in enumerate(model.blocks):
            yield from ((layer, name, W, h) for name, W in zip(("W_q", "W_k", "W_v"), block.qkv.split(d)))
            attended = block.attention(h, model.rope)
            yield layer, "W_O", block.attn_out.T, attended @ torch.linalg.inv(block.attn_out)
            h = norm(h + block.attn_alpha().abs() * (norm(attended) - h))
            u, nu = block.mlp_in[:m], block.mlp_in[m:]
            gated = F.silu(h @ nu.T * block.s_v() * math.sqrt(d)) * (h @ u.T * block.s_u())
            yield from ((layer, "W_u", u, h), (layer, "W_nu", nu, h), (layer, "W_oMLP", block.mlp_out.T, gated))
            h = norm(h + block.mlp_alpha().abs() * (norm(gated @ block.mlp_out) - h))
        yield from ((2, "adapter", model.adapter, h), (2, "E_out", model.unembedding, h @ model.adapter.T / 2))

    with torch.no_grad():
        for row, (layer, name, W, x), (_, _, W_0, x_0) in zip(rows, maps(model), maps(initial)):
            expected = dict(layer=layer, d_in=x.size(-1)) | by_hand(W, W_0, x, x_0)
            assert row.pop("map") == name and row == pytest.approx(expected, rel=1e-3)
        z, dz = model(tokens)[0], model(tokens)[0] - initial(tokens)[0]
    logits = dict(layer=2, rms_y=rms(z).mean().item(), rms_dy=rms(dz).mean().item())
    assert len(rows) == 2 * 7 + 3 and rows[-1].pop("map") == "logits" and rows[-1] == pytest.approx(logits)
    assert alignment.is_hidden("blocks.0.gate") and not alignment.is_hidden("adapter")
    model.unembed = lambda h: GPT.unembed(model, F.linear(h, torch.cat((model.adapter[:16], model.adapter[16:]))))
    with pytest.raises(ValueError, match="no parameter as a whole"):
        alignment.measure(model, initial, tokens, targets)


def test_snapshots_give_the_definition_and_the_csv_the_same_report(tmp_path, say):
    (tmp_path / "words.txt").write_text("norm sphere rescaler alpha residual width depth head " * 200)
    prepare(tmp_path, [Path("words.txt")], tmp_path, progress=False)
    for width in (16, 32):
        options = dict(width=width, depth=2, head_dim=8, seq_len=16, batch_size=4, steps=6, snapshot_every=4,
                       device="cpu", dtype="float32", compile=False, data=tmp_path, sample_tokens=0,
                       out_dir=tmp_path / str(width))
        assert train.main([f"--{key}={value}" for key, value in options.items()]) == 0
    line = f"results/alignment.py {tmp_path}/16 {tmp_path}/32"
    report = say(f"{line} --csv={tmp_path}/a.csv")
    assert say(f"results/alignment.py {tmp_path}/a.csv") == report and "slope over widths" in report
    rows = [row for _, row in alignment.read_csv(tmp_path / "a.csv")]
    assert [row["step"] for row in rows[::16]] == 2 * ["0", "1", "2", "4", "6"]
    row = next(row for row in rows if (row["width"], row["step"], row["layer"], row["map"]) == ("32", "6", "0", "W_q"))
    val = read_folder(tmp_path)[1]      # small: all of it is measured
    tokens = torch.from_numpy(val[0:(len(val) - 1) // 16 * 16].astype(int)).view(-1, 16)
    W, W_0, E, E_0 = (torch.load(tmp_path / f"32/snapshot_0000000{step}.pt")["model"][name]
                      for name in ("blocks.0.qkv", "embedding") for step in (6, 0))
    expected = by_hand(W[:32], W_0[:32], E[tokens], E_0[tokens])
    assert {key: float(row[key]) for key in expected} == pytest.approx(expected, rel=1e-3)
    (tmp_path / "16/snapshot_00000004.pt").write_bytes((tmp_path / "16/ckpt.pt").read_bytes()[:5000])
    assert "16 cannot be measured" in say(line)
    (tmp_path / "16/snapshot_00000000.pt").unlink()
    assert "has no snapshot of step 0" in say(line)


def measurements(*names):
    """Rows as of runs whose RMS(W x) / (RMS(W) RMS(x)) is 3 d^0.8 at step 1, 3 d^0.6 at step 10."""
    rows = []
    for name, width, seed, step in itertools.product(names, (48, 96, 192), (0, 1), (0, 1, 10)):
        run = dict(parametrization=name, width=width, depth=2, steps=10, seed=seed, step=step, rms_dW=width ** -0.75,
                   rms_dx=width ** -0.5, rms_y=1, rms_dy=width ** 0.5, loss={0: 6, 1: 3, 10: 2}[step])
        for layer, name, n in ((0, "W_q", width), (0, "W_oMLP", 2.5 * width), (2, "E_out", width), (2, "logits", "")):
            exponent = n and (0.6 if step == 10 else 0.8) + math.log(3, n)
            rows.append(dict(run, layer=layer, map=name, d_in=n, alpha=exponent, omega=exponent, nu=exponent))
    return rows


def test_slopes_are_free_of_constants_and_powers_are_of_the_width(tmp_path, say):
    path = write(tmp_path / "a.csv", measurements("nugpt"))
    text = say(f"results/alignment.py {path} --plot={tmp_path}/a.png").splitlines()
    assert text[6].split()[2:] == ["0.80", "±", "0.00"] * 6 and text[7].split()[2:] == ["0.60", "±", "0.00"] * 6
    assert text[8].split()[3:] == ["0.75", "±", "0.00"] * 6     # 3 nats were won by step 1, 1 nat by step 10
    logs = [math.log(48), math.log(120)]    # a class's exponent is its mean logarithm over that of d_in
    assert text[1].split()[3] == f"{0.75 + math.log(3) / np.mean(logs):.2f}"
    text = say(f"results/alignment.py {write(path, measurements('nugpt', 'ngpt'))} --plot={tmp_path}/b.png")
    assert [line.replace("-0.00", "+0.00").split() for line in text.splitlines()[1:5]] == [
        [name, step, "-0.25", "+0.00", "+0.50"] for name in ("ngpt", "nugpt") for step in ("1", "10")]


def test_bad_input_gets_one_sentence(tmp_path, say):
    rows, maps = sweep(dict(ngpt=0.0)), measurements("ngpt", "nugpt")
    bad_tables = {
        "verdict.py --axis=width --columns=ngpt,nugpt_full": {
            "has no rows": [], "parameters is None": [dict(a=1)], "width is '0'": [{**rows[0], "width": 0}],
            "head_dim is 16 and 32": [{**rows[0], "head_dim": 16}, {**rows[1], "head_dim": 32}],
            "in ngpt's runs of 400 steps": [*rows, {**rows[0], "warmup_steps": 40}],
            "width 48 differ in depth, batch_size": [*rows, {**rows[0], "depth": 9, "batch_size": 8}],
            "beta1 is 0.9 and 0.8": [*search(), {**search()[0], "beta1": 0.8}], "not of nugpt_full": rows},
        "alignment.py": {
            "is there twice": [*maps, maps[0]], "another depth or length": [*maps, {**maps[0], "steps": 40, "seed": 7}],
            "needs more than one width of ngpt and nugpt": [row for row in maps if row["width"] == 48],
            "have only [0]": [row for row in maps if row["parametrization"] != "ngpt" or row["step"] == 0],
            "line 2 is not as": [{**maps[0], "d_in": "wide"}]}}
    for line, bad in bad_tables.items():
        for words, table in bad.items():
            assert words in say(f"results/{line} {write(tmp_path / 'a.csv', table)}")
    for words, line in {"No such file": "verdict.py none.csv", "--axis": "verdict.py none.csv --axis=height",
                        "--plott": "alignment.py a --plott=a.png", "head_dim": "bench.py --width=33"}.items():
        assert words in say(f"results/{line}")


def test_bench_prints_both_models_and_their_ratio(monkeypatch, say):
    command = ("results/bench.py --width=32 --depth=1 --head_dim=8 --seq_len=16 --vocab_size=64 --batch_size=2 "
               "--device=cpu --dtype=float32 --compile=False")
    clock, build, builds = iter([0.2, 0.01, 0.004, 0.1, 0.02, 0.004] * 2), bench.contestant, itertools.count()
    monkeypatch.setattr(bench, "seconds", lambda function, device: [function(), next(clock)][1])
    monkeypatch.setattr(bench, "TURNS", 2)
    lines = say(command).splitlines()
    assert f" of {2 * 2048 ** 3 / 0.004 / 1e12:.3f} TFLOP/s" in lines[0] and next(clock, None) is None
    assert "normalized: step 210.00 ms, of which the update 10.00; 152 tokens/s" in lines[0] and "plain: " in lines[1]
    normalized, plain = (float(re.search(r"([\d.]+)·d bytes", line)[1]) for line in lines[:2])
    assert normalized > plain > 4 * 10      # the plain block keeps more than 10 vectors of d fp32 numbers
    for line, ratio in zip(lines[2:], (0.21 / 0.12, (0.2 * 2 ** 14 + 0.01) / (0.1 * 2 ** 14 + 0.02)), strict=True):
        assert line.startswith(f"ratio normalized/plain: {ratio:.3f} for a step of")

    def second_does_not_fit(*args):
        if next(builds) == 1:
            raise torch.OutOfMemoryError
        return build(*args)
    monkeypatch.setattr(bench, "contestant", second_does_not_fit)
    clock = iter([0.2, 0.01, 0.004] * 2 + [0.1, 0.02, 0.004] * 2)
    assert say(command).splitlines()[1:] == lines
