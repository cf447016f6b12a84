"""
The verdict on a sweep of train.py: does the best learning rate stay where it is as models grow?

    python results/verdict.py results/width_1600.csv --plot=results/width_1600.png
"""
import argparse
import csv
import functools
import math
import os
import statistics
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from parametrize import COLUMNS, TENSOR_CLASSES, parametrize  # noqa: E402

SIZES = ["width", "depth", "steps", "base_width", "base_depth", "base_steps"]
MULTS = [f"{tensors}_lr_mult" for tensors in TENSOR_CLASSES]
RECIPE = ["warmup_steps", "weight_decay"]       # may differ between columns: a plain GPT needs some, a normalized one none
NUMBERS = {**dict.fromkeys((*SIZES, "seed", "parameters", "warmup_steps"), int),
           **dict.fromkeys((*MULTS, "weight_decay", "learning_rate", "val_loss"), float)}
ALPHAS = ["attn_alpha", "mlp_alpha"]
RUN = [key for key in NUMBERS if key not in ("parameters", "val_loss")]
MAY_DIFFER = {      # between the runs of one sweep
    "parametrization", "width", "depth", "steps", "learning_rate", "seed", "micro_batch_size", "out_dir", "results",
    "resume", "sample_only", "prompt", "sample_tokens", "log_every", "eval_every", "checkpoint_every", "alignment_every",
    "device", "compile", "bench", *RECIPE}


def log2(number):
    """Rounded, so that equal learning rates are equal whatever the way they were computed. Raises ValueError for 0."""
    return round(math.log2(number), 4)


def one_class_at_a_time(runs):
    """Whether the runs have one η and vary the multipliers of tensor classes instead."""
    return len({float(run["learning_rate"]) for run in runs}) == 1 and any(len({run[key] for run in runs}) > 1 for key in MULTS)


def read_run(options, keys, where):
    """{option: text} with numbers as numbers and inf as a diverged run's val_loss. Raises ValueError."""
    run = {"status": "", **dict.fromkeys(RECIPE, 0), **dict.fromkeys(MULTS, 1), "unembedding_lr_mult": -1, **options}   # train.py's defaults
    for key in keys:
        try:
            run[key] = NUMBERS[key](run[key])
            if key == "learning_rate":
                log2(run[key])
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ValueError(f"{where}: {key} must be a possible number, not {run.get(key)!r}") from None
    if run["status"] == "diverged" or math.isnan(run.get("val_loss", 0)):
        run["val_loss"] = math.inf
    return run


def read_rows(path):
    """The rows of a .csv file as dictionaries of text. Raises ValueError if it cannot be read."""
    try:
        with open(path, newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read {path}: {error}") from None


def read_results(path):
    """The runs in a results file of train.py. Raises ValueError if it is none, or if its runs are not of one sweep."""
    rows = read_rows(path)
    for key in ("parametrization", "step", "status", "learning_rate", "val_loss"):
        if not rows or key not in rows[0]:
            raise ValueError(f"{path} is no results file of train.py: it has no {f'column {key}' if rows else 'rows'}")
    runs = [read_run(row, NUMBERS, f"{path}, line {i}") for i, row in enumerate(rows, 2)]
    may_differ = MAY_DIFFER.union(MULTS if one_class_at_a_time(runs) else ())
    for key in list(rows[0])[:list(rows[0]).index("step")]:     # the configuration; what comes then is the outcome
        if key not in may_differ and len(values := {str(row[key]) for row in rows}) > 1:
            raise ValueError(f"{path} mixes runs with {key} = {' and '.join(sorted(values))}; give each its own file")
    recipes(runs)
    return runs


def recipe(run):
    """(warm-up steps, weight decay) of a run, which are part of what makes it the same run as another."""
    return tuple(run[key] for key in RECIPE)


def recipes(runs):
    """{(column, steps): its recipe}. Raises ValueError if runs of one column and length differ in it."""
    found = {}
    for run in runs:
        its = found.setdefault((run["parametrization"], run["steps"]), recipe(run))
        if its != recipe(run):
            raise ValueError(f"{run['parametrization']} has {' and '.join(RECIPE)} of {its} and of {recipe(run)} in runs of {run['steps']} "
                             "steps; give each its own file")
    return found


cached = functools.cache(parametrize)


def as_column(run, name):
    """
    (model, shift) of column `name` at a run's size. Columns with equal models are the same run wherever log2(η) + shift is
    equal. So at the base all columns share their runs. And over steps, at the base width and depth, they differ in the power
    of m_t alone, which only multiplies η: one set of runs shows what happens with it and, η shifted, what happens without.
    """
    sizes = [run[key] for key in SIZES]
    mults = {key: run[key] for key in MULTS}
    initial, scale = cached(name, *sizes, **mults)
    total = sum(scale.values()) or 1
    model = initial | {tensors: rate / total for tensors, rate in scale.items()}
    return (*sizes, *recipe(run), *(f"{key} {number:.6g}" for key, number in model.items())), math.log2(total)


def identity(run):
    """Equal for runs that are the same, whatever their columns."""
    model, shift = as_column(run, run["parametrization"])
    return model, run["seed"], round(log2(run["learning_rate"]) + shift, 4)


def curve(runs):
    """{(log2 η, seed): run} of one column at one size as a curve with its best η, the window around it, and what to add."""
    seeds, x = sorted({seed for _, seed in runs}), np.array(sorted({x for x, _ in runs}))
    loss = np.array([[runs.get((a, seed), {}).get("val_loss", math.nan) for a in x] for seed in seeds])     # nan: not run
    # Seeds differ mostly by a shift. Each is moved to the common level, lest an η that only some have run be misplaced.
    shared = np.isfinite(loss).all(0)
    level = loss[:, shared].mean(1, keepdims=True) if shared.any() else np.zeros((1, 1))
    mean = np.nanmean(loss - level, axis=0) + level.mean()
    best = int(mean.argmin())
    # The five η nearest the best, as many on its left as on its right: three, or one, if others are missing or diverged.
    half = max((k for k in (1, 2) if k <= best < len(x) - k and np.isfinite(mean[best - k:best + k + 1]).all()), default=0)
    window, step = slice(best - half, best + half + 1), float(np.diff(x).min()) if len(x) > 1 else 0.5
    add = [(a, seed) for a in x[max(best - 2, 0):best + 3].tolist() for seed in seeds if (a, seed) not in runs]
    for edge, outward, beyond in ((x[0], -step, mean[:best][::-1]), (x[-1], step, mean[best + 1:])):
        if not np.isinf(beyond[:2]).any():      # behind a divergence there is nothing to look for
            add += [(round(float(edge) + outward * i, 4), seed) for i in range(1, 3 - len(beyond)) for seed in seeds]
    alphas = [float(runs[x[best], seed].get(key) or "nan") for seed in seeds if (x[best], seed) in runs for key in ALPHAS]
    return dict(x=x, loss=loss, seeds=seeds, mean=mean, best=best, half=half, window=window, add=add, eta=float(x[best]),
                alpha=float(np.mean(alphas)),       # mean |α| at the end of the best runs
                complete=[i for i in range(len(seeds)) if np.isfinite(loss[i, window]).all()])


def fit(curves):
    """
    {(size, seed): the optimum of its curve}: loss = a[size, seed] + c · (log2 η - optimum[size, seed])² over the windows, one c
    for all curves of a column, by least squares. Nothing where no size has its best inside its grid, or where c is not positive.
    """
    windows = {(size, one["seeds"][i]): (one["x"][one["window"]], one["loss"][i, one["window"]])
               for size, one in curves.items() if one["half"] for i in one["complete"]}
    if not windows:
        return {}
    of = np.eye(len(windows)).repeat([len(x) for x, _ in windows.values()], axis=0)     # (points, curves): which curve a point is of
    u = np.concatenate([x - x.mean() for x, _ in windows.values()])
    loss = np.concatenate([loss for _, loss in windows.values()])
    *lines, c = np.linalg.lstsq(np.column_stack((of, of * u[:, None], u * u)), loss, rcond=None)[0]     # of lines: levels, then slopes
    return {key: x.mean() - slope / (2 * c) for (key, (x, _)), slope in zip(windows.items(), lines[len(windows):])} if c > 0 else {}


def student(freedom):
    """The 97.5 % quantile of Student's t. With t = √freedom · tan(θ) its density is cos(θ)^(freedom - 1)."""
    theta = np.linspace(0, math.pi / 2, 20_001)
    density = np.cos(theta) ** (freedom - 1)
    area = np.cumsum(density) - (density + density[0]) / 2      # trapezoids
    return math.sqrt(freedom) * math.tan(np.interp(0.95 * area[-1], area, theta))


def drift(optima):
    """
    Slope of the optima over log2 size, in octaves a doubling, half its 95 % interval, and the number of seeds behind it;
    None for fewer than two sizes. All η of a curve share its luck, so the unit is the curve: the interval comes from the
    scatter of the optima about parallel lines, one a seed, with (curves - seeds - 1) degrees of freedom.
    """
    seeds = [seed for seed in {seed for _, seed in optima} if len({size for size, its in optima if its == seed}) > 1]
    if not seeds:
        return None
    groups = [np.array([(math.log2(size), x) for (size, its), x in optima.items() if its == seed]) for seed in seeds]
    size, x = np.concatenate([group - group.mean(0) for group in groups]).T
    slope, freedom = size @ x / (size @ size), len(x) - len(seeds) - 1
    rest = x - slope * size
    half = student(freedom) * math.sqrt(rest @ rest / freedom / (size @ size)) if freedom else math.inf
    return float(slope), half, len(seeds)


def loss_at(one, x):
    """Mean loss of a curve at log2 η = x, by a parabola through the three nearest points; inf where one of them diverged."""
    near = np.argsort(abs(one["x"] - x), kind="stable")[:3]
    usable = len(near) == 3 and np.isfinite(one["mean"][near]).all()
    return float(np.polyval(np.polyfit(one["x"][near], one["mean"][near], 2), x)) if usable else math.inf


def curves_of(name, sizes):
    """{size: curve} of column `name` from {size: runs}: its own runs, those it shares, and where it has none, those of others
    that are its own at another η."""
    curves, its = {}, recipes(run for here in sizes.values() for run in here if run["parametrization"] == name)
    for size, here in sizes.items():
        own, runs = any(run["parametrization"] == name for run in here), {}
        here = [run for run in here if recipe(run) == its.get((name, run["steps"]), recipe(run))]
        for run in here:
            (model, its_shift), (wanted, shift) = as_column(run, run["parametrization"]), as_column(run, name)
            if model == wanted and (abs(its_shift - shift) < 1e-6 or not own):
                runs[round(log2(run["learning_rate"]) + its_shift - shift, 4), run["seed"]] = run
        if runs:
            curves[size] = dict(curve(runs), run={**here[0], "parametrization": name}, own=own)
    return curves


def curves_of_class(key, sizes, center):
    """{size: curve} over the multiplier `key` of one tensor class, from the runs whose other multipliers are at their center."""
    curves = {}
    for size, here in sizes.items():
        runs = {(log2(run[key]), run["seed"]): run for run in here
                if all(run[other] == center[other] for other in MULTS if other != key)}
        if runs:
            curves[size] = dict(curve(runs), run={**here[0], **center}, own=True)
    return curves


def judge_column(curves, key):
    """The verdict on one column from its curves {size: curve}, which get their best η, regret and what is wrong with them."""
    optima = fit(curves)
    for size, one in curves.items():
        one["eta"] = float(np.mean([x for (its, _), x in optima.items() if its == size] or one["eta"]))
        window = one["x"][one["window"]]
        one["outside"] = bool(one["half"]) and not window[0] <= one["eta"] <= window[-1]
    first, *larger = curves.values()
    known = larger if first["half"] else []
    for one in known:       # curves rise outwards: outside a grid, its edge is a lower bound
        nearest = float(np.clip(first["eta"], one["x"][0], one["x"][-1]))
        there = loss_at(one, nearest)
        best = min(there, float(one["mean"][one["best"]]), loss_at(one, one["eta"]))
        one["regret"] = there - best if there < math.inf else math.inf
        one["bound"] = nearest != first["eta"]
    best = [one["x"][one["best"]] for one in curves.values()]
    narrow = any(one["add"] or not one["half"] or one["outside"] for one in curves.values())
    small, large = (parametrize(one["run"]["parametrization"], *map(one["run"].get, SIZES))[1] for one in (first, [first, *larger][-1]))
    doublings = math.log2(max(curves) / min(curves)) or math.nan
    return dict(
        key=key, curves=curves, optima=optima, drift=drift(optima), difference=None,
        regret=dict(regret=max(one["regret"] for one in known), bound=any(one["bound"] for one in known)) if known else {},
        # Lingle's criterion (arXiv:2404.05728), but grids that η was shifted onto need not have equal points
        same="?" if narrow or not larger else "Yes" if max(best) - min(best) < np.diff(first["x"]).min() / 2 else "No",
        powers={tensors: math.log2(large[tensors] / small[tensors]) / doublings for tensors in small
                if key in ("learning_rate", f"{tensors}_lr_mult")})


def judge(rows, axis=None, control="ngpt"):
    """
    The verdict on runs of read_results: (axis, {column: {"curves": {size: curve}, "drift", "difference", "regret", …}}).
    Columns are those of the runs, and also the control and nugpt where runs of other names are theirs at several sizes.
    Where runs vary the multipliers of tensor classes one at a time, a class takes the place of a column, its multiplier η's.
    Raises ValueError if the sizes do not lie on one axis, or for multipliers of several columns, or of 0.
    """
    varying = [key for key in ("width", "depth", "steps") if len({run[key] for run in rows}) > 1]
    axis = axis or ("parameters" if len(varying) > 1 else (varying or ["width"])[0])
    sizes, verdicts = {}, {}
    for run in sorted(rows, key=lambda run: run[axis]):
        sizes.setdefault(run[axis], []).append(run)
    for size, here in sizes.items():
        if differing := [key for key in varying if len({run[key] for run in here}) > 1]:
            raise ValueError(f"runs with {axis} = {size} differ in {' and '.join(differing)}; give each its own file")
    named = {run["parametrization"] for run in rows}
    if one_class_at_a_time(rows):
        names = {tensors: key for tensors, key in zip(TENSOR_CLASSES, MULTS) if len({run[key] for run in rows}) > 1}
        center = {key: statistics.mode(run[key] for run in rows) for key in MULTS}
        if len(named) > 1 or not all(run[key] > 0 for run in rows for key in names.values()):
            raise ValueError("a sweep of one tensor class at a time must be of one column, its multipliers positive numbers")
        return axis, {name: judge_column(curves_of_class(key, sizes, center), key) for name, key in names.items()}
    for name in COLUMNS:
        if name in {*named, control, "nugpt"}:
            curves = curves_of(name, sizes)
            if len(curves) > 1 or name in named:
                verdicts[name] = judge_column(curves, "learning_rate")
    theirs = verdicts.get(control, {"optima": {}})["optima"]
    for name, verdict in verdicts.items():
        if name != control:
            mine = verdict["optima"]
            verdict["difference"] = drift({key: mine[key] - theirs[key] for key in mine.keys() & theirs.keys()})
    return axis, verdicts


def steps_needed(verdicts, control):
    """
    Rows (column, steps, best loss, "2.1 × the steps"): how long the control must train for that loss. Both at their own best η, on
    the seeds they share; the control's losses are a polygon over log steps. Only sizes whose best η lies inside its grid count.
    """
    def best_losses(name, seeds):
        return {size: np.mean([one["loss"][one["seeds"].index(seed), one["best"]] for seed in seeds])
                for size, one in verdicts[name]["curves"].items() if one["half"]}

    for name in verdicts if control in verdicts else ():
        ones = [*verdicts[name]["curves"].values(), *verdicts[control]["curves"].values()]
        seeds = set.intersection(*(set(one["seeds"]) for one in ones))
        theirs = best_losses(control, seeds) if seeds else {}
        if name == control or not all(one["own"] for one in ones) or not theirs:
            continue
        lengths, falling = list(theirs), np.minimum.accumulate(list(theirs.values()))      # what counts is when it had a loss first
        for size, loss in best_losses(name, seeds).items():
            bound = "< " if loss > falling[0] else "> " if loss < falling[-1] else ""
            steps = 2 ** np.interp(-loss, -falling, np.log2(lengths))
            yield name, f"{size:,}", f"{loss:.4f}", f"{bound}{steps / size:.2f} × the steps"


def table(*rows):
    """Rows of text as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + "\n" for row in rows)


def report(axis, verdicts, control="ngpt"):
    """The verdict as text."""
    def interval(pair):
        return f"{pair[0]:+.2f} [{pair[0] - pair[1]:+.2f}, {pair[0] + pair[1]:+.2f}]" if pair else "-"

    def regret(one):
        return f"{'> ' * one['bound']}{one['regret']:.4f}".replace("inf", "diverges") if "regret" in one else "-"

    def grid(one):
        new = " ".join(f"2^{x:.5g}" for x in sorted({x for x, _ in one["add"]}))
        return (f"add {new}" if new else "diverges near the best" if one["half"] < 2 else
                "its parabola's best is outside its window" if one["outside"] else "wide enough")

    eta = "η*" if all(one["key"] == "learning_rate" for one in verdicts.values()) else "×*"
    what = "η*" if eta == "η*" else "the best multiplier ×* of one class's η, others kept"
    needed = list(steps_needed(verdicts, control)) if axis == "steps" else []
    powers = [(name, *(f"{one['powers'][key]:+.2f} → {one['powers'][key] + one['drift'][0]:+.2f}" if key in one["powers"] else "-"
                       for key in TENSOR_CLASSES)) for name, one in verdicts.items() if one["drift"]]
    less = [one["difference"] for one in verdicts.values()]
    return "\n".join((
        table(("column", axis, "seeds", f"log2 {eta}", eta, "best loss", "regret", "|α|", "grid"),
              *((name, f"{size:,}", str(len(one["complete"])), f"{one['eta']:.2f}", f"{2 ** one['eta']:.5f}",
                 f"{one['mean'][one['best']]:.4f}", regret(one), f"{one['alpha']:.3f}".replace("nan", "-"), grid(one))
                for name, verdict in verdicts.items() for size, one in verdict["curves"].items())),
        table(("column", "drift [95 % interval]", *[f"less {control}'s [95 % interval]"] * any(less), "worst regret", "same best η?"),
              *((name, interval(one["drift"]), *[interval(one["difference"])] * any(less), regret(one["regret"]), one["same"])
                for name, one in verdicts.items())),
        *([table(("column", "steps", "loss", f"for it {control} needs"), *needed)] if needed else ()),
        *([table((f"power of {axis} in η of", *TENSOR_CLASSES), *powers)] if powers else ()),
        f"drift: of log2 {what}, a doubling of {axis}.",
        f"regret: loss at the smallest size's {eta}, less the best. |α|: eigen learning rates, mean at the end. power: in the table",
        "→ what would have left no drift, had all tensor classes been changed by as much.",
        *([f"needs: how long {control} must be trained, at its own best η, for that loss."] if needed else ())))


def plotting():
    """(matplotlib, a function that makes a figure of a width and height in inches). Raises ValueError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the picture needs matplotlib: pip install matplotlib") from None
    return matplotlib, lambda width, height: Figure(figsize=(width, height), dpi=150, layout="constrained")


def save(figure, path):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path)


def draw(axis, verdicts, path):
    """
    The picture of the verdict: a panel a column, a curve a size, thin ones for the seeds, a star at each η*, a dotted line
    at the smallest size's. Raises ValueError without matplotlib, or if it cannot write such a file.
    """
    matplotlib, figure_of = plotting()
    sizes = sorted({size for verdict in verdicts.values() for size in verdict["curves"]})
    colors = dict(zip(sizes, matplotlib.colormaps["plasma"](np.linspace(0, 0.85, len(sizes)))))
    down = 1 + (len(verdicts) > 3)
    across = math.ceil(len(verdicts) / down)
    figure = figure_of(max(5, 3.3 * across), 3.9 * down)
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
    for panel in panels[len(verdicts):]:
        panel.remove()
    near = []       # the losses that the picture must show; far to the right they can be of any height
    for panel, (name, verdict) in zip(panels, verdicts.items()):
        for size, one in verdict["curves"].items():
            color, x, mean, diverged = colors[size], one["x"], one["mean"], np.isinf(one["mean"])
            near.extend(one["loss"][:, max(one["best"] - 3, 0):one["best"] + 4].ravel())
            for loss in one["loss"]:
                run = ~np.isnan(loss)
                panel.plot(x[run], loss[run], ".-", color=color, lw=0.5, ms=2.5, alpha=0.5)
            panel.plot(x[~diverged], mean[~diverged], "o-", color=color, lw=1.6, ms=3.5, label=f"{size:,}")
            panel.plot(x[diverged], np.full(diverged.sum(), 0.97), "x", color=color, transform=panel.get_xaxis_transform())
            if one["half"]:     # else its best is not known
                bottom = min(loss_at(one, one["eta"]), mean[one["best"]])
                panel.plot(one["eta"], bottom, "*", color=color, ms=13, mec="black", zorder=5)
        panel.axvline(verdict["curves"][min(verdict["curves"])]["eta"], color="gray", lw=0.8, ls=":")
        slope, half, seeds = verdict["drift"] or (math.nan, math.nan, 0)
        interval = f"± {half:.2f} octaves a doubling" if half < math.inf else "octaves a doubling"
        panel.set_title(name + f"\ndrift {slope:+.2f} {interval}" * bool(seeds), fontsize=10)
        panel.set_xlabel("learning rate η, ★ the best" if verdict["key"] == "learning_rate" else "multiplier of its η, ★ the best")
        panel.xaxis.set_major_locator(matplotlib.ticker.MultipleLocator(1))
        panel.xaxis.set_major_formatter(lambda x, _: f"$2^{{{x:g}}}$")
        panel.tick_params(labelbottom=True)
        panel.grid(alpha=0.25)
    near = np.array(near)[np.isfinite(near)]
    if len(near):
        panels[0].set_ylim(near.min() - 0.05 * np.ptp(near) - 1e-3, near.max() + 0.05 * np.ptp(near) + 1e-3)
    panels[0].set_ylabel("validation loss, nats a token")
    max(panels, key=lambda panel: len(panel.get_legend_handles_labels()[1])).legend(title=axis, fontsize=8, title_fontsize=8)
    save(figure, path)


def main():
    parser = argparse.ArgumentParser(usage="python results/verdict.py RESULTS.csv [options]", allow_abbrev=False, description=(
        "Judge a sweep made with train.py --results=RESULTS.csv: does the best learning rate stay where it is?"))
    parser.add_argument("results", metavar="RESULTS.csv")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the picture, too")
    parser.add_argument("--axis", choices=("width", "depth", "steps", "parameters"),
                        help="what the size is; default: what differs between the runs, parameters if several do")
    parser.add_argument("--control", default="ngpt", choices=COLUMNS, help="the column that others are compared to [ngpt]")
    parser.error = lambda message: sys.exit(f"verdict.py: {message} (see python results/verdict.py --help)")
    args = parser.parse_args()
    try:
        axis, verdicts = judge(read_results(args.results), args.axis, args.control)
        print(report(axis, verdicts, args.control))
        if args.plot:
            draw(axis, verdicts, args.plot)
    except (ValueError, OSError) as error:
        sys.exit(f"verdict.py: {error}")


if __name__ == "__main__":
    main()
