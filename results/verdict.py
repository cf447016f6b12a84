"""
The verdict on a results table of train.py: does the best learning rate η stay where it is as models grow?

    python results/verdict.py results/width_1600.csv --plot=picture.png

A table of one column and size with many values of the learning rate and other hyperparameters is a random search. Its
verdict is the best runs, the ranges that were too narrow, and the options to paste.
"""
import argparse
import csv
import functools
import math
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import parametrize as rules
import show
from train import MATHEMATICS, Config

AXES = ["width", "depth", "steps", "batch_size"]
SIZES = [*AXES[:3], "base_width", "base_depth", "base_steps", "batch_size", "base_batch_size"]     # as parametrize's
MULTS = [f"{tensors}_lr_mult" for tensors in rules.TENSOR_CLASSES]
VARYING = ["parametrization", *AXES, "learning_rate", "seed", "dtype"]      # within a sweep
RECIPE = ["warmup_steps", "weight_decay", "beta1", "beta2", "eps", *MULTS]     # as columns and sizes want
SEARCHED = ["learning_rate", "alpha_init", *MULTS, "weight_decay", "warmup_steps"]

parametrize = functools.cache(rules.parametrize)


def read_results(path):
    """The runs of a results table, as dicts of options and outcome; val_loss in nats a token, inf: diverged. A missing
    column is the option's default. Of equal runs the last row counts. Raises ValueError and OSError."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    runs = {}
    for line, row in enumerate(rows, 2):
        run = {key: str(cell) for key, cell in {**vars(Config()), **row}.items()}
        if run.get("status") == "diverged":
            run["val_loss"] = "inf"
        for key in (*SIZES, *SEARCHED, "seed", "parameters", "val_loss"):
            try:
                run[key] = float(run[key])
            except (KeyError, ValueError):
                run[key] = math.nan
            if math.isnan(run[key]) or run[key] <= 0 and key in (*SIZES, "learning_rate"):
                raise ValueError(f"{path}, line {line} is no run of train.py: {key} is {row.get(key)!r}")
        runs[tuple(run[key] for key in MATHEMATICS)] = run
    if not runs:
        raise ValueError(f"{path} has no rows")
    return list(runs.values())


def check_one_sweep(runs, may_differ):
    """Raises ValueError if runs differ in other options, or runs of one column and size in their recipe."""
    for key in [key for key in MATHEMATICS if key not in (*VARYING, *may_differ)]:
        values = {}
        for run in runs:
            size = (run["parametrization"], run["steps"], run["batch_size"]) if key in RECIPE else ()
            if values.setdefault(size, run[key]) != run[key]:
                where = f" in {size[0]}'s runs of {size[1]:g} steps" if size else ""
                raise ValueError(f"{key} is {values[size]} and {run[key]}{where}; give each its own file")


def losses(points):
    """(seeds, x, loss (seeds, x), loss at the seeds' common level) of {(x, seed): run}. nan: not run, inf: diverged."""
    seeds, x = sorted({seed for _, seed in points}), np.array(sorted({x for x, _ in points}))
    loss = np.array([[points.get((a, seed), {}).get("val_loss", math.nan) for a in x] for seed in seeds])
    # Seeds differ mostly by a shift. Each is moved to the common level, lest an x that only some have run be misplaced.
    shared = np.isfinite(loss).all(0)
    level = loss[:, shared].mean(1, keepdims=True) if shared.any() else np.zeros((1, 1))
    return seeds, x, loss, loss - level + level.mean()


def make_curve(points, own):
    """
    Loss against x = log2 of η, or of a multiplier, from {(x, seed): run}. A namespace:
    seeds, x, loss (seeds, x), mean (x,); best: index of the lowest mean; window: slice of points to fit; radius: how
    many on each side of the best; complete: seeds that ran the window; add: x to run; alpha: mean |α| at the best; own.
    """
    seeds, x, loss, leveled = losses(points)
    mean = np.nanmean(leveled, axis=0)
    best = int(mean.argmin())
    # Five points, as many left as right of the best: three, or one, if others are missing or diverged.
    radius, near = min(2, best, len(x) - 1 - best), slice(max(best - 2, 0), best + 3)
    while not np.isfinite(mean[best - radius:best + radius + 1]).all() and radius:
        radius -= 1
    window = slice(best - radius, best + radius + 1)
    add, step = set(x[near][np.isnan(loss[:, near]).any(0)]), np.diff(x).min() if len(x) > 1 else 0.5
    for edge, outward, beyond in ((x[0], -step, mean[:best][::-1]), (x[-1], step, mean[best + 1:])):
        if not np.isinf(beyond[:2]).any():      # behind a divergence there is nothing to look for
            add |= {edge + outward * i for i in range(1, 3 - len(beyond))}
    at_best = [run for (a, _), run in points.items() if a == x[best]]
    return SimpleNamespace(
        seeds=seeds, x=x, loss=loss, mean=mean, best=best, window=window, radius=radius, add=sorted(add), own=own,
        complete=[seed for seed, finite in zip(seeds, np.isfinite(loss[:, window]).all(1)) if finite],
        regret=None, bound=False,
        alpha=statistics.fmean(float(run.get(key) or "nan") for run in at_best for key in ("attn_alpha", "mlp_alpha")))


def factor_on_eta(run, name):
    """The η that column `name` needs for the same run, over the run's η; 0: none does. At the base size all columns are
    one: 1. At the base width and depth columns differ in the powers of m_t and m_b alone, which multiply η."""
    options = [run[key] for key in (*SIZES, "alpha_init", *MULTS)]
    initial, scale = parametrize(run["parametrization"], *options)
    wanted_initial, wanted = parametrize(name, *options)
    factor = sum(scale.values()) / sum(wanted.values())
    same = initial == wanted_initial and all(math.isclose(scale[key], factor * wanted[key]) for key in scale)
    return round(factor, 9) if same else 0


def curves_of(name, key, sizes, center):
    """{size: curve over log2 of `key`} of column `name`, from {size: runs}. Runs of other columns count where they are
    the same; with η shifted, too, where the column has none. Multipliers other than `key` must be at the center."""
    recipes = {(run["steps"], run["batch_size"]): {option: run[option] for option in RECIPE}
               for runs in sizes.values() for run in runs if run["parametrization"] == name}
    curves = {}
    for size, runs in sizes.items():
        own, points = any(run["parametrization"] == name for run in runs), {}
        for run in runs:
            factor = factor_on_eta(run, name)
            wanted = {**recipes.get((run["steps"], run["batch_size"]), {}), **center, key: run[key]}
            usable = all(run[option] == wanted[option] for option in wanted)
            if usable and run[key] > 0 and (factor == 1 or factor and not own):
                points[round(math.log2(run[key] * factor), 4), run["seed"]] = run
        if points:
            curves[size] = make_curve(points, own)
    return curves


def loss_at(curve, x):
    """Mean loss of a curve at x, by a parabola through the three nearest points; inf where one of them diverged."""
    near = np.argsort(abs(curve.x - x), kind="stable")[:3]
    usable = len(near) == 3 and np.isfinite(curve.mean[near]).all()
    return float(np.polyval(np.polyfit(curve.x[near], curve.mean[near], 2), x)) if usable else math.inf


def fit(curves):
    """{(size, seed): optimum} by least squares over the windows: loss = level[size, seed] + c · (x - optimum)², one c
    for all. Empty if no size has its best inside its grid, or c is not positive."""
    windows = {(size, seed): (curve.x[curve.window], curve.loss[curve.seeds.index(seed), curve.window])
               for size, curve in curves.items() if curve.radius for seed in curve.complete}
    bends = [x * x - np.polyval(np.polyfit(x, x * x, 1), x) for x, _ in windows.values()]       # x² less its best line
    square = sum(bend @ bend for bend in bends)
    c = sum(bend @ loss for bend, (_, loss) in zip(bends, windows.values())) / square if bends else 0
    return {key: np.polyfit(x, loss - c * x * x, 1)[0] / (-2 * c) for key, (x, loss) in windows.items() if c > 0}


def student(freedom):
    """The 97.5 % quantile of Student's t, to 0.001: tabulated, then the Cornish-Fisher expansion."""
    expansion = 1.95996 + 2.37227 / freedom + 2.82250 / freedom ** 2 + 2.55585 / freedom ** 3 + 1.58 / freedom ** 4
    return {1: 12.70620, 2: 4.30265, 3: 3.18245}.get(freedom, expansion)


def drift(optima):
    """
    (slope of {(size, seed): optimum} over log2 size, in octaves a doubling; half its 95 % interval); None for one size.
    All η of a curve share its luck, so the curve is the unit: the interval comes from the scatter of the optima about
    parallel lines, one a seed, with (curves - seeds - 1) degrees of freedom.
    """
    lines = {}
    for (size, seed), x in optima.items():
        lines.setdefault(seed, []).append((math.log2(size), x))
    centered = [np.array(line) - np.mean(line, axis=0) for line in lines.values() if len(line) > 1]
    if not centered:
        return None
    size, x = np.concatenate(centered).T
    slope, freedom = size @ x / (size @ size), len(x) - len(centered) - 1
    variance = np.square(x - slope * size).sum() / (size @ size)
    return slope, student(freedom) * math.sqrt(variance / freedom) if freedom else math.inf


def judge_column(curves):
    """The verdict on {size: curve}, as a namespace. Each curve gets optimum, regret in nats and a word on its grid."""
    optima = fit(curves)
    first, *larger = curves.values()
    for size, curve in curves.items():
        curve.optimum = float(np.mean([x for (its, _), x in optima.items() if its == size] or curve.x[curve.best]))
        curve.bottom = min(curve.mean[curve.best], loss_at(curve, curve.optimum))
        inside = curve.x[curve.window][0] <= curve.optimum <= curve.x[curve.window][-1]
        faults = {"add " + " ".join(f"2^{x:.5g}" for x in curve.add): curve.add,
                  "diverges near the best": curve.radius < 2, "its parabola's best is outside its window": not inside}
        curve.grid = next((words for words, found in faults.items() if found), "wide enough")
        if first.radius and curve is not first:     # curves rise outwards: outside a grid, its edge is a lower bound
            x = float(np.clip(first.optimum, curve.x[0], curve.x[-1]))
            loss, curve.bound = loss_at(curve, x), x != first.optimum
            curve.regret = max(loss - curve.bottom, 0) if loss < math.inf else math.inf
    known = larger and all(curve.grid == "wide enough" for curve in curves.values())
    moved = np.ptp([curve.x[curve.best] for curve in curves.values()])
    return SimpleNamespace(
        curves=curves, optima=optima, drift=drift(optima), difference=None, bound=any(curve.bound for curve in larger),
        regret=max((curve.regret for curve in larger if curve.regret is not None), default=None),
        # Lingle's criterion (arXiv:2404.05728), but grids that η was shifted onto need not have equal points
        same="?" if not known else "Yes" if moved < np.diff(first.x).min() / 2 else "No")


def judge(runs, axis=None, control="ngpt"):
    """(axis, {column: verdict}). The control and nugpt are judged, too, where other columns' runs count as theirs. If
    runs of one η vary one multiplier at a time, a tensor class takes the place of a column. Raises ValueError."""
    names, rates = ({run[key] for run in runs} for key in ("parametrization", "learning_rate"))
    center = {key: statistics.mode(run[key] for run in runs) for key in MULTS}
    changed = [{key for key in MULTS if run[key] != center[key]} for run in runs]
    one_at_a_time = len(names) == len(rates) == max(map(len, changed)) == 1
    classes = [key for key in MULTS if key in set.union(*changed)] if one_at_a_time else []
    check_one_sweep(runs, classes)
    varying = [key for key in AXES if len({run[key] for run in runs}) > 1]
    equal_tokens = varying == ["steps", "batch_size"]
    axis = axis or ("batch_size" if equal_tokens else "parameters" if len(varying) > 1 else (varying or ["width"])[0])
    sizes, verdicts = {}, {}
    for run in sorted(runs, key=lambda run: run[axis]):
        sizes.setdefault(run[axis], []).append(run)
        if differing := [key for key in varying if run[key] != sizes[run[axis]][0][key]]:
            raise ValueError(f"runs of {axis} {run[axis]:g} differ in {', '.join(differing)}; give each its own file")
    columns = ({key.removesuffix("_lr_mult"): (*names, key) for key in classes} or
               {name: (name, "learning_rate") for name in rules.COLUMNS if name in {*names, control, "nugpt"}})
    for title, (name, key) in columns.items():
        curves = curves_of(name, key, sizes, center if classes else {})
        if len(curves) > 1 or curves and name in names:
            verdict = verdicts[title] = judge_column(curves)
            ends = sizes[min(curves)][0], sizes[max(curves)][0]
            small, large = (parametrize(name, *map(run.get, SIZES))[1] for run in ends)
            verdict.powers = {tensors: math.log2(large[tensors] / small[tensors]) / math.log2(max(curves) / min(curves))
                              for tensors in small if verdict.drift and (not classes or tensors == title)}
    paired = verdicts[control].optima if control in verdicts else {}
    for name in verdicts.keys() - {control}:
        optima = verdicts[name].optima
        verdicts[name].difference = drift({key: optima[key] - paired[key] for key in optima.keys() & paired.keys()})
    return axis, verdicts


def searched(runs):
    """The hyperparameters of a random search: the learning rate and others, two with five values or more, and those
    that are not train.py's default. Else []."""
    values = {key: {run[key] for run in runs} for key in SEARCHED}
    alike = all(len({run[key] for run in runs}) == 1 for key in ("parametrization", *SIZES))
    many = sum(len(tried) >= 5 for tried in values.values())
    keys = [key for key, tried in values.items() if tried != {getattr(Config, key)}]
    return keys if alike and many > 1 and len(values["learning_rate"]) > 1 else []


def rank(runs, keys):
    """([(loss at the seeds' common level, number of seeds, values of keys)] best first, a seed's scatter in nats). The
    scatter is nan where fewer than two settings ran with several seeds. Raises ValueError."""
    check_one_sweep(runs, keys)
    settings = [tuple(run[key] for key in keys) for run in runs]
    tried = list(dict.fromkeys(settings))
    _, _, _, loss = losses({(tried.index(values), run["seed"]): run for values, run in zip(settings, runs)})
    seeds = np.isfinite(loss).sum(0)
    variances = np.nanvar(loss[:, (seeds > 1) & ~np.isinf(loss).any(0)], axis=0, ddof=1)
    freedom = len(variances) - 1        # the seeds' levels took one
    scatter = math.sqrt(variances.sum() / freedom) if freedom > 0 else math.nan
    return sorted(zip(np.nanmean(loss, axis=0).tolist(), seeds.tolist(), tried)), scatter


def main():
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("results", metavar="RESULTS.csv")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the picture, too")
    parser.add_argument("--columns", type=lambda text: text.split(","), help="show only these, as in ngpt,nugpt")
    parser.add_argument("--control", default="ngpt", choices=rules.COLUMNS, help="what the others are compared to")
    parser.add_argument("--axis", choices=(*AXES, "parameters"),
                        help="what the size is; default: what differs between runs, parameters if several do")
    parser.error = lambda message: sys.exit(f"verdict.py: {message} (see python results/verdict.py --help)")
    args = parser.parse_args()
    try:
        runs = read_results(args.results)
        if len(dtypes := sorted({run["dtype"] for run in runs})) > 1:
            print(f"Runs of dtype {' and '.join(dtypes)} stand side by side. They differ in rounding.\n")
        if keys := searched(runs):
            ranked, scatter = rank(runs, keys)
            print(show.report_search(ranked, scatter, keys))
        else:
            axis, verdicts = judge(runs, args.axis, args.control)
            if unknown := set(args.columns or ()) - verdicts.keys():
                raise ValueError(f"there are runs of {', '.join(verdicts)}, but not of {', '.join(sorted(unknown))}")
            verdicts = {name: verdicts[name] for name in args.columns or verdicts}
            print(show.report(axis, verdicts, args.control))
        if args.plot and keys:
            show.draw_search(ranked, keys, args.plot)
        elif args.plot:
            show.draw(axis, verdicts, args.plot)
    except (ValueError, OSError, csv.Error) as error:
        sys.exit(f"verdict.py: {error}")


if __name__ == "__main__":
    main()
