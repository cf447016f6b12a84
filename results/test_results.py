"""
What the laboratory promises: `python -m pytest results`.

Sweeps are synthetic, of known drift and noise. Models are tiny.
"""
import importlib
import itertools
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
import alignment
import bench
import plain
import prepare_data
import show
import train
import verdict
from alignment import rms
from model import GPT
from model import GPTConfig
from model import norm

torch.set_num_threads(1)

# A run of nGPT at its base. Tests change what they are about.
RUN = {
    **{name: getattr(plain.Config, name) for name in verdict.OPTIONS},
    "parametrization": "ngpt",
    "width": 48,
    "depth": 4,
    "steps": 400,
    "base_width": 48,
    "base_depth": 4,
    "base_steps": 400,
    "dtype": "float32",
    "compile": True,
    "data_fingerprint": "0123456789abcdef",
    "val_loss": 2.0,
    "parameters": 1000,
    "status": "finished",
    "alpha_A": 0.2,
    "alpha_M": 0.2,
}


# ------------------------------------------------------------------------------------------------
# Helpers


def write(path, rows):
    """The path, after rows {column: value} were written to it."""
    show.write_rows(path, [{name: str(value) for name, value in row.items()} for row in rows])
    return path


@pytest.fixture
def say(capsys, monkeypatch):
    """A function: what `python results/….py …` prints, or the sentence with which it leaves.

    It runs in this process, in the repository's folder. Pictures must have been drawn."""

    def run(line):
        script, *args = shlex.split(line)
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [script, *args])
        capsys.readouterr()
        try:
            importlib.import_module(Path(script).stem).main()
        except SystemExit as end:
            assert "\n" not in end.code
            return end.code
        for picture in re.findall(r"--plot=(\S+)", line):
            assert Path(picture).read_bytes().startswith(b"\x89PNG")
        return capsys.readouterr().out

    return run


def judge(rows, control="ngpt"):
    """{column: Verdict} of rows."""
    _, verdicts = verdict.judge(rows, control=control)
    return verdicts


def text_of(rows, control="ngpt"):
    """What verdict.py prints of rows."""
    axis, verdicts = verdict.judge(rows, control=control)
    return show.report(axis, verdicts, control)


def sweep(drifts, sizes=(48, 96, 192), seeds=range(3), grid=np.arange(-8.5, -3.9, 0.5),
          axis="width", best=-6.0, noise=0.0, jitter=0.0, shared_jitter=0.0, draw=0):
    """
    Rows of a sweep: parabolas whose best moves by drifts[column] octaves a doubling.

    noise: of each run; jitter: of each curve's best; shared_jitter: of a seed's bests at all sizes.
    Only the first column has runs at the base, where all columns are one model.
    """
    rng = np.random.default_rng(draw)
    shift = {seed: shared_jitter * rng.standard_normal() for seed in seeds}
    first = next(iter(drifts))
    rows = []
    for (name, drift), size, seed in itertools.product(drifts.items(), sizes, seeds):
        doublings = math.log2(size / sizes[0])
        optimum = best + drift * doublings + shift[seed] + jitter * rng.standard_normal()
        level = 1.9 - 0.1 * doublings + 0.03 * rng.standard_normal()
        if size == sizes[0] and name != first:
            continue
        for x in grid:
            loss = level + 0.03 * (x - optimum) ** 2 + noise * rng.standard_normal()
            rows.append({
                **RUN,
                "parametrization": name,
                axis: size,
                "seed": seed,
                "learning_rate": 2.0 ** x,
                "val_loss": loss,
            })
    return rows


def diverging(rows, is_too_hot):
    """The rows, of which those that are too hot have diverged."""
    return [{**row, "val_loss": math.inf} if is_too_hot(row) else row for row in rows]


# ------------------------------------------------------------------------------------------------
# The READMEs quote what the commands print


def quoted():
    """(command, block) of each untagged code block that follows a `python results/….py …`."""
    for path in (ROOT / "README.md", ROOT / "results/README.md"):
        text = path.read_text(encoding="utf-8")
        before, *parts = re.split(r"^```(\S*)\n(.*?)^```$", text, flags=re.M | re.S)
        for tag, block, after in zip(parts[::3], parts[1::3], parts[2::3]):
            commands = re.findall(r"`python (results/\w+\.py [^`]+)`", before)
            if commands and not tag:
                yield commands[-1], block
            before = after


@pytest.mark.parametrize("line, block", list(quoted()))
def test_quoted_tables_are_what_the_commands_print(say, line, block):
    printed = say(line)
    assert "\n" + block in "\n" + printed, f"`python {line}` prints\n{printed}"


# ------------------------------------------------------------------------------------------------
# The verdict on a sweep

DRIFTS = {"ngpt": -0.5, "mup": 0.2, "nugpt": 0.0}
UNEVEN_GRID = (-8, -7.25, -7, -6.5, -6.25, -6, -5.5, -5, -4.5, -4)


@pytest.fixture(scope="module")
def exact():
    """{column: Verdict} of a sweep without noise."""
    return judge(sweep(DRIFTS, grid=UNEVEN_GRID))


@pytest.mark.parametrize("name", DRIFTS)
def test_a_known_drift_is_found(exact, name):
    assert exact[name].drift == pytest.approx((DRIFTS[name], 0), abs=1e-6)


@pytest.mark.parametrize("name", DRIFTS)
def test_known_optima_are_found(exact, name):
    optima = [curve.optimum for curve in exact[name].curves.values()]
    expected = [-6 + DRIFTS[name] * doublings for doublings in range(3)]
    assert optima == pytest.approx(expected, abs=1e-6)


def test_columns_are_compared_to_the_control(exact):
    assert exact["nugpt"].difference == pytest.approx((0.5, 0), abs=1e-6)
    assert exact["ngpt"].difference is None


def test_regret_is_the_loss_at_the_smallest_sizes_best(exact):
    # ngpt's best moves by 2 · 0.5 octaves, and the parabolas are 0.03 x²
    assert exact["ngpt"].regret == pytest.approx(0.03, abs=1e-6)
    assert exact["nugpt"].regret == pytest.approx(0, abs=1e-6)


def test_the_same_best_point_is_said(exact):
    assert [exact[name].same for name in DRIFTS] == ["No", "No", "Yes"]


def test_powers_are_those_of_the_table(exact):
    expected = {"embedding": -0.5, "hidden": -0.75, "unembedding": -0.75, "rescalers": 0}
    assert exact["nugpt"].powers == pytest.approx(expected)


def test_columns_stand_in_the_order_from_ngpt_to_nugpt(exact):
    assert list(exact) == ["ngpt", "mup", "nugpt"]


def test_the_axis_is_what_differs():
    rows = sweep({"nugpt": 0.4}, sizes=(4, 16, 64), axis="batch_size")
    axis, verdicts = verdict.judge(rows)
    assert axis == "batch_size"
    assert verdicts["nugpt"].drift == pytest.approx((0.4, 0), abs=1e-6)


@pytest.mark.parametrize("seeds, draws, longest", [(3, 300, 3.2), (1, 200, 20)])
def test_intervals_cover_at_their_nominal_rate(seeds, draws, longest):
    """With noise of runs, and of whole curves, which would fool an interval that goes by runs."""
    slopes = []
    halves = []
    differences = []
    halves_of_differences = []
    for draw in range(1000, 1000 + draws):
        rows = sweep({"ngpt": -0.5, "nugpt": -0.1}, seeds=range(seeds), noise=0.003, jitter=0.15,
                     draw=draw)
        judged = judge(rows)["nugpt"]
        slopes.append(judged.drift[0])
        halves.append(judged.drift[1])
        differences.append(judged.difference[0])
        halves_of_differences.append(judged.difference[1])

    covered = np.mean(np.abs(np.array(slopes) + 0.1) <= halves)
    assert 0.91 <= covered <= 0.99      # with 1.96 in place of Student's 2.57 it would be 0.88
    covered = np.mean(np.abs(np.array(differences) - 0.4) <= halves_of_differences)
    assert 0.92 <= covered <= 0.997     # too long, as both columns share the runs at the base
    scatter = np.std(slopes)
    assert np.mean(slopes) == pytest.approx(-0.1, abs=3 * scatter / draws ** 0.5)
    assert np.median(halves) < longest * scatter


def test_what_a_seed_has_in_common_at_all_sizes_cancels():
    plain_drift, plain_half = judge(sweep({"ngpt": -0.5}, noise=0.002))["ngpt"].drift
    rows = sweep({"ngpt": -0.5}, noise=0.002, shared_jitter=0.6)
    slope, half = judge(rows)["ngpt"].drift
    assert abs(slope + 0.5) < 0.1
    assert half < 2 * plain_half


def test_what_a_seed_has_in_common_in_two_columns_cancels():
    rows = sweep({"ngpt": -0.3}, jitter=0.3)
    copies = [{**row, "parametrization": "nugpt"} for row in rows if row["width"] > 48]
    copy = judge(rows + copies)["nugpt"]
    assert copy.drift[1] > 0.05
    assert copy.difference == pytest.approx((0, 0), abs=1e-9)


def test_runs_at_the_base_count_for_every_column():
    verdicts = judge(sweep({"ngpt": -0.5, "nugpt": 0.0}, noise=0.01))
    losses = verdicts["nugpt"].curves[48].loss
    assert np.array_equal(losses, verdicts["ngpt"].curves[48].loss)


@pytest.mark.parametrize("name, value", [("warmup_steps", 40), ("embedding_lr_mult", 0.25)])
def test_runs_at_the_base_with_another_recipe_do_not_count(name, value):
    rows = sweep({"ngpt": -0.5, "nugpt": 0.0}, noise=0.01)
    for row in rows:
        if row["parametrization"] == "nugpt":
            row[name] = value
    verdicts = judge(rows)
    assert list(verdicts["nugpt"].curves) == [96, 192]
    assert list(verdicts["ngpt"].curves) == [48, 96, 192]


SHIFTS = [("nugpt", "ngpt", -1 / 3), ("ngpt", "nugpt", 1 / 3)]


@pytest.mark.parametrize("run_as, other, shift", SHIFTS)
def test_over_steps_a_column_is_another_with_eta_shifted(run_as, other, shift):
    verdicts = judge(sweep({run_as: -0.05}, sizes=(400, 800, 1600), axis="steps"))
    assert verdicts[run_as].drift[0] == pytest.approx(-0.05, abs=1e-3)
    assert verdicts[other].drift[0] == pytest.approx(-0.05 + shift, abs=1e-3)


def test_off_the_base_width_no_shift_makes_columns_alike():
    rows = sweep({"ngpt": -0.05}, sizes=(400, 800, 1600), axis="steps")
    verdicts = judge([{**row, "base_width": 96} for row in rows])
    assert list(verdicts) == ["ngpt"]


def test_one_tensor_class_at_a_time():
    drifts = {"embedding": 0.2, "unembedding": -0.25}
    rows = []
    for width, name, seed, x in itertools.product((48, 192), drifts, range(3), (-2, -1, 0, 1, 2)):
        shifts = {"embedding": 0, "unembedding": 0, name: x}
        off = [shifts[other] - drifts[other] * math.log2(width / 48) for other in drifts]
        rows.append({
            **RUN,
            "parametrization": "nugpt",
            "width": width,
            "seed": seed,
            "embedding_lr_mult": 2.0 ** shifts["embedding"],
            "unembedding_lr_mult": 2.0 ** shifts["unembedding"] / 2,
            "val_loss": 2 + 0.1 * seed + 0.03 * np.dot(off, off),
        })
    verdicts = judge(rows)
    assert verdicts["embedding"].drift == pytest.approx((0.2, 0), abs=1e-6)
    assert verdicts["unembedding"].drift == pytest.approx((-0.25, 0), abs=1e-6)
    assert verdicts["embedding"].powers == pytest.approx({"embedding": -0.5})
    assert verdicts["unembedding"].powers == pytest.approx({"unembedding": -0.75})
    text = text_of(rows)
    assert "-0.75 → -1.00" in text      # the table's power, and the one that would do
    assert "×*" in text                 # a multiplier is what was varied
    # whichever run of a size comes first
    small = [row for row in rows if row["width"] == 48]
    large = [row for row in rows if row["width"] == 192]
    assert judge(small + large[::-1])["unembedding"].powers == verdicts["unembedding"].powers


# ------------------------------------------------------------------------------------------------
# Grids that are too narrow, and runs that diverge

NARROW = (-6.5, -6, -5.5, -5)


def test_points_to_add_are_said():
    judged = judge(sweep({"ngpt": -0.75}, grid=NARROW))["ngpt"]
    words = [curve.grid for curve in judged.curves.values()]
    assert words == ["add 2^-7", "add 2^-7.5 2^-7", "add 2^-7.5 2^-7"]
    assert judged.same == "?"


def test_a_loss_that_ran_beside_a_divergence_is_known():
    # the smallest width's best η, 2^-6, is the last before the divergence at 192
    rows = diverging(sweep({"ngpt": 0.0}), lambda row: row["width"] == 192 and row["learning_rate"] > 0.017)
    judged = judge(rows)["ngpt"]
    assert judged.curves[192].regret == pytest.approx(0, abs=1e-6)


def test_a_size_with_two_rates_has_no_regret():
    rows = [row for row in sweep({"ngpt": 0.0})
            if row["width"] < 192 or abs(math.log2(row["learning_rate"]) + 6) < 0.6]
    rows = [row for row in rows if row["width"] < 192 or row["learning_rate"] < 0.02]
    judged = judge(rows)["ngpt"]
    assert len(judged.curves[192].x) == 2
    assert judged.curves[192].regret is None
    assert judged.curves[96].regret == pytest.approx(0, abs=1e-6)


def test_an_optimum_is_never_extrapolated():
    judged = judge(sweep({"ngpt": -0.75}, grid=NARROW))["ngpt"]
    assert not any(size == 192 for size, _ in judged.optima)


def test_without_the_smallest_sizes_best_there_is_no_regret():
    assert judge(sweep({"ngpt": 0}, best=-5, grid=NARROW))["ngpt"].regret is None


def test_beyond_a_grid_the_regret_is_a_lower_bound():
    rows = sweep({"ngpt": -1.0}, sizes=(48, 96, 192, 384), best=-5)
    # The bests are at -5, -6, -7 and -8. The widest's grid ends at -7.
    rows = [row for row in rows if row["width"] < 384 or row["learning_rate"] < 2 ** -6.75]
    judged = judge(rows)["ngpt"]
    assert judged.curves[384].regret == pytest.approx(0.03, abs=1e-6)
    assert judged.curves[384].bound
    assert judged.regret == pytest.approx(0.12, abs=1e-6)       # at 192, not a bound itself
    assert judged.bound
    assert "> 0.1200" in text_of(rows)


def test_a_seed_that_ran_one_point_does_not_move_the_best():
    rows = sweep({"ngpt": 0.0}, seeds=[0, 1])
    point = [row for row in rows if row["seed"] == 0 and row["learning_rate"] == 2 ** -7]
    rows += [{**row, "seed": 2, "val_loss": 1.0} for row in point]
    curve = judge(rows)["ngpt"].curves[96]
    assert curve.x[curve.best] == -6
    assert curve.complete == [0, 1]
    assert curve.grid == "add 2^-6.5 2^-6 2^-5.5 2^-5"


def hotter_than(log2_rate):
    """A condition on rows, for diverging."""
    return lambda row: row["learning_rate"] > 2 ** log2_rate


def test_beside_a_divergence_the_window_stays_symmetric():
    curve = judge(diverging(sweep({"ngpt": 0.0}), hotter_than(-5.25)))["ngpt"].curves[96]
    assert curve.radius == 1
    assert curve.add == []
    assert curve.optimum == pytest.approx(-6, abs=1e-6)


def test_a_best_beside_a_divergence_is_said():
    judged = judge(diverging(sweep({"ngpt": 0.0}), hotter_than(-5.75)))["ngpt"]
    assert judged.drift is None
    assert judged.curves[96].grid == "diverges near the best"


def test_behind_a_divergence_no_points_are_asked_for():
    rows = sweep({"ngpt": 0.0}, grid=np.arange(-8.5, -5.4, 0.5))
    assert judge(diverging(rows, hotter_than(-5.75)))["ngpt"].curves[96].add == []


def test_where_nothing_survives_lower_rates_are_asked_for():
    rows = diverging(sweep({"ngpt": 0.0}), lambda row: row["width"] == 192)
    curve = judge(rows)["ngpt"].curves[192]
    assert curve.add == [-9.5, -9]
    assert curve.regret == math.inf


def test_a_point_diverged_if_one_seed_did():
    rows = sweep({"ngpt": 0.0})
    rows = diverging(rows, lambda row: row["seed"] == 1 and row["learning_rate"] == 2 ** -5)
    curve = judge(rows)["ngpt"].curves[96]
    assert curve.radius == 1
    assert np.isinf(curve.mean).sum() == 1


def test_a_carried_rate_that_diverges_has_an_infinite_regret():
    rows = sweep({"ngpt": -1.0})
    rows = diverging(rows, lambda row: row["width"] == 192 and row["learning_rate"] > 2 ** -6.25)
    assert judge(rows)["ngpt"].regret == math.inf
    assert "diverges" in text_of(rows)


# ------------------------------------------------------------------------------------------------
# The cost of carrying


def costs(drifts, carried=-6.0, seeds=range(3), change=None, **options):
    """{column: Cost at the largest size} of a sweep whose rows may be changed first."""
    rows = sweep(drifts, seeds=seeds, **options)
    rows = change(rows) if change else rows
    _, verdicts = verdict.judge(rows, carried=carried)
    return {name: judged.curves[192].cost for name, judged in verdicts.items()}


def on_one_level(rows):
    """The rows, with the columns' curves of a size and seed at one level."""
    lowest = {}
    for row in rows:
        place = (row["parametrization"], row["width"], row["seed"])
        lowest[place] = min(row["val_loss"], lowest.get(place, math.inf))
    levelled = []
    for row in rows:
        place = (row["parametrization"], row["width"], row["seed"])
        levelled.append({**row, "val_loss": row["val_loss"] - lowest[place] + 2})
    return levelled


def test_a_cost_is_against_the_best_of_any_column():
    found = costs({"ngpt": -0.5, "nugpt": 0.0}, change=lambda rows: [
        {**row, "val_loss": row["val_loss"] - 0.1 * (row["parametrization"] == "nugpt")}
        for row in on_one_level(rows)])
    # ngpt's best is 0.1 higher, and 1 octave away on parabolas 0.03 x²
    assert found["ngpt"] == pytest.approx((0.13, 0, False), abs=1e-6)
    assert found["nugpt"] == pytest.approx((0, 0, False), abs=1e-6)


def test_a_known_cost_is_covered_at_the_nominal_rate():
    """One column, of drift -0.4: 0.8 octaves at four times the width, on parabolas 0.03 x²."""
    grid = np.arange(-8.8, -3.9, 0.4)
    errors = []
    halves = []
    for draw in range(400):
        cost = costs({"ngpt": -0.4}, noise=0.003, grid=grid, draw=draw)["ngpt"]
        errors.append(cost.mean - 0.03 * 0.8 ** 2)
        halves.append(cost.half)
    covered = np.mean(np.abs(errors) <= halves)
    assert 0.91 <= covered <= 0.98
    assert abs(np.mean(errors)) < 3 * np.std(errors) / 20


def test_a_cost_of_zero_is_neither_gain_nor_loss():
    """The carried η is the best of twenty settings alike in truth: their luck must not count."""
    means = []
    covered = 0
    for draw in range(400):
        def luck(rows, draw=draw):
            rng = np.random.default_rng(draw)
            return [{**row, "val_loss": 2 + rng.normal(0, 0.01)} for row in rows]
        cost = costs({"ngpt": 0, "nugpt": 0}, change=luck)["ngpt"]
        means.append(cost.mean)
        covered += abs(cost.mean) <= cost.half
    assert abs(np.mean(means)) < 3 * np.std(means) / 20
    assert 0.91 <= covered / 400 <= 0.98


def test_a_carried_rate_that_diverged_costs_without_end():
    hot = {"ngpt": -1.0, "nugpt": 0.0}
    cost = costs(hot, change=lambda rows: diverging(rows, lambda row: (
        row["parametrization"] == "ngpt" and row["learning_rate"] > 2 ** -6.25 and row["seed"] == 1
    )))["ngpt"]
    assert cost.mean == math.inf
    assert show.cost_text(cost) == "diverges"


def test_the_cost_of_one_seed_has_a_mark_and_no_interval():
    cost = costs({"ngpt": -0.5}, seeds=[0])["ngpt"]
    assert show.cost_text(cost) == "+0.0300*"


def test_beyond_its_grid_a_cost_is_a_lower_bound():
    cost = costs({"ngpt": -0.5}, carried=-3.0)["ngpt"]
    assert show.cost_text(cost).startswith("> +0.2700")


def test_without_the_carried_rate_a_cost_is_interpolated():
    cost = costs({"ngpt": -0.5}, carried=-5.8)["ngpt"]
    assert cost.mean == pytest.approx(0.03 * 1.2 ** 2, abs=1e-6)


def test_a_setting_that_lacks_a_seed_is_no_best():
    def lucky(rows):
        first = next(row for row in rows if row["width"] == 192)
        return [*rows, {**first, "learning_rate": 2.0 ** -5.8, "val_loss": 0.1}]
    assert costs({"ngpt": -0.5}, change=lucky)["ngpt"].mean == pytest.approx(0.03, abs=1e-6)


# ------------------------------------------------------------------------------------------------
# Steps that the control needs for the same loss


def lengths(name, losses, seeds=(0,), grid=(-7, -6.5, -6, -5.5, -5)):
    """Rows of a column at several lengths, from {steps: best loss of seed 0}."""
    rows = []
    for (steps, best), seed, x in itertools.product(losses.items(), seeds, grid):
        rows.append({
            **RUN,
            "parametrization": name,
            "width": 96,
            "steps": steps,
            "seed": seed,
            "learning_rate": 2.0 ** x,
            "embedding_lr_mult": 2.0 if name == "nugpt" else 16.0,
            "val_loss": best - 0.1 * seed + 0.03 * (x + 6) ** 2,
        })
    return rows


PLAIN_LOSSES = {400: 2.0, 800: 1.9, 1600: 1.8}


def test_steps_that_the_control_needs_are_interpolated_over_log_steps():
    losses = {200: 2.1, 400: 1.95, 800: 1.9, 1600: 1.75}
    # Seed 1 does not count, since the control has not run it.
    rows = lengths("gpt_sp", PLAIN_LOSSES) + lengths("nugpt", losses, seeds=(0, 1))
    needed = [row[3] for row in show.steps_needed(judge(rows, "gpt_sp"), "gpt_sp")]
    # 1.95 is halfway between the losses at 400 and 800 steps, which is 400 · √2 steps
    assert needed == ["< 2.00 × the steps", "1.41 × the steps", "1.00 × the steps",
                      "> 1.00 × the steps"]
    assert "for it gpt_sp needs" in text_of(rows, "gpt_sp")


def test_without_the_controls_best_no_steps_are_given():
    rows = lengths("gpt_sp", PLAIN_LOSSES, grid=(-6, -5.5, -5)) + lengths("nugpt", PLAIN_LOSSES)
    assert show.steps_needed(judge(rows, "gpt_sp"), "gpt_sp") == []


def test_the_plain_gpt_has_no_rescalers():
    rows = lengths("gpt_sp", PLAIN_LOSSES)
    assert "rescalers" not in judge(rows, "gpt_sp")["gpt_sp"].powers


# ------------------------------------------------------------------------------------------------
# Leads

LEAD_RUNS = [       # parametrization, learning_rate, seed, val_loss
    ("nugpt", "0.01", "0", "1.0"), ("nugpt", "0.01", "1", "2.0"), ("nugpt", "0.01", "2", "3.0"),
    ("nugpt", "0.02", "0", "0.1"), ("nugpt", "0.02", "1", "0.1"), ("nugpt", "0.02", "2", ""),
    ("ngpt", "0.03", "0", "1.1"), ("ngpt", "0.03", "1", "2.2"), ("ngpt", "0.03", "2", "3.3"),
    ("ngpt", "0.04", "0", "2.0"), ("ngpt", "0.04", "1", "3.0"), ("ngpt", "0.04", "2", "4.0"),
    ("ngpt", "0.05", "0", "0.1"), ("ngpt", "0.05", "1", "0.1"),
]


@pytest.fixture
def leads(tmp_path, say):
    """A function: what lead.py says of two columns in a table of LEAD_RUNS and more runs."""

    def run(first, second, more=()):
        lines = ["width,warmup_steps,parametrization,learning_rate,seed,val_loss"]
        for warmup, cells in [*((0, cells) for cells in LEAD_RUNS), *more]:
            lines.append(",".join(["48", str(warmup), *cells]))
        table = tmp_path / "a.csv"
        table.write_text("\n".join(lines) + "\n")
        return say(f"results/lead.py {table} {first} {second} width=48")

    return run


def test_a_lead_is_the_mean_difference_of_paired_seeds_at_the_best_rates(leads):
    # differences -0.1, -0.2, -0.3: their standard deviation is 0.1, and t with 2 degrees 4.303.
    # nugpt's 0.02 has lower losses, but a seed diverged; of ngpt's 0.05 a seed is missing
    half = 4.303 * 0.1 / math.sqrt(3)
    assert leads("nugpt", "ngpt") == (f"-0.200 ± {half:.3f} nats, 3 seeds, at width=48: "
                                      "nugpt with η = 0.01 less ngpt with η = 0.03\n")


def test_a_lead_may_be_asked_for_at_one_rate(leads):
    assert leads("nugpt", "ngpt:0.04").startswith("-1.000 ± 0.000 nats")


def test_a_rate_may_be_written_with_more_digits(leads):
    more = [(0, ("mup", "0.0110485", "0", "1")), (0, ("mup", "0.01104854", "1", "1")),
            (0, ("mup", "0.011048543456039806", "2", "1"))]
    assert "mup with η = 0.0110485 less" in leads("mup", "ngpt", more)


@pytest.mark.parametrize("sentence, first, more", [
    ("mup has no learning rate that three seeds finished", "mup", []),
    ("nugpt:0.02 has no learning rate that three seeds finished", "nugpt:0.02", []),
    ("nugpt has two runs of seed 0 with learning rate 0.01", "nugpt",
     [(0, ("nugpt", "0.01", "0", "5.0"))]),
    ("the runs of nugpt differ in warmup_steps, too", "nugpt", [(9, ("nugpt", "0.08", "0", "5.0"))]),
])
def test_a_lead_that_would_not_compare_like_with_like_is_refused(leads, sentence, first, more):
    assert sentence in leads(first, "ngpt", more)


def test_a_rate_that_begins_two_is_refused(leads):
    more = [(0, ("nugpt", "0.013", str(seed), "1")) for seed in range(3)]
    assert "nugpt:0.0 may be any of 0.01, 0.013" in leads("nugpt:0.0", "ngpt", more)
    assert "nugpt with η = 0.01 less" in leads("nugpt:0.01", "ngpt", more)


def test_a_lead_at_a_size_that_the_table_does_not_have_is_refused(say):
    assert "has no column 'heads'" in say("results/lead.py results/fresh.csv gpt_sp nugpt heads=4")


# ------------------------------------------------------------------------------------------------
# Random searches

KEYS = ["learning_rate", "alpha_init"]


def search(seeds=(0,)):
    """
    Rows of a random search of 40 settings, of which six have all seeds.

    The loss is 2 + 0.1 · (distance in log2 from η = 2^-6 and α₀ = 0.4, the end of its range)².
    """
    rng = np.random.default_rng(0)
    settings = np.random.default_rng(1).uniform((-8, -6), (-4, -1.3), (40, 2))
    rows = []
    for i, (x, a) in enumerate(settings.tolist()):
        for seed in seeds if i < 6 else seeds[:1]:
            loss = 2 + 0.1 * ((x + 6) ** 2 + (a + 1.3) ** 2) + 0.05 * seed
            rows.append({
                **RUN,
                "learning_rate": 2 ** x,
                "alpha_init": 2 ** a,
                "embedding_lr_mult": 0.25,
                "seed": seed,
                "val_loss": loss + 0.01 * rng.standard_normal(),
            })
    return rows


def test_the_best_of_a_search_is_printed_as_options_to_paste(tmp_path, say):
    rows = search()
    out = say(f"results/verdict.py {write(tmp_path / 'a.csv', rows)} --plot={tmp_path}/a.png")
    best = min(rows, key=lambda row: row["val_loss"])
    # embedding_lr_mult was not varied, but is not the default either
    options = [f"--{key}={best[key]:.4g}" for key in [*KEYS, "embedding_lr_mult"]]
    assert out.splitlines()[1].split() == [f"{best['val_loss']:.4f}", "0.0000", "1", *options]
    assert "in nats" in out


def test_a_range_at_whose_end_the_best_lies_is_to_be_widened(tmp_path, say):
    out = say(f"results/verdict.py {write(tmp_path / 'a.csv', search())}")
    assert "widen alpha_init upwards" in out
    assert "widen learning_rate" not in out


@pytest.mark.parametrize("key, best, tried, advice", [
    ("learning_rate", 0.0101, [0.01, 0.1], "widen learning_rate downwards"),
    ("learning_rate", 0.03, [0.01, 0.1], ""),
    ("beta2", 0.989, [0.9, 0.99], "widen beta2 upwards"),
    ("beta2", 0.901, [0.9, 0.99], "widen beta2 downwards"),
    ("warmup_steps", 39, [0, 40], "widen warmup_steps upwards"),
    ("min_lr_ratio", 0.15, [0.001, 0.2], ""),   # by logarithms that would be near the end
    ("warmup_steps", 1, [0, 40], ""),           # below 0 there is nothing
])
def test_a_range_is_widened_by_logarithms_or_evenly_as_it_was_drawn(key, best, tried, advice):
    assert show.range_to_widen(key, best, [best, *tried]).split(":")[0] == advice


def test_losses_of_a_search_are_in_scatters_of_a_seed():
    ranked, scatter = verdict.rank(search(seeds=(0, 1, 2)), KEYS)
    assert 0.006 < scatter < 0.015      # 0.01 is true
    assert sum(setting.seeds == 3 for setting in ranked) == 6
    assert "scatters of a seed" in show.report_search(ranked, scatter, KEYS)


# ------------------------------------------------------------------------------------------------
# Results tables that a person or a spreadsheet has touched


@pytest.fixture
def table(tmp_path):
    """A results table of two columns; its first line is the head, its second the first run."""
    return write(tmp_path / "table.csv", sweep({"ngpt": -0.5, "nugpt": 0.0}, noise=0.002))


def byte_order_mark(text):
    return "\ufeff" + text


def crlf(text):
    return text.replace("\n", "\r\n")


def no_newline_at_the_end(text):
    return text.rstrip("\n")


def blank_rows_at_the_end(text):
    commas = "," * text.split("\n")[0].count(",")
    return text + "\n" + commas + "\n\n"


def other_order_of_columns(text):
    lines = [",".join(reversed(line.split(","))) for line in text.splitlines()]
    return "\n".join(lines) + "\n"


def spelling_of_a_spreadsheet(text):
    text = text.replace("True", "TRUE").replace("1e-16", "1E-16")
    return text.replace(",0.05,", ",0.0500,").replace(",400,", ",4E+02,")


def quoted_cells(text):
    lines = [",".join(f'"{cell}"' for cell in line.split(",")) for line in text.splitlines()]
    return "\n".join(lines) + "\n"


RESAVED = [byte_order_mark, crlf, no_newline_at_the_end, blank_rows_at_the_end,
           other_order_of_columns, spelling_of_a_spreadsheet, quoted_cells]


@pytest.mark.parametrize("resave", RESAVED)
def test_a_table_saved_elsewhere_has_the_same_runs(table, resave):
    text = table.read_text()
    assert resave(text) != text
    runs = verdict.read_results(table)
    table.write_bytes(resave(text).encode())
    assert verdict.read_results(table) == runs


def renamed_column(text):
    return text.replace("width,", "Width,", 1)


def without_column(name):
    """A function that takes the column out of a table's text."""

    def damage(text):
        lines = [line.split(",") for line in text.splitlines()]
        place = lines[0].index(name)
        return "\n".join(",".join(line[:place] + line[place + 1 :]) for line in lines)

    return damage


def with_cell(name, cell):
    """A function that puts the cell into the first run of a table's text."""

    def damage(text):
        head, first, *others = text.splitlines()
        cells = first.split(",")
        cells[head.split(",").index(name)] = cell
        return "\n".join([head, ",".join(cells), *others])

    return damage


def semicolons(text):
    return text.replace(",", ";").replace(".", ",")


def half_a_row_at_the_end(text):
    return text[:-40]


def column_twice(text):
    return text.replace("width,", "depth,", 1)


DAMAGED = [
    ("line 1: column 'Width'", renamed_column),
    ("line 1: there is no column 'learning_rate'", without_column("learning_rate")),
    ("line 1: there is no column 'status'", without_column("status")),
    ("line 1: columns are separated by semicolons", semicolons),
    ("line 1: there are two columns 'depth'", column_twice),
    ("line 151 has", half_a_row_at_the_end),
    ("line 2, column learning_rate: '0,0221'", with_cell("learning_rate", '"0,0221"')),
    ("line 2, column seed: '1.5'", with_cell("seed", "1.5")),
    ("line 2, column steps: '1 000'", with_cell("steps", "1 000")),
    ("line 2, column width: 'wide'", with_cell("width", "wide")),
    ("line 2, column width: must be more than 0", with_cell("width", "0")),
    ("line 2, column width: '1e999' is too large", with_cell("width", "1e999")),
    ("line 2, column beta1: 'nan'", with_cell("beta1", "nan")),
    ("line 2, column compile: 'yes'", with_cell("compile", "yes")),
    ("line 2, column embedding_lr_mult: must be at least 0", with_cell("embedding_lr_mult", "-1")),
    ("line 2, column val_loss: a finished run", with_cell("val_loss", "")),
    ("line 2, column status: must be", with_cell("status", "done")),
]


@pytest.mark.parametrize("words, damage", DAMAGED)
def test_a_damaged_table_is_refused_with_file_line_and_column(table, say, words, damage):
    table.write_text(damage(table.read_text()))
    sentence = say(f"results/verdict.py {table}")
    assert sentence.startswith(f"verdict.py: {table}, ")
    assert words in sentence


def test_a_table_in_utf_16_is_refused(table, say):
    table.write_text(table.read_text(), encoding="utf-16")
    assert "UTF-16" in say(f"results/verdict.py {table}")


def test_a_table_in_latin_1_is_refused_with_its_line(table, say):
    lines = table.read_text().split("\n")
    lines[2] = lines[2].replace("float32", "flöat32")
    table.write_text("\n".join(lines), encoding="latin-1")
    assert f"{table}, line 3 is not in UTF-8" in say(f"results/verdict.py {table}")


def test_values_have_the_types_of_config(table):
    run = verdict.read_results(table)[0]
    for name, kind in verdict.OPTION_TYPES.items():
        assert type(run[name]) is kind


def test_what_a_table_lacks_has_its_default(tmp_path):
    rows = [{name: value for name, value in RUN.items() if name != "beta1"}]
    runs = verdict.read_results(write(tmp_path / "a.csv", rows))
    assert runs[0]["beta1"] == train.Config.beta1
    assert runs[0]["s_z"] is None


def test_a_long_seed_is_exact(tmp_path):
    seed = 2 ** 58 + 1
    path = write(tmp_path / "a.csv", [{**RUN, "seed": seed}])
    assert verdict.read_results(path)[0]["seed"] == seed


def test_of_equal_runs_the_last_row_counts(tmp_path):
    path = write(tmp_path / "a.csv", [RUN, {**RUN, "seed": 1}, {**RUN, "val_loss": 1.5}])
    assert [run["val_loss"] for run in verdict.read_results(path)] == [1.5, 2.0]


def test_a_run_on_another_text_is_another_run(tmp_path):
    path = write(tmp_path / "a.csv", [RUN, {**RUN, "data_fingerprint": "fedcba9876543210"}])
    assert len(verdict.read_results(path)) == 2


def test_a_diverged_run_has_an_infinite_loss(tmp_path):
    path = write(tmp_path / "a.csv", [{**RUN, "status": "diverged", "val_loss": "nan"}])
    assert verdict.read_results(path)[0]["val_loss"] == math.inf


@pytest.mark.parametrize("text", ["", ",".join(RUN) + "\n"])
def test_a_table_without_rows_has_no_runs(tmp_path, say, text):
    path = tmp_path / "a.csv"
    path.write_text(text)
    assert verdict.read_results(path) == []
    assert say(f"results/verdict.py {path}") == f"verdict.py: {path} has no rows"


def test_runs_of_two_dtypes_may_stand_together_and_that_is_said(tmp_path, say):
    rows = sweep({"ngpt": 0.0})
    path = write(tmp_path / "a.csv", [*rows[1:], {**rows[0], "dtype": "bfloat16"}])
    assert "bfloat16 and float32 stand side by side" in say(f"results/verdict.py {path}")


def one_at_a_time():
    """Rows of a setting and of changes to it. Seed 1 is 0.3 worse than seed 0 in all of them."""
    gain = {("beta2", 0.99): (0.02, 0.04), ("warmup_steps", 40): (-0.01, -0.01), ("schedule", "wsd"): (0.1, 0.1)}
    rows = []
    for seed in (0, 1):
        level = 2.0 + 0.3 * seed
        rows.append({**RUN, "seed": seed, "val_loss": level})
        for (option, value), gains in gain.items():
            rows.append({**RUN, "seed": seed, option: value, "val_loss": level - gains[seed]})
    return rows


def test_options_changed_one_at_a_time_show_what_each_gains(tmp_path, say):
    rows = one_at_a_time()
    out = say(f"results/verdict.py {write(tmp_path / 'a.csv', rows)} --plot={tmp_path}/a.png")
    half = 12.7062 * 0.01       # Student's t for two seeds, times the standard error of 0.02 and 0.04
    table = [line.split() for line in out.splitlines()[:5]]
    assert table[1:] == [
        ["-", "-", "2.1500", "-", "2"],
        ["schedule", "wsd", "2.0500", "+0.1000", "[+0.1000,", "+0.1000]", "2"],
        ["warmup_steps", "40", "2.1600", "-0.0100", "[-0.0100,", "-0.0100]", "2"],
        ["beta2", "0.99", "2.1200", "+0.0300", f"[{0.03 - half:+.4f},", f"{0.03 + half:+.4f}]", "2"],
    ]
    assert "--schedule=cosine --warmup_steps=0 --beta2=0.95" in out


def test_a_change_that_diverged_or_has_no_seed_in_common_is_shown_as_such(tmp_path, say):
    rows = [row for row in one_at_a_time() if row["seed"] == 0]
    rows.append({**RUN, "seed": 1, "beta1": 0.8, "val_loss": 1.9})
    rows.append({**RUN, "seed": 0, "eps": 1e-3, "val_loss": "", "status": "diverged"})
    out = say(f"results/verdict.py {write(tmp_path / 'a.csv', rows)} --plot={tmp_path}/a.png")
    table = [line.split() for line in out.splitlines()]
    assert ["beta1", "0.8", "1.9000", "-", "1"] in table
    assert ["eps", "0.001", "diverges", "-", "1"] in table
    assert ["beta2", "0.99", "1.9800", "+0.0200", "1"] in table


def test_changes_without_a_run_of_the_setting_are_refused(tmp_path, say):
    rows = [row for row in one_at_a_time() if row["val_loss"] not in (2.0, 2.3)]
    assert "no run has the setting" in say(f"results/verdict.py {write(tmp_path / 'a.csv', rows)}")


NOT_ONE_SWEEP = [
    ("trained on different texts", {"data_fingerprint": "fedcba9876543210"}),
    ("head_dim is 64 and 32", {"head_dim": 32}),
    ("embedding_std is 1.0 and 0.5", {"embedding_std": 0.5}),
    ("in ngpt's runs of 400 steps", {"warmup_steps": 40}),
    ("width 48 differ in depth, batch_size", {"depth": 9, "batch_size": 8}),
    ("there is no parametrization 'mine'", {"parametrization": "mine"}),
]


@pytest.mark.parametrize("words, change", NOT_ONE_SWEEP)
def test_runs_that_are_not_one_sweep_are_refused(tmp_path, say, words, change):
    rows = sweep({"ngpt": 0.0})
    path = write(tmp_path / "a.csv", [*rows, {**rows[0], **change}])
    assert words in say(f"results/verdict.py {path} --axis=width")


def test_a_search_with_another_option_changed_is_refused(tmp_path, say):
    rows = search()
    path = write(tmp_path / "a.csv", [*rows, {**rows[0], "beta1": 0.8}])
    assert "beta1 is 0.9 and 0.8" in say(f"results/verdict.py {path}")


def test_only_the_columns_asked_for_are_shown(tmp_path, say):
    path = write(tmp_path / "a.csv", sweep(DRIFTS))
    out = say(f"results/verdict.py {path} --columns=nugpt,ngpt --plot={tmp_path}/a.png")
    assert re.findall(r"^(\w+) +48", out, flags=re.M) == ["nugpt", "ngpt"]
    assert "not of nugpt_full" in say(f"results/verdict.py {path} --columns=nugpt_full")


def with_steps(rows, steps):
    """The rows as of runs of another length, which their base has, too."""
    return [{**row, "steps": steps, "base_steps": steps} for row in rows]


def test_several_tables_show_how_drift_and_regret_follow_the_steps(tmp_path, say):
    long = with_steps(sweep({"ngpt": -0.75, "nugpt": 0.0}, sizes=(48, 192)), 6400)
    short = sweep({"ngpt": -0.5, "nugpt": 0.25})
    paths = f"{write(tmp_path / 'long.csv', long)} {write(tmp_path / 'short.csv', short)}"
    out = say(f"results/verdict.py {paths} --plot={tmp_path}/a.png")
    rows = [line.split() for line in out.strip().splitlines()[1:]]
    # a parabola 0.03 · (2 doublings · drift)² away from its lowest point
    assert rows == [
        ["ngpt", "400", "-0.50", "[-0.50,", "-0.50]", "0.0300"],
        ["ngpt", "6,400", "-0.75", "[-0.75,", "-0.75]", "0.0675"],
        ["nugpt", "400", "+0.25", "[+0.25,", "+0.25]", "0.0075"],
        ["nugpt", "6,400", "+0.00", "[-0.00,", "+0.00]", "0.0000"],
    ]
    out = say(f"results/verdict.py {paths} --columns=nugpt")
    assert "ngpt " not in out.replace("nugpt", "")
    assert "not of mup" in say(f"results/verdict.py {paths} --columns=mup")


NOT_SIDE_BY_SIDE = [
    ("the tables have no width in common",
     with_steps(sweep({"ngpt": 0.0}, sizes=(60, 120)), 1600)),
    ("the tables are sweeps over depth and width",
     with_steps([{**row, "width": 48} for row in sweep({"ngpt": 0.0}, sizes=(2, 4), axis="depth")], 1600)),
    ("the tables differ in depth and steps",
     [{**row, "depth": 8} for row in with_steps(sweep({"ngpt": 0.0}), 1600)]),
]


@pytest.mark.parametrize("words, other", NOT_SIDE_BY_SIDE)
def test_tables_that_cannot_stand_side_by_side_are_refused(tmp_path, say, words, other):
    first = write(tmp_path / "a.csv", sweep({"ngpt": 0.0}))
    second = write(tmp_path / "b.csv", other)
    assert words in say(f"results/verdict.py {first} {second}")


def test_tables_of_one_sweep_are_joined(tmp_path, say):
    rows = sweep({"ngpt": -0.5, "mup": 0.0, "nugpt": 0.1})
    whole = write(tmp_path / "whole.csv", rows)
    halves = [write(tmp_path / "a.csv", [row for row in rows if row["parametrization"] != "mup"]),
              write(tmp_path / "b.csv", [row for row in rows if row["parametrization"] == "mup"])]
    assert say(f"results/verdict.py {halves[0]} {halves[1]}") == say(f"results/verdict.py {whole}")


def test_tables_of_one_size_each_are_joined(tmp_path, say):
    rows = sweep({"ngpt": -0.5}, sizes=(48, 96))
    small, large = (write(tmp_path / f"{width}.csv", [row for row in rows if row["width"] == width])
                    for width in (48, 96))
    assert "-0.50 [-0.50, -0.50]" in say(f"results/verdict.py {small} {large}")


def test_what_an_older_table_lacks_is_taken_from_the_other_and_said(tmp_path, say):
    rows = [{**row, "base_batch_size": 16} for row in sweep({"ngpt": -0.5, "nugpt": 0.0})]
    new = [row for row in rows if row["parametrization"] == "nugpt"]
    old = [{name: value for name, value in row.items()
            if name not in ("base_batch_size", "data_fingerprint")}
           for row in rows if row["parametrization"] == "ngpt"]
    old, new = write(tmp_path / "old.csv", old), write(tmp_path / "new.csv", new)
    said = say(f"results/verdict.py {old} {new}")
    assert f"{old} has no column base_batch_size: taken as 16, as in {new}." in said
    assert f"{old} has no fingerprint of its text" in said
    assert "+0.50 [+0.50, +0.50]" in said


def test_tables_of_two_texts_are_not_joined(tmp_path, say):
    rows = sweep({"ngpt": -0.5})
    first = write(tmp_path / "a.csv", rows)
    second = write(tmp_path / "b.csv", [{**row, "data_fingerprint": "another"} for row in rows])
    assert "different texts" in say(f"results/verdict.py {first} {second}")


# ------------------------------------------------------------------------------------------------
# Alignment: one model


def adapted(seed):
    """A model with one more linear map, the adapter; no factor is 1, and some are negative."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(width=32, depth=2, head_dim=8, vocab_size=48, seq_len=16,
                          alpha_A_init=0.3, alpha_M_init=0.3))
    model.adapter = torch.nn.Parameter(torch.randn(32, 32))
    model.unembed = lambda h: GPT.unembed(model, F.linear(h, 0.5 * model.adapter))
    for parameter in model.parameters():
        parameter.data *= torch.empty_like(parameter).uniform_(-0.5, 1.5)
    return model


def maps_by_hand(model, tokens):
    """(layer, map, weight (d_out, d_in), input) of each linear map, from the model's equations."""
    h = model.embedding[tokens]
    for layer, block in enumerate(model.blocks):
        yield layer, "W_q", block.W_q, h
        yield layer, "W_k", block.W_k, h
        yield layer, "W_v", block.W_v, h
        attended = block.attention(h, model.cos_sin)
        yield layer, "W_O", block.W_O.T, attended @ torch.linalg.inv(block.W_O)
        h = norm(h + block.alpha_A().abs() * (norm(attended) - h))
        yield layer, "W_u", block.W_u, h
        yield layer, "W_nu", block.W_nu, h
        u = h @ block.W_u.T * block.s_u()
        nu = h @ block.W_nu.T * block.s_nu() * math.sqrt(model.config.width)
        gated = u * F.silu(nu)
        yield layer, "W_oMLP", block.W_oMLP.T, gated
        h = norm(h + block.alpha_M().abs() * (norm(gated @ block.W_oMLP) - h))
    yield 2, "adapter", model.adapter, h
    yield 2, "E_out", model.unembedding, h @ model.adapter.T / 2


def exponent_by_hand(W, x):
    ratio = rms(x @ W.T) / (rms(W.flatten()) * rms(x))
    return ratio.log().mean().item() / math.log(W.size(1))


def measured_by_hand(W, W_0, x, x_0):
    """{column: number} of the map y = W x, from the definition."""
    dW = W - W_0
    dx = x - x_0
    return {
        "alpha": exponent_by_hand(dW, x_0),
        "omega": exponent_by_hand(W_0, dx),
        "nu": exponent_by_hand(dW, dx),
        "rms_dW": rms(dW.flatten()).item(),
        "rms_dx": rms(dx).mean().item(),
        "rms_y": rms(x @ W.T).mean().item(),
        "rms_dy": rms(x @ W.T - x_0 @ W_0.T).mean().item(),
    }


def test_independent_weight_and_input_have_exponent_one_half():
    torch.manual_seed(0)
    exponent = alignment.alignment_exponent(torch.randn(300, 1024), torch.randn(50, 1024))
    assert exponent == pytest.approx(0.5, abs=0.01)


def test_a_weight_of_rank_one_along_the_input_has_exponent_one():
    torch.manual_seed(0)
    x = torch.randn(1, 1024)
    exponent = alignment.alignment_exponent(3 * torch.outer(torch.randn(300), x[0]), 5 * x)
    assert exponent == pytest.approx(1, abs=1e-5)


def test_tokens_without_a_logarithm_do_not_count():
    torch.manual_seed(0)
    x = torch.randn(3, 1024)
    first_quarter = torch.arange(1024) < 256
    weight = torch.outer(torch.randn(300), x[0] * first_quarter)
    x[1] = x[0] * ~first_quarter        # which the weight does not see
    x[2] = 0                            # which has not moved
    share = (x[0] * first_quarter).norm() / x[0].norm()
    exponent = 1 + math.log(share, 1024)
    assert alignment.alignment_exponent(weight, x) == pytest.approx(exponent, abs=1e-5)
    assert math.isnan(alignment.alignment_exponent(torch.zeros(300, 1024), x))


@torch.no_grad()
def test_each_map_is_measured_with_its_own_input_and_without_rescalers():
    initial = adapted(0)
    model = adapted(1)
    tokens = torch.randint(48, (2, 16))
    rows, _ = alignment.measure(model, initial, tokens, tokens)
    now = list(maps_by_hand(model, tokens))
    before = list(maps_by_hand(initial, tokens))
    assert len(rows) == len(now) + 1
    for row, (layer, map_, W, x), (_, _, W_0, x_0) in zip(rows, now, before):
        assert (row.pop("layer"), row.pop("map"), row.pop("d_in")) == (layer, map_, x.size(-1))
        assert row == pytest.approx(measured_by_hand(W, W_0, x, x_0), rel=1e-3)


@torch.no_grad()
def test_the_last_row_is_of_the_logits():
    initial = adapted(0)
    model = adapted(1)
    tokens = torch.randint(48, (2, 16))
    rows, loss = alignment.measure(model, initial, tokens, tokens)
    logits, expected_loss = model(tokens, tokens)
    initial_logits, _ = initial(tokens)
    last = rows[-1]
    assert (last["layer"], last["map"]) == (2, "logits")
    assert last["rms_y"] == pytest.approx(rms(logits).mean().item())
    assert last["rms_dy"] == pytest.approx(rms(logits - initial_logits).mean().item())
    assert loss == pytest.approx(expected_loss.item())


@torch.no_grad()
def test_a_map_that_is_no_parameter_is_refused():
    model = adapted(0)
    halves = torch.cat((model.adapter[:16], model.adapter[16:]))
    model.unembed = lambda h: GPT.unembed(model, F.linear(h, halves))
    tokens = torch.randint(48, (2, 16))
    with pytest.raises(ValueError, match="no parameter as a whole"):
        alignment.measure(model, model, tokens, tokens)


def test_the_plain_gpt_can_be_measured():
    torch.manual_seed(0)
    config = plain.PlainGPTConfig(width=16, depth=1, head_dim=8, vocab_size=48, seq_len=16)
    tokens = torch.randint(48, (2, 16))
    rows, _ = alignment.measure(plain.PlainGPT(config), plain.PlainGPT(config), tokens, tokens)
    maps = [row["map"] for row in rows]
    assert maps == ["W_q", "W_k", "W_v", "W_O", "W_u", "W_nu", "W_oMLP", "E_out", "logits"]


def test_the_tensor_class_of_a_map_is_that_of_the_table():
    assert alignment.is_hidden("blocks.0.W_oMLP")
    assert not alignment.is_hidden("E_out")
    assert not alignment.is_hidden("blocks.0.adapter")


# ------------------------------------------------------------------------------------------------
# Alignment: runs


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A data folder of a few words."""
    folder = tmp_path_factory.mktemp("words")
    text = folder / "words.txt"
    text.write_text("norm sphere rescaler alpha residual width depth head\n" * 200)
    argv = sys.argv
    sys.argv = ["prepare_data.py", str(text), f"--out={folder}/data"]
    try:
        prepare_data.main()
    finally:
        sys.argv = argv
    return folder / "data"


TINY = ("--depth=2 --head_dim=8 --seq_len=16 --batch_size=4 --steps=6 --base_width=16 "
        "--base_depth=2 --base_steps=6 --device=cpu --dtype=float32 --compile=False")


@pytest.fixture(scope="module")
def measured(words, tmp_path_factory):
    """(command that trains two widths, the file that it has written)."""
    path = tmp_path_factory.mktemp("measured") / "a.csv"
    line = f"results/alignment.py {TINY} --width=16,32 --every=4 --data={words} --csv={path}"
    argv = sys.argv
    sys.argv = shlex.split(line)
    try:
        alignment.main()
    finally:
        sys.argv = argv
    return line, path


def rows_of(path):
    """The rows of a file of measurements."""
    _, lines = show.read_rows(path)
    return [row for _, row in lines]


def test_runs_are_measured_at_powers_of_two_then_every_so_many_steps_and_at_the_end(measured):
    _, path = measured
    steps = dict.fromkeys((row["width"], int(row["step"])) for row in rows_of(path))
    assert list(steps) == [(width, step) for width in ("16", "32") for step in (0, 1, 2, 4, 6)]


def test_a_run_is_measured_against_its_own_first_weights(measured, words):
    _, path = measured
    row = next(row for row in rows_of(path)
               if (row["width"], row["step"], row["layer"], row["map"]) == ("32", "6", "0", "W_q"))
    weights = []

    def keep(step, model):
        weights.append((model.blocks[0].W_q.detach().clone(), model.embedding.detach().clone()))

    [config] = alignment.configs_of([*TINY.split(), "--width=32", f"--data={words}"])
    train.train(config, after_step=keep)
    W_0, E_0 = weights[0]
    W, E = weights[-1]
    tokens, _ = alignment.validation_batch(config, torch.device("cpu"))
    expected = measured_by_hand(W, W_0, E[tokens], E_0[tokens])
    assert {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=1e-3)


def test_the_file_gives_the_same_report_as_the_runs(measured, say, monkeypatch):
    line, path = measured
    monkeypatch.setattr(train, "train", None)       # no run is made again
    report = say(line)
    assert report == say(f"results/alignment.py {path}")
    assert "slope over widths" in report


def test_interrupted_measurements_go_on_where_they_stopped(measured, tmp_path, monkeypatch, say):
    line, whole = measured
    path = tmp_path / "b.csv"
    line = line.replace(str(whole), str(path))
    train_whole_run = train.train
    widths = []

    def interrupted(config, *args, **kwargs):
        widths.append(config.width)
        if len(widths) == 2:
            raise KeyboardInterrupt
        return train_whole_run(config, *args, **kwargs)

    monkeypatch.setattr(train, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        say(line)
    assert {row["width"] for row in rows_of(path)} == {"16"}
    say(line)
    assert widths == [16, 32, 32]
    assert rows_of(path) == rows_of(whole)


def test_an_impossible_run_is_refused_before_the_first_begins(words, tmp_path, say, monkeypatch):
    monkeypatch.setattr(train, "train", None)
    line = f"results/alignment.py {TINY} --data={words} --csv={tmp_path}/a.csv"
    assert "width must be a positive multiple" in say(f"{line} --width=16,33")
    assert "no parametrization 'mine'" in say(f"{line} --parametrization=nugpt,mine")


def test_runs_are_not_added_to_a_file_that_does_not_know_its_runs(words, say):
    line = f"results/alignment.py {TINY} --data={words} --csv=results/alignment.csv"
    assert "has no column run" in say(line)


def measurements(*columns):
    """Rows of runs whose RMS(W x) / (RMS(W) RMS(x)) is 3 d^0.8 at step 1 and 3 d^0.6 at step 10."""
    rows = []
    losses = {0: 6, 1: 3, 10: 2}
    for column, width, seed, step in itertools.product(columns, (48, 96, 192), (0, 1), losses):
        run = {
            "parametrization": column,
            "width": width,
            "depth": 2,
            "steps": 10,
            "seed": seed,
            "step": step,
            "loss": losses[step],
            "rms_dW": width ** -0.75,
            "rms_dx": width ** -0.5,
            "rms_dy": width ** 0.5,
        }
        power = 0.6 if step == 10 else 0.8
        inputs = {(0, "W_q"): width, (0, "W_oMLP"): 2.5 * width, (2, "E_out"): width}
        for (layer, map_), d_in in inputs.items():
            exponent = power + math.log(3, d_in)
            rows.append({**run, "layer": layer, "map": map_, "d_in": d_in,
                         "alpha": exponent, "omega": exponent, "nu": exponent})
        rows.append({**run, "layer": 2, "map": "logits"})
    return rows


def test_slopes_over_widths_are_free_of_constants(tmp_path, say):
    path = write(tmp_path / "a.csv", measurements("nugpt"))
    lines = say(f"results/alignment.py {path} --plot={tmp_path}/a.png").splitlines()
    assert lines[6].split() == ["nugpt", "1", *["0.80", "±", "0.00"] * 6]
    assert lines[7].split() == ["nugpt", "10", *["0.60", "±", "0.00"] * 6]


def test_the_mean_over_training_is_weighted_by_the_decrease_of_the_loss(tmp_path, say):
    path = write(tmp_path / "a.csv", measurements("nugpt"))
    lines = say(f"results/alignment.py {path}").splitlines()
    # 3 nats were won by step 1, and 1 nat by step 10
    assert lines[8].split() == ["nugpt", "all,", "loss-weighted", *["0.75", "±", "0.00"] * 6]


def test_an_exponent_at_one_width_is_over_the_mean_logarithm_of_d_in(tmp_path, say):
    path = write(tmp_path / "a.csv", measurements("nugpt"))
    lines = say(f"results/alignment.py {path}").splitlines()
    mean_log = np.mean([math.log(48), math.log(2.5 * 48)])
    assert lines[1].split()[3] == f"{0.75 + math.log(3) / mean_log:.2f}"


def test_the_coordinate_check_prints_powers_of_the_width(tmp_path, say):
    path = write(tmp_path / "a.csv", measurements("nugpt", "ngpt"))
    lines = say(f"results/alignment.py {path} --plot={tmp_path}/a.png").splitlines()
    rows = [line.replace("-0.00", "+0.00").split() for line in lines[1:5]]
    assert rows == [[column, step, "-0.25", "+0.00", "+0.50"]
                    for column in ("ngpt", "nugpt") for step in ("1", "10")]


MAPS = measurements("ngpt", "nugpt")
AT_STEP_0 = [row for row in MAPS if row["step"] == 0]
AT_WIDTH_48 = [row for row in MAPS if row["width"] == 48]
ONE_SEED_A_WIDTH = [row for row in MAPS if row["seed"] == (row["width"] > 48)]
BAD_MEASUREMENTS = [
    ("is there twice", [*MAPS, MAPS[0]]),
    ("another depth or length", [*MAPS, {**MAPS[0], "steps": 40, "seed": 7}]),
    ("more than one width of ngpt and nugpt", AT_WIDTH_48),
    ("have only [0]", AT_STEP_0),
    ("no seed in common", ONE_SEED_A_WIDTH),
    ("has no logits at step 10", MAPS[:-1]),
    ("line 2 is not as", [{**MAPS[0], "d_in": "wide"}]),
    ("has no column step", [RUN]),
]


@pytest.mark.parametrize("words, rows", BAD_MEASUREMENTS)
def test_measurements_that_do_not_go_together_are_refused(tmp_path, say, words, rows):
    assert words in say(f"results/alignment.py {write(tmp_path / 'a.csv', rows)}")


# ------------------------------------------------------------------------------------------------
# Runs, looked at


@pytest.fixture(scope="module")
def first(words, tmp_path_factory):
    """The folder of a run of six steps."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    options = [*TINY.split(), f"--data={words}", f"--out_dir={folder}", "--width=16",
               "--sample_tokens=0", "--log_every=1", "--eval_every=2"]
    train.train(train.load_config(train.parse_args(options)))
    return folder


def copy_of_log(folder, other, ending):
    """The folder `other`, with the log of a run, but for its last row: that is `ending`."""
    other.mkdir()
    lines = (folder / "log.csv").read_text().splitlines()
    text = "\n".join([*lines[:-1], *ending]) + "\n"
    (other / "log.csv").write_text(text)
    return other


def test_runs_are_listed_with_where_they_stand(first, tmp_path, say):
    row = dict.fromkeys(train.LOG, "") | {"step": 6, "tokens": 384, "train_loss": "nan"}
    diverged = ",".join(str(cell) for cell in (row | {"status": "diverged"}).values())
    second = copy_of_log(first, tmp_path / "second", [diverged])
    third = copy_of_log(first, tmp_path / "third", [])
    lines = say(f"results/show.py {first} {second} {third}").splitlines()
    assert lines[0].split() == ["run", "steps", "tokens", "train_loss", "val_loss", "status"]
    assert lines[1].split()[:3] == [str(first), "6", "384"]
    assert [line.split()[-1] for line in lines[1:]] == ["finished", "diverged", "unfinished"]


@pytest.mark.parametrize("name", ["with blanks", "_hidden", "$x$_{", "Ω'&\\"])
def test_runs_are_drawn_whatever_their_folders_are_called(first, tmp_path, say, name):
    second = copy_of_log(first, tmp_path / name, [])
    folders = shlex.join([str(first), str(second)])
    say(f"results/show.py {folders} --plot={tmp_path}/a.png")


def test_losses_are_those_of_the_log(first):
    run = show.read_run(first)
    assert run.log["tokens"] == [64.0 * step for step in range(1, 7)]
    known = [not math.isnan(loss) for loss in run.log["val_loss"]]
    assert known == [False, True, False, True, False, True]


def test_a_folder_without_a_run_gets_one_sentence(tmp_path, say):
    assert "has no log.csv" in say(f"results/show.py {tmp_path}")
    (tmp_path / "log.csv").write_text("a,b\n1,2\n")
    assert "is no log of train.py" in say(f"results/show.py {tmp_path}")
    (tmp_path / "log.csv").write_text(",".join(train.LOG) + "\n")
    assert "has no rows yet" in say(f"results/show.py {tmp_path}")


# ------------------------------------------------------------------------------------------------
# Bench

BENCH = ("results/bench.py --width=32 --depth=1 --head_dim=8 --seq_len=16 --vocab_size=64 "
         "--batch_size=2 --device=cpu --dtype=float32 --compile=False")
NORMALIZED_TIMES = [0.2, 0.01, 0.004]       # forward with backward, update, product
PLAIN_TIMES = [0.1, 0.02, 0.004]


@pytest.fixture
def clock(monkeypatch):
    """A function that sets the seconds which bench.py measures from then on."""
    monkeypatch.setattr(bench, "TURNS", 2)

    def set_times(times):
        left = iter(times)

        def seconds(function, device):
            function()
            return next(left)

        monkeypatch.setattr(bench, "seconds", seconds)

    return set_times


def test_bench_prints_times_of_both_models(clock, say):
    clock((NORMALIZED_TIMES + PLAIN_TIMES) * 2)
    lines = say(BENCH).splitlines()
    assert "normalized: step 210.00 ms, of which the update 10.00; 152 tokens/s" in lines[0]
    assert "plain: step 120.00 ms, of which the update 20.00; 267 tokens/s" in lines[1]
    assert f" of {2 * 2048 ** 3 / 0.004 / 1e12:.3f} TFLOP/s" in lines[0]


def test_bench_prints_the_ratio_for_a_small_and_a_large_step(clock, say):
    clock((NORMALIZED_TIMES + PLAIN_TIMES) * 2)
    lines = say(BENCH).splitlines()
    micro_batches = 2 ** 19 / 32
    large = (0.2 * micro_batches + 0.01) / (0.1 * micro_batches + 0.02)
    assert lines[2] == f"ratio normalized/plain: {0.21 / 0.12:.3f} for a step of 32 tokens"
    assert lines[3] == f"ratio normalized/plain: {large:.3f} for a step of 524,288 tokens"


def test_bench_prints_what_a_block_keeps_for_backward(clock, say):
    clock((NORMALIZED_TIMES + PLAIN_TIMES) * 2)
    normalized, opponent = re.findall(r"([\d.]+)·d bytes", say(BENCH))
    assert float(normalized) > float(opponent) > 4 * 10     # more than 10 vectors of fp32 numbers


def test_bench_runs_one_model_after_the_other_where_memory_is_short(clock, say, monkeypatch):
    clock((NORMALIZED_TIMES + PLAIN_TIMES) * 2)
    lines = say(BENCH).splitlines()
    make_contestant = bench.make_contestant
    made = []

    def second_does_not_fit(*args):
        made.append(args)
        if len(made) == 2:
            raise torch.OutOfMemoryError
        return make_contestant(*args)

    monkeypatch.setattr(bench, "make_contestant", second_does_not_fit)
    clock(NORMALIZED_TIMES * 2 + PLAIN_TIMES * 2)
    first, *others = say(BENCH).splitlines()
    assert first.startswith("both models do not fit")
    assert others == lines


def test_bench_adds_a_row_to_a_file(clock, say, tmp_path):
    path = tmp_path / "bench.csv"
    for _ in range(2):
        clock((NORMALIZED_TIMES + PLAIN_TIMES) * 2)
        say(f"{BENCH} --csv={path}")
    rows = rows_of(path)
    assert len(rows) == 2
    assert rows[1]["normalized_ms"] == "210.00"
    assert rows[1]["ratio"] == "1.750"


# ------------------------------------------------------------------------------------------------
# Command lines


BAD_COMMANDS = [
    ("verdict.py: [Errno 2] No such file", "verdict.py none.csv"),
    ("verdict.py: argument --axis", "verdict.py none.csv --axis=height"),
    ("verdict.py: [Errno 21] Is a directory", "verdict.py results"),
    ("alignment.py: ", "alignment.py none.csv --plott=a.png"),
    ("alignment.py: give .csv files", "alignment.py"),
    ("alignment.py: --csv and options", "alignment.py a.csv --csv=b.csv"),
    ("alignment.py: --every must be", "alignment.py --csv=a.csv --every=0"),
    ("train.py: ", "alignment.py --csv=out/a.csv --height=3"),
    ("show.py: out/none is no folder of a run", "show.py out/none"),
    ("bench.py: width must be", "bench.py --width=33"),
]


@pytest.mark.parametrize("words, line", BAD_COMMANDS)
def test_an_impossible_command_gets_one_sentence(say, words, line):
    assert say(f"results/{line}").startswith(words)


def test_without_matplotlib_a_picture_gets_one_sentence(capsys, monkeypatch, say):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    sentence = say("results/verdict.py results/laptop.csv --plot=x.png")
    assert sentence == "verdict.py: the picture needs matplotlib: pip install matplotlib"
    assert "wide enough" in capsys.readouterr().out     # the tables are printed all the same


def test_a_home_folder_is_found(tmp_path, monkeypatch, table, say):
    monkeypatch.setenv("HOME", str(table.parent))
    assert "wide enough" in say("results/verdict.py ~/table.csv")


SCRIPTS = ["verdict.py", "show.py", "alignment.py", "bench.py"]


def python(*args, **options):
    """The finished process of `python ARGS` in the repository's folder."""
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, **options)


def test_help_of_every_script_is_printed_without_docstrings_and_without_greek():
    latin = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    code = f"""if True:
        import runpy, sys
        sys.path.insert(0, "results")
        for script in ["../train.py", "sweep.py", "plain.py"] + {SCRIPTS!r}:
            sys.argv = [script, "--help"]
            try:
                runpy.run_path("results/" + script, run_name="__main__")
            except SystemExit as end:
                print("ended with", end.code)
    """
    done = python("-OO", "-c", code, env=latin)
    assert done.stderr == b""
    assert done.stdout.count(b"ended with 0") == 3 + len(SCRIPTS)


def test_a_verdict_can_be_printed_on_any_terminal():
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = python("results/verdict.py", "results/laptop.csv", env=ascii_only)
    assert done.returncode == 0
    assert b"best loss" in done.stdout


def test_a_closed_pipe_ends_a_verdict_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "results/verdict.py", "results/laptop.csv"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.stderr == b""
