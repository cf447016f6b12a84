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
import compare
import plain
import prepare_data
import show
import train
import verdict
from alignment import rms
from model import GPT, GPTConfig, norm
from parametrize import parametrize

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
    "data": "data/stdlib",
    "data_fingerprint": "t123456789abcdef",
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


def judge(rows, **options):
    """{column: Verdict} of rows."""
    _, verdicts = verdict.judge(rows, **options)
    return verdicts


def sweep(drifts, sizes=(48, 96, 192), seeds=range(3), grid=np.arange(-8.5, -3.9, 0.5),
          axis="width", best=-6.0, noise=0.0, jitter=0.0, shared_jitter=0.0, draw=0):
    """
    Rows of a sweep: parabolas whose best moves by drifts[column] octaves a doubling.

    noise: of each run; jitter: of each curve's best; shared_jitter: of a seed's bests at all sizes.
    Only the first column has runs at the base, where all columns are one model.
    """
    rng = np.random.default_rng(draw)
    shift = {seed: shared_jitter * rng.standard_normal() for seed in seeds}
    level = {seed: 0.03 * rng.standard_normal() for seed in seeds}
    first = next(iter(drifts))
    rows = []
    for (name, drift), size, seed in itertools.product(drifts.items(), sizes, seeds):
        doublings = math.log2(size / sizes[0])
        optimum = best + drift * doublings + shift[seed] + jitter * rng.standard_normal()
        if size == sizes[0] and name != first:
            continue
        for x in grid:
            loss = 1.9 - 0.1 * doublings + level[seed] + 0.03 * (x - optimum) ** 2
            rows.append({
                **RUN,
                "parametrization": name,
                axis: size,
                "seed": seed,
                "learning_rate": 2.0 ** x,
                "val_loss": loss + noise * rng.standard_normal(),
            })
    return rows


def diverging(rows, is_too_hot):
    """The rows, of which those that are too hot have diverged."""
    return [{**row, "val_loss": math.inf} if is_too_hot(row) else row for row in rows]


def hotter_than(log2_rate):
    """A condition on rows, for diverging."""
    return lambda row: row["learning_rate"] > 2 ** log2_rate


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
def test_quoted_blocks_are_what_commands_print(say, line, block):
    printed = say(line)
    assert "\n" + block in "\n" + printed, f"`python {line}` prints\n{printed}"


# ------------------------------------------------------------------------------------------------
# Drift and regret

DRIFTS = {"ngpt": -0.5, "mup": 0.2, "nugpt": 0.0}
UNEVEN_GRID = (-8, -7.25, -7, -6.5, -6.25, -6, -5.5, -5, -4.5, -4)


@pytest.fixture(scope="module")
def exact():
    """{column: Verdict} of a sweep without noise."""
    return judge(sweep(DRIFTS, grid=UNEVEN_GRID))


@pytest.mark.parametrize("name", DRIFTS)
def test_a_known_drift_is_found(exact, name):
    assert exact[name].drift == pytest.approx((DRIFTS[name], 0), abs=1e-6)
    optima = [curve.optimum for curve in exact[name].curves.values()]
    assert optima == pytest.approx([-6 + DRIFTS[name] * i for i in range(3)], abs=1e-6)


def test_columns_are_compared_to_the_control(exact):
    assert exact["nugpt"].difference == pytest.approx((0.5, 0), abs=1e-6)
    assert exact["ngpt"].difference is None


def test_regret_is_the_loss_at_the_smallest_sizes_best(exact):
    # ngpt's best moves by 2 · 0.5 octaves, and the parabolas are 0.03 x²
    assert exact["ngpt"].curves[192].regret.mean == pytest.approx(0.03, abs=1e-6)
    assert exact["nugpt"].curves[192].regret.mean == pytest.approx(0, abs=1e-6)


def test_the_same_best_point_is_said(exact):
    assert [exact[name].same for name in DRIFTS] == ["No", "No", "Yes"]


def test_columns_stand_in_the_order_from_ngpt_to_nugpt(exact):
    assert list(exact) == ["ngpt", "mup", "nugpt"]


def test_the_axis_is_what_differs():
    rows = sweep({"nugpt": 0.4}, sizes=(4, 16, 64), axis="batch_size")
    axis, verdicts = verdict.judge(rows)
    assert axis == "batch_size"
    assert verdicts["nugpt"].drift == pytest.approx((0.4, 0), abs=1e-6)


def test_intervals_cover_at_their_nominal_rate(draws=300):
    """With noise of runs, and of whole curves, which would fool an interval that goes by runs."""
    drifts = []
    for draw in range(1000, 1000 + draws):
        rows = sweep({"ngpt": -0.1}, noise=0.003, jitter=0.15, draw=draw)
        drifts.append(judge(rows)["ngpt"].drift)
    slopes, halves = np.array(drifts).T
    covered = np.mean(np.abs(slopes + 0.1) <= halves)
    assert 0.91 <= covered <= 0.99      # with 1.96 in place of Student's 2.57 it would be 0.88
    scatter = np.std(slopes)
    assert np.mean(slopes) == pytest.approx(-0.1, abs=3 * scatter / draws ** 0.5)
    assert np.median(halves) < 3.2 * scatter


def test_what_a_seed_has_in_common_at_all_sizes_cancels():
    plain_drift, plain_half = judge(sweep({"ngpt": -0.5}, noise=0.002))["ngpt"].drift
    rows = sweep({"ngpt": -0.5}, noise=0.002, shared_jitter=0.6)
    slope, half = judge(rows)["ngpt"].drift
    assert abs(slope + 0.5) < 0.1
    assert half < 2 * plain_half


def test_runs_at_the_base_count_for_every_column():
    verdicts = judge(sweep({"ngpt": -0.5, "nugpt": 0.0}, noise=0.01))
    losses = verdicts["nugpt"].curves[48].loss
    assert np.array_equal(losses, verdicts["ngpt"].curves[48].loss)


def test_base_runs_of_another_recipe_do_not_count():
    rows = sweep({"ngpt": -0.5, "nugpt": 0.0}, noise=0.01)
    for row in rows:
        if row["parametrization"] == "nugpt":
            row["embedding_lr_mult"] = 0.25
    verdicts = judge(rows)
    assert list(verdicts["nugpt"].curves) == [96, 192]
    assert list(verdicts["ngpt"].curves) == [48, 96, 192]


SHIFTS = [("nugpt", "ngpt", -1 / 3), ("ngpt", "nugpt", 1 / 3)]


@pytest.mark.parametrize("run_as, other, shift", SHIFTS)
def test_over_steps_a_column_is_another_at_another_eta(run_as, other, shift):
    verdicts = judge(sweep({run_as: -0.05}, sizes=(400, 800, 1600), axis="steps"))
    assert verdicts[run_as].drift[0] == pytest.approx(-0.05, abs=1e-3)
    assert verdicts[other].drift[0] == pytest.approx(-0.05 + shift, abs=1e-3)


def test_off_the_base_width_no_eta_makes_columns_alike():
    rows = sweep({"ngpt": -0.05}, sizes=(400, 800, 1600), axis="steps")
    assert list(judge([{**row, "base_width": 96} for row in rows])) == ["ngpt"]


# ------------------------------------------------------------------------------------------------
# Grids that are too narrow, and runs that diverge

NARROW = (-6.5, -6, -5.5, -5)


def test_points_to_add_are_said():
    judged = judge(sweep({"ngpt": -0.75}, grid=NARROW))["ngpt"]
    words = [curve.grid for curve in judged.curves.values()]
    assert words == ["add 2^-7", "add 2^-7.5 2^-7", "add 2^-7.5 2^-7"]
    assert judged.same == "?"


def test_an_optimum_is_never_extrapolated():
    judged = judge(sweep({"ngpt": -0.75}, grid=NARROW))["ngpt"]
    assert not any(size == 192 for size, _ in judged.optima)


def test_without_the_smallest_sizes_best_there_is_no_regret():
    curve = judge(sweep({"ngpt": 0}, best=-5, grid=NARROW))["ngpt"].curves[192]
    assert curve.regret is None
    assert curve.cost is None


def test_beyond_a_grid_the_regret_is_a_lower_bound():
    rows = sweep({"ngpt": -1.0}, sizes=(48, 96, 192, 384), best=-5)
    # The bests are at -5, -6, -7 and -8. The widest's grid ends at -7.
    rows = [row for row in rows if row["width"] < 384 or row["learning_rate"] < 2 ** -6.75]
    regret = judge(rows)["ngpt"].curves[384].regret
    assert verdict.regret_text(regret) == "> 0.0300"


def test_a_seed_that_ran_one_point_does_not_move_the_best():
    rows = sweep({"ngpt": 0.0}, seeds=[0, 1])
    point = [row for row in rows if row["seed"] == 0 and row["learning_rate"] == 2 ** -7]
    rows += [{**row, "seed": 2, "val_loss": 1.0} for row in point]
    curve = judge(rows)["ngpt"].curves[96]
    assert curve.x[curve.best] == -6
    assert curve.complete == [0, 1]
    assert curve.grid == "add 2^-6.5 2^-6 2^-5.5 2^-5"


def test_beside_a_divergence_the_window_stays_symmetric():
    curve = judge(diverging(sweep({"ngpt": 0.0}), hotter_than(-5.25)))["ngpt"].curves[96]
    assert curve.radius == 1
    assert curve.add == []
    assert curve.optimum == pytest.approx(-6, abs=1e-6)


def test_a_best_beside_a_divergence_is_said():
    judged = judge(diverging(sweep({"ngpt": 0.0}), hotter_than(-5.75)))["ngpt"]
    assert judged.drift is None
    assert judged.curves[96].grid == "diverges near the best"


def test_where_nothing_survives_lower_rates_are_asked_for():
    rows = diverging(sweep({"ngpt": 0.0}), lambda row: row["width"] == 192)
    curve = judge(rows)["ngpt"].curves[192]
    assert curve.add == [-9.5, -9]
    assert verdict.regret_text(curve.regret) == "diverges"


def test_a_point_diverged_if_one_seed_did():
    rows = diverging(sweep({"ngpt": 0.0}), lambda row: hotter_than(-5.25)(row) and row["seed"] == 1)
    curve = judge(rows)["ngpt"].curves[96]
    assert np.isinf(curve.mean).sum() == 3


# ------------------------------------------------------------------------------------------------
# The cost of carrying


def costs(drifts, carried=-6.0, change=None, **options):
    """{column: Cost at the largest size} of a sweep whose rows may be changed first."""
    rows = sweep(drifts, **options)
    verdicts = judge(change(rows) if change else rows, carried=carried)
    return {name: judged.curves[192].cost for name, judged in verdicts.items()}


def test_a_cost_is_against_the_best_of_any_column():
    def nugpt_is_better(rows):
        return [{**row, "val_loss": row["val_loss"] - 0.1 * (row["parametrization"] == "nugpt")}
                for row in rows]

    found = costs({"ngpt": -0.5, "nugpt": 0.0}, change=nugpt_is_better)
    # ngpt's best is 0.1 higher, and 1 octave away on parabolas 0.03 x²
    assert found["ngpt"] == pytest.approx((0.13, 0, False), abs=1e-6)
    assert found["nugpt"] == pytest.approx((0, 0, False), abs=1e-6)


def simulated(losses, noise, draws=1000):
    """(errors of the mean, halves of the intervals) of the costs of x = 0 in `draws` sweeps of two
    columns with three seeds, whose true losses at x = 0, 1, … are `losses`."""
    rng = np.random.default_rng(0)
    errors = []
    halves = []
    for _ in range(draws):
        level = rng.normal(0, 0.1, 3)
        curves = []
        for column in losses:
            points = {(x, seed): {"val_loss": loss + level[seed] + rng.normal(0, noise),
                                  "alpha_A": None, "alpha_M": None}
                      for x, loss in enumerate(column) for seed in range(3)}
            curves.append(verdict.make_curve(points))
        cost = verdict.cost_of(curves[0], 0.0, curves)
        errors.append(cost.mean - (losses[0][0] - min(map(min, losses))))
        halves.append(cost.half)
    return np.array(errors), np.array(halves)


@pytest.mark.parametrize("losses", [[[2.1, 2.05, 2.0], [2.03, 2.04, 2.05]], [[2.0] * 8, [2.0] * 8]])
def test_a_true_cost_is_covered_at_the_nominal_rate(losses):
    """Of the second, with a true cost of 0, the luckiest of sixteen like settings must not count:
    chosen on the same seeds, it would look better by one and a half scatters of a mean."""
    errors, halves = simulated(losses, noise=0.01)
    assert 0.92 <= np.mean(np.abs(errors) <= halves) <= 0.98
    assert abs(errors.mean()) < 3 * errors.std() / len(errors) ** 0.5


def test_a_carried_rate_that_diverged_costs_without_end():
    hot = costs({"ngpt": -1.0}, change=lambda rows: diverging(rows, lambda row: (
        hotter_than(-6.25)(row) and row["seed"] == 1)))
    assert hot["ngpt"].mean == math.inf
    assert verdict.cost_text(hot["ngpt"]) == "diverges"


def test_the_cost_of_one_seed_has_a_mark_and_no_interval():
    assert verdict.cost_text(costs({"ngpt": -0.5}, seeds=[0])["ngpt"]) == "+0.0300*"


def test_beyond_its_grid_a_cost_is_a_lower_bound():
    cost = costs({"ngpt": -0.5}, carried=-3.0)["ngpt"]
    assert verdict.cost_text(cost).startswith("> +0.2700")


def test_a_carried_rate_that_did_not_run_is_interpolated():
    cost = costs({"ngpt": -0.5}, carried=-5.8)["ngpt"]
    assert cost.mean == pytest.approx(0.03 * 1.2 ** 2, abs=1e-6)


def test_a_setting_that_lacks_a_seed_is_no_best():
    def lucky(rows):
        first = next(row for row in rows if row["width"] == 192)
        return [*rows, {**first, "learning_rate": 2.0 ** -5.8, "val_loss": 0.1}]

    assert costs({"ngpt": -0.5}, change=lucky)["ngpt"].mean == pytest.approx(0.03, abs=1e-6)


def test_the_carried_rate_may_be_given(tmp_path, say):
    path = write(tmp_path / "a.csv", sweep({"ngpt": -0.5}))
    out = say(f"results/verdict.py {path} --carried=2^-5.5")
    assert "+0.0675 [+0.0675, +0.0675]" in out      # 1.5 octaves from the best
    assert "cost: loss at η = 2^-5.5" in out
    assert "invalid eta value" in say(f"results/verdict.py {path} --carried=0")


# ------------------------------------------------------------------------------------------------
# Results tables that a person or a spreadsheet has touched


@pytest.fixture
def table(tmp_path):
    """A results table of two columns; its first line is the head, its second the first run."""
    return write(tmp_path / "table.csv", sweep({"ngpt": -0.5, "nugpt": 0.0}, noise=0.002))


def read(*paths):
    """The runs of results tables, a list a table."""
    tables, _ = verdict.read_results(*paths)
    return tables


def spelled_by_a_spreadsheet(text):
    text = text.replace("False", "FALSE").replace("1e-16", "1E-16")
    return text.replace(",0.05,", ",0.0500,").replace(",400,", ",4E+02,")


def with_blank_rows(text):
    return text + "\n" + "," * text.split("\n")[0].count(",") + "\n\n"


def with_columns_reversed(text):
    return "\n".join(",".join(reversed(line.split(","))) for line in text.splitlines())


def quoted_with_crlf(text):
    lines = [line.replace(",", '","') for line in text.splitlines()]
    return "\ufeff" + "".join(f'"{line}"\r\n' for line in lines)


RESAVED = [spelled_by_a_spreadsheet, with_blank_rows, with_columns_reversed, quoted_with_crlf]


@pytest.mark.parametrize("resave", RESAVED)
def test_a_table_saved_elsewhere_has_the_same_runs(table, resave):
    text = table.read_text()
    runs = read(table)
    table.write_bytes(resave(text).encode())
    assert table.read_text() != text
    assert read(table) == runs


def with_cell(name, cell):
    """A function that puts the cell into the first run of a table's text."""

    def damage(text):
        head, first, *others = text.splitlines()
        cells = first.split(",")
        cells[head.split(",").index(name)] = cell
        return "\n".join([head, ",".join(cells), *others])

    return damage


DAMAGED = [
    ("line 1: column 'Width'", lambda text: text.replace("width,", "Width,", 1)),
    ("line 1: there is no column 'seed'", lambda text: text.replace(",seed", ",step", 1)),
    ("line 1: there is one column", lambda text: text.replace(",", ";").replace(".", ",")),
    ("line 151 has", lambda text: text[:-40]),
    ("line 2, column learning_rate: '0,0221'", with_cell("learning_rate", '"0,0221"')),
    ("line 2, column seed: '1.5'", with_cell("seed", "1.5")),
    ("line 2, column steps: '1 000'", with_cell("steps", "1 000")),
    ("line 2, column width: must be more than 0", with_cell("width", "0")),
    ("line 2, column embedding_lr_mult: '-1'", with_cell("embedding_lr_mult", "-1")),
    ("line 2, column val_loss: a finished run", with_cell("val_loss", "")),
    ("line 2, column status: must be", with_cell("status", "done")),
]


@pytest.mark.parametrize("words, damage", DAMAGED)
def test_a_damaged_table_is_refused_with_its_place(table, say, words, damage):
    table.write_text(damage(table.read_text()))
    assert say(f"results/verdict.py {table}").startswith(f"verdict.py: {table}, {words}")


@pytest.mark.parametrize("encoding, line", [("utf-16", 1), ("latin-1", 3)])
def test_a_table_in_another_encoding_is_refused(table, say, encoding, line):
    lines = table.read_text().split("\n")
    lines[2] = lines[2].replace("float32", "flöat32")
    table.write_text("\n".join(lines), encoding=encoding)
    assert f"{table}, line {line} is not in UTF-8" in say(f"results/verdict.py {table}")


def test_values_have_the_types_of_config(table):
    for name, kind in verdict.OPTION_TYPES.items():
        if name in verdict.OPTIONS:
            assert type(read(table)[0][0][name]) is kind


def test_a_long_seed_is_exact(tmp_path):
    seed = 2 ** 58 + 1
    assert read(write(tmp_path / "a.csv", [{**RUN, "seed": seed}]))[0][0]["seed"] == seed


def test_of_equal_runs_the_last_counts_in_six_digits(tmp_path):
    first = {**RUN, "learning_rate": 0.02209708691207961}
    again = {**RUN, "learning_rate": 0.0220971, "val_loss": 1.5}
    path = write(tmp_path / "a.csv", [first, {**RUN, "seed": 1}, again])
    assert [run["val_loss"] for run in read(path)[0]] == [1.5, 2.0]


def test_a_run_on_another_text_is_another_run(tmp_path):
    path = write(tmp_path / "a.csv", [RUN, {**RUN, "data_fingerprint": "t9"}])
    assert len(read(path)[0]) == 2


def test_a_diverged_run_has_an_infinite_loss(tmp_path):
    path = write(tmp_path / "a.csv", [{**RUN, "status": "diverged", "val_loss": "nan"}])
    assert read(path)[0][0]["val_loss"] == math.inf


@pytest.mark.parametrize("text", ["", ",".join(RUN) + "\n"])
def test_a_table_without_rows_is_said(tmp_path, say, text):
    path = tmp_path / "a.csv"
    path.write_text(text)
    assert say(f"results/verdict.py {path}") == f"verdict.py: {path} has no rows"


def test_runs_of_two_dtypes_stand_together_and_that_is_said(tmp_path, say):
    rows = sweep({"ngpt": 0.0})
    path = write(tmp_path / "a.csv", [*rows[1:], {**rows[0], "dtype": "bfloat16"}])
    assert "bfloat16 and float32 stand side by side" in say(f"results/verdict.py {path}")


NOT_ONE_SWEEP = [
    ("trained on different texts", {"data_fingerprint": "t9"}),
    ("head_dim is 64 and 32", {"head_dim": 32}),
    ("in ngpt's runs of 400 steps", {"warmup_steps": 40}),
    ("width 48 differ in depth, batch_size", {"depth": 9, "batch_size": 8}),
    ("there is no parametrization 'mine'", {"parametrization": "mine"}),
]


@pytest.mark.parametrize("words, change", NOT_ONE_SWEEP)
def test_runs_that_are_not_one_sweep_are_refused(tmp_path, say, words, change):
    rows = sweep({"ngpt": 0.0})
    path = write(tmp_path / "a.csv", [*rows, {**rows[0], **change}])
    assert words in say(f"results/verdict.py {path} --axis=width")


# ------------------------------------------------------------------------------------------------
# Several tables


def test_tables_of_one_sweep_are_joined(tmp_path, say):
    rows = sweep({"ngpt": -0.5, "mup": 0.0, "nugpt": 0.1})
    whole = write(tmp_path / "whole.csv", rows)
    mup = [row for row in rows if row["parametrization"] == "mup"]
    first = write(tmp_path / "a.csv", [row for row in rows if row not in mup])
    second = write(tmp_path / "b.csv", mup)
    assert say(f"results/verdict.py {first} {second}") == say(f"results/verdict.py {whole}")


def test_tables_of_one_size_each_are_joined(tmp_path, say):
    small = write(tmp_path / "small.csv", sweep({"ngpt": 0}, sizes=[48]))
    large = write(tmp_path / "large.csv", sweep({"ngpt": 0}, sizes=[96], best=-6.5))
    assert "-0.50 [-0.50, -0.50]" in say(f"results/verdict.py {small} {large}")


def test_what_an_older_table_lacks_is_taken_and_said(tmp_path, say):
    rows = [{**row, "base_batch_size": 16} for row in sweep({"ngpt": -0.5, "nugpt": 0.0})]
    new = [row for row in rows if row["parametrization"] == "nugpt"]
    lacking = ("base_batch_size", "data_fingerprint")
    old = [{name: value for name, value in row.items() if name not in lacking}
           for row in rows if row not in new]
    new = write(tmp_path / "new.csv", new)
    old = write(tmp_path / "old.csv", old)
    said = say(f"results/verdict.py {old} {new}")
    assert f"{old} has no base_batch_size: taken as 16, as in the others." in said
    assert f"{old} has no data_fingerprint" in said
    assert "+0.50 [+0.50, +0.50]" in said


def test_tables_of_two_texts_are_not_joined(tmp_path, say):
    rows = sweep({"ngpt": -0.5})
    first = write(tmp_path / "a.csv", rows)
    second = write(tmp_path / "b.csv", [{**row, "data_fingerprint": "t9"} for row in rows])
    assert "different texts" in say(f"results/verdict.py {first} {second}")


def with_steps(rows, steps):
    """The rows as of runs of another length, which their base has, too."""
    return [{**row, "steps": steps, "base_steps": steps} for row in rows]


def test_tables_of_other_lengths_stand_side_by_side(tmp_path, say):
    long = with_steps(sweep({"ngpt": -0.75, "nugpt": 0.0}, sizes=(48, 192)), 6400)
    short = sweep({"ngpt": -0.5, "nugpt": 0.25})
    paths = f"{write(tmp_path / 'long.csv', long)} {write(tmp_path / 'short.csv', short)}"
    rows = [line.split()[:6] for line in say(f"results/verdict.py {paths}").splitlines()[1:5]]
    # a parabola 0.03 · (2 doublings · drift)² away from its lowest point
    assert rows == [
        ["ngpt", "400", "-0.50", "[-0.50,", "-0.50]", "0.0300"],
        ["ngpt", "6,400", "-0.75", "[-0.75,", "-0.75]", "0.0675"],
        ["nugpt", "400", "+0.25", "[+0.25,", "+0.25]", "0.0075"],
        ["nugpt", "6,400", "+0.00", "[-0.00,", "+0.00]", "0.0000"],
    ]


OVER_DEPTH = [{**row, "width": 60} for row in sweep({"ngpt": 0.0}, sizes=(2, 4), axis="depth")]
NOT_SIDE_BY_SIDE = [
    ("the tables have no width in common", sweep({"ngpt": 0.0}, sizes=(60, 120))),
    ("the tables are sweeps over depth and width", OVER_DEPTH),
    ("the tables differ in depth and steps", [{**row, "depth": 8} for row in sweep({"ngpt": 0})]),
]


@pytest.mark.parametrize("words, other", NOT_SIDE_BY_SIDE)
def test_tables_that_do_not_go_together_are_refused(tmp_path, say, words, other):
    first = write(tmp_path / "a.csv", sweep({"ngpt": 0.0}))
    second = write(tmp_path / "b.csv", with_steps(other, 1600))
    assert words in say(f"results/verdict.py {first} {second}")


# ------------------------------------------------------------------------------------------------
# Comparisons

LEAD_RUNS = [       # parametrization, learning_rate, losses of seeds 0, 1, 2
    ("nugpt", "0.01", "1.0 2.0 3.0"),
    ("nugpt", "0.02", "0.1 0.1 nan"),
    ("ngpt", "0.03", "1.1 2.2 3.3"),
    ("ngpt", "0.04", "2.0 3.0 4.0"),
    ("ngpt", "0.05", "0.1 0.1"),
]


@pytest.fixture
def leads(tmp_path, say):
    """A function: what compare.py says of two columns in a table of LEAD_RUNS and more runs."""

    def run(first, second, *more):
        lines = ["width,warmup_steps,parametrization,learning_rate,seed,val_loss"]
        for name, rate, losses in LEAD_RUNS:
            for seed, loss in enumerate(losses.split()):
                lines.append(f"48,0,{name},{rate},{seed},{loss}")
        table = tmp_path / "a.csv"
        table.write_text("\n".join([*lines, *more]))
        return say(f"results/compare.py lead {table} {first} {second} width=48")

    return run


def test_a_lead_is_of_paired_seeds_at_the_best_rates(leads):
    # differences -0.1, -0.2, -0.3: their standard deviation is 0.1, and t with 2 degrees 4.303.
    # nugpt's 0.02 has lower losses, but a seed diverged; of ngpt's 0.05 a seed is missing
    half = 4.303 * 0.1 / math.sqrt(3)
    assert leads("nugpt", "ngpt") == (f"-0.200 ± {half:.3f} nats, 3 seeds, at width=48: "
                                      "nugpt with η = 0.01 less ngpt with η = 0.03\n")


def test_a_lead_may_be_asked_for_at_one_rate(leads):
    assert leads("nugpt", "ngpt:0.04").startswith("-1.000 ± 0.000 nats")


def test_a_rate_may_be_written_with_more_digits(leads):
    more = ["48,0,mup,0.0110485,0,1", "48,0,mup,0.01104854,1,1",
            "48,0,mup,0.011048543456039806,2,1"]
    assert "mup with η = 0.0110485 less" in leads("mup", "ngpt", *more)


NO_LEADS = [
    ("mup has no learning rate that three seeds finished", "mup", []),
    ("nugpt:0.02 has no learning rate that three seeds finished", "nugpt:0.02", []),
    ("two runs of seed 0 with learning rate 0.01", "nugpt", ["48,0,nugpt,0.01,0,5"]),
    ("nugpt differ in warmup_steps, too", "nugpt", ["48,9,nugpt,0.08,0,5"]),
    ("nugpt:0.0 may be any of 0.01, 0.013", "nugpt:0.0",
     [f"48,0,nugpt,0.013,{seed},1" for seed in range(3)]),
]


@pytest.mark.parametrize("sentence, first, more", NO_LEADS)
def test_a_lead_that_compares_unlike_runs_is_refused(leads, sentence, first, more):
    assert sentence in leads(first, "ngpt", *more)


def search():
    """
    Rows of a random search of 40 settings.

    The loss is 2 + 0.1 · (distance in log2 from η = 2^-6 and α₀ = 0.4, the end of its range)².
    """
    settings = np.random.default_rng(1).uniform((-8, -6), (-4, -1.3), (40, 2))
    rows = []
    for x, a in settings.tolist():
        rows.append({
            **RUN,
            "learning_rate": float(f"{2 ** x:.4g}"),
            "alpha_init": float(f"{2 ** a:.4g}"),
            "val_loss": 2 + 0.1 * ((x + 6) ** 2 + (a + 1.3) ** 2),
        })
    return rows


def test_the_best_of_a_search_is_printed_as_options(tmp_path, say):
    rows = search()
    out = say(f"results/compare.py search {write(tmp_path / 'a.csv', rows)}")
    best = min(rows, key=lambda row: row["val_loss"])
    options = [f"--{name}={best[name]:.4g}" for name in ("alpha_init", "learning_rate")]
    assert out.splitlines()[1].split() == [f"{best['val_loss']:.4f}", "+0.0000", "1", *options]
    assert "widen alpha_init upwards" in out
    assert "widen learning_rate" not in out


TWENTY = [0.01 * 1.1 ** i for i in range(20)]


@pytest.mark.parametrize("best, where", [(0, "downwards"), (9, None), (18, "upwards")])
def test_a_range_with_its_best_near_an_end_is_widened(best, where):
    advice = compare.range_to_widen("beta2", [TWENTY[best], *TWENTY])
    assert [sentence.split(":")[0] for sentence in advice] == [f"widen beta2 {where}"] * bool(where)


def test_below_zero_there_is_nothing_to_try():
    assert compare.range_to_widen("warmup_steps", [0, 10, 20, 40]) == []


def test_a_good_seed_makes_no_setting_the_best():
    runs = [{**RUN, "learning_rate": rate, "seed": seed, "val_loss": 2 - seed + 9 * rate}
            for rate, seed in ((0.01, 0), (0.01, 1), (0.02, 0), (0.02, 1), (0.03, 1))]
    ranked = compare.rank(runs, ["learning_rate"])
    assert [setting.values for setting in ranked] == [(0.01,), (0.02,), (0.03,)]


def one_at_a_time():
    """Rows of a setting and of changes to it. Seed 1 is 0.3 worse than seed 0 in all of them."""
    gain = {("beta2", 0.99): (0.02, 0.04), ("schedule", "wsd"): (0.1, 0.1)}
    rows = []
    for seed in (0, 1):
        level = 2.0 + 0.3 * seed
        rows.append({**RUN, "seed": seed, "val_loss": level})
        for (option, value), gains in gain.items():
            rows.append({**RUN, "seed": seed, option: value, "val_loss": level - gains[seed]})
    return rows


def test_options_changed_one_at_a_time_are_priced(tmp_path, say):
    path = write(tmp_path / "a.csv", one_at_a_time())
    lines = [line.split() for line in say(f"results/compare.py options {path}").splitlines()]
    half = 12.7062 * 0.01   # Student's t for two seeds, times the standard error of 0.02 and 0.04
    interval = f"[{-0.03 - half:+.4f}, {half - 0.03:+.4f}]".split()
    assert lines[1:4] == [
        ["unchanged", "2.1500", "+0.0000", "[+0.0000,", "+0.0000]", "2"],
        ["--schedule=wsd", "2.0500", "-0.1000", "[-0.1000,", "-0.1000]", "2"],
        ["--beta2=0.99", "2.1200", "-0.0300", *interval, "2"],
    ]
    assert lines[5] == ["Unchanged:", "--schedule=cosine", "--beta2=0.95"]


def test_changes_without_the_unchanged_are_refused(tmp_path, say):
    rows = [row for row in one_at_a_time() if row["val_loss"] not in (2.0, 2.3)]
    rows.append({**RUN, "eps": 1e-8})
    path = write(tmp_path / "a.csv", rows)
    assert "no run has the setting" in say(f"results/compare.py options {path}")


# ------------------------------------------------------------------------------------------------
# Alignment


def adapted(seed):
    """A model with one more linear map, the adapter; no factor is 1, and some are negative."""
    torch.manual_seed(seed)
    settings, _ = parametrize("ngpt", width=32, depth=2, steps=1, base_width=32, base_depth=2,
                              base_steps=1, alpha_init=0.3)
    model = GPT(GPTConfig(settings, width=32, depth=2, head_dim=8, vocab_size=48, seq_len=16))
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


def test_independent_weight_and_input_have_exponent_half():
    torch.manual_seed(0)
    exponent = alignment.alignment_exponent(torch.randn(300, 1024), torch.randn(50, 1024))
    assert exponent == pytest.approx(0.5, abs=0.01)


def test_a_weight_of_rank_one_along_the_input_has_one():
    torch.manual_seed(0)
    x = torch.randn(1, 1024)
    exponent = alignment.alignment_exponent(3 * torch.outer(torch.randn(300), x[0]), 5 * x)
    assert exponent == pytest.approx(1, abs=1e-5)


def test_tokens_that_have_not_moved_do_not_count():
    torch.manual_seed(0)
    weight = torch.randn(300, 64)
    x = torch.randn(3, 64)
    with_zeros = torch.cat((x, torch.zeros(2, 64)))
    exponent = alignment.alignment_exponent(weight, x)
    assert alignment.alignment_exponent(weight, with_zeros) == pytest.approx(exponent)


@torch.no_grad()
def test_each_map_is_measured_with_its_own_input():
    initial = adapted(0)
    model = adapted(1)
    tokens = torch.randint(48, (2, 16))
    rows, loss = alignment.measure(model, initial, tokens, tokens)
    now = list(maps_by_hand(model, tokens))
    before = list(maps_by_hand(initial, tokens))
    *maps, last = rows
    assert len(maps) == len(now)
    for row, (layer, map_, W, x), (_, _, W_0, x_0) in zip(maps, now, before):
        assert (row.pop("layer"), row.pop("map"), row.pop("d_in")) == (layer, map_, x.size(-1))
        assert row == pytest.approx(measured_by_hand(W, W_0, x, x_0), rel=1e-3)
    logits, expected_loss = model(tokens, tokens)
    initial_logits, _ = initial(tokens)
    assert (last["layer"], last["map"]) == (2, "logits")
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


TINY = ("--depth=2 --head_dim=8 --seq_len=16 --batch_size=4 --steps=6 --base_width=16 "
        "--base_depth=2 --base_steps=6 --device=cpu --dtype=float32 --compile=False")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A data folder of a few words."""
    folder = tmp_path_factory.mktemp("words")
    text = folder / "words.txt"
    text.write_text("norm sphere rescaler alpha residual width depth head\n" * 200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare_data.py", str(text), f"--out={folder}/data"])
        prepare_data.main()
    return folder / "data"


@pytest.fixture(scope="module")
def measured(words, tmp_path_factory):
    """(command that trains two widths, the file that it has written)."""
    path = tmp_path_factory.mktemp("measured") / "a.csv"
    line = f"results/alignment.py {TINY} --width=16,32 --every=4 --data={words} --results={path}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", shlex.split(line))
        patch.setattr(train, "quiet", True)
        alignment.main()
    return line, path


def rows_of(path):
    """The rows of a file of measurements."""
    _, lines = show.read_rows(path)
    return [row for _, row in lines]


def test_runs_are_measured_early_and_then_every_so_often(measured):
    _, path = measured
    steps = {(row["width"], int(row["step"])) for row in rows_of(path)}
    assert steps == {(width, step) for width in ("16", "32") for step in (0, 1, 2, 4, 6)}


def test_a_run_is_measured_against_its_own_first_weights(measured):
    _, path = measured
    for width in ("16", "32"):
        changes = [float(row["rms_dW"]) for row in rows_of(path)
                   if (row["width"], row["layer"], row["map"]) == (width, "0", "W_q")]
        assert changes[0] == 0 < changes[1] < changes[4]


def test_interrupted_measurements_go_on(measured, tmp_path, monkeypatch, say):
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
    say(line)
    assert widths == [16, 32, 32]
    assert {row["width"] for row in rows_of(path)} == {"16", "32"}
    assert say(line) == say(f"results/alignment.py {path}")
    assert len(widths) == 3         # no run is made again


def test_runs_are_not_added_to_a_file_of_unknown_runs(words, say):
    line = f"results/alignment.py {TINY} --data={words} --results=results/alignment.csv"
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
    assert lines[1].split() == ["nugpt", "1", *["0.80", "±", "0.00"] * 6]
    assert lines[2].split() == ["nugpt", "10", *["0.60", "±", "0.00"] * 6]
    # 3 nats were won by step 1, and 1 nat by step 10
    assert lines[3].split() == ["nugpt", "all,", "loss-weighted", *["0.75", "±", "0.00"] * 6]


def test_the_coordinate_check_prints_powers_of_the_width(tmp_path, say):
    path = write(tmp_path / "a.csv", measurements("nugpt", "ngpt"))
    out = say(f"results/alignment.py {path}").replace("-0.00", "+0.00")
    rows = [line.split() for line in out.splitlines()]
    for column in ("ngpt", "nugpt"):
        assert [column, "10", "-0.25", "+0.00", "+0.50"] in rows


MAPS = measurements("ngpt", "nugpt")
BAD_MEASUREMENTS = [
    ("is there twice", [*MAPS, MAPS[0]]),
    ("needs two widths of ngpt", [row for row in MAPS if row["width"] == 48]),
    ("have only [0]", [row for row in MAPS if row["step"] == 0]),
    ("other linear maps", MAPS[:-1]),
    ("line 2 is not as", [{**MAPS[0], "d_in": "wide"}]),
]


@pytest.mark.parametrize("words, rows", BAD_MEASUREMENTS)
def test_measurements_that_do_not_fit_are_refused(tmp_path, say, words, rows):
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


def test_runs_are_listed_with_where_they_stand(first, tmp_path, say):
    head, *rows = (first / "log.csv").read_text().splitlines()
    (tmp_path / "log.csv").write_text("\n".join([head, *rows[:-1]]))
    lines = say(f"results/show.py {first} {tmp_path}").splitlines()
    assert lines[0].split() == ["run", "steps", "tokens", "train_loss", "val_loss", "status"]
    assert lines[1].split()[:3] == [str(first), "6", "384"]
    assert [line.split()[-1] for line in lines[1:]] == ["finished", "unfinished"]


@pytest.mark.parametrize("name", ["with blanks", "_hidden", "$x$_{", "Ω'&\\"])
def test_runs_are_drawn_whatever_their_folders_are_called(first, tmp_path, say, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "log.csv").write_bytes((first / "log.csv").read_bytes())
    folder = shlex.quote(str(tmp_path / name))
    assert "finished" in say(f"results/show.py {folder} --plot={tmp_path}/a.png")


def test_a_folder_without_a_run_gets_one_sentence(tmp_path, say):
    assert "has no log.csv" in say(f"results/show.py {tmp_path}")
    (tmp_path / "log.csv").write_text("a,b\n1,2\n")
    assert "is no log of train.py" in say(f"results/show.py {tmp_path}")
    (tmp_path / "log.csv").write_text(",".join(train.LOG) + "\n")
    assert "has no rows yet" in say(f"results/show.py {tmp_path}")


def test_a_notebooks_settings_do_not_touch_a_picture(table, tmp_path, say, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setitem(matplotlib.rcParams, "figure.facecolor", "black")
    assert "wide enough" in say(f"results/verdict.py {table} --plot={tmp_path}/new/a.png")
    assert os.environ["MPLBACKEND"] == "agg"
    assert matplotlib.rcParams["figure.facecolor"] == "white"


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


def test_bench_prints_times_and_ratios_of_both_models(clock, say):
    clock((NORMALIZED_TIMES + PLAIN_TIMES) * 2)
    lines = say(BENCH).splitlines()
    assert "normalized: step 210.00 ms, of which the update 10.00; 152 tokens/s" in lines[0]
    assert "plain: step 120.00 ms, of which the update 20.00; 267 tokens/s" in lines[1]
    assert f" of {2 * 2048 ** 3 / 0.004 / 1e12:.3f} TFLOP/s" in lines[0]
    micro_batches = 2 ** 19 / 32
    large = (0.2 * micro_batches + 0.01) / (0.1 * micro_batches + 0.02)
    assert lines[2] == f"ratio normalized/plain: {0.21 / 0.12:.3f} for a step of 32 tokens"
    assert lines[3] == f"ratio normalized/plain: {large:.3f} for a step of 524,288 tokens"


# ------------------------------------------------------------------------------------------------
# Command lines


BAD_COMMANDS = [
    ("verdict.py: [Errno 2] No such file", "verdict.py none.csv"),
    ("verdict.py: argument --axis", "verdict.py none.csv --axis=height"),
    ("verdict.py: [Errno 21] Is a directory", "verdict.py results"),
    ("compare.py: lead takes two columns", "compare.py lead results/fresh.csv nugpt"),
    ("compare.py: results/fresh.csv has no column 'heads'",
     "compare.py lead results/fresh.csv gpt_sp nugpt heads=4"),
    ("alignment.py: give .csv files", "alignment.py"),
    ("alignment.py: give .csv files", "alignment.py a.csv --results=b.csv"),
    ("alignment.py: --every must be", "alignment.py a.csv --every=0"),
    ("sweep.py: unrecognized arguments: --height=3", "alignment.py --results=a.csv --height=3"),
    ("show.py: out/none is no folder of a run", "show.py out/none"),
    ("bench.py: width must be", "bench.py --width=33"),
]


@pytest.mark.parametrize("words, line", BAD_COMMANDS)
def test_an_impossible_command_gets_one_sentence(say, words, line):
    assert say(f"results/{line}").startswith(words)


def test_without_matplotlib_the_table_is_printed(capsys, monkeypatch, say):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    sentence = say("results/verdict.py results/laptop.csv --plot=x.png")
    assert sentence == "verdict.py: the picture needs matplotlib: pip install matplotlib"
    assert "wide enough" in capsys.readouterr().out


SCRIPTS = ["sweep.py", "verdict.py", "compare.py", "show.py", "alignment.py", "bench.py"]


def test_help_needs_neither_docstrings_nor_greek():
    code = f"""if True:
        import runpy, sys
        sys.path.insert(0, "results")
        for script in {SCRIPTS!r}:
            sys.argv = [script, "--help"]
            try:
                runpy.run_path("results/" + script, run_name="__main__")
            except SystemExit as end:
                print("ended with", end.code)
    """
    done = subprocess.run([sys.executable, "-OO", "-c", code], cwd=ROOT, capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    assert done.stderr == b""
    assert done.stdout.count(b"ended with 0") == len(SCRIPTS)


def test_a_closed_pipe_ends_a_verdict_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "results/verdict.py", "results/laptop.csv"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    os.close(writer)
    assert done.stderr == b""
