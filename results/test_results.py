"""
Tests of the laboratory: `python -m pytest results/test_results.py`. Sweeps are synthetic, of known drift and noise.
"""
import contextlib
import csv
import io
import itertools
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
import show
import train
import verdict

GRID = tuple(np.arange(-8.5, -3.9, 0.5))
RUN = {**vars(train.Config()), "parametrization": "ngpt", "width": 48, "depth": 4, "base_width": 48, "base_depth": 4,
       "base_steps": 400, "steps": 400, "embedding_lr_mult": 1, "unembedding_lr_mult": 0.5, "dtype": "float32",
       "val_loss": 2.0, "parameters": 1000, "status": "finished", "attn_alpha": 0.2, "mlp_alpha": 0.2}


def sweep(drifts, sizes=(48, 96, 192), seeds=range(3), grid=GRID, axis="width", best=-6.0, noise=0.0, jitter=0.0,
          shared_jitter=0.0, draw=0):
    """
    Rows of a sweep: parabolas whose optimum moves by drifts[column] octaves a doubling, with noise of each run,
    of each curve's optimum (jitter) and of a seed's optima at all sizes. Only the first column has runs at the base.
    """
    rng, rows = np.random.default_rng(draw), []
    seed_shift = {seed: shared_jitter * rng.standard_normal() for seed in seeds}
    for name, drift in drifts.items():
        for i, size in enumerate(sizes):
            for seed in seeds:
                optimum = best + drift * math.log2(size / sizes[0]) + seed_shift[seed] + jitter * rng.standard_normal()
                level = 1.9 - 0.1 * i + 0.03 * rng.standard_normal()
                for x in grid if i or name == next(iter(drifts)) else ():
                    loss = level + 0.03 * (x - optimum) ** 2 + noise * rng.standard_normal()
                    rows.append({**RUN, "parametrization": name, axis: size, "seed": seed, "learning_rate": 2.0 ** x,
                                 "val_loss": loss})
    return rows


def runs_of(rows):
    """Rows as verdict.read_results would give them."""
    return [{key: float(cell) if isinstance(cell, (int, float)) else cell for key, cell in row.items()} for row in rows]


def judge(rows, **options):
    return verdict.judge(runs_of(rows), **options)


def text_of(rows, control="ngpt"):
    axis, verdicts = judge(rows, control=control)
    return show.report(axis, verdicts, control)


def diverge(rows, where):
    return [{**row, "val_loss": math.inf} if where(row) else row for row in rows]


def write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def command(line):
    """Output, error text and exit code of `python LINE`, run from the repository root in this process."""
    argv = shlex.split(line)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", argv)
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as end:       # of a sentence, Python prints it and exits with 1
            code = end.code or 0
            if isinstance(code, str):
                code = print(code, file=err) or 1
    return out.getvalue(), err.getvalue(), code


def quoted():
    """(command, block) for each untagged code block of a README with `python results/….py …` in the text before it."""
    for path in (ROOT / "README.md", ROOT / "results/README.md"):
        text, *parts = re.split(r"^```(\S*)\n(.*?)^```$", path.read_text(), flags=re.M | re.S)
        for tag, block, following in zip(parts[::3], parts[1::3], parts[2::3]):
            commands = re.findall(r"`python (results/\w+\.py [^`]+)`", text)
            if commands and not tag:
                yield commands[-1], block
            text = following


@pytest.mark.parametrize("line, block", quoted())
def test_quoted_tables_are_what_the_commands_print(line, block):
    out, err, code = command(line)
    assert code == 0, err
    assert "\n" + block in "\n" + out, f"`python {line}` prints\n{out}"


def test_known_drift_without_noise():
    drifts = dict(ngpt=-0.5, mup=0.2, nugpt=0.0)
    axis, verdicts = judge(sweep(drifts, grid=(-8, -7.25, -7, -6.5, -6.25, -6, -5.5, -5, -4.5, -4)))
    assert axis == "width" and list(verdicts) == list(drifts)
    for name, drift in drifts.items():
        assert verdicts[name].drift == pytest.approx((drift, 0), abs=1e-6)
        optima = [curve.optimum for curve in verdicts[name].curves.values()]
        assert optima == pytest.approx([-6 + drift * i for i in range(3)], abs=1e-6)
    assert verdicts["nugpt"].difference == pytest.approx((0.5, 0), abs=1e-6) and verdicts["ngpt"].difference is None
    # the smallest size's η is 2 · 0.5 octaves off at the largest: 0.03 · 1²
    assert [verdicts[name].regret for name in ("ngpt", "nugpt")] == pytest.approx([0.03, 0], abs=1e-6)
    assert [verdicts[name].same for name in drifts] == ["No", "No", "Yes"]
    assert verdicts["nugpt"].powers == pytest.approx(dict(embedding=-0.5, hidden=-0.75, unembedding=-0.75, rescalers=0))
    assert "-0.50 → -0.30" in text_of(sweep(drifts))      # mup's embedding


def test_interval_covers_at_its_nominal_rate():
    """Both kinds of noise: of runs, and of whole curves, which would fool an interval that goes by single runs."""
    drifts = []
    for draw in range(1000, 1300):
        verdicts = judge(sweep(dict(ngpt=-0.5, nugpt=-0.1), noise=0.003, jitter=0.15, draw=draw, grid=GRID[1:]))[1]
        drifts.append((*verdicts["nugpt"].drift, *verdicts["nugpt"].difference))
    slope, half, difference, its_half = np.transpose(drifts)
    assert 0.91 <= np.mean(abs(slope + 0.1) <= half) <= 0.985        # with 1.96 instead of t's 2.57 it would be 0.88
    assert 0.92 <= np.mean(abs(difference - 0.4) <= its_half) <= 0.997  # long: the base runs are common
    assert np.mean(slope) == pytest.approx(-0.1, abs=3 * np.std(slope) / 300 ** 0.5)
    assert np.median(half) < 3.2 * np.std(slope)


def test_one_seed_has_a_long_interval_that_covers():
    drifts = np.array([judge(sweep(dict(ngpt=-0.5), seeds=[0], jitter=0.2, draw=draw))[1]["ngpt"].drift
                       for draw in range(200)])
    assert 0.91 <= np.mean(abs(drifts[:, 0] + 0.5) <= drifts[:, 1]) <= 0.99 and np.median(drifts[:, 1]) > 0.5
    assert judge(sweep(dict(ngpt=-0.5), seeds=[0], sizes=(48, 96), jitter=0.2))[1]["ngpt"].drift[1] == math.inf


def test_seeds_are_paired():
    """What a seed has in common at all sizes, or in two columns, cancels."""
    plain, shifted = (judge(sweep(dict(ngpt=-0.5), noise=0.002, shared_jitter=by))[1]["ngpt"] for by in (0, 0.6))
    assert np.ptp([x for (size, _), x in shifted.optima.items() if size == 48]) > 0.3
    assert abs(shifted.drift[0] + 0.5) < 0.1 and shifted.drift[1] < 2 * plain.drift[1]
    rows = sweep(dict(ngpt=-0.3), jitter=0.3)
    copy = judge(rows + [{**row, "parametrization": "nugpt"} for row in rows if row["width"] > 48])[1]["nugpt"]
    assert copy.drift[1] > 0.05 and copy.difference == pytest.approx((0, 0), abs=1e-9)


def test_base_runs_count_for_every_column_with_the_same_options():
    rows = sweep(dict(ngpt=-0.5, nugpt=0.0), noise=0.01)
    verdicts = judge(rows)[1]
    assert (verdicts["nugpt"].curves[48].loss == verdicts["ngpt"].curves[48].loss).all()
    # not where -1 leaves the unembedding to the table, which gives ngpt twice nugpt's
    assert list(judge([{**row, "unembedding_lr_mult": -1} for row in rows])[1]["nugpt"].curves) == [96, 192]
    # and not with another warm-up
    warm = judge([{**row, "warmup_steps": 40 * (row["parametrization"] == "nugpt")} for row in rows])[1]
    assert list(warm["nugpt"].curves) == [96, 192] and list(warm["ngpt"].curves) == [48, 96, 192]


@pytest.mark.parametrize("run_as, other, shift", [("nugpt", "ngpt", -1 / 3), ("ngpt", "nugpt", 1 / 3)])
def test_over_steps_columns_differ_by_a_shift(run_as, other, shift):
    rows = sweep({run_as: -0.05}, sizes=(400, 800, 1600), axis="steps")
    axis, verdicts = judge(rows)
    assert axis == "steps" and verdicts[run_as].drift[0] == pytest.approx(-0.05, abs=1e-3)
    assert verdicts[other].drift[0] == pytest.approx(-0.05 + shift, abs=1e-3)
    assert list(judge([{**row, "base_width": 96} for row in rows])[1]) == [run_as]      # not off the base width


def test_narrow_grids_are_said():
    rows = sweep(dict(ngpt=-0.75), grid=(-6.5, -6, -5.5, -5))
    judged = judge(rows)[1]["ngpt"]
    assert [curve.grid for curve in judged.curves.values()] == ["add 2^-7", "add 2^-7.5 2^-7", "add 2^-7.5 2^-7"]
    assert judged.same == "?" and not any(size == 192 for size, _ in judged.optima)      # never extrapolated
    assert judge(sweep(dict(ngpt=0), best=-5, grid=(-6.5, -6, -5.5, -5)))[1]["ngpt"].regret is None
    # a third seed ran at one η only: that is said, and does not move the best
    rows = sweep(dict(ngpt=0.0), seeds=[0, 1])
    late = [{**row, "seed": 2, "val_loss": row["val_loss"] - 0.2} for row in rows
            if (row["seed"], row["learning_rate"]) == (0, 2 ** -7)]
    curve = judge(rows + late)[1]["ngpt"].curves[96]
    assert curve.x[curve.best] == -6 and curve.complete == [0, 1] and curve.grid == "add 2^-6.5 2^-6 2^-5.5 2^-5"


def test_diverged_runs():
    rows = sweep(dict(ngpt=0.0))
    curve = judge(diverge(rows, lambda row: row["learning_rate"] > 2 ** -5.25))[1]["ngpt"].curves[96]
    assert (curve.radius, curve.add) == (1, []) and curve.optimum == pytest.approx(-6, abs=1e-6)    # symmetric window
    hot = diverge(rows, lambda row: row["learning_rate"] > 2 ** -5.75)
    short = judge([row for row in hot if row["learning_rate"] < 2 ** -5.25])[1]["ngpt"]
    assert short.curves[96].add == []       # the grid ends with a divergence: far enough
    judged = judge(hot)[1]["ngpt"]
    assert judged.drift is None and judged.curves[96].grid == "diverges near the best"
    dead = judge(diverge(rows, lambda row: row["width"] == 192))[1]["ngpt"].curves[192]
    assert dead.add == [-9.5, -9] and dead.regret == math.inf       # nothing survives: look further left
    one = judge(diverge(rows, lambda row: row["seed"] == 1 and row["learning_rate"] == 2 ** -5))[1]["ngpt"].curves[96]
    assert one.radius == 1 and np.isinf(one.mean).sum() == 1        # one seed makes the point diverged
    rows = diverge(sweep(dict(ngpt=-1.0)), lambda row: row["width"] == 192 and row["learning_rate"] > 2 ** -6.25)
    assert judge(rows)[1]["ngpt"].regret == math.inf and "diverges" in text_of(rows).split("drift")[0]


def test_regret_beyond_a_grid_is_a_lower_bound():
    rows = sweep(dict(ngpt=-1.0), sizes=(48, 96, 192, 384), best=-5)
    rows = [row for row in rows if row["width"] < 384 or row["learning_rate"] < 2 ** -6.75]
    judged = judge(rows)[1]["ngpt"]     # the optima are -5, -6, -7, -8; the widest's grid ends at -7
    assert judged.curves[384].regret == pytest.approx(0.03, abs=1e-6) and judged.curves[384].bound
    assert judged.regret == pytest.approx(0.12, abs=1e-6) and judged.bound and "> 0.1200" in text_of(rows)


def test_joint_axis():
    rows = [{**row, "depth": row["width"] // 12, "parameters": row["width"] ** 3} for row in sweep(dict(ngpt=-0.5))]
    axis, verdicts = judge(rows)
    assert axis == "parameters" and verdicts["ngpt"].drift[0] == pytest.approx(-0.5 / 3, abs=1e-6)
    assert judge(rows, axis="width")[1]["ngpt"].drift[0] == pytest.approx(-0.5, abs=1e-6)
    with pytest.raises(ValueError, match="width 48 differ in depth"):
        judge(rows + [{**rows[0], "depth": 9}], axis="width")


def test_one_tensor_class_at_a_time():
    drifts, center, rows = dict(embedding=0.2, unembedding=-0.25), dict(embedding=1.0, unembedding=0.5), {}
    for width, name, seed, x in itertools.product((48, 192), drifts, range(3), (-2, -1, 0, 1, 2)):
        mults = {**center, name: center[name] * 2.0 ** x}
        off = [math.log2(mults[other] / center[other]) - drifts[other] * math.log2(width / 48) for other in drifts]
        rows[width, seed, *mults.values()] = {
            **RUN, "parametrization": "nugpt", "width": width, "seed": seed,
            "val_loss": 2 + 0.1 * seed + 0.03 * np.dot(off, off),
            **{f"{other}_lr_mult": mult for other, mult in mults.items()}}
    verdicts = judge(rows.values())[1]
    assert list(verdicts) == list(drifts)
    for name, power, first in (("embedding", -0.5, 0), ("unembedding", -0.75, -1)):
        assert verdicts[name].drift == pytest.approx((drifts[name], 0), abs=1e-6)
        assert verdicts[name].powers == pytest.approx({name: power})
        optima = [curve.optimum for curve in verdicts[name].curves.values()]
        assert optima == pytest.approx([first, first + 2 * drifts[name]])
    assert "-0.75 → -1.00" in text_of(rows.values()) and "×*" in text_of(rows.values())


def test_steps_that_the_control_needs():
    def rows(losses, seeds=(0,), grid=(-7, -6.5, -6, -5.5, -5)):
        return [{**RUN, "parametrization": name, "width": 96, "steps": steps, "seed": seed, "learning_rate": 2.0 ** x,
                 "val_loss": best - 0.1 * seed + 0.03 * (x + 6) ** 2}
                for name, lengths in losses.items() for steps, best in lengths.items() for seed in seeds for x in grid]

    def needed(rows):
        verdicts = judge(rows, control="gpt_sp")[1]
        return [row[3].removesuffix(" × the steps") for row in show.steps_needed(verdicts, "gpt_sp")]

    plain = {400: 2.0, 800: 1.9, 1600: 1.8}     # 1.41: halfway between 400 and 800 in logs. Seed 1 does not count
    many = rows(dict(gpt_sp=plain)) + rows(dict(nugpt={200: 2.1, 400: 1.95, 800: 1.9, 1600: 1.75}), seeds=(0, 1))
    assert needed(many) == ["< 2.00", "1.41", "1.00", "> 1.00"] and "for it gpt_sp needs" in text_of(many, "gpt_sp")
    # a control that got worse and better again had a loss first when it had it first
    assert needed(rows(dict(gpt_sp={400: 2.0, 800: 1.9, 1600: 1.95, 3200: 1.8}, nugpt={400: 2.01, 1600: 1.92}))) == [
        "< 1.00", f"{400 * 2 ** 0.8 / 1600:.2f}"]
    assert not needed(rows(dict(gpt_sp=plain), grid=(-6, -5.5, -5)) + rows(dict(nugpt=plain)))      # best at the edge
    assert "ngpt needs" not in text_of(rows(dict(nugpt=plain)))       # ngpt's runs are nugpt's


def search_rows(seeds=(0,), count=40):
    """A random search: loss is 2 + 0.1 · (log2 distances from lr 2^-6 and alpha_init 0.4, the end of its range)²."""
    rng, rows = np.random.default_rng(0), []
    settings = np.random.default_rng(1).uniform((-8, -6), (-4, -1.3), (count, 2))
    for setting, (x, a) in enumerate(settings.tolist()):
        for seed in seeds if setting < 6 else seeds[:1]:
            loss = 2 + 0.1 * ((x + 6) ** 2 + (a + 1.3) ** 2) + 0.05 * seed + 0.01 * rng.standard_normal()
            rows.append({**RUN, "learning_rate": 2 ** x, "alpha_init": 2 ** a, "seed": seed, "val_loss": loss})
    return rows


def test_search_report(tmp_path):
    pytest.importorskip("matplotlib")
    rows = search_rows()
    best = min(rows, key=lambda row: row["val_loss"])
    out, err, code = command(f"results/verdict.py {write(tmp_path / 'a.csv', rows)} --plot={tmp_path}/a.png")
    assert code == 0 and (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG", err
    assert out.splitlines()[1].split()[:2] == [f"{best['val_loss']:.4f}", "0.0000"] and "in nats" in out
    assert "widen alpha_init upwards" in out and "widen learning_rate" not in out
    assert out.splitlines()[-1] == f"--learning_rate={best['learning_rate']:.4g} --alpha_init={best['alpha_init']:.4g}"
    ranked, scatter = verdict.rank(runs_of(search_rows(seeds=(0, 1, 2))), ["learning_rate", "alpha_init"])
    assert 0.006 < scatter < 0.015 and sum(seeds == 3 for _, seeds, _ in ranked) == 6
    by_options = {values: loss for loss, _, values in ranked}       # at the common level, 0.05 above seed 0's
    shifts = [by_options[row["learning_rate"], row["alpha_init"]] - row["val_loss"] for row in rows]
    assert np.mean(shifts) == pytest.approx(0.05, abs=0.01)
    assert "scatters of a seed" in show.report_search(ranked, scatter, ["learning_rate", "alpha_init"])
    for other in (sweep(dict(ngpt=0.0), sizes=(48,)), rows + [{**rows[0], "width": 96}]):
        assert not verdict.searched(runs_of(other))
    with pytest.raises(ValueError, match="batch_size is"):
        verdict.rank(runs_of([*rows, {**rows[0], "batch_size": 32}]), ["learning_rate", "alpha_init"])


def test_command_reads_prints_and_draws(tmp_path):
    pytest.importorskip("matplotlib")
    rows = sweep(dict(ngpt=-0.5, mup=0.2, nugpt=0.0), noise=0.002)
    # the last row of a run counts, whatever its free options; a missing column is the option's default
    rows = [{**rows[0], "val_loss": 99, "log_every": 1}, *rows, {**rows[-1], "dtype": "bfloat16"}]
    rows.append({**rows[1], "learning_rate": 2.0 ** -3, "val_loss": 0.5, "status": "diverged"})
    rows = [{key: value for key, value in row.items() if key != "beta1"} for row in rows]
    path = write(tmp_path / "a.csv", rows)
    out, err, code = command(f"results/verdict.py {path} --columns=ngpt,nugpt --plot={tmp_path}/a.png")
    assert code == 0 and "wide enough" in out and "Yes" in out, err
    assert not any(words in out for words in ("\nmup ", "99.0", "0.5000"))
    assert "bfloat16 and float32 stand side by side" in out and (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert "not of nugpt_full" in command(f"results/verdict.py {path} --columns=ngpt,nugpt_full")[1]
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib/__init__.py").write_text("raise ImportError('none')")
    done = subprocess.run([sys.executable, "results/verdict.py", path, f"--plot={tmp_path}/b.png"], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and "drift" in done.stdout
    assert done.stderr == "verdict.py: the picture needs matplotlib: pip install matplotlib\n"


def test_bad_input_gets_one_sentence(tmp_path):
    rows = sweep(dict(ngpt=0.0))
    bad = {
        "has no rows": [], "parameters is None": [dict(a=1)], "seed is 'x'": [{**rows[0], "seed": "x"}],
        "learning_rate is '-1'": [{**rows[0], "learning_rate": -1}], "width is '0'": [{**rows[0], "width": 0}],
        "batch_size is 16 and 32": [{**rows[0], "batch_size": 16}, {**rows[1], "batch_size": 32}],
        "in ngpt's runs of 400 steps": [*rows, {**rows[0], "warmup_steps": 40}],
        "no parametrization 'mine'": [{**rows[0], "parametrization": "mine"}],
        "hidden_lr_mult is": [{**row, "hidden_lr_mult": 1 + (row["width"] == 96)} for row in rows]}
    for words, table in bad.items():
        (tmp_path / "a.csv").write_text("")
        path = write(tmp_path / "a.csv", table) if table else tmp_path / "a.csv"
        out, err, code = command(f"results/verdict.py {path}")
        assert (code, out, err.count("\n")) == (1, "", 1) and words in err, (words, err)
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    write(tmp_path / "a.csv", rows)
    for words, line in {"No such file": "none.csv", "decode": "binary.csv", "--axis": "a.csv --axis=height",
                        "--control": "a.csv --control=mine", "unrecognized": "a.csv --plott=a.png",
                        "jpegg": f"a.csv --plot={tmp_path}/a.jpegg"}.items():
        out, err, code = command(f"results/verdict.py {tmp_path}/{line}")
        assert (code, err.count("\n")) == (1, 1) and words in err, (words, err)
