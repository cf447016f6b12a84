"""
The verdict on a sweep: does the best learning rate η stay where it is as models grow?

    python results/verdict.py results/width.csv --plot=out/width.png
    python results/verdict.py results/width.csv out/mine.csv      one sweep, joined
    python results/verdict.py results/width.csv results/width_1600.csv     drift against steps

results/sweep.py makes such a table, a row a run. Of random searches, of options changed one at a
time and of a single size there is results/compare.py.

In this file a *column* is a parametrization, as in parametrize.py or results/plain.py.
A *curve* is the loss of one column at one size against x = log2 η. *Drift* is how far the best x
moves when the size doubles, in octaves. *Regret* is what the smallest size's best η costs a larger
model, against its own best. *Cost* is the same against the best that any column reached there.
"""
import functools
import math
import re
import statistics
import sys
from dataclasses import dataclass
from dataclasses import fields
from os.path import expanduser
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import parametrize
import plain
import show
import train
from show import COLUMNS

# plain.Config is train.Config with the plain GPT's own option.
DEFAULTS = vars(plain.Config())
OPTION_TYPES = {option.name: option.type for option in fields(plain.Config)}
OPTIONS = train.options_of_a_run(plain.Config)       # these make a run, with the text

AXES = ["width", "depth", "steps", "batch_size"]
SIZES = [*AXES, *(f"base_{axis}" for axis in AXES)]
CLASSES = [name for name in parametrize.TENSOR_CLASSES if f"{name}_lr_mult" in OPTION_TYPES]
MULTS = [f"{tensor_class}_lr_mult" for tensor_class in CLASSES]

# These vary within a sweep.
VARYING = ["parametrization", *AXES, "learning_rate", "seed", "dtype"]
# These are as a column wants them at a number of steps and a batch size.
RECIPE = ["warmup_steps", "weight_decay", "beta1", "beta2", "eps", *MULTS, "embedding_std"]


# ------------------------------------------------------------------------------------------------
# Reading results tables

CORE = ["parametrization", *AXES, "learning_rate", "seed", "val_loss", "status"]
POSITIVE = [*SIZES, "learning_rate"]
WHOLE_OUTCOMES = ["step", "tokens", "parameters"]
NUMBER = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def read_results(*paths):
    """
    ([the runs of each table], sentences on what was assumed). A run is {option or outcome: value}.

    Values have Config's types. An older table may lack an option, or the fingerprint of its text:
    see fill. A missing outcome is None. val_loss is inf where a run diverged. Of equal runs the
    last row counts. Raises OSError, and ValueError for what cannot be read.
    """
    tables = {}
    for path in paths:
        header, rows = show.read_rows(path)
        if header:
            check_header(path, header)
        tables[path] = [read_run(f"{path}, line {line}", row) for line, row in rows]
    notes = fill(tables)
    return [without_repetition(runs) for runs in tables.values()], notes


def check_header(path, header):
    """Raises ValueError for an unknown column, and if one is missing that every run needs."""
    for name in header:
        if name not in {*OPTION_TYPES, *train.OUTCOME, "data_fingerprint"}:
            raise ValueError(f"{path}, line 1: column {name!r} is neither an option of train.py "
                             "nor an outcome")
    for name in CORE:
        if name not in header:
            raise ValueError(f"{path}, line 1: there is no column {name!r}, which every results "
                             "table has")


def read_run(where, row):
    """The run of a row {column: text}. Raises ValueError, which begins with `where`."""
    run = dict.fromkeys(train.OUTCOME)
    for name, cell in row.items():
        try:
            run[name] = read_cell(name, cell)
        except ValueError as error:
            raise ValueError(f"{where}, column {name}: {error}") from None
    for name in POSITIVE:
        if run.get(name) == 0:
            raise ValueError(f"{where}, column {name}: must be more than 0")
    if run["status"] not in ("finished", "diverged"):
        raise ValueError(f"{where}, column status: must be finished or diverged, "
                         f"not {run['status']!r}")
    if run["status"] == "diverged":
        run["val_loss"] = math.inf
    if run["val_loss"] is None:
        raise ValueError(f"{where}, column val_loss: a finished run must have a loss")
    return run


def read_cell(name, cell):
    """The value of a cell in the column `name`. Raises ValueError if it has none."""
    if name in OPTION_TYPES:
        return read_value(cell, OPTION_TYPES[name])
    if name in ("status", "data_fingerprint"):
        return cell
    # The plain GPT has no α, and a diverged run no loss.
    if cell.strip().lower() in ("", "nan", "inf", "-inf"):
        return None
    return read_value(cell, int if name in WHOLE_OUTCOMES else float)


def read_value(cell, kind):
    """The str, bool, int or float in a cell, as a spreadsheet may spell it. Raises ValueError."""
    text = cell.strip()
    if kind is str:
        return cell
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{cell!r} is neither True nor False")
        return text.lower() == "true"
    if not NUMBER.fullmatch(text) or math.isinf(float(text)):
        raise ValueError(f"{cell!r} is no number, as 1234.5 and 1e-16 are")
    if kind is float:
        return float(text)
    if float(text) != int(float(text)):
        raise ValueError(f"{cell!r} is no whole number")
    return int(text) if text.isdecimal() else int(float(text))      # float would round a long seed


def fill(tables):
    """
    Sentences on what was assumed, after the runs of {path: runs} got what an older table lacks.

    It is what the others have, if they have one value of it; else Config's default. A text without
    a fingerprint is taken for the one that the others have in a folder of that name.
    """
    notes = []
    everything = [run for runs in tables.values() for run in runs]
    for name in OPTIONS:
        known = {run[name] for run in everything if name in run}
        value = known.pop() if len(known) == 1 else DEFAULTS[name]
        for path, runs in tables.items():
            lacking = [run for run in runs if name not in run]
            for run in lacking:
                run[name] = value
            if lacking and value != DEFAULTS[name]:
                notes.append(f"{path} has no {name}: taken as {value}, as in the others.")

    texts = {}      # {data folder: its fingerprints}
    for run in everything:
        run.setdefault("data", DEFAULTS["data"])
        if run.get("data_fingerprint"):
            texts.setdefault(run["data"], set()).add(run["data_fingerprint"])
    for path, runs in tables.items():
        guessed = set()
        for run in runs:
            if not run.get("data_fingerprint"):
                run["data_fingerprint"] = run["data"]
                if len(texts.get(run["data"], ())) == 1:
                    run["data_fingerprint"] = min(texts[run["data"]])
                    guessed.add(run["data"])
        for folder in sorted(guessed):
            notes.append(f"{path} has no data_fingerprint: {folder} is taken for the same text as "
                         "in the others.")
    return notes


def rounded(value):
    """A float to six digits: some tables have six, some seventeen."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def identity(run):
    """What makes the run: two runs with the same are one run."""
    return (*(rounded(run[name]) for name in OPTIONS), run["data_fingerprint"])


def without_repetition(runs):
    """The runs; of equal ones the last."""
    return list({identity(run): run for run in runs}.values())


# ------------------------------------------------------------------------------------------------
# What a column makes of a run


@functools.cache
def rates_of(column, alpha_init, sizes, lr_mults):
    """parametrize.parametrize's pair (settings, lr_factors), of tuples of SIZES and of MULTS."""
    rule = plain.parametrize if column in plain.COLUMNS else parametrize.parametrize
    return rule(
        column,
        alpha_init=alpha_init,
        lr_mults=dict(zip(CLASSES, lr_mults)),
        **dict(zip(SIZES, sizes)),
    )


def factor_on_eta(run, column):
    """
    The η with which a column makes the same run, over the run's own η; 0 if no η does that.

    At the base size all columns of parametrize.py are one model: 1. At the base width and depth
    they differ by the powers of m_t and m_b alone, which multiply every class's rate. Raises
    ValueError for an unknown column.
    """
    sizes = tuple(run[key] for key in SIZES)
    lr_mults = tuple(run[key] for key in MULTS)
    settings, rates = rates_of(run["parametrization"], run["alpha_init"], sizes, lr_mults)
    wanted_settings, wanted = rates_of(column, run["alpha_init"], sizes, lr_mults)
    if settings != wanted_settings:
        return 0
    ratios = []
    for tensor_class, rate in wanted.items():
        if rate > 0:
            ratios.append(rates[tensor_class] / rate)
        elif rates[tensor_class] > 0:
            return 0
    if not ratios or not math.isclose(min(ratios), max(ratios)):
        return 0
    return round(ratios[0], 9)


# ------------------------------------------------------------------------------------------------
# Curves


class Cost(NamedTuple):
    """What an η costs, in nats."""
    mean: float         # over seeds; inf if one of them diverged
    half: float         # of the 95 % interval; nan for a single seed, and where there is none
    bound: bool         # whether the mean is a lower bound


@dataclass
class Curve:
    """The loss of one column and size against x = log2 η."""
    seeds: list
    x: np.ndarray               # (X,): the grid, ascending
    loss: np.ndarray            # (seeds, X): nan where nothing ran, inf where it diverged
    mean: np.ndarray            # (X,): over seeds at their common level
    best: int                   # where `mean` is lowest
    radius: int                 # how many points on each side of the best are fitted, 2 at most
    add: list                   # x that are yet to run
    alpha: float                # mean |α| at the end, at the best x; nan for the plain GPT

    # found by judge_column and judge
    optimum: float = math.nan   # the best x: by the fit, or of the grid without a fit
    bottom: float = math.nan    # the lowest loss: of the grid, or of a parabola at the optimum
    grid: str = ""              # whether the grid was wide enough, in words
    regret: Cost | None = None  # None: not known
    cost: Cost | None = None

    @property
    def window(self):
        """The points to fit, a slice."""
        return slice(self.best - self.radius, self.best + self.radius + 1)

    @property
    def complete(self):
        """The seeds that ran the whole window and did not diverge there."""
        finite = np.isfinite(self.loss[:, self.window]).all(axis=1)
        return [seed for seed, is_complete in zip(self.seeds, finite) if is_complete]


def loss_table(points):
    """(seeds, x, losses (seeds, x)) of {(x, seed): run}. nan: nothing ran, inf: it diverged."""
    seeds = sorted({seed for _, seed in points})
    x = sorted({place for place, _ in points})
    loss = np.full((len(seeds), len(x)), math.nan)
    for (place, seed), run in points.items():
        loss[seeds.index(seed), x.index(place)] = run["val_loss"]
    return seeds, np.array(x), loss


def at_common_level(loss):
    """
    Losses (seeds, x), with each seed moved to the mean level of all.

    Seeds differ mostly by a shift. Unmoved, an x that only good seeds have run would look good.
    Seeds that have no x in common stay unmoved: nothing tells their levels.
    """
    shared = np.isfinite(loss).all(axis=0)
    if not shared.any():
        return loss
    level = loss[:, shared].mean(axis=1, keepdims=True)
    return loss - level + level.mean()


def make_curve(points):
    """The Curve through {(x, seed): run}."""
    seeds, x, loss = loss_table(points)
    mean = np.nanmean(at_common_level(loss), axis=0)
    best = int(mean.argmin())
    # As many points left as right of the best: curves fall off a cliff on the right, and a lopsided
    # window would move the optimum.
    radius = min(2, best, len(mean) - 1 - best)
    while radius > 0 and not np.isfinite(mean[best - radius : best + radius + 1]).all():
        radius -= 1
    alphas = []
    for (place, _), run in points.items():
        if place == x[best]:
            alphas += [run["alpha_A"], run["alpha_M"]]
    alpha = math.nan if None in alphas else statistics.fmean(alphas)
    return Curve(seeds, x, loss, mean, best, radius, points_to_add(x, loss, mean, best), alpha)


def points_to_add(x, loss, mean, best):
    """The x to run, so that two points on each side of the best are known for every seed."""
    step = np.diff(x).min() if len(x) > 1 else 0.5
    add = []
    for place in range(best - 2, best + 3):
        if 0 <= place < len(x):
            if np.isnan(loss[:, place]).any():
                add.append(x[place])
        # Beyond an end of the grid, unless a run on that side diverged: behind a divergence there
        # is nothing to look for.
        elif place < 0 and not np.isinf(mean[:best]).any():
            add.append(x[0] + place * step)
        elif place > best and not np.isinf(mean[best + 1 :]).any():
            add.append(x[-1] + (place - len(x) + 1) * step)
    return add


def recipe_of(run):
    return [rounded(run[option]) for option in RECIPE]


def curves_of(column, runs_of_size):
    """
    {size: Curve} of a column, from {size: runs}.

    Runs of other columns count where they are the same run. Where the column has none of its own,
    those count, too, that are the same with another η.
    """
    recipes = {}
    for runs in runs_of_size.values():
        for run in runs:
            if run["parametrization"] == column:
                recipes[run["steps"], run["batch_size"]] = recipe_of(run)
    curves = {}
    for size, runs in runs_of_size.items():
        own = any(run["parametrization"] == column for run in runs)
        points = {}
        for run in runs:
            factor = factor_on_eta(run, column)
            wanted = recipes.get((run["steps"], run["batch_size"]), recipe_of(run))
            if factor != 0 and (factor == 1 or not own) and recipe_of(run) == wanted:
                points[round(math.log2(run["learning_rate"] * factor), 4), run["seed"]] = run
        if points:
            curves[size] = make_curve(points)
    return curves


def loss_at(x, loss, place):
    """
    (loss at a place of the grid x, whether that is a lower bound).

    It is the loss that ran there, or that of a parabola through the three nearest points that ran;
    inf if one of them diverged, nan if there are not three. Beyond the grid it is the loss at the
    edge, a lower bound: curves rise outwards.
    """
    ran = ~np.isnan(loss)
    x = x[ran]
    loss = loss[ran]
    inside = np.clip(place, x[0], x[-1])
    bound = abs(inside - place) > 1e-4
    near = np.argsort(abs(x - inside), kind="stable")[:3]
    if abs(x[near[0]] - inside) <= 1e-4:
        return float(loss[near[0]]), bound
    if len(near) < 3:
        return math.nan, bound
    if not np.isfinite(loss[near]).all():
        return math.inf, bound
    return float(np.polyval(np.polyfit(x[near], loss[near], 2), inside)), bound


# ------------------------------------------------------------------------------------------------
# Optima, their drift, and what a carried η costs


def fit(curves):
    """
    {(size, seed): best x} by least squares over the windows of all curves, with one c for all:

        loss = level[size, seed] + c · (x - best[size, seed])²

    Empty if no size has its best inside its grid, or if c is not positive.
    """
    windows = {}
    for size, curve in curves.items():
        for seed in curve.complete if curve.radius > 0 else []:
            loss = curve.loss[curve.seeds.index(seed), curve.window]
            windows[size, seed] = (curve.x[curve.window], loss)

    # A straight line through each window takes up its level and its best x. So c is what losses
    # have in common with x², less the straight line through x².
    overlap = 0
    square = 0
    for x, loss in windows.values():
        line = np.polyfit(x, x * x, 1)
        bend = x * x - np.polyval(line, x)
        overlap += bend @ loss
        square += bend @ bend
    if overlap <= 0:
        return {}

    c = overlap / square
    optima = {}
    for key, (x, loss) in windows.items():
        slope, _ = np.polyfit(x, loss - c * x * x, 1)
        optima[key] = -slope / (2 * c)
    return optima


def student(freedom):
    """The 97.5 % quantile of Student's t, to 0.001."""
    tabulated = {1: 12.70620, 2: 4.30265, 3: 3.18245}
    if freedom in tabulated:
        return tabulated[freedom]
    # the Cornish-Fisher expansion
    expansion = 1.95996 + 2.37227 / freedom + 2.82250 / freedom ** 2
    return expansion + 2.55585 / freedom ** 3 + 1.58 / freedom ** 4


def mean_of_seeds(values):
    """(mean of a number a seed, half its 95 % interval); half is nan for fewer than two seeds."""
    mean = float(np.mean(values))
    if len(values) < 2 or not math.isfinite(mean):
        return mean, math.nan
    return mean, student(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def drift(optima):
    """
    (slope of {(size, seed): best x} over log2 size, half its 95 % interval).

    None if no seed has two sizes.

    All η of a curve share its luck, so the unit is the curve. The interval comes from the scatter
    of the optima about parallel lines, one a seed: curves - seeds - 1 degrees of freedom.
    """
    lines = {}
    for (size, seed), x in optima.items():
        lines.setdefault(seed, []).append((math.log2(size), x))
    centered = []
    for line in lines.values():
        if len(line) > 1:
            centered.append(np.array(line) - np.mean(line, axis=0))
    if not centered:
        return None

    size, x = np.concatenate(centered).T
    slope = size @ x / (size @ size)
    freedom = len(x) - len(centered) - 1
    if freedom == 0:
        return slope, math.inf
    variance = np.square(x - slope * size).sum() / (size @ size)
    return slope, student(freedom) * math.sqrt(variance / freedom)


def cost_of(curve, carried, rivals):
    """
    The Cost of x = carried: the loss there less the best that one of the rivals reached.

    Rivals are the curves of all columns at that size. For each seed the best column and η are
    chosen on the other seeds: chosen on the same one, the luckiest setting would look best. Only
    settings count that finished on all of these seeds. A single seed has to choose for itself. None
    if the cost is not known.
    """
    losses = {}
    bounds = []
    for seed, loss in zip(curve.seeds, curve.loss):
        at_carried, bound = loss_at(curve.x, loss, carried)
        if not math.isnan(at_carried):
            losses[seed] = at_carried
            bounds.append(bound)
    settings = []       # of each the losses, a seed each
    for rival in rivals:
        if set(losses) <= set(rival.seeds):
            rows = [rival.seeds.index(seed) for seed in losses]
            settings += [setting for setting in rival.loss[rows].T if np.isfinite(setting).all()]
    if not losses or not settings:
        return None

    settings = np.array(settings)
    costs = []
    for i, loss in enumerate(losses.values()):
        others = np.delete(settings, i, axis=1) if len(losses) > 1 else settings
        best = others.mean(axis=1).argmin()
        costs.append(loss - settings[best, i])
    return Cost(*mean_of_seeds(costs), any(bounds))


# ------------------------------------------------------------------------------------------------
# The verdict


@dataclass
class Verdict:
    """What the curves of one column say."""
    curves: dict                        # {size: Curve}
    optima: dict                        # {(size, seed): best x}
    drift: tuple | None                 # (octaves a doubling, half their 95 % interval)
    same: str                           # is one grid point the best at all sizes? Yes, No or ?
    difference: tuple | None = None     # drift less the control's, on the same seeds


def judge_column(curves):
    """The Verdict on {size: Curve}, smallest first. Each curve gets its own part of it."""
    optima = fit(curves)
    for size, curve in curves.items():
        of_seeds = [x for (its_size, _), x in optima.items() if its_size == size]
        curve.optimum = float(np.mean(of_seeds or curve.x[curve.best]))
        fitted, _ = loss_at(curve.x, curve.mean, curve.optimum)
        curve.bottom = np.fmin(curve.mean[curve.best], fitted)
        curve.grid = grid_in_words(curve)

    first, *larger = curves.values()
    for curve in larger:
        # Else the smallest size's best is not known, or this size's loss there.
        if first.radius > 0 and len(curve.x) >= 3:
            loss, bound = loss_at(curve.x, curve.mean, first.optimum)
            regret = max(loss - curve.bottom, 0) if loss < math.inf else math.inf
            curve.regret = Cost(regret, math.nan, bound)
    return Verdict(curves, optima, drift(optima), same_best(list(curves.values())))


def grid_in_words(curve):
    """What the grid of a curve lacks, in a few words."""
    if curve.add:
        return "add " + " ".join(f"2^{x:.5g}" for x in curve.add)
    if curve.radius < 2:
        return "diverges near the best"
    window = curve.x[curve.window]
    if not window[0] <= curve.optimum <= window[-1]:
        return "its parabola's best is outside its window"
    return "wide enough"


def same_best(curves):
    """Yes or No by Lingle's criterion (arXiv:2404.05728); ? if a grid was too narrow to tell."""
    if len(curves) < 2 or any(curve.grid != "wide enough" for curve in curves):
        return "?"
    best = [curve.x[curve.best] for curve in curves]
    # Half a step, since grids onto which η was shifted need not have equal points.
    step = np.diff(curves[0].x).min()
    return "Yes" if max(best) - min(best) < step / 2 else "No"


def judge(runs, axis=None, control="ngpt", carried=None):
    """
    (axis, {column: Verdict}) of the runs of a sweep. The axis is what the size is.

    Columns `control` and nugpt are judged, too, where runs of other columns count as theirs.
    `carried` is log2 of the η whose cost is wanted; by default each column carries the best η of
    its smallest size. Raises ValueError if the runs do not go together.
    """
    check_one_sweep(runs)
    varying = [key for key in AXES if len({run[key] for run in runs}) > 1]
    axis = axis or find_axis(varying)
    runs_of_size = group_by_size(runs, axis, varying)
    ran = {run["parametrization"] for run in runs}
    verdicts = {}
    for column in show.in_order({*ran, control, "nugpt"}):
        curves = curves_of(column, runs_of_size)
        # Of a column that did not run, one size alone is of no interest.
        if len(curves) > 1 or (curves and column in ran):
            verdicts[column] = judge_column(curves)

    for column, verdict in verdicts.items():
        if control in verdicts and column != control:
            verdict.difference = difference(verdict.optima, verdicts[control].optima)
        smallest = verdict.curves[min(verdict.curves)]
        place = smallest.optimum if carried is None else carried
        for size, curve in verdict.curves.items():
            rivals = [other.curves[size] for other in verdicts.values() if size in other.curves]
            if carried is not None or smallest.radius > 0:      # else its best is not known
                curve.cost = cost_of(curve, place, rivals)
    return axis, verdicts


def difference(optima, control):
    """The drift of a column less the control's, from {(size, seed): best x} of both."""
    return drift({key: optima[key] - control[key] for key in optima if key in control})


def check_one_sweep(runs, may_differ=()):
    """Raises ValueError if runs differ in what is one in a sweep, or in a column's recipe."""
    if len({run["data_fingerprint"] for run in runs}) > 1:
        raise ValueError("the runs were trained on different texts (see their data_fingerprint); "
                         "give each its own file")
    for key in OPTIONS:
        if key in VARYING or key in may_differ:
            continue
        first_value = {}
        for run in runs:
            group = None
            where = ""
            if key in RECIPE:
                group = (run["parametrization"], run["steps"], run["batch_size"])
                where = f" in {run['parametrization']}'s runs of {run['steps']} steps"
            value = first_value.setdefault(group, run[key])
            if rounded(run[key]) != rounded(value):
                raise ValueError(f"{key} is {value} and {run[key]}{where}; give each its own file, "
                                 "or compare them by results/compare.py")


def find_axis(varying):
    """What the size is, from those of AXES that differ between runs."""
    if varying == ["steps", "batch_size"]:
        return "batch_size"     # at equal tokens
    if len(varying) > 1:
        return "parameters"
    return varying[0] if varying else "width"


def group_by_size(runs, axis, varying):
    """{size: runs}, smallest first. Raises ValueError if runs of one size differ in the others."""
    if any(run[axis] is None for run in runs):
        raise ValueError(f"a run has no {axis}, which is the size here")
    groups = {}
    for run in sorted(runs, key=lambda run: run[axis]):
        groups.setdefault(run[axis], []).append(run)
    for size, group in groups.items():
        differing = [key for key in varying if len({run[key] for run in group}) > 1]
        if differing:
            raise ValueError(f"runs of {axis} {size} differ in {', '.join(differing)}; "
                             "give each its own file")
    return groups


def group_tables(tables):
    """
    (key, {value of the key: runs}) of tables [runs, …]. The key is one of AXES in which tables
    differ. Tables of one sweep are joined: then the key is None, and so is its value.
    """
    varying = set()         # within a table: what the sizes are
    for runs in tables:
        varying.update(key for key in AXES if len({run[key] for run in runs}) > 1)
    everything = without_repetition([run for runs in tables for run in runs])
    differing = []
    for key in AXES:
        if varying and key not in varying and len({run[key] for run in everything}) > 1:
            differing.append(key)
    if len(differing) > 1:
        raise ValueError(f"the tables differ in {' and '.join(differing)}; sweeps stand side by "
                         "side if they differ in one")
    key = differing[0] if differing else None
    groups = {}
    for run in sorted(everything, key=lambda run: run.get(key, 0)):
        groups.setdefault(run.get(key), []).append(run)
    return key, groups


# ------------------------------------------------------------------------------------------------
# Reports


def report(axis, verdicts, control, carried=None):
    """The verdicts {column: Verdict} of judge as text: a row a curve, then a row a column."""
    curves = [("column", axis, "seeds", "log2 η*", "η*", "best loss", "regret",
               "cost [95 % interval]", "|α|", "grid")]
    columns = [("column", "drift [95 % interval]", f"less {control}'s [95 % interval]",
                "same best η?")]
    for name, verdict in verdicts.items():
        for size, curve in verdict.curves.items():
            curves.append((
                name,
                f"{size:,.0f}",
                str(len(curve.complete)),
                f"{curve.optimum:.2f}",
                f"{2 ** curve.optimum:.5f}",
                f"{curve.mean[curve.best]:.4f}",
                regret_text(curve.regret),
                cost_text(curve.cost),
                "-" if math.isnan(curve.alpha) else f"{curve.alpha:.3f}",
                curve.grid,
            ))
        columns.append((name, drift_text(verdict.drift), drift_text(verdict.difference),
                        verdict.same))
    place = "the smallest size's η*" if carried is None else f"η = 2^{carried:.4g}"
    notes = (
        f"drift: change of log2 η* a doubling of {axis}; the power of {axis} that would have "
        "removed it\nis the table's plus the drift. |α|: eigen learning rates, mean at the end.\n"
        "regret: loss at the smallest size's η*, less the best of this column.\n"
        f"cost: loss at {place}, less the best that any column reached, chosen for each seed\n"
        "on the others (*: on the only one). >: a lower bound, the grid ends before that η."
    )
    return "\n".join([show.table(curves), show.table(columns), notes])


def report_groups(axis, key, groups):
    """{value of the key: {column: Verdict}} as text: how drift, regret and cost depend on it."""
    sizes = []
    for verdicts in groups.values():
        sizes.append({size for verdict in verdicts.values() for size in verdict.curves})
    size = max(set.intersection(*sizes), default=None)
    if size is None:
        raise ValueError(f"the tables have no {axis} in common")
    rows = [("column", key, "drift [95 % interval]", f"regret at {axis} {size:,.0f}",
             f"cost at {axis} {size:,.0f}")]
    for name in show.in_order({name for verdicts in groups.values() for name in verdicts}):
        for value, verdicts in groups.items():
            if name in verdicts and size in verdicts[name].curves:
                curve = verdicts[name].curves[size]
                rows.append((name, f"{value:,.0f}", drift_text(verdicts[name].drift),
                             regret_text(curve.regret), cost_text(curve.cost)))
    return show.table(rows)


def drift_text(drift):
    return "-" if drift is None else show.interval(*drift, digits=2)


def regret_text(regret):
    if regret is None:
        return "-"
    number = "diverges" if regret.mean == math.inf else f"{regret.mean:.4f}"
    return f"> {number}" if regret.bound else number


def cost_text(cost):
    if cost is None:
        return "not run"
    if cost.mean == math.inf:
        return "diverges"
    text = show.interval(cost.mean, cost.half)
    if math.isnan(cost.half):
        text += "*"
    return f"> {text}" if cost.bound else text


# ------------------------------------------------------------------------------------------------
# Command line


def eta(text):
    """log2 of an η such as 0.02 or 2^-5.5. Raises ValueError."""
    return math.log2(train.parse_value("learning_rate", text))


def parse_args():
    parser = show.ArgumentParser("verdict.py", __doc__)
    parser.add_argument("tables", nargs="+", metavar="TABLE.csv", type=expanduser,
                        help="tables of one sweep, which are joined; or of several, which differ "
                             "in steps, say")
    parser.add_argument("--plot", metavar="FILE.png", type=expanduser, help="draw a picture, too")
    parser.add_argument("--columns", metavar="NAME,NAME", help="show only these")
    parser.add_argument("--control", default="ngpt", choices=COLUMNS,
                        help="what the others are compared to (default: ngpt)")
    parser.add_argument("--axis", choices=[*AXES, "parameters"],
                        help="what the size is (default: what differs between runs)")
    parser.add_argument("--carried", metavar="ETA", type=eta,
                        help="the η whose cost is wanted, such as 2^-5.5 (default: each column's "
                             "best at its smallest size)")
    return parser.parse_args()


def choose(verdicts, names):
    """The verdicts of "name,name", in this order. Raises ValueError for one that is not there."""
    if names is None:
        return verdicts
    for name in names.split(","):
        if name not in verdicts:
            raise ValueError(f"there are runs of {', '.join(verdicts)}, but not of {name}")
    return {name: verdicts[name] for name in names.split(",")}


def print_verdict(args):
    """Print the verdict on the tables, and draw it if asked. Raises ValueError and OSError."""
    tables, notes = read_results(*args.tables)
    for path, runs in zip(args.tables, tables):
        if not runs:
            raise ValueError(f"{path} has no rows")
    key, groups = group_tables(tables)
    dtypes = sorted({run["dtype"] for runs in groups.values() for run in runs})
    if len(dtypes) > 1:
        notes.append(f"Runs of dtype {' and '.join(dtypes)} stand side by side. They differ in "
                     "rounding.")
    for note in notes:
        print(note)

    verdicts = {}
    axes = set()
    for value, runs in groups.items():
        axis, of_group = judge(runs, args.axis, args.control, args.carried)
        axes.add(axis)
        verdicts[value] = choose(of_group, args.columns)
    if len(axes) > 1:
        raise ValueError(f"the tables are sweeps over {' and '.join(sorted(axes))}")
    if key:
        print(report_groups(axis, key, verdicts))
        if args.plot:
            raise ValueError("a picture is of one sweep: give its tables alone")
        return
    print(report(axis, verdicts[None], args.control, args.carried))
    if args.plot:
        show.draw(axis, verdicts[None], args.plot)


def main():
    args = parse_args()
    try:
        print_verdict(args)
    except (ValueError, OSError) as error:
        sys.exit(f"verdict.py: {error}")


if __name__ == "__main__":
    show.prepare_terminal()
    main()
