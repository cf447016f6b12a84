"""
Runs as a table and as curves; and what the scripts of this folder share: tables and pictures.

    python results/show.py out/first out/second                     print where the runs stand
    python results/show.py out/first out/second --plot=runs.png     and draw losses, |α| and s_z
"""
import argparse
import csv
import io
import math
import os
import signal
import sys
from os.path import expanduser
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import parametrize
import plain
from prepare_data import write_aside

COLUMNS = {**parametrize.COLUMNS, **plain.COLUMNS}
# Columns are shown from nGPT to νGPT. Others follow as their own tables have them.
ORDER = ["ngpt", "mup", "depth_mup", "nugpt_full", "nugpt_none", "nugpt"]


# ------------------------------------------------------------------------------------------------
# Terminals and tables


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
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + error.object[: error.start].count(b"\n")
        raise ValueError(f"{path}, line {line} is not in UTF-8; save it as “CSV UTF-8”") from None
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
            elif len(cells) != len(header):
                raise ValueError(f"{where} has {len(cells)} cells, but there are {len(header)} "
                                 "columns")
            else:
                rows.append((reader.line_num, dict(zip(header, cells))))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    return header, rows


def check_names(where, header):
    """Raises ValueError if a table's columns cannot be told apart by their names."""
    if len(header) == 1:
        raise ValueError(f"{where}: there is one column; they must be separated by commas, with "
                         "points for decimals")
    for i, name in enumerate(header):
        if name == "" or name in header[:i]:
            raise ValueError(f"{where}: there are two columns {name!r}, or one without a name")


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


def interval(mean, half, digits=4):
    """+0.10 [+0.05, +0.15] of a mean and half its interval; without it where half is nan."""
    if math.isnan(half):
        return f"{mean:+.{digits}f}"
    if half == math.inf:        # too few runs
        return f"{mean:+.{digits}f} [unknown]"
    return f"{mean:+.{digits}f} [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]"


# ------------------------------------------------------------------------------------------------
# Pictures


def new_figure(width, height):
    """A figure of so many inches. Raises ValueError without matplotlib."""
    # A picture is a file: what a notebook or a user's settings say of screens must not count.
    os.environ["MPLBACKEND"] = "agg"
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the picture needs matplotlib: pip install matplotlib") from None
    matplotlib.rcdefaults()
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def save(figure, path):
    """Write a picture; its folder is made if it is missing. Raises OSError and ValueError."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw(axis, verdicts, path):
    """Draws a panel a column: a curve a size, and a dotted line at the smallest size's best η."""
    down = 2 if len(verdicts) > 3 else 1
    across = math.ceil(len(verdicts) / down)
    figure = new_figure(4.6 * across, 4.4 * down)
    from matplotlib import colormaps

    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
    sizes = sorted({size for verdict in verdicts.values() for size in verdict.curves})
    colors = dict(zip(sizes, colormaps["plasma"](np.linspace(0, 0.85, len(sizes)))))
    lines = {}          # one a size, for the legend
    for panel, (name, verdict) in zip(panels, verdicts.items()):
        for size, curve in verdict.curves.items():
            lines[size] = draw_curve(panel, curve, colors[size])
        smallest = verdict.curves[min(verdict.curves)]
        panel.axvline(smallest.optimum, color="gray", lw=1.2, ls=":")
        title = name
        if verdict.drift:
            title += f"\ndrift {interval(*verdict.drift, digits=2)}"
        panel.set_title(title, fontsize=14)
        panel.set_xlabel("log2 of the learning rate η", fontsize=14)
        panel.tick_params(labelsize=13, labelbottom=True)
        panel.grid(alpha=0.25)
    for panel in panels[len(verdicts):]:
        panel.remove()
    panels[0].set_ylabel("validation loss, nats a token", fontsize=14)
    panels[0].set_ylim(loss_limits(verdicts))
    panels[0].legend([lines[size] for size in sizes], [f"{size:,.0f}" for size in sizes],
                     title=axis, fontsize=13, title_fontsize=13)
    save(figure, path)


def draw_curve(panel, curve, color):
    """Draws a curve's mean, thin lines for seeds, crosses where it diverged, a star at its best.
    Returns the line of the mean."""
    for loss in curve.loss:
        ran = ~np.isnan(loss)
        panel.plot(curve.x[ran], loss[ran], ".-", color=color, lw=0.7, ms=3, alpha=0.5)
    diverged = np.isinf(curve.mean)
    for x in curve.x[diverged]:
        panel.plot(x, 0.97, "x", color=color, transform=panel.get_xaxis_transform())
    if curve.radius > 0:        # else the best is not known
        panel.plot(curve.optimum, curve.bottom, "*", color=color, ms=20, mec="black", zorder=5)
    line, = panel.plot(curve.x[~diverged], curve.mean[~diverged], "o-", color=color, lw=2.2, ms=5)
    return line


def loss_limits(verdicts):
    """(lowest, highest) loss near the bests; far to the right losses can be of any height."""
    near = []
    for verdict in verdicts.values():
        for curve in verdict.curves.values():
            losses = curve.loss[:, max(curve.best - 3, 0) : curve.best + 4]
            near.extend(losses[np.isfinite(losses)])
    if not near:
        return None, None
    margin = 0.05 * np.ptp(near) + 1e-3
    return min(near) - margin, max(near) + margin


# ------------------------------------------------------------------------------------------------
# Runs

RESCALERS = ["alpha_A", "alpha_M", "s_z"]
LOGGED = ["step", "tokens", "train_loss", "val_loss", *RESCALERS]


def read_log(folder):
    """
    ({column of log.csv: a number a row, nan where there is none}, status) of a run's folder.

    The status is "unfinished" without one. Raises OSError, and ValueError for another folder.
    """
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
    return log, row.get("status") or "unfinished"


def last_number(numbers):
    """The last of the numbers that is not nan, as text."""
    known = [number for number in numbers if not math.isnan(number)]
    return f"{known[-1]:.4f}" if known else "-"


def draw_runs(logs, path):
    """Draws losses against tokens, and the means of the rescalers below, of {folder: log}."""
    figure = new_figure(10, 7.5)
    titles = {
        "loss": "loss, nats a token (thin: of the training batches; dots: validation)",
        "alpha_A": "mean |α_A|, attention's step",
        "alpha_M": "mean |α_M|, the MLP's step",
        "s_z": "mean s_z, the logits' scale",
    }
    panels = figure.subplot_mosaic([["loss"] * 3, RESCALERS], height_ratios=(2, 1))
    for i, (folder, log) in enumerate(logs.items()):
        # To matplotlib $ begins a formula, and _ at the beginning hides a label.
        label = " " + folder.encode("utf-8", "replace").decode().replace("$", r"\$")
        color = f"C{i % 10}"
        tokens = np.array(log["tokens"])
        panels["loss"].plot(tokens, log["train_loss"], color=color, lw=0.7, alpha=0.5)
        for name in ["val_loss", *RESCALERS]:
            panel = panels.get(name, panels["loss"])
            numbers = np.array(log[name])
            known = np.isfinite(numbers)
            panel.plot(tokens[known], numbers[known], "o-", color=color, ms=3, label=label)
    for name, panel in panels.items():
        panel.set_title(titles[name], fontsize=11)
        panel.set_xlabel("tokens")
        panel.grid(alpha=0.25)
    panels["loss"].legend()
    save(figure, path)


def main():
    parser = ArgumentParser("show.py", __doc__)
    parser.add_argument("folders", nargs="+", metavar="OUT_DIR", type=expanduser,
                        help="folders of runs")
    parser.add_argument("--plot", metavar="FILE.png", type=expanduser, help="draw the curves, too")
    args = parser.parse_args()
    rows = [("run", "steps", "tokens", "train_loss", "val_loss", "status")]
    logs = {}
    try:
        for folder in args.folders:
            log, status = read_log(folder)
            logs[folder] = log
            rows.append((
                folder,
                f"{log['step'][-1]:,.0f}",
                f"{log['tokens'][-1]:,.0f}",
                f"{log['train_loss'][-1]:.4f}",
                last_number(log["val_loss"]),
                status,
            ))
        print(table(rows), end="")
        if args.plot:
            draw_runs(logs, args.plot)
    except (ValueError, OSError) as error:
        sys.exit(f"show.py: {error}")


if __name__ == "__main__":
    prepare_terminal()
    main()
