"""
The verdict on a results table: does the best learning rate η stay where it is as models grow?

    python results/verdict.py results/width_1600.csv --plot=picture.png
    python results/verdict.py results/width_100.csv results/width_1600.csv     drift against steps

results/sweep.py makes such a table, a row a run. If all runs are of one size, and several
hyperparameters have many values, then the table is a random search. Its verdict is the best
settings, as options to paste, and the ranges that were too narrow. If each run differs in at most
one option from the others, then the verdict is what each change gains.

In this file a *column* is a parametrization, as in parametrize.py or results/plain.py.
A *curve* is the loss of one column at one size against log2 η. *Drift* is how far the best η moves
when the size doubles, in octaves. *Regret* is what the smallest size's best η costs a larger model, against
its own best. *Cost* is the same against the best that any column reached at that size.
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
from parametrize import TENSOR_CLASSES
from show import COLUMNS

# plain.Config is train.Config with the plain GPT's own option.
DEFAULTS = plain.Config()
OPTION_TYPES = {option.name: option.type for option in fields(plain.Config)}
OPTIONS = train.options_of_a_run(plain.Config)       # these make a run, with the data

AXES = ["width", "depth", "steps", "batch_size"]
SIZES = [*AXES, *(f"base_{axis}" for axis in AXES)]
CLASSES = [name for name in TENSOR_CLASSES if f"{name}_lr_mult" in OPTION_TYPES]
MULTS = [f"{tensor_class}_lr_mult" for tensor_class in CLASSES]

# These vary within a sweep.
VARYING = ["parametrization", *AXES, "learning_rate", "seed", "dtype"]
# These are as a column wants them at a number of steps and a batch size.
RECIPE = ["warmup_steps", "weight_decay", "beta1", "beta2", "eps", *MULTS, "embedding_std"]
# These a random search may vary.
SEARCHED = ["learning_rate", "alpha_init", *MULTS, "weight_decay", "warmup_steps", "beta2",
            "min_lr_ratio", "embedding_std"]


# ------------------------------------------------------------------------------------------------
# Reading a results table

CORE = ["parametrization", *AXES, "learning_rate", "seed", "val_loss", "status"]
POSITIVE = [*SIZES, "learning_rate"]
WHOLE_OUTCOMES = ["step", "tokens", "parameters"]
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def read_results(path):
    """
    The runs of a results table, a list of {option or outcome: value}. Values have Config's types.

    A missing option has Config's default, a missing outcome is None. val_loss is inf where a run
    diverged. Of equal runs the last row counts. The list is empty if the table has no rows. Raises
    OSError, and ValueError for what cannot be read.
    """
    header, rows = show.read_rows(path)
    if header:
        check_header(path, header)
    runs = {}
    for line, row in rows:
        run = read_run(f"{path}, line {line}", row)
        identity = tuple(run[key] for key in [*OPTIONS, "data_fingerprint"])
        runs[identity] = run
    return list(runs.values())


def join(paths):
    """
    ([runs of each table], sentences on what was assumed). Raises ValueError and OSError.

    An older table may lack an option, or the fingerprint of its text. Where all others have one
    value of it, the older table is taken to have that, too; and one folder to be one text.
    """
    tables = {path: read_runs(path) for path in paths}
    headers = {path: show.read_rows(path)[0] for path in paths}
    notes = []
    for name in OPTIONS:
        with_it = [path for path in paths if name in headers[path]]
        values = {run[name] for path in with_it for run in tables[path]}
        for path in paths:
            if path in with_it or len(values) != 1 or values == {getattr(DEFAULTS, name)}:
                continue
            value = next(iter(values))
            notes.append(f"{path} has no column {name}: taken as {value}, as in {with_it[0]}.")
            for run in tables[path]:
                run[name] = value

    texts = {}      # {data folder: its fingerprints}
    for runs in tables.values():
        for run in runs:
            if run["data_fingerprint"] != run["data"]:
                texts.setdefault(run["data"], set()).add(run["data_fingerprint"])
    for path, runs in tables.items():
        guessed = [run for run in runs if run["data_fingerprint"] == run["data"]
                   and len(texts.get(run["data"], ())) == 1]
        for run in guessed:
            run["data_fingerprint"] = next(iter(texts[run["data"]]))
        if guessed:
            notes.append(f"{path} has no fingerprint of its text: {guessed[0]['data']} is taken "
                         "for the text that it is in the other table.")
    return list(tables.values()), notes


def check_header(path, header):
    """Raises ValueError for an unknown column, and if one is missing that every run needs."""
    known = {*OPTION_TYPES, *train.OUTCOME, "data_fingerprint"}
    for name in header:
        if name not in known:
            raise ValueError(f"{path}, line 1: column {name!r} is neither an option of train.py "
                             "nor an outcome")
    for name in CORE:
        if name not in header:
            raise ValueError(f"{path}, line 1: there is no column {name!r}, which every results "
                             "table has")


def read_run(where, row):
    """The run of a row {column: text}. Raises ValueError, which begins with `where`."""
    run = dict(vars(DEFAULTS))
    run.update(dict.fromkeys(train.OUTCOME))
    run.update({"data_fingerprint": ""})
    for name, cell in row.items():
        try:
            run[name] = read_cell(name, cell)
        except ValueError as error:
            raise ValueError(f"{where}, column {name}: {error}") from None

    for name in POSITIVE:
        if run[name] <= 0:
            raise ValueError(f"{where}, column {name}: must be more than 0, not {run[name]}")
    for name in MULTS:
        if run[name] < 0:
            raise ValueError(f"{where}, column {name}: must be at least 0, not {run[name]}")
    if run["status"] not in ("finished", "diverged"):
        raise ValueError(f"{where}, column status: must be finished or diverged, "
                         f"not {run['status']!r}")
    if run["status"] == "diverged":
        run["val_loss"] = math.inf
    if run["val_loss"] is None:
        raise ValueError(f"{where}, column val_loss: a finished run must have a loss")
    # A table older than fingerprints knows its text by the folder.
    if not run["data_fingerprint"]:
        run["data_fingerprint"] = run["data"]
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
    if kind is str:
        return cell
    text = cell.strip()
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{cell!r} is neither True nor False")
        return text.lower() == "true"
    if not NUMBER.fullmatch(text):
        raise ValueError(f"{cell!r} is no number, as 1234.5 and 1e-16 are")
    number = float(text)
    if abs(number) > 1e18:
        raise ValueError(f"{cell!r} is too large")
    if kind is float:
        return number
    if number != int(number):
        raise ValueError(f"{cell!r} is no whole number")
    return int(text) if text.isdecimal() else int(number)       # float would round a long seed


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


def rates_for(run, column):
    """(settings, lr_factors) by a column for a run's model. Raises ValueError if it is unknown."""
    sizes = tuple(run[key] for key in SIZES)
    lr_mults = tuple(run[key] for key in MULTS)
    return rates_of(column, run["alpha_init"], sizes, lr_mults)


def factor_on_eta(run, column):
    """
    The η with which a column makes the same run, over the run's own η; 0 if no η does that.

    At the base size all columns of parametrize.py are one model: 1. At the base width and depth
    they differ by the powers of m_t and m_b alone, which multiply every class's rate.
    """
    settings, lr_factors = rates_for(run, run["parametrization"])
    wanted_settings, wanted_factors = rates_for(run, column)
    if settings != wanted_settings:
        return 0
    ratios = []
    for tensor_class, wanted in wanted_factors.items():
        if wanted > 0:
            ratios.append(lr_factors[tensor_class] / wanted)
        elif lr_factors[tensor_class] > 0:
            return 0
    if not ratios or not math.isclose(min(ratios), max(ratios)):
        return 0
    return round(ratios[0], 9)


# ------------------------------------------------------------------------------------------------
# Curves


class Cost(NamedTuple):
    """What the carried η costs, in nats, against the best of any column."""
    mean: float         # over seeds; inf if one of them diverged
    half: float         # of the 95 % interval; nan for a single seed, whose best is its own
    bound: bool         # whether the mean is a lower bound


@dataclass
class Curve:
    """The loss of one column and size against x = log2 of η, or of a class's multiplier."""
    seeds: list
    x: np.ndarray               # (X,): the grid, ascending
    loss: np.ndarray            # (seeds, X): nan where nothing ran, inf where it diverged
    mean: np.ndarray            # (X,): over seeds at their common level
    best: int                   # where `mean` is lowest
    radius: int                 # how many points on each side of the best are fitted, 2 at most
    add: list                   # x that are yet to run
    alpha: float                # mean |α| at the end, at the best x; nan for the plain GPT
    own: bool                   # whether the column itself ran, or only others that are the same

    # found by judge_column
    optimum: float = math.nan       # the best x: by the fit, or of the grid without a fit
    bottom: float = math.nan        # the lowest loss: of the grid, or of a parabola at the optimum
    grid: str = ""                  # whether the grid was wide enough, in words
    regret: float | None = None     # None: not known
    bound: bool = False             # whether the regret is a lower bound
    cost: Cost | None = None        # of the carried η; found by judge

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


def make_curve(points, own):
    """The Curve through {(x, seed): run}."""
    seeds, x, loss = loss_table(points)
    mean = np.nanmean(at_common_level(loss), axis=0)
    best = int(mean.argmin())
    alphas = []
    for (place, _), run in points.items():
        if place == x[best]:
            alphas.append(run["alpha_A"])
            alphas.append(run["alpha_M"])
    return Curve(
        seeds=seeds,
        x=x,
        loss=loss,
        mean=mean,
        best=best,
        radius=find_radius(mean, best),
        add=points_to_add(x, loss, mean, best),
        alpha=math.nan if None in alphas else statistics.fmean(alphas),
        own=own,
    )


def find_radius(mean, best):
    """
    How many points on each side of the best to fit: 2 at most, and as many left as right.

    Curves fall off a cliff on the right. A lopsided window would move the optimum.
    """
    radius = min(2, best, len(mean) - 1 - best)
    while radius > 0 and not np.isfinite(mean[best - radius : best + radius + 1]).all():
        radius -= 1
    return radius


def points_to_add(x, loss, mean, best):
    """The x to run, so that two points on each side of the best are known for every seed."""
    near = slice(max(best - 2, 0), best + 3)
    unfinished = np.isnan(loss[:, near]).any(axis=0)
    add = set(x[near][unfinished])

    # Beyond an end of the grid, unless a run next to the best diverged: behind a divergence there
    # is nothing to look for.
    step = np.diff(x).min() if len(x) > 1 else 0.5
    left = mean[max(best - 2, 0) : best]
    right = mean[best + 1 : best + 3]
    if not np.isinf(left).any():
        for i in range(1, 3 - len(left)):
            add.add(x[0] - i * step)
    if not np.isinf(right).any():
        for i in range(1, 3 - len(right)):
            add.add(x[-1] + i * step)
    return sorted(add)


def curves_of(column, key, runs_of_size, usual):
    """
    {size: Curve over log2 of the option `key`} of a column, from {size: runs}.

    Runs of other columns count where they are the same run. Where the column has none of its own,
    those count, too, that are the same with another η. `usual` is what other multipliers must be.
    """
    recipes = {}
    for runs in runs_of_size.values():
        for run in runs:
            if run["parametrization"] == column:
                length = (run["steps"], run["batch_size"])
                recipes[length] = {option: run[option] for option in RECIPE}

    curves = {}
    for size, runs in runs_of_size.items():
        own = any(run["parametrization"] == column for run in runs)
        points = {}
        for run in runs:
            factor = factor_on_eta(run, column)
            if factor == 0 or (own and factor != 1) or run[key] == 0:
                continue
            wanted = {**recipes.get((run["steps"], run["batch_size"]), {}), **usual}
            wanted.pop(key, None)
            if any(run[option] != value for option, value in wanted.items()):
                continue
            x = round(math.log2(run[key] * factor), 4)
            points[x, run["seed"]] = run
        if points:
            curves[size] = make_curve(points, own)
    return curves


def loss_at(x, loss, place):
    """
    The loss at a place of the grid x: that which ran, or by a parabola through the three nearest
    points that ran. inf if one of them diverged; nan without three, and outside the grid.
    """
    ran = ~np.isnan(loss)
    x = x[ran]
    loss = loss[ran]
    near = np.argsort(abs(x - place), kind="stable")[:3]
    if len(near) > 0 and abs(x[near[0]] - place) < 1e-4:
        return float(loss[near[0]])
    if len(near) < 3 or not x[0] <= place <= x[-1]:
        return math.nan
    if not np.isfinite(loss[near]).all():
        return math.inf
    return float(np.polyval(np.polyfit(x[near], loss[near], 2), place))


# ------------------------------------------------------------------------------------------------
# Optima and their drift


def fit(curves):
    """
    {(size, seed): best x} by least squares over the windows of all curves, with one c for all:

        loss = level[size, seed] + c · (x - best[size, seed])²

    Empty if no size has its best inside its grid, or if c is not positive.
    """
    windows = {}
    for size, curve in curves.items():
        if curve.radius == 0:
            continue
        for seed in curve.complete:
            loss = curve.loss[curve.seeds.index(seed)]
            windows[size, seed] = (curve.x[curve.window], loss[curve.window])

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


# ------------------------------------------------------------------------------------------------
# The verdict on a column


@dataclass
class Verdict:
    """What the curves of one column say, or of one tensor class if one class varies at a time."""
    curves: dict                        # {size: Curve}
    optima: dict                        # {(size, seed): best x}
    drift: tuple | None                 # (octaves a doubling, half their 95 % interval)
    regret: float | None                # the largest of all sizes
    bound: bool                         # whether that is a lower bound
    same: str                           # is one grid point the best at all sizes? Yes, No or ?
    difference: tuple | None = None     # drift less the control's, on the same seeds
    powers: dict | None = None          # {tensor class: the table's power of the size in its rate}


def judge_column(curves):
    """The Verdict on {size: Curve}, smallest first. Each curve gets its own part of it."""
    optima = fit(curves)
    for size, curve in curves.items():
        of_seeds = [x for (its_size, _), x in optima.items() if its_size == size]
        curve.optimum = float(np.mean(of_seeds or curve.x[curve.best]))
        curve.bottom = curve.mean[curve.best]
        if optima:
            curve.bottom = np.fmin(curve.bottom, loss_at(curve.x, curve.mean, curve.optimum))
        curve.grid = grid_in_words(curve)

    first, *larger = curves.values()
    for curve in larger:
        # Else the smallest size's best is not known, or this size's loss there.
        if first.radius > 0 and len(curve.x) >= 3:
            curve.regret, curve.bound = regret_of(curve, first.optimum)
    regrets = [curve.regret for curve in larger if curve.regret is not None]
    return Verdict(
        curves=curves,
        optima=optima,
        drift=drift(optima),
        regret=max(regrets, default=None),
        bound=any(curve.bound for curve in larger),
        same=same_best(list(curves.values())),
    )


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


def regret_of(curve, x):
    """(loss at x less the curve's best loss; whether that is only a lower bound)."""
    # Curves rise outwards: beyond the grid, the loss at its edge is a lower bound.
    inside = float(np.clip(x, curve.x[0], curve.x[-1]))
    loss = loss_at(curve.x, curve.mean, inside)
    regret = max(loss - curve.bottom, 0) if loss < math.inf else math.inf
    return regret, inside != x


def cost_of(curve, carried, rivals):
    """
    The Cost of x = carried: the loss there less the best that one of the rivals reached.

    Rivals are the curves of all columns at that size. For each seed the best column and η are
    chosen on the other seeds: chosen on the same one, the luckiest setting would look best. Only
    settings count that finished on all of these seeds. None if the cost is not known.
    """
    losses = {}
    bound = False
    for seed, loss in zip(curve.seeds, curve.loss):
        # Curves rise outwards: beyond the grid, the loss at its edge is a lower bound.
        grid = curve.x[~np.isnan(loss)]
        inside = float(np.clip(carried, grid[0], grid[-1]))
        at_carried = loss_at(curve.x, loss, inside)
        if not math.isnan(at_carried):
            losses[seed] = at_carried
            bound = bound or abs(inside - carried) > 1e-4
    if math.inf in losses.values():
        return Cost(math.inf, math.nan, bound)
    settings = []       # of each the losses, a seed each
    for rival in rivals:
        if set(losses) <= set(rival.seeds):
            rows = [rival.seeds.index(seed) for seed in losses]
            settings.extend(rival.loss[rows].T)
    settings = [setting for setting in settings if np.isfinite(setting).all()]
    if not losses or not settings:
        return None

    settings = np.array(settings)
    costs = []
    for i, loss in enumerate(losses.values()):
        others = np.delete(settings, i, axis=1) if len(losses) > 1 else settings
        best = others.mean(axis=1).argmin()
        costs.append(loss - settings[best, i])
    return Cost(*mean_of_seeds(costs), bound)


def mean_of_seeds(values):
    """(mean of values, half its 95 % interval); half is nan for a single value."""
    if len(values) == 1:
        return float(values[0]), math.nan
    half = student(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), half


def same_best(curves):
    """Yes or No by Lingle's criterion (arXiv:2404.05728); ? if a grid was too narrow to tell."""
    if len(curves) < 2 or any(curve.grid != "wide enough" for curve in curves):
        return "?"
    best = [curve.x[curve.best] for curve in curves]
    # Half a step, since grids onto which η was shifted need not have equal points.
    step = np.diff(curves[0].x).min()
    return "Yes" if max(best) - min(best) < step / 2 else "No"


# ------------------------------------------------------------------------------------------------
# The verdict on a sweep


def judge(runs, axis=None, control="ngpt", carried=None):
    """
    (axis, {column: Verdict}) of the runs of a sweep. The axis is what the size is. `carried` is
    log2 of the η whose cost is wanted; without it, each column carries its smallest size's best.

    Columns `control` and nugpt are judged, too, where runs of other columns count as theirs. If the
    multiplier of one class varies at a time, at one η, classes take the place of columns. Raises
    ValueError if the runs do not go together.
    """
    usual = {key: statistics.mode(run[key] for run in runs) for key in MULTS}
    classes = classes_varied(runs, usual)
    check_one_sweep(runs, may_differ=[f"{tensor_class}_lr_mult" for tensor_class in classes])
    varying = [key for key in AXES if len({run[key] for run in runs}) > 1]
    axis = axis or find_axis(varying)
    runs_of_size = group_by_size(runs, axis, varying)

    ran = {run["parametrization"] for run in runs}
    verdicts = {}
    for tensor_class in classes:
        column = runs[0]["parametrization"]
        curves = curves_of(column, f"{tensor_class}_lr_mult", runs_of_size, usual)
        judged = judge_column(curves)
        judged.powers = powers_of(column, [tensor_class], judged, runs_of_size)
        verdicts[tensor_class] = judged
    if not classes:
        for column in show.in_order({*ran, control, "nugpt"}):
            curves = curves_of(column, "learning_rate", runs_of_size, usual={})
            # Of a column that did not run, one size alone is of no interest.
            if len(curves) > 1 or (curves and column in ran):
                verdict = judge_column(curves)
                verdict.powers = powers_of(column, TENSOR_CLASSES, verdict, runs_of_size)
                verdicts[column] = verdict

    for column, verdict in verdicts.items():
        if control in verdicts and column != control:
            verdict.difference = difference(verdict.optima, verdicts[control].optima)
        first = next(iter(verdict.curves.values()))
        eta = carried
        if eta is None and first.radius > 0:
            eta = first.optimum
        for size, curve in verdict.curves.items():
            rivals = [other.curves[size] for other in verdicts.values() if size in other.curves]
            if eta is not None:
                curve.cost = cost_of(curve, eta, rivals)
    return axis, verdicts


def classes_varied(runs, usual):
    """The tensor classes of a sweep that varies one class's multiplier at a time; else []."""
    columns = {run["parametrization"] for run in runs}
    rates = {run["learning_rate"] for run in runs}
    changed = [{key for key in MULTS if run[key] != usual[key]} for run in runs]
    if len(columns) > 1 or len(rates) > 1 or max(len(keys) for keys in changed) != 1:
        return []
    changed_somewhere = set.union(*changed)
    return [key.removesuffix("_lr_mult") for key in MULTS if key in changed_somewhere]


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
            if run[key] != value:
                raise ValueError(f"{key} is {value} and {run[key]}{where}; give each its own file")


def find_axis(varying):
    """What the size is, from those of AXES that differ between runs."""
    if varying == ["steps", "batch_size"]:
        return "batch_size"     # at equal tokens
    if len(varying) > 1:
        return "parameters"
    if len(varying) == 1:
        return varying[0]
    return "width"


def group_by_size(runs, axis, varying):
    """{size: runs}, smallest first. Raises ValueError if runs of one size differ in the others."""
    for run in runs:
        if run[axis] is None:
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


def powers_of(column, classes, verdict, runs_of_size):
    """{tensor class: power of the size in its rate}, by the table; {} where there is no drift."""
    if verdict.drift is None:
        return {}
    smallest = min(verdict.curves)
    largest = max(verdict.curves)
    doublings = math.log2(largest / smallest)
    # The constants of a run are not the table's, and may vary within a size.
    without_constants = dict.fromkeys(MULTS, 1.0)
    _, small = rates_for({**runs_of_size[smallest][0], **without_constants}, column)
    _, large = rates_for({**runs_of_size[largest][0], **without_constants}, column)
    powers = {}
    for tensor_class in classes:
        if tensor_class == "rescalers" and column in plain.COLUMNS:
            continue        # the plain GPT has none
        if small[tensor_class] == 0:
            continue        # the column freezes this class
        powers[tensor_class] = math.log2(large[tensor_class] / small[tensor_class]) / doublings
    return powers


def group_tables(tables):
    """
    (key, {value of the key: runs}) of tables [runs, …]. The key is one of AXES in which tables
    differ; None if they are of one sweep, whose runs are then joined under the value None.
    """
    varying = set()         # within a table: what the sizes are
    for runs in tables:
        for key in AXES:
            if len({run[key] for run in runs}) > 1:
                varying.add(key)
    everything = [run for runs in tables for run in runs]
    differing = []
    for key in AXES:
        if varying and key not in varying and len({run[key] for run in everything}) > 1:
            differing.append(key)
    if not differing:
        return None, {None: everything}
    if len(differing) > 1:
        raise ValueError(f"the tables differ in {' and '.join(differing)}: sweeps stand side by "
                         f"side if they differ in one of {', '.join(AXES)}, but for their sizes")
    groups = {}
    for run in everything:
        groups.setdefault(run[differing[0]], []).append(run)
    return differing[0], dict(sorted(groups.items()))


def difference(optima, control):
    """The drift of a column less the control's, from {(size, seed): best x} of both."""
    return drift({key: optima[key] - control[key] for key in optima if key in control})


# ------------------------------------------------------------------------------------------------
# Random searches


class Setting(NamedTuple):
    """A setting of a random search. The best sorts first."""
    loss: float         # mean over seeds, at their common level
    seeds: int          # how many of them did not diverge
    values: tuple       # of the hyperparameters searched


def searched(runs):
    """The hyperparameters of a random search that are not at train.py's default; else []."""
    for key in ("parametrization", *SIZES):
        if len({run[key] for run in runs}) > 1:
            return []
    tried = {key: {run[key] for run in runs} for key in SEARCHED}
    of_many_values = [key for key in SEARCHED if len(tried[key]) >= 5]
    if len(of_many_values) < 2 or len(tried["learning_rate"]) < 2:
        return []
    return [key for key in SEARCHED if tried[key] != {getattr(DEFAULTS, key)}]


def rank(runs, keys):
    """
    ([Setting of the hyperparameters `keys`, …] best first, a seed's scatter in nats) of a search.

    The scatter is nan where fewer than two settings ran with several seeds. Raises ValueError if
    the runs differ in anything else but dtype.
    """
    check_one_sweep(runs, may_differ=keys)
    places = {}         # {values: a number for them}
    points = {}
    for run in runs:
        values = tuple(run[key] for key in keys)
        place = places.setdefault(values, len(places))
        points[place, run["seed"]] = run
    _, _, loss = loss_table(points)
    loss = at_common_level(loss)
    mean = np.nanmean(loss, axis=0)
    seeds = np.isfinite(loss).sum(axis=0)
    settings = []
    for values, place in places.items():
        settings.append(Setting(float(mean[place]), int(seeds[place]), values))

    repeated = (seeds > 1) & ~np.isinf(loss).any(axis=0)
    variances = np.nanvar(loss[:, repeated], axis=0, ddof=1)
    freedom = len(variances) - 1        # the seeds' levels took one
    scatter = math.sqrt(variances.sum() / freedom) if freedom > 0 else math.nan
    return sorted(settings), scatter


# ------------------------------------------------------------------------------------------------
# One option at a time


class Change(NamedTuple):
    """What it gains to change one option of the setting that the others have."""
    option: str
    value: object
    losses: dict        # {seed: loss}
    gain: tuple         # (mean over the seeds that both have, half its 95 % interval), in nats


def changed_alone(runs):
    """
    ([option, …], setting {option: value}) if all runs are of one size, and each has the setting or
    differs from it in one option alone; else ([], setting).
    """
    setting = {}
    for key in OPTIONS:
        if key not in ("seed", "dtype"):
            setting[key] = statistics.mode(run[key] for run in runs)
    changed = set()
    for run in runs:
        differing = [key for key in setting if run[key] != setting[key]]
        if len(differing) > 1 or set(differing) & set(SIZES):
            return [], setting
        changed.update(differing)
    if changed <= {"learning_rate", "parametrization"}:
        return [], setting          # that is a sweep
    return [key for key in setting if key in changed], setting


def gains(runs, options, setting):
    """(losses {seed: loss} of the setting, [Change, …]). Raises ValueError if runs differ in the
    text, or if nothing ran with the setting itself."""
    check_one_sweep(runs, may_differ=options)
    losses = {}         # {(option, value), or None for the setting: {seed: loss}}
    for run in runs:
        change = None
        for option in options:
            if run[option] != setting[option]:
                change = (option, run[option])
        losses.setdefault(change, {})[run["seed"]] = run["val_loss"]
    if None not in losses:
        raise ValueError("no run has the setting from which all others differ in one option")

    unchanged = losses.pop(None)
    changes = []
    for (option, value), of_seeds in losses.items():
        shared = [seed for seed in of_seeds if seed in unchanged]
        gain = np.array([unchanged[seed] - of_seeds[seed] for seed in shared])
        half = math.nan
        if len(gain) > 1 and np.isfinite(gain).all():
            half = student(len(gain) - 1) * gain.std(ddof=1) / math.sqrt(len(gain))
        mean = gain.mean() if len(gain) else math.nan
        changes.append(Change(option, value, of_seeds, (float(mean), half)))
    return unchanged, sorted(changes, key=lambda one: (options.index(one.option), one.value))


# ------------------------------------------------------------------------------------------------
# Command line


def parse_args():
    parser = show.ArgumentParser("verdict.py", __doc__)
    parser.add_argument("results", nargs="+", metavar="RESULTS.csv", type=expanduser,
                        help="tables of one sweep, which are joined; or several, which differ "
                             "in steps, say")
    parser.add_argument("--plot", metavar="FILE.png", type=expanduser, help="draw a picture, too")
    parser.add_argument("--columns", metavar="NAME,NAME", help="show only these")
    parser.add_argument("--control", default="ngpt", choices=COLUMNS,
                        help="what the others are compared to (default: ngpt)")
    parser.add_argument("--axis", choices=[*AXES, "parameters"],
                        help="what the size is (default: what differs between runs)")
    parser.add_argument("--carried", metavar="ETA", type=eta,
                        help="the η whose cost is wanted, such as 2^-5.5 (default: the best η of "
                             "the smallest size)")
    return parser.parse_args()


def choose(verdicts, names):
    """The verdicts of "name,name", in this order. Raises ValueError for one that is not there."""
    chosen = {}
    for name in names.split(","):
        if name not in verdicts:
            raise ValueError(f"there are runs of {', '.join(verdicts)}, but not of {name}")
        chosen[name] = verdicts[name]
    return chosen


def read_runs(path):
    """The runs of a results table, as read_results has them. Raises ValueError if it has none."""
    runs = read_results(path)
    if not runs:
        raise ValueError(f"{path} has no rows")
    return runs


def eta(text):
    """log2 of an η such as 2^-5.5. Raises ValueError."""
    return math.log2(train.number(text))


def print_side_by_side(args, other, groups):
    """Print how drift and regret differ between the groups {value of other: runs}, and draw it if
    asked. Raises ValueError."""
    axes = set()
    tables = {}
    for value, runs in groups.items():
        axis, tables[value] = judge(runs, args.axis, args.control, args.carried)
        axes.add(axis)
    if len(axes) > 1:
        raise ValueError(f"the tables are sweeps over {' and '.join(sorted(axes))}")
    if show.largest_common_size(tables) is None:
        raise ValueError(f"the tables have no {axis} in common")
    if args.columns:
        of_any = {name: None for verdicts in tables.values() for name in verdicts}
        wanted = choose(of_any, args.columns)
        for value, verdicts in tables.items():
            tables[value] = {name: verdicts[name] for name in wanted if name in verdicts}
    print(show.report_tables(axis, other, tables))
    if args.plot:
        show.draw_tables(axis, other, tables, args.plot)


def print_verdict(args):
    """Print the verdict on the tables, and draw it if asked. Raises ValueError and OSError."""
    tables, notes = join(args.results)
    other, groups = group_tables(tables)
    for note in notes:
        print(note)
    if other:
        print_side_by_side(args, other, groups)
        return
    runs = groups[None]
    dtypes = sorted({run["dtype"] for run in runs})
    if len(dtypes) > 1:
        print(f"Runs of dtype {' and '.join(dtypes)} stand side by side. "
              "They differ in rounding.\n")

    options, setting = changed_alone(runs)
    keys = searched(runs)
    if (options or keys) and (args.axis or args.columns):
        raise ValueError("--axis and --columns are for a sweep over sizes")
    if options:
        unchanged, changes = gains(runs, options, setting)
        print(show.report_changes(unchanged, changes, setting))
        if args.plot:
            show.draw_changes(unchanged, changes, setting, args.plot)
        return

    if keys:
        ranked, scatter = rank(runs, keys)
        print(show.report_search(ranked, scatter, keys))
        if args.plot:
            show.draw_search(ranked, keys, args.plot)
        return

    axis, verdicts = judge(runs, args.axis, args.control, args.carried)
    if args.columns:
        verdicts = choose(verdicts, args.columns)
    print(show.report(axis, verdicts, args.control, args.carried))
    if args.plot:
        show.draw(axis, verdicts, args.plot)


def main():
    args = parse_args()
    try:
        print_verdict(args)
    except (ValueError, OSError) as error:
        sys.exit(f"verdict.py: {error}")


if __name__ == "__main__":
    show.prepare_terminal()
    main()
