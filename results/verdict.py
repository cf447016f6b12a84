"""
The verdict on a results table of train.py: does the best learning rate η stay where it is as models grow?

    python results/verdict.py results/width_1600.csv --plot=picture.png

A table of one column and size with many values of several hyperparameters is a random search: the verdict then is its best
runs, the ranges that were too narrow, and the options to paste.
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
from train import MATHEMATICS, Config

SIZES = ["width", "depth", "steps", "base_width", "base_depth", "base_steps"]
MULTS = [f"{tensors}_lr_mult" for tensors in rules.TENSOR_CLASSES]
RECIPE = ["warmup_steps", "weight_decay"]       # may differ between columns and lengths: a plain GPT needs some
SEARCHED = ["learning_rate", "alpha_init", *MULTS, "weight_decay"]
parametrize = functools.cache(rules.parametrize)


def read_results(path):
    """
    The runs of a results table as dicts of options and outcome, val_loss in nats a token (inf: diverged). A missing column is
    the option's default; of equal runs the last row counts. Raises ValueError if the file is no such table.
    """
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if missing := {"parametrization", "learning_rate", "val_loss", "status"}.difference(*rows[:1]):
        raise ValueError(f"{path} is no results table of train.py: it has no rows with {', '.join(sorted(missing))}")
    runs = {}
    for line, row in enumerate(rows, 2):
        run = {key: str(cell) for key, cell in {**vars(Config()), "parameters": 0, **row}.items()}
        if run["status"] == "diverged":
            run["val_loss"] = "inf"
        for key in (*SIZES, *SEARCHED, "warmup_steps", "seed", "parameters", "val_loss"):
            try:
                run[key] = float(run[key])
                assert not math.isnan(run[key]) and (run[key] > 0 or key not in (*SIZES, "learning_rate"))
            except (ValueError, AssertionError):
                raise ValueError(f"{path}, line {line}: {key} must be a possible number, not {run[key]!r}") from None
        runs[tuple(run[key] for key in MATHEMATICS)] = run
    return list(runs.values())


def factor_on_eta(run, name):
    """
    What makes a run's η that of the same run of column `name`: 1 at the base size, where all columns are one; at the base
    width and depth the ratio of the columns' powers of m_t; 0 where the runs differ.
    """
    options = [run[key] for key in (*SIZES, "alpha_init", *MULTS)]
    (initial, scale), (wanted_initial, wanted) = parametrize(run["parametrization"], *options), parametrize(name, *options)
    factor = sum(scale.values()) / sum(wanted.values())
    same = initial == wanted_initial and all(math.isclose(scale[key], factor * wanted[key]) for key in scale)
    return round(factor, 9) if same else 0


def losses(points):
    """Of {(x, seed): run}: seeds; x, ascending; loss (seeds, x; nan: not run, inf: diverged); mean over seeds (x,)."""
    seeds, x = sorted({seed for _, seed in points}), np.array(sorted({x for x, _ in points}))
    loss = np.array([[points.get((a, seed), {}).get("val_loss", math.nan) for a in x] for seed in seeds])
    # Seeds differ mostly by a shift. Each is moved to the common level, lest an x that only some have run be misplaced.
    shared = np.isfinite(loss).all(0)
    level = loss[:, shared].mean(1, keepdims=True) if shared.any() else np.zeros((1, 1))
    return seeds, x, loss, np.nanmean(loss - level, axis=0) + level.mean()


def make_curve(points, own):
    """
    Loss against x, log2 of η or of a multiplier, from {(x, seed): run}: a namespace of what losses() returns, best (index of
    the lowest mean), window (slice of the points to fit), radius (points on each side of the best in it), complete (seeds
    that have them all), add (x still to run), alpha (mean |α| at the best) and own (whether the column itself was run).
    """
    seeds, x, loss, mean = losses(points)
    best = int(mean.argmin())
    # Five points, as many left as right of the best: three, or one, if others are missing or diverged.
    radius = max((r for r in (1, 2) if r <= best < len(x) - r and np.isfinite(mean[best - r:best + r + 1]).all()), default=0)
    window, near = slice(best - radius, best + radius + 1), slice(max(best - 2, 0), best + 3)
    add, step = set(x[near][np.isnan(loss[:, near]).any(0)]), np.diff(x).min() if len(x) > 1 else 0.5
    for edge, outward, beyond in ((x[0], -step, mean[:best][::-1]), (x[-1], step, mean[best + 1:])):
        if not np.isinf(beyond[:2]).any():      # behind a divergence there is nothing to look for
            add |= {edge + outward * i for i in range(1, 3 - len(beyond))}
    alphas = [float(run.get(key) or "nan") for (a, _), run in points.items() if a == x[best] for key in ("attn_alpha", "mlp_alpha")]
    return SimpleNamespace(
        seeds=seeds, x=x, loss=loss, mean=mean, best=best, window=window, radius=radius, add=sorted(add), own=own,
        complete=[seed for seed, finite in zip(seeds, np.isfinite(loss[:, window]).all(1)) if finite],
        alpha=statistics.fmean(alphas), regret=None, bound=False)


def curves_of(name, key, sizes, center):
    """
    {size: curve over log2 of `key`} of a column, from {size: runs}: its own runs, others that are the same runs, and at sizes
    without any of its own those that are the same at another η. Multipliers other than `key` must be at the center.
    """
    recipes = {run["steps"]: recipe(run) for runs in sizes.values() for run in runs if run["parametrization"] == name}
    curves = {}
    for size, runs in sizes.items():
        own, points = any(run["parametrization"] == name for run in runs), {}
        for run in runs:
            factor, wanted = factor_on_eta(run, name), recipes.get(run["steps"], recipe(run))
            usable = recipe(run) == wanted and all(run[mult] == center[mult] for mult in MULTS if mult != key)
            if usable and (factor == 1 or factor and not own):
                points[round(math.log2(run[key] * factor), 4), run["seed"]] = run
        if points:
            curves[size] = make_curve(points, own)
    return curves


def recipe(run):
    return [run[key] for key in RECIPE]


def loss_at(curve, x):
    """Mean loss of a curve at x, by a parabola through the three nearest points; inf where one of them diverged."""
    near = np.argsort(abs(curve.x - x), kind="stable")[:3]
    usable = len(near) == 3 and np.isfinite(curve.mean[near]).all()
    return float(np.polyval(np.polyfit(curve.x[near], curve.mean[near], 2), x)) if usable else math.inf


def fit(curves):
    """
    {(size, seed): optimum in log2 η}, by least squares: loss = level[size, seed] + c · (x - optimum[size, seed])² over the
    windows, one c for all. Empty where no size has its best inside its grid, or where c is not positive.
    """
    windows = {(size, seed): (curve.x[curve.window], curve.loss[curve.seeds.index(seed), curve.window])
               for size, curve in curves.items() if curve.radius for seed in curve.complete}
    bends = [x * x - np.polyval(np.polyfit(x, x * x, 1), x) for x, _ in windows.values()]       # x² less its best line
    square = sum(bend @ bend for bend in bends)
    c = sum(bend @ loss for bend, (_, loss) in zip(bends, windows.values())) / square if bends else 0
    return {key: -np.polyfit(x, loss - c * x * x, 1)[0] / (2 * c) for key, (x, loss) in windows.items()} if c > 0 else {}


def student(freedom):
    """The 97.5 % quantile of Student's t, to 0.001: tabulated, then the Cornish-Fisher expansion."""
    expansion = 1.95996 + 2.37227 / freedom + 2.82250 / freedom ** 2 + 2.55585 / freedom ** 3 + 1.58 / freedom ** 4
    return {1: 12.70620, 2: 4.30265, 3: 3.18245}.get(freedom, expansion)


def drift(optima):
    """
    (slope of the optima over log2 size, in octaves a doubling, and half its 95 % interval); None for fewer than two sizes.
    All η of a curve share its luck, so the unit is the curve: the interval comes from the scatter of the optima about
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
    residual = x - slope * size
    half = student(freedom) * math.sqrt(residual @ residual / freedom / (size @ size)) if freedom else math.inf
    return float(slope), half


def judge_column(curves):
    """The verdict on {size: curve}, as a namespace; each curve gets its optimum, its regret and what to say of its grid."""
    optima = fit(curves)
    first, *larger = curves.values()
    for size, curve in curves.items():
        curve.optimum = float(np.mean([x for (its, _), x in optima.items() if its == size] or curve.x[curve.best]))
        inside = curve.x[curve.window][0] <= curve.optimum <= curve.x[curve.window][-1]
        curve.grid = ("add " + " ".join(f"2^{x:.5g}" for x in curve.add) if curve.add else "diverges near the best"
                      if curve.radius < 2 else "wide enough" if inside else "its parabola's best is outside its window")
        if first.radius and curve is not first:     # curves rise outwards: outside a grid, its edge is a lower bound
            x = float(np.clip(first.optimum, curve.x[0], curve.x[-1]))
            loss, best = loss_at(curve, x), min(curve.mean[curve.best], loss_at(curve, curve.optimum))
            curve.regret, curve.bound = max(loss - best, 0) if loss < math.inf else loss, x != first.optimum
    known = larger and all(curve.grid == "wide enough" for curve in curves.values())
    return SimpleNamespace(
        curves=curves, optima=optima, drift=drift(optima), difference=None, bound=any(curve.bound for curve in larger),
        regret=max((curve.regret for curve in larger if curve.regret is not None), default=None),
        # Lingle's criterion (arXiv:2404.05728), but grids that η was shifted onto need not have equal points
        same="?" if not known else "Yes" if np.ptp([curve.x[curve.best] for curve in curves.values()]) < np.diff(first.x).min() / 2
        else "No")


def judge(runs, axis=None, control="ngpt"):
    """
    (axis, {column: its verdict}). Columns are those of the runs, and the control and nugpt where other runs are theirs at
    several sizes. Where runs of one η vary one multiplier at a time, a tensor class takes the place of a column.
    Raises ValueError for runs that are no single sweep.
    """
    center, names = {key: statistics.mode(run[key] for run in runs) for key in MULTS}, {run["parametrization"] for run in runs}
    changed = [{key for key in MULTS if run[key] != center[key]} for run in runs]
    classes = [key for key in MULTS if key in set().union(*changed)]
    if len({run["learning_rate"] for run in runs}) > 1 or max(map(len, changed)) > 1 or len(names) > 1:
        classes = []
    for key in set(MATHEMATICS).difference(("parametrization", *SIZES[:3], "learning_rate", "seed", "dtype"), classes):
        values = {}
        for run in runs:
            where = f" in {run['parametrization']}'s runs of {run['steps']:g} steps" if key in RECIPE else ""
            if values.setdefault(where, run[key]) != run[key]:
                raise ValueError(f"the table mixes {key} = {values[where]} and {run[key]}{where}; give each its own file")
    varying = [key for key in SIZES[:3] if len({run[key] for run in runs}) > 1]
    axis = axis or ("parameters" if len(varying) > 1 else (varying or ["width"])[0])
    sizes, verdicts = {}, {}
    for run in sorted(runs, key=lambda run: run[axis]):
        sizes.setdefault(run[axis], []).append(run)
        if differing := [key for key in varying if run[key] != sizes[run[axis]][0][key]]:
            raise ValueError(f"runs with {axis} = {run[axis]:g} differ in {' and '.join(differing)}; give each its own file")
    if any(run[key] <= 0 for run in runs for key in classes):
        raise ValueError("the multipliers in a sweep of one tensor class at a time must be positive")
    columns = ({key.removesuffix("_lr_mult"): (*names, key) for key in classes} or
               {name: (name, "learning_rate") for name in rules.COLUMNS if name in {*names, control, "nugpt"}})
    for title, (name, key) in columns.items():
        curves = curves_of(name, key, sizes, center)
        if len(curves) > 1 or curves and name in names:
            verdict = verdicts[title] = judge_column(curves)
            small, large = (parametrize(name, *map(sizes[size][0].get, SIZES))[1] for size in (min(curves), max(curves)))
            verdict.powers = {tensors: math.log2(large[tensors] / small[tensors]) / math.log2(max(curves) / min(curves))
                              for tensors in small if verdict.drift and (not classes or tensors == title)}
    paired = verdicts[control].optima if control in verdicts else {}
    for name, verdict in verdicts.items():
        if name != control:
            verdict.difference = drift({key: x - paired[key] for key, x in verdict.optima.items() if key in paired})
    return axis, verdicts


def steps_needed(verdicts, control):
    """
    Rows (column, steps, best loss, "2.1 × the steps"): how long the control must train for that loss. Both are at their own
    best η, on the seeds they share; the control's losses are a polygon over log steps. Optima at the edge of a grid do not count.
    """
    for name in verdicts if control in verdicts else ():
        curves = [*verdicts[name].curves.values(), *verdicts[control].curves.values()]
        seeds = set.intersection(*(set(curve.seeds) for curve in curves))
        ours, controls = ({size: np.mean([curve.loss[curve.seeds.index(seed), curve.best] for seed in seeds])
                           for size, curve in verdicts[column].curves.items() if curve.radius and seeds} for column in (name, control))
        if name == control or not controls or not all(curve.own for curve in curves):
            continue
        falling = np.minimum.accumulate(list(controls.values()))    # what counts is when the control had a loss first
        for size, loss in ours.items():
            bound = "< " if loss > falling[0] else "> " if loss < falling[-1] else ""
            steps = 2 ** np.interp(-loss, -falling, np.log2(list(controls)))
            yield name, f"{size:,.0f}", f"{loss:.4f}", f"{bound}{steps / size:.2f} × the steps"


def table(*rows):
    """Rows of text as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + "\n" for row in rows)


def report(axis, verdicts, control="ngpt"):
    """The verdict as text."""
    def interval(drift):
        return "-" if drift is None else f"{drift[0]:+.2f} [{drift[0] - drift[1]:+.2f}, {drift[0] + drift[1]:+.2f}]"

    def regret(judged):
        return "-" if judged.regret is None else f"{'> ' * judged.bound}{judged.regret:.4f}".replace("inf", "diverges")

    best = "η*" if verdicts.keys() <= rules.COLUMNS.keys() else "×*"
    needed = list(steps_needed(verdicts, control)) if axis == "steps" else []
    paired = [f"less {control}'s [95 % interval]"] * any(verdict.difference for verdict in verdicts.values())
    powers = [(name, *(f"{verdict.powers[key]:+.2f} → {verdict.powers[key] + verdict.drift[0]:+.2f}" if key in verdict.powers else "-"
                       for key in rules.TENSOR_CLASSES)) for name, verdict in verdicts.items() if verdict.drift]
    tables = [
        [("column", axis, "seeds", f"log2 {best}", best, "best loss", "regret", "|α|", "grid"),
         *((name, f"{size:,.0f}", str(len(curve.complete)), f"{curve.optimum:.2f}", f"{2 ** curve.optimum:.5f}",
            f"{curve.mean[curve.best]:.4f}", regret(curve), f"{curve.alpha:.3f}".replace("nan", "-"), curve.grid)
           for name, verdict in verdicts.items() for size, curve in verdict.curves.items())],
        [("column", "drift [95 % interval]", *paired, "worst regret", "same best η?"),
         *((name, interval(verdict.drift), *[interval(verdict.difference) for _ in paired], regret(verdict), verdict.same)
           for name, verdict in verdicts.items())],
        [("column", "steps", "loss", f"for it {control} needs"), *needed],
        [(f"power of {axis} in η of", *rules.TENSOR_CLASSES), *powers]]
    return "\n".join((
        *(table(*rows) for rows in tables if len(rows) > 1),
        f"drift: change of log2 {best} a doubling of {axis}. regret: loss at the smallest size's {best}, less the best.",
        "|α|: eigen learning rates, mean at the end. needs: steps at its own best η to reach that loss. power: the table's",
        "exponent → the exponent that would have removed the drift, if every class is shifted equally."))


def searched(runs):
    """The hyperparameters of a random search: those with five values or more, if there are several; [] for other runs."""
    keys = [key for key in SEARCHED if len({run[key] for run in runs}) >= 5]
    alike = all(len({run[key] for run in runs}) == 1 for key in ("parametrization", *SIZES))
    center = {key: statistics.mode(run[key] for run in runs) for key in keys}
    return keys if alike and len(keys) > 1 and any(sum(run[key] != center[key] for key in keys) > 1 for run in runs) else []


def rank(runs, keys):
    """([(loss at the seeds' common level, number of seeds, values of keys)], best first; a seed's scatter in nats or nan)."""
    tried = list(dict.fromkeys(tuple(run[key] for key in keys) for run in runs))
    _, _, loss, mean = losses({(tried.index(tuple(run[key] for key in keys)), run["seed"]): run for run in runs})
    finite = np.isfinite(loss)
    repeats = np.where(finite, loss, math.nan)[:, finite.sum(0) > 1]
    repeats = repeats[np.isfinite(repeats).any(1)]
    freedom, scatter = np.isfinite(repeats).sum() - sum(repeats.shape) + 1, math.nan
    if repeats.size and freedom > 0:
        residual = repeats - np.nanmean(repeats, axis=0)
        scatter = math.sqrt(np.nansum((residual - np.nanmean(residual, axis=1, keepdims=True)) ** 2) / freedom)
    return sorted(zip(mean.tolist(), finite.sum(0).tolist(), tried)), scatter


def report_search(ranked, scatter, keys):
    """The best runs of a search, ranges to widen where the best lies in a range's outer tenth, and options, as text."""
    best = ranked[0][0]
    over = [f"{loss - best:.4f}" if math.isnan(scatter) else f"{(loss - best) / scatter:.1f} σ" for loss, *_ in ranked[:5]]
    lines = [table(("loss", "over the best", "seeds", *keys), *(
        (f"{loss:.4f}", distance, str(seeds), *(f"{value:.4g}" for value in values))
        for (loss, seeds, values), distance in zip(ranked, over)))]
    for i, key in enumerate(keys):
        logs = [math.log(values[i]) for _, _, values in ranked if values[i] > 0]
        place = (math.log(ranked[0][2][i]) - min(logs)) / np.ptp(logs) if ranked[0][2][i] > 0 else 0.5
        if not 0.1 <= place <= 0.9:
            lines.append(f"widen {key} {'downwards' if place < 0.1 else 'upwards'}: the best of {math.exp(min(logs)):.3g} to "
                         f"{math.exp(max(logs)):.3g} is {ranked[0][2][i]:.3g}")
    diverged = sum(loss == math.inf for loss, *_ in ranked)
    lines += [f"{len(ranked)} settings, {diverged} diverged; distance in " + (
        "nats, as no setting was run with several seeds" if math.isnan(scatter) else f"scatters of a seed, σ = {scatter:.4f} nats")]
    return "\n".join((*lines, " ".join(f"--{key}={value:.4g}" for key, value in zip(keys, ranked[0][2]))))


def figure_of(count, sharex):
    """A figure and its `count` panels, in two rows from four on. Raises ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the picture needs matplotlib: pip install matplotlib") from None
    down = 1 + (count > 3)
    across = math.ceil(count / down)
    figure = Figure(figsize=(4.6 * across, 4.4 * down), dpi=120, layout="constrained")
    panels = figure.subplots(down, across, sharex=sharex, sharey=True, squeeze=False).ravel()
    for panel in panels[count:]:
        panel.remove()
    for panel in panels:
        panel.tick_params(labelsize=13, labelbottom=True)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("validation loss, nats a token", fontsize=15)
    return figure, panels[:count]


def draw_search(ranked, keys, path):
    """Draws a panel a hyperparameter: loss against it, a star at the best."""
    figure, panels = figure_of(len(keys), sharex=False)
    for i, (panel, key) in enumerate(zip(panels, keys)):
        panel.semilogx([values[i] for _, _, values in ranked], [loss for loss, *_ in ranked], "o", color="C0", alpha=0.6)
        panel.semilogx(ranked[0][2][i], ranked[0][0], "*", color="C1", ms=22, mec="black")
        panel.set_xlabel(key, fontsize=15)
    figure.savefig(path)


def draw(axis, verdicts, path):
    """Draws a panel a column: a curve a size, thin ones for the seeds, a star at each best η, a dotted line at the smallest size's."""
    figure, panels = figure_of(len(verdicts), sharex=True)
    from matplotlib import colormaps, ticker
    sizes = sorted({size for verdict in verdicts.values() for size in verdict.curves})
    colors = dict(zip(sizes, colormaps["plasma"](np.linspace(0, 0.85, len(sizes)))))
    near = []       # the losses that the picture must show; far to the right they can be of any height
    for panel, (name, verdict) in zip(panels, verdicts.items()):
        for size, curve in verdict.curves.items():
            color, diverged = colors[size], np.isinf(curve.mean)
            near.extend(curve.loss[:, max(curve.best - 3, 0):curve.best + 4].ravel())
            for loss in curve.loss:
                panel.plot(curve.x[loss == loss], loss[loss == loss], ".-", color=color, lw=0.7, ms=3, alpha=0.5)
            panel.plot(curve.x[~diverged], curve.mean[~diverged], "o-", color=color, lw=2.2, ms=5, label=f"{size:,.0f}")
            panel.plot(curve.x[diverged], 0.97 + 0 * curve.x[diverged], "x", color=color, transform=panel.get_xaxis_transform())
            if curve.radius:        # else the best is not known
                bottom = min(loss_at(curve, curve.optimum), curve.mean[curve.best])
                panel.plot(curve.optimum, bottom, "*", color=color, ms=20, mec="black", zorder=5)
        panel.axvline(verdict.curves[min(verdict.curves)].optimum, color="gray", lw=1.2, ls=":")
        slope, half = verdict.drift or (math.nan, math.inf)
        title = f"{name}: drift {slope:+.2f}" + f" ± {half:.2f}" * (half < math.inf)
        panel.set_title(title if verdict.drift else name, fontsize=17)
        panel.set_xlabel("learning rate η" if name in rules.COLUMNS else "multiplier of the class's η", fontsize=15)
        panel.xaxis.set_major_locator(ticker.MultipleLocator(1))
        panel.xaxis.set_major_formatter(lambda x, _: f"$2^{{{x:g}}}$")
    near = np.array(near)[np.isfinite(near)]
    if len(near):
        panels[0].set_ylim(near.min() - 0.05 * np.ptp(near) - 1e-3, near.max() + 0.05 * np.ptp(near) + 1e-3)
    max(panels, key=lambda panel: len(panel.get_legend_handles_labels()[1])).legend(title=axis, fontsize=13, title_fontsize=13)
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(usage="python results/verdict.py RESULTS.csv [options]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("results", metavar="RESULTS.csv")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the picture, too")
    parser.add_argument("--columns", type=lambda text: text.split(","), help="show these columns only, as in ngpt,nugpt")
    parser.add_argument("--control", default="ngpt", choices=rules.COLUMNS, help="the column that others are compared to")
    parser.add_argument("--axis", choices=("width", "depth", "steps", "parameters"),
                        help="what the size is; default: what differs between the runs, parameters if several do")
    parser.error = lambda message: sys.exit(f"verdict.py: {message} (see python results/verdict.py --help)")
    args = parser.parse_args()
    try:
        runs = read_results(args.results)
        if len(dtypes := sorted({run["dtype"] for run in runs})) > 1:
            print(f"Runs of dtype {' and '.join(dtypes)} stand side by side; they differ in rounding.\n")
        if keys := searched(runs):
            ranked, scatter = rank(runs, keys)
            print(report_search(ranked, scatter, keys))
        else:
            axis, verdicts = judge(runs, args.axis, args.control)
            if unknown := set(args.columns or ()) - verdicts.keys():
                raise ValueError(f"{args.results} has {', '.join(verdicts)}, but not {', '.join(sorted(unknown))}")
            verdicts = {name: verdicts[name] for name in args.columns or verdicts}
            print(report(axis, verdicts, args.control))
        if args.plot:
            draw_search(ranked, keys, args.plot) if keys else draw(axis, verdicts, args.plot)
    except (ValueError, OSError) as error:
        sys.exit(f"verdict.py: {error}")


if __name__ == "__main__":
    main()
