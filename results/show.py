"""
Runs as a table and as curves; and all tables and pictures of verdict.py and alignment.py.

    python results/show.py out/first out/second                     print where the runs stand
    python results/show.py out/first out/second --plot=runs.png     and draw losses, |α| and s_z
"""
import argparse
import csv
import io
import math
import signal
import sys
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import parametrize
import plain
from parametrize import TENSOR_CLASSES
from prepare_data import write_aside

COLUMNS = {**parametrize.COLUMNS, **plain.COLUMNS}
# Columns are shown from nGPT to νGPT. Others follow as their own tables have them.
ORDER = ["ngpt", "mup", "depth_mup", "nugpt_full", "nugpt_none", "nugpt"]

# In a random search these are shown, and their ranges widened, on a linear scale; all others on a
# log scale. results/sweep.py spreads values on a log scale wherever a range begins above 0.
LINEAR = {"warmup_steps", "beta2", "min_lr_ratio"}


# ------------------------------------------------------------------------------------------------
# Terminals and files


def prepare_terminal():
    """Let terminals without Greek print ?, and a closed pipe end the program quietly."""
    sys.stdout.reconfigure(errors="replace")
    sys.stderr.reconfigure(errors="replace")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


class ArgumentParser(argparse.ArgumentParser):
    """Leaves with one sentence, and with exit code 1, for an impossible option."""

    def __init__(self, script, doc):
        super().__init__(
            prog=script,
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message):
        sys.exit(f"{self.prog}: {message} (see python results/{self.prog} --help)")


def read_rows(path):
    """
    (names of columns, [(line number, {column: text}), …]) of a .csv file, wherever it was saved.

    Both are empty for an empty file. A byte order mark, CRLF and blank rows do no harm. Raises
    OSError, and ValueError for what is no such table.
    """
    content = Path(path).read_bytes()
    if b"\0" in content:
        raise ValueError(f"{path} is not in UTF-8, but perhaps in UTF-16; save it as “CSV UTF-8”")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + content[: error.start].count(b"\n")
        raise ValueError(f"{path}, line {line} is not in UTF-8; save it as “CSV UTF-8”") from None
    first_line = text.split("\n", 1)[0]
    if "," not in first_line and (";" in first_line or "\t" in first_line):
        raise ValueError(f"{path}, line 1: columns are separated by semicolons or tabs; "
                         "save the table with commas, and with points for decimals")

    header = []
    rows = []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [name.strip() for name in cells]
                check_names(where, header)
                continue
            if len(cells) != len(header):
                raise ValueError(f"{where} has {len(cells)} cells, but there are {len(header)} "
                                 "columns")
            rows.append((reader.line_num, dict(zip(header, cells))))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    return header, rows


def check_names(where, header):
    """Raises ValueError if a column has no name, or two have the same."""
    for i, name in enumerate(header):
        if name == "":
            raise ValueError(f"{where}: column {i + 1} has no name")
        if name in header[:i]:
            raise ValueError(f"{where}: there are two columns {name!r}")


def write_rows(path, rows):
    """Write rows {column: text} as a .csv file, whole or not at all. Raises OSError."""
    columns = {}        # in the order in which they first appear
    for row in rows:
        columns.update(row)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, lambda file: file.write(text.getvalue().encode()))


def in_order(names):
    """The names of columns in the order in which they are shown, a list."""
    names = list(dict.fromkeys(names))
    order = [*ORDER, *COLUMNS, *names]
    return sorted(names, key=order.index)


def table(rows):
    """Rows of text as lines with aligned columns: the first to the left, others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        for cell, width in zip(others, widths[1:]):
            cells.append(cell.rjust(width))
        lines.append("  ".join(cells) + "\n")
    return "".join(lines)


# ------------------------------------------------------------------------------------------------
# Report: a sweep


def report(axis, verdicts, control, carried=None):
    """The verdicts {column: verdict} of verdict.judge as text."""
    best = "η*" if verdicts.keys() <= COLUMNS.keys() else "×*"
    tables = [curves_table(axis, verdicts, best), drift_table(verdicts, control)]
    needed = steps_needed(verdicts, control) if axis == "steps" else []
    if needed:
        tables.append(table([("column", "steps", "loss", f"for it {control} needs"), *needed]))
    notes = [f"drift: change of log2 {best} a doubling of {axis}. "
             "|α|: eigen learning rates, mean at the end.",
             f"regret: loss at the smallest size's {best}, less the best.",
             cost_note(axis, best, carried)]
    if needed:
        notes.append("needs: steps at the best η to reach that loss.")
    if any(verdict.drift for verdict in verdicts.values()):
        tables.append(powers_table(axis, verdicts))
        notes.append("power: the table's exponent → the one that would have removed the drift, "
                     "if every class is shifted equally.")
    return "\n".join([*tables, *notes])


def cost_note(axis, best, carried):
    """What the cost is, in words."""
    eta = f"the smallest size's {best}" if carried is None else f"η = 2^{carried:.4g}"
    return (f"cost [95 % interval]: loss at {eta}, less the best that any column reached at that "
            f"{axis},\nchosen for each seed on the others (*: on the only one).")


def curves_table(axis, verdicts, best):
    """A row for each column and size."""
    rows = [("column", axis, "seeds", f"log2 {best}", best, "best loss", "regret",
             "cost [95 % interval]", "|α|", "grid")]
    for name, verdict in verdicts.items():
        for size, curve in verdict.curves.items():
            rows.append((
                name,
                f"{size:,.0f}",
                str(len(curve.complete)),
                f"{curve.optimum:.2f}",
                f"{2**curve.optimum:.5f}",
                f"{curve.mean[curve.best]:.4f}",
                regret_text(curve),
                cost_text(curve.cost),
                "-" if math.isnan(curve.alpha) else f"{curve.alpha:.3f}",
                curve.grid,
            ))
    return table(rows)


def drift_table(verdicts, control):
    """A row for each column: how far its best η moves, and what that costs."""
    paired = any(verdict.difference for verdict in verdicts.values())
    head = ["column", "drift [95 % interval]", "worst regret", "same best η?"]
    if paired:
        head.insert(2, f"less {control}'s [95 % interval]")
    rows = [head]
    for name, verdict in verdicts.items():
        row = [name, interval_text(verdict.drift), regret_text(verdict), verdict.same]
        if paired:
            row.insert(2, interval_text(verdict.difference))
        rows.append(row)
    return table(rows)


def powers_table(axis, verdicts):
    """A row for each column: its table's powers, and those that would have removed the drift."""
    rows = [(f"power of {axis} in η of", *TENSOR_CLASSES)]
    for name, verdict in verdicts.items():
        if not verdict.drift:
            continue
        slope, _ = verdict.drift
        row = [name]
        for tensor_class in TENSOR_CLASSES:
            power = verdict.powers.get(tensor_class)
            row.append("-" if power is None else f"{power:+.2f} → {power + slope:+.2f}")
        rows.append(row)
    return table(rows)


def largest_common_size(tables):
    """The largest size that is in each table of {value: {column: Verdict}}; None without one."""
    sizes = []
    for verdicts in tables.values():
        sizes.append({size for verdict in verdicts.values() for size in verdict.curves})
    return max(set.intersection(*sizes), default=None)


def report_tables(axis, other, tables):
    """{value of `other`: {column: Verdict}} of verdict.judge_tables as text."""
    size = largest_common_size(tables)
    rows = [("column", other, "drift [95 % interval]", f"regret at {axis} {size:,.0f}")]
    for name in in_order({name for verdicts in tables.values() for name in verdicts}):
        for value, verdicts in tables.items():
            if name in verdicts:
                verdict = verdicts[name]
                curve = verdict.curves.get(size)
                regret = regret_text(curve) if curve else "-"
                rows.append((name, f"{value:,.0f}", interval_text(verdict.drift), regret))
    return table(rows)


def interval_text(drift):
    """+0.10 [+0.05, +0.15] of a pair (0.1, 0.05), or - of None."""
    if drift is None:
        return "-"
    slope, half = drift
    if half == math.inf:        # too few curves
        return f"{slope:+.2f} [unknown]"
    return f"{slope:+.2f} [{slope - half:+.2f}, {slope + half:+.2f}]"


def regret_text(judged):
    """The regret of a curve or of a column."""
    if judged.regret is None:
        return "-"
    number = "diverges" if judged.regret == math.inf else f"{judged.regret:.4f}"
    return f"> {number}" if judged.bound else number


def cost_text(cost):
    """The cost of a curve."""
    if cost is None:
        return "not run"
    if cost.mean == math.inf:
        return "diverges"
    sign = "> " if cost.bound else ""
    if math.isnan(cost.half):
        return f"{sign}{cost.mean:+.4f}*"
    return (f"{sign}{cost.mean:+.4f} [{cost.mean - cost.half:+.4f}, "
            f"{cost.mean + cost.half:+.4f}]")


def steps_needed(verdicts, control):
    """
    Rows (column, steps, its best loss, "2.1 × the steps", which the control needs for that loss).

    Both are at their best η, where it is inside the grid, on the seeds that they share. The
    control's losses are joined by lines over log steps.
    """
    rows = []
    for name, verdict in verdicts.items():
        if name == control or control not in verdicts:
            continue
        curves = [*verdict.curves.values(), *verdicts[control].curves.values()]
        seeds = set.intersection(*(set(curve.seeds) for curve in curves))
        reached = best_losses(verdict, seeds)
        by_control = best_losses(verdicts[control], seeds)
        if not by_control or not all(curve.own for curve in curves):
            continue
        log_steps = np.log2(list(by_control))
        # A loss counts from the step at which it was first reached.
        falling = np.minimum.accumulate(list(by_control.values()))
        for steps, loss in reached.items():
            needed = 2 ** np.interp(-loss, -falling, log_steps)     # interp wants ascending values
            bound = ""
            if loss > falling[0]:
                bound = "< "
            if loss < falling[-1]:
                bound = "> "
            ratio = f"{bound}{needed / steps:.2f} × the steps"
            rows.append((name, f"{steps:,.0f}", f"{loss:.4f}", ratio))
    return rows


def best_losses(verdict, seeds):
    """{size: mean loss of these seeds at the best point}, where that is inside the grid."""
    losses = {}
    for size, curve in verdict.curves.items():
        if curve.radius > 0 and seeds:
            rows = [curve.seeds.index(seed) for seed in seeds]
            losses[size] = np.mean(curve.loss[rows, curve.best])
    return losses


# ------------------------------------------------------------------------------------------------
# Report: a random search


def report_search(ranked, scatter, keys):
    """The best of verdict.rank's settings, as options to paste, and the ranges to widen; text."""
    best = ranked[0]
    rows = [("loss", "over the best", "seeds", "options to paste")]
    for setting in ranked[:5]:
        over = setting.loss - best.loss
        options = [f"--{key}={value:.4g}" for key, value in zip(keys, setting.values)]
        rows.append((
            f"{setting.loss:.4f}",
            f"{over:.4f}" if math.isnan(scatter) else f"{over / scatter:.1f}",
            str(setting.seeds),
            " ".join(options),
        ))

    lines = [table(rows)]
    for i, key in enumerate(keys):
        advice = range_to_widen(key, best.values[i], [setting.values[i] for setting in ranked])
        if advice:
            lines.append(advice)
    diverged = sum(setting.loss == math.inf for setting in ranked)
    unit = "nats" if math.isnan(scatter) else f"scatters of a seed, {scatter:.4f} nats"
    lines.append(f"{len(ranked)} settings, {diverged} diverged. Over the best: in {unit}.")
    return "\n".join(lines)


def range_to_widen(key, best, tried):
    """A sentence if the best value is in an outer tenth of those tried, by logarithms or, of some
    options, by the values themselves; else ""."""
    if key in LINEAR:
        scale = float
    else:
        scale = math.log
        tried = [value for value in tried if value > 0]
    low = min(tried, default=math.inf)
    high = max(tried, default=0)
    if best < low or low >= high:
        return ""
    place = (scale(best) - scale(low)) / (scale(high) - scale(low))
    if place < 0.1:
        where = "downwards"
    elif place > 0.9:
        where = "upwards"
    else:
        return ""
    if where == "downwards" and key in LINEAR and low < 0.1 * high:
        return ""       # the range ends at 0, below which there is nothing
    return f"widen {key} {where}: the best is {best:.3g} of {low:.3g} to {high:.3g}"


# ------------------------------------------------------------------------------------------------
# Report: one option at a time


def report_changes(unchanged, changes, setting):
    """What each of verdict.gains' changes gains over the setting; text."""
    rows = [("option", "value", "loss", "gain [95 % interval]", "seeds")]
    rows.append(("-", "-", mean_loss(unchanged), "-", str(len(unchanged))))
    for change in changes:
        rows.append((
            change.option,
            value_text(change.value),
            mean_loss(change.losses),
            gain_text(*change.gain),
            str(len(change.losses)),
        ))
    options = dict.fromkeys(change.option for change in changes)
    middle = " ".join(f"--{option}={value_text(setting[option])}" for option in options)
    notes = (
        f"The first row is of {middle}\n"
        "gain: by how many nats the loss is lower when this option alone is changed, on the same "
        "seeds.\n"
        f"Of {len(changes)} changes some gain by luck."
    )
    return f"{table(rows)}\n{notes}"


def mean_loss(losses):
    """The mean of {seed: loss} as text."""
    mean = np.mean(list(losses.values()))
    return f"{mean:.4f}" if mean < math.inf else "diverges"


def gain_text(gain, half):
    """+0.0100 [+0.0050, +0.0150]; without the interval for one seed; - if nothing can be said."""
    if not math.isfinite(gain):
        return "-"
    if math.isnan(half):
        return f"{gain:+.4f}"
    return f"{gain:+.4f} [{gain - half:+.4f}, {gain + half:+.4f}]"


def value_text(value):
    """An option's value as one would type it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------
# Report: alignment

EXPONENTS = ["hidden α", "hidden ω", "hidden ν",
             "unembedding α", "unembedding ω", "unembedding ν"]
CHANGES = ["weights of blocks, |ΔW| / |W|", "last hidden state, |Δh|", "logits, RMS of Δz"]


def report_alignment(name, runs):
    """The exponents of a column as text: at each width, and as slopes over widths."""
    exponents = [("column", "width", "seeds", *EXPONENTS)]
    for width, mean, half in zip(runs.widths, *runs.mean_exponents):
        exponents.append((name, str(width), str(len(runs.exponents)), *estimates_text(mean, half)))

    slopes = [("slope over widths", "after step", *EXPONENTS)]
    shown = steps_near(np.geomspace(1, runs.steps[-1], 6), runs.steps)
    rows = [*runs.steps, "all, loss-weighted"]
    for step, mean, half in zip(rows, *runs.mean_slopes):
        if step in shown or step == "all, loss-weighted":
            slopes.append((name, str(step), *estimates_text(mean, half)))

    notes = (
        "1/2: not aligned, 1: fully. "
        "α: weight changes with initial inputs, ω: initial weights with input changes,\n"
        "ν: both changes. "
        "Above: means over training, weighted by the decrease of the loss. Below: slopes of\n"
        "log RMS(W x) / (RMS(W) RMS(x)) over log width.\n"
    )
    return "\n".join([table(exponents), table(slopes), notes])


def steps_near(wanted, steps):
    """For each step wanted the nearest, by ratio, of the steps there are; a set."""
    return {min(steps, key=lambda step: abs(math.log(step / one))) for one in wanted}


def estimates_text(means, halves):
    """A cell "0.61 ± 0.01" for each mean and half of its interval; one seed has no interval."""
    cells = []
    for mean, half in zip(means, halves):
        if math.isnan(mean):
            cells.append("-")
        elif math.isnan(half):
            cells.append(f"{mean:.2f}")
        else:
            cells.append(f"{mean:.2f} ± {half:.2f}")
    return cells


def report_coordinates(columns):
    """The power of the width in each change, as text. Raises ValueError for a single width."""
    single = [name for name, runs in columns.items() if len(runs.widths) == 1]
    if single:
        raise ValueError("the coordinate check needs more than one width of "
                         f"{' and '.join(single)}")
    rows = [("power of width in", "after step", *CHANGES)]
    for name, runs in columns.items():
        for i, step in decades(runs.steps):
            powers = [f"{power:+.2f}" for power in runs.powers[i]]
            rows.append((name, str(step), *powers))
    return table(rows)


def decades(steps):
    """[(place in steps, step), …] of the steps nearest to 1, 10, 100, …"""
    near = set()
    for i in range(1 + round(math.log10(steps[-1]))):
        near.add(min(steps, key=lambda step: abs(step - 10**i)))
    return [(steps.index(step), step) for step in sorted(near)]


# ------------------------------------------------------------------------------------------------
# Report: runs


LOGGED = ["step", "tokens", "train_loss", "val_loss", "alpha_A", "alpha_M", "s_z"]


@dataclass
class Run:
    """What train.py logged of a run."""
    name: str       # its folder
    log: dict       # {column of log.csv: a number a row, nan where there is none}
    status: str     # finished, diverged, or unfinished


def read_run(folder):
    """The Run in a folder of train.py. Raises OSError, and ValueError for another folder."""
    path = Path(folder, "log.csv")
    if not path.is_file():
        raise ValueError(f"{folder} is no folder of a run: it has no log.csv")
    header, rows = read_rows(path)
    for name in LOGGED:
        if header and name not in header:
            raise ValueError(f"{path} is no log of train.py: it has no column {name}")
    if not rows:
        raise ValueError(f"{path} has no rows yet")

    log = {name: [] for name in LOGGED}
    for line, row in rows:
        for name in LOGGED:
            try:
                log[name].append(float(row[name] or "nan"))
            except ValueError:
                raise ValueError(f"{path}, line {line}, column {name}: {row[name]!r} is no "
                                 "number") from None
    _, last = rows[-1]
    return Run(str(folder), log, last.get("status") or "unfinished")


def report_runs(runs):
    """Where each run stands, as text."""
    rows = [("run", "steps", "tokens", "train_loss", "val_loss", "status")]
    for run in runs:
        rows.append((
            run.name,
            f"{run.log['step'][-1]:,.0f}",
            f"{run.log['tokens'][-1]:,.0f}",
            f"{run.log['train_loss'][-1]:.4f}",
            last_number(run.log["val_loss"]),
            run.status,
        ))
    return table(rows)


def last_number(numbers):
    """The last of the numbers that is not nan, as text."""
    known = [number for number in numbers if not math.isnan(number)]
    return f"{known[-1]:.4f}" if known else "-"


# ------------------------------------------------------------------------------------------------
# Pictures


def new_figure(width, height, dpi):
    """A figure of so many inches. Raises ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the picture needs matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def new_panels(count, sharex):
    """(figure, [panel, …]) with as many panels of losses, in two rows from four on."""
    down = 2 if count > 3 else 1
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


def draw(axis, verdicts, path):
    """Draws a panel a column: a curve a size, and a dotted line at the smallest size's best η."""
    figure, panels = new_panels(len(verdicts), sharex=True)
    from matplotlib import colormaps
    from matplotlib import ticker

    sizes = sorted({size for verdict in verdicts.values() for size in verdict.curves})
    colors = dict(zip(sizes, colormaps["plasma"](np.linspace(0, 0.85, len(sizes)))))
    for panel, (name, verdict) in zip(panels, verdicts.items()):
        for size, curve in verdict.curves.items():
            draw_curve(panel, curve, colors[size], label=f"{size:,.0f}")
        smallest = verdict.curves[min(verdict.curves)]
        panel.axvline(smallest.optimum, color="gray", lw=1.2, ls=":")
        panel.set_title(title_of(name, verdict), fontsize=15)
        varied = "learning rate η" if name in COLUMNS else "multiplier of the class's η"
        panel.set_xlabel(varied, fontsize=15)
        panel.xaxis.set_major_locator(ticker.MultipleLocator(1))
        panel.xaxis.set_major_formatter(power_of_two)

    limits = loss_limits(verdicts)
    if limits:
        panels[0].set_ylim(limits)
    fullest = max(panels, key=lambda panel: len(panel.get_legend_handles_labels()[1]))
    fullest.legend(title=axis, fontsize=13, title_fontsize=13)
    figure.savefig(path)


def draw_tables(axis, other, tables, path):
    """Draws drift, with intervals, and regret at the largest common size, against `other`."""
    size = largest_common_size(tables)
    figure = new_figure(7, 7, dpi=120)
    above, below = figure.subplots(2, 1, sharex=True)
    names = in_order({name for verdicts in tables.values() for name in verdicts})
    for place, name in enumerate(names):
        apart = 1.03 ** (place - (len(names) - 1) / 2)      # so that intervals do not overlap
        drifts = []
        regrets = []
        for value, verdicts in tables.items():
            if name not in verdicts:
                continue
            verdict = verdicts[name]
            if verdict.drift:
                slope, half = verdict.drift
                drifts.append((value * apart, slope, half if half < math.inf else math.nan))
            regret = verdict.curves[size].regret if size in verdict.curves else None
            if regret is not None and regret < math.inf:
                regrets.append((value * apart, regret))
        if drifts:
            x, slope, half = zip(*drifts)
            above.errorbar(x, slope, yerr=half, fmt="o-", capsize=4, label=name)
        if regrets:
            below.plot(*zip(*regrets), "o-", label=name)
    above.axhline(0, color="gray", lw=1.2, ls=":")
    above.set_ylabel(f"drift, octaves a doubling of {axis}", fontsize=12)
    above.legend(fontsize=12)
    below.set_yscale("symlog", linthresh=0.001)
    below.set_ylim(bottom=0)
    below.set_ylabel(f"regret at {axis} {size:,.0f}, nats", fontsize=12)
    below.set_xscale("log")
    below.set_xticks(list(tables), [f"{value:,.0f}" for value in tables])
    below.minorticks_off()
    below.set_xlabel(other, fontsize=12)
    for panel in (above, below):
        panel.grid(alpha=0.25)
    figure.savefig(path)


def draw_curve(panel, curve, color, label):
    """Draws a curve's mean, thin lines for seeds, crosses where it diverged, a star at its best."""
    for loss in curve.loss:
        ran = ~np.isnan(loss)
        panel.plot(curve.x[ran], loss[ran], ".-", color=color, lw=0.7, ms=3, alpha=0.5)
    diverged = np.isinf(curve.mean)
    x = curve.x[~diverged]
    panel.plot(x, curve.mean[~diverged], "o-", color=color, lw=2.2, ms=5, label=label)
    for x in curve.x[diverged]:
        panel.plot(x, 0.97, "x", color=color, transform=panel.get_xaxis_transform())
    if curve.radius > 0:        # else the best is not known
        panel.plot(curve.optimum, curve.bottom, "*", color=color, ms=20, mec="black", zorder=5)


def title_of(name, verdict):
    """The title of a column's panel."""
    if not verdict.drift:
        return name
    slope, half = verdict.drift
    interval = f" ± {half:.2f}" if half < math.inf else ""
    return f"{name}\ndrift {slope:+.2f}{interval} octaves a doubling"


def power_of_two(x, position):
    """The label of a tick at log2 = x."""
    return f"$2^{{{x:g}}}$"


def loss_limits(verdicts):
    """(lowest, highest) loss near the bests; far to the right losses can be of any height."""
    near = []
    for verdict in verdicts.values():
        for curve in verdict.curves.values():
            window = slice(max(curve.best - 3, 0), curve.best + 4)
            near.extend(curve.loss[:, window].ravel())
    near = np.array(near)
    near = near[np.isfinite(near)]
    if len(near) == 0:
        return None
    margin = 0.05 * np.ptp(near) + 1e-3
    return near.min() - margin, near.max() + margin


def draw_search(ranked, keys, path):
    """Draws a panel a hyperparameter that varies: loss against it, a star at the best."""
    varying = [i for i in range(len(keys)) if len({setting.values[i] for setting in ranked}) > 1]
    figure, panels = new_panels(len(varying), sharex=False)
    losses = [setting.loss for setting in ranked]
    for panel, i in zip(panels, varying):
        panel.plot([setting.values[i] for setting in ranked], losses, "o", color="C0", alpha=0.6)
        panel.plot(ranked[0].values[i], ranked[0].loss, "*", color="C1", ms=22, mec="black")
        if keys[i] not in LINEAR:
            panel.set_xscale("log", base=2)
        panel.set_xlabel(keys[i], fontsize=15)
    figure.savefig(path)


def draw_changes(unchanged, changes, setting, path):
    """Draws a panel an option: losses against its values, thin for a seed; a star at the setting."""
    options = list(dict.fromkeys(change.option for change in changes))
    figure, panels = new_panels(len(options), sharex=False)
    for panel, option in zip(panels, options):
        losses = {change.value: change.losses for change in changes if change.option == option}
        losses[setting[option]] = unchanged
        values = sorted(losses)
        for seed in unchanged:
            panel.plot(values, [losses[value].get(seed, math.nan) for value in values], ".-",
                       color="C0", lw=0.7, alpha=0.5)
        means = [np.mean(list(losses[value].values())) for value in values]
        panel.plot(values, means, "o-", color="C0", lw=2.2)
        panel.plot(setting[option], np.mean(list(unchanged.values())), "*",
                   color="C1", ms=22, mec="black", zorder=5)
        if option not in LINEAR and all(not isinstance(v, str) and v > 0 for v in values):
            panel.set_xscale("log", base=2)
        panel.set_xlabel(option, fontsize=15)
    figure.savefig(path)


def draw_alignment(name, runs, path):
    """Draws the exponents at the largest width, and as slopes over widths, against steps."""
    figure = new_figure(8, 3.8, dpi=150)
    panels = figure.subplots(1, 2, sharey=True)
    # The last of both is no step, but the mean over training.
    at_largest_width = runs.exponents[:, -1, :-1]
    draw_exponents(panels[0], f"{name}, width {runs.widths[-1]}", runs.steps, at_largest_width)
    draw_exponents(panels[1], "slope over widths", runs.steps, runs.slopes[:, :-1])
    panels[0].legend(fontsize=7)
    figure.savefig(path)


def draw_exponents(panel, title, steps, values):
    """Draws six exponents, values (seeds, steps, 6), as means and bands from seed to seed."""
    for i, label in enumerate(EXPONENTS):
        color = ("C3", "C0", "C2")[i % 3]
        style = "o-" if i < 3 else "s:"
        y = values[..., i]
        panel.semilogx(steps, y.mean(axis=0), style, color=color, ms=3, label=label)
        panel.fill_between(steps, y.min(axis=0), y.max(axis=0), color=color, alpha=0.15, lw=0)
    panel.set(title=title, xlabel="step", ylabel="alignment exponent", ylim=(0.4, 1.05))
    panel.grid(axis="y", ls=":")
    panel.label_outer()


def draw_coordinates(columns, path):
    """Draws a panel for each change and column: the change against width, a line a step."""
    figure = new_figure(2.3 * len(columns), 6.5, dpi=150)
    panels = figure.subplots(len(CHANGES), len(columns), sharex=True, sharey="row")
    for (name, runs), below in zip(columns.items(), panels.T):
        below[0].set_title(name, fontsize=10)
        for panel, label, change in zip(below, CHANGES, runs.changes.T):
            for i, step in decades(runs.steps):     # change is (steps, widths)
                panel.loglog(runs.widths, change[i], "o-", ms=3, label=f"step {step}")
            panel.set_xticks(runs.widths, runs.widths)
            panel.minorticks_off()
            panel.set(xlabel="width", ylabel=label)
            panel.label_outer()
    panels[0, 0].legend(fontsize=7)
    figure.savefig(path)


def draw_runs(runs, path):
    """Draws each run's training and validation loss against tokens; |α_A|, |α_M| and s_z below."""
    figure = new_figure(10, 7.5, dpi=120)
    from matplotlib import ticker

    panels = figure.subplot_mosaic(
        [["loss", "loss", "loss"], ["alpha_A", "alpha_M", "s_z"]],
        height_ratios=(2, 1),
    )
    for i, (run, label) in enumerate(zip(runs, labels_of(runs))):
        color = f"C{i % 10}"
        draw_log(panels["loss"], run, "train_loss", color=color, lw=0.7, alpha=0.5)
        draw_log(panels["loss"], run, "val_loss", color=color, marker="o", ms=4, label=label)
        for name in ("alpha_A", "alpha_M", "s_z"):
            draw_log(panels[name], run, name, color=color, marker="o", ms=3)
    titles = {
        "loss": "loss, nats a token (thin: of the training batches; dots: validation)",
        "alpha_A": "mean |α_A|, attention's step",
        "alpha_M": "mean |α_M|, the MLP's step",
        "s_z": "mean s_z, the logits' scale",
    }
    for name, panel in panels.items():
        panel.set_title(titles[name], fontsize=11)
        panel.set_xlabel("tokens")
        panel.xaxis.set_major_locator(ticker.MaxNLocator(5))
        panel.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))        # 5k, 10M
        panel.grid(alpha=0.25)
    panels["loss"].legend()
    figure.savefig(path)


def draw_log(panel, run, column, **style):
    """Draws the known numbers of a column of a run's log against tokens."""
    points = zip(run.log["tokens"], run.log[column])
    points = [(tokens, number) for tokens, number in points if math.isfinite(number)]
    panel.plot([tokens for tokens, _ in points], [number for _, number in points], **style)


def labels_of(runs):
    """The names of the runs' folders, without what is above them, if that tells them apart."""
    names = [Path(run.name).resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [run.name for run in runs]
    labels = []
    for name in names:
        readable = name.encode("utf-8", "replace").decode()
        # To matplotlib $ begins a formula, and _ at the beginning hides a label.
        labels.append(" " + readable.replace("$", r"\$"))
    return labels


# ------------------------------------------------------------------------------------------------
# Command line


def main():
    parser = ArgumentParser("show.py", __doc__)
    parser.add_argument("folders", nargs="+", metavar="OUT_DIR", type=expanduser,
                        help="folders of runs")
    parser.add_argument("--plot", metavar="FILE.png", type=expanduser, help="draw the curves, too")
    args = parser.parse_args()
    try:
        runs = [read_run(folder) for folder in args.folders]
        print(report_runs(runs), end="")
        if args.plot:
            draw_runs(runs, args.plot)
    except (ValueError, OSError) as error:
        sys.exit(f"show.py: {error}")


if __name__ == "__main__":
    prepare_terminal()
    main()
