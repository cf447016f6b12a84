"""Tables and pictures of what results/verdict.py and results/alignment.py found."""
import math

import numpy as np

from parametrize import COLUMNS, TENSOR_CLASSES

EXPONENTS = [f"{tensors} {exponent}" for tensors in ("hidden", "unembedding") for exponent in "αων"]
CHANGES = ["weights of blocks, |ΔW| / |W|", "last hidden state, |Δh|", "logits, RMS of Δz"]


def table(*rows):
    """Rows of text as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + "\n" for row in rows)


def steps_needed(verdicts, control):
    """Rows (column, steps, best loss, "2.1 × the steps"): how long the control must train for that loss. Both are at
    their best η inside the grid, on the seeds they share. The control's losses are a polygon over log steps."""
    for name in verdicts if control in verdicts else ():
        curves = [*verdicts[name].curves.values(), *verdicts[control].curves.values()]
        seeds = set.intersection(*(set(curve.seeds) for curve in curves))
        reached, falling = ({size: np.mean([curve.loss[curve.seeds.index(seed), curve.best] for seed in seeds])
                             for size, curve in verdicts[column].curves.items() if curve.radius and seeds}
                            for column in (name, control))
        if name == control or not falling or not all(curve.own for curve in curves):
            continue
        lengths, falling = list(falling), np.minimum.accumulate(list(falling.values()))     # when it had a loss first
        for steps, loss in reached.items():
            bound = "< " if loss > falling[0] else "> " if loss < falling[-1] else ""
            needed = 2 ** np.interp(-loss, -falling, np.log2(lengths))
            yield name, f"{steps:,.0f}", f"{loss:.4f}", f"{bound}{needed / steps:.2f} × the steps"


def report(axis, verdicts, control):
    """The verdicts {column: verdict} of verdict.judge as text."""
    def interval(drift):
        return "-" if drift is None else f"{drift[0]:+.2f} [{drift[0] - drift[1]:+.2f}, {drift[0] + drift[1]:+.2f}]"

    def regret(judged):
        return "-" if judged.regret is None else f"{'> ' * judged.bound}{judged.regret:.4f}".replace("inf", "diverges")

    def power(verdict, key):
        table, drift = verdict.powers.get(key), verdict.drift[0]
        return "-" if table is None else f"{table:+.2f} → {table + drift:+.2f}"

    needed = steps_needed(verdicts, control) if axis == "steps" else ()
    best = "η*" if verdicts.keys() <= COLUMNS.keys() else "×*"
    paired = [f"less {control}'s [95 % interval]"] * any(verdict.difference for verdict in verdicts.values())
    tables = [
        [("column", axis, "seeds", f"log2 {best}", best, "best loss", "regret", "|α|", "grid"),
         *((name, f"{size:,.0f}", str(len(curve.complete)), f"{curve.optimum:.2f}", f"{2 ** curve.optimum:.5f}",
            f"{curve.mean[curve.best]:.4f}", regret(curve), f"{curve.alpha:.3f}".replace("nan", "-"), curve.grid)
           for name, verdict in verdicts.items() for size, curve in verdict.curves.items())],
        [("column", "drift [95 % interval]", *paired, "worst regret", "same best η?"),
         *((name, interval(verdict.drift), *[interval(verdict.difference) for _ in paired], regret(verdict),
            verdict.same) for name, verdict in verdicts.items())],
        [("column", "steps", "loss", f"for it {control} needs"), *needed],
        [(f"power of {axis} in η of", *TENSOR_CLASSES),
         *((name, *(power(verdict, key) for key in TENSOR_CLASSES))
           for name, verdict in verdicts.items() if verdict.drift)]]
    return "\n".join((
        *(table(*rows) for rows in tables if len(rows) > 1),
        f"drift: change of log2 {best} a doubling of {axis}. |α|: eigen learning rates, mean at the end.",
        f"regret: loss at the smallest size's {best}, less the best. needs: steps at the best η to reach that loss.",
        "power: the table's exponent → the one that would have removed the drift, if every class is shifted equally."))


def report_search(ranked, scatter, keys):
    """The best runs of a search, as options to paste, and the ranges in whose outer tenth the best lies, as text."""
    best, _, chosen = ranked[0]
    unit = "nats" if math.isnan(scatter) else f"scatters of a seed, {scatter:.4f} nats"
    lines = [table(("loss", "over the best", "seeds", "options to paste"), *(
        (f"{loss:.4f}", f"{loss - best:.4f}" if math.isnan(scatter) else f"{(loss - best) / scatter:.1f}", str(seeds),
         " ".join(f"--{key}={value:.4g}" for key, value in zip(keys, values))) for loss, seeds, values in ranked[:5]))]
    for i, key in enumerate(keys):
        tried = [values[i] for _, _, values in ranked if values[i] > 0]
        low, high = min(tried), max(tried)
        place = math.log(chosen[i] / low) / math.log(high / low) if low <= chosen[i] and low < high else 0.5
        if abs(place - 0.5) > 0.4:
            where = "downwards" if place < 0.5 else "upwards"
            lines.append(f"widen {key} {where}: the best is {chosen[i]:.3g} of {low:.3g} to {high:.3g}")
    diverged = sum(loss == math.inf for loss, _, _ in ranked)
    return "\n".join((*lines, f"{len(ranked)} settings, {diverged} diverged. Over the best: in {unit}."))


def report_alignment(name, runs):
    """The exponents of a column as text: loss-weighted at each width, and as slopes over widths, free of constants."""
    def cells(mean, half):
        return ("-" if math.isnan(x) else f"{x:.2f}" + f" ± {h:.2f}" * bool(h == h) for x, h in zip(mean, half))

    near = {min(runs.steps, key=lambda step: abs(math.log(step / x))) for x in np.geomspace(1, runs.steps[-1], 6)}
    slopes = dict(zip([*runs.steps, "all, loss-weighted"], zip(*runs.mean_slopes)))
    return "\n".join((
        table(("column", "width", "seeds", *EXPONENTS), *(
            (name, str(width), str(len(runs.exponents)), *cells(mean, half))
            for width, mean, half in zip(runs.widths, *runs.mean_exponents))),
        table(("slope over widths", "after step", *EXPONENTS), *(
            (name, str(step), *cells(*slopes[step])) for step in [*sorted(near), "all, loss-weighted"])),
        "1/2: not aligned, 1: fully. α: weight changes with initial inputs, ω: initial weights with input changes,\n"
        "ν: both changes. Above: means over training, weighted by the decrease of the loss. Below: slopes of\n"
        "log RMS(W x) / (RMS(W) RMS(x)) over log width.\n"))


def steps_to_check(steps):
    """The steps nearest to 1, 10, 100, …, with their places in steps."""
    near = {min(steps, key=lambda step: abs(step - 10 ** i)) for i in range(1 + round(math.log10(steps[-1])))}
    return [(steps.index(step), step) for step in sorted(near)]


def report_coordinates(columns):
    """The power of the width in each change, as text. Raises ValueError if a column has one width only."""
    if single := [name for name, runs in columns.items() if len(runs.widths) == 1]:
        raise ValueError(f"the coordinate check needs more than one width of {' and '.join(single)}")
    return table(("power of width in", "after step", *CHANGES), *(
        (name, str(step), *(f"{power:+.2f}" for power in runs.powers[i]))
        for name, runs in columns.items() for i, step in steps_to_check(runs.steps)))


def new_figure(width, height, dpi):
    """A figure of so many inches. Raises ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the picture needs matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def figure_of(count, sharex):
    """A figure and its `count` panels, in two rows from four on."""
    down = 1 + (count > 3)
    across = math.ceil(count / down)
    figure = new_figure(4.6 * across, 4.4 * down, dpi=120)
    panels = figure.subplots(down, across, sharex=sharex, sharey=True, squeeze=False).ravel()
    for panel in panels[count:]:
        panel.remove()
    for panel in panels:
        panel.tick_params(labelsize=13, labelbottom=True)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("validation loss, nats a token", fontsize=15)
    return figure, panels[:count]


def draw_search(ranked, keys, path):
    """Draws a panel a hyperparameter that varies: loss against it, a star at the best."""
    varying = [i for i in range(len(keys)) if len({values[i] for _, _, values in ranked}) > 1]
    figure, panels = figure_of(len(varying), sharex=False)
    for panel, i in zip(panels, varying):
        panel.plot([values[i] for _, _, values in ranked], [loss for loss, _, _ in ranked], "o", color="C0", alpha=0.6)
        panel.plot(ranked[0][2][i], ranked[0][0], "*", color="C1", ms=22, mec="black")
        panel.set_xscale("log", base=2)
        panel.set_xlabel(keys[i], fontsize=15)
    figure.savefig(path)


def draw(axis, verdicts, path):
    """Draws a panel a column: a curve a size, thin ones for seeds, a star at each best η, dots at the smallest."""
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
            for x in curve.x[diverged]:
                panel.plot(x, 0.97, "x", color=color, transform=panel.get_xaxis_transform())
            if curve.radius:        # else the best is not known
                panel.plot(curve.optimum, curve.bottom, "*", color=color, ms=20, mec="black", zorder=5)
        panel.axvline(verdict.curves[min(verdict.curves)].optimum, color="gray", lw=1.2, ls=":")
        slope, half = verdict.drift or (math.nan, math.inf)
        interval = f" ± {half:.2f}" * (half < math.inf)
        panel.set_title(name + f"\ndrift {slope:+.2f}{interval} octaves a doubling" * bool(verdict.drift), fontsize=15)
        panel.set_xlabel("learning rate η" if name in COLUMNS else "multiplier of the class's η", fontsize=15)
        panel.xaxis.set_major_locator(ticker.MultipleLocator(1))
        panel.xaxis.set_major_formatter(lambda x, _: f"$2^{{{x:g}}}$")
    near = np.array(near)[np.isfinite(near)]
    if len(near):
        panels[0].set_ylim(near.min() - 0.05 * np.ptp(near) - 1e-3, near.max() + 0.05 * np.ptp(near) + 1e-3)
    fullest = max(panels, key=lambda panel: len(panel.get_legend_handles_labels()[1]))
    fullest.legend(title=axis, fontsize=13, title_fontsize=13)
    figure.savefig(path)


def draw_alignment(name, runs, path):
    """Draws exponents at the largest width, and slopes over widths, against steps; bands from seed to seed."""
    figure = new_figure(8, 3.8, dpi=150)
    panels = figure.subplots(1, 2, sharey=True)
    titles = f"{name}, width {runs.widths[-1]}", "slope over widths"
    for panel, title, values in zip(panels, titles, (runs.exponents[:, -1, :-1], runs.slopes[:, :-1])):
        for i, label in enumerate(EXPONENTS):
            color, y = ("C3", "C0", "C2")[i % 3], values[..., i]        # (seeds, S)
            panel.semilogx(runs.steps, y.mean(0), "o-" if i < 3 else "s:", color=color, ms=3, label=label)
            panel.fill_between(runs.steps, y.min(0), y.max(0), color=color, alpha=0.15, lw=0)
        panel.set(title=title, xlabel="step", ylabel="alignment exponent", ylim=(0.4, 1.05))
        panel.grid(axis="y", ls=":")
        panel.label_outer()
    panels[0].legend(fontsize=7)
    figure.savefig(path)


def draw_coordinates(columns, path):
    """Draws a panel for each change and column: the change against width, a line a step."""
    figure = new_figure(2.3 * len(columns), 6.5, dpi=150)
    panels = figure.subplots(len(CHANGES), len(columns), sharex=True, sharey="row")
    for (name, runs), below in zip(columns.items(), panels.T):
        below[0].set_title(name, fontsize=10)
        for panel, label, change in zip(below, CHANGES, runs.changes.T):        # change (S, W)
            for i, step in steps_to_check(runs.steps):
                panel.loglog(runs.widths, change[i], "o-", ms=3, label=f"step {step}")
            panel.set_xticks(runs.widths, runs.widths)
            panel.minorticks_off()
            panel.set(xlabel="width", ylabel=label)
            panel.label_outer()
    panels[0, 0].legend(fontsize=7)
    figure.savefig(path)
