"""
Comparisons of settings: of a random search, of options changed one at a time, of two columns.

    python results/compare.py search out/search.csv                the best settings, to paste
    python results/compare.py options out/options.csv              what each change costs or gains
    python results/compare.py lead results/width.csv nugpt_z ngpt width=384
    python results/compare.py lead results/fresh.csv gpt_sp:0.00978 nugpt:0.022 steps=400

Differences are over the seeds that both have run, with intervals of 95 %. A best setting was chosen
on the same seeds, of which its interval knows nothing.

lead: the first column's loss less the second's at one size, which is a column of the table and its
value. Each is taken at the η with the lowest mean loss of those that the most seeds have finished,
at least three. `gpt_sp:0.00978` chooses nothing: it is that column at the η which begins so.
"""
import math
import statistics
import sys
from os.path import expanduser
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import show
import verdict

MAY_DIFFER = ["learning_rate", "seed", "dtype"]     # in the runs of a lead's column


class Setting(NamedTuple):
    """Values of some options. The best sorts first."""
    loss: float         # mean over seeds, at their common level; inf if a seed diverged
    values: tuple
    losses: dict        # {seed: loss}


# ------------------------------------------------------------------------------------------------
# Settings


def options_that_vary(runs):
    """The names of the options, but for seed and dtype, that differ between runs."""
    names = []
    for name in verdict.OPTIONS:
        values = {verdict.rounded(run[name]) for run in runs}
        if len(values) > 1 and name not in ("seed", "dtype"):
            names.append(name)
    return names


def rank(runs, names):
    """[Setting of the options `names`, …], best first. Raises ValueError if the runs differ in
    anything else but seed and dtype."""
    verdict.check_one_sweep(runs, may_differ=names)
    losses = {}         # {values: {seed: loss}}
    points = {}
    for run in runs:
        values = tuple(verdict.rounded(run[name]) for name in names)
        losses.setdefault(values, {})[run["seed"]] = run["val_loss"]
        points[list(losses).index(values), run["seed"]] = run
    _, _, loss = verdict.loss_table(points)
    means = np.nanmean(verdict.at_common_level(loss), axis=0)
    settings = [Setting(float(mean), *pair) for mean, pair in zip(means, losses.items())]
    return sorted(settings, key=lambda setting: setting.loss)


def less(setting, other):
    """The loss of a setting less the other's, on their common seeds, as text."""
    shared = [seed for seed in setting.losses if seed in other.losses]
    differences = [setting.losses[seed] - other.losses[seed] for seed in shared]
    if not differences or not np.isfinite(differences).all():
        return "-"
    return show.interval(*verdict.mean_of_seeds(differences))


def words(names, setting, other=None):
    """The setting as options to paste; those alone that differ from the other, if there is one."""
    options = []
    for i, name in enumerate(names):
        value = setting.values[i]
        if other is None or value != other.values[i]:
            text = f"{value:.6g}" if isinstance(value, float) else value
            options.append(f"--{name}={text}")
    return " ".join(options)


def report_search(ranked, names):
    """The best settings as text, and which ranges were too narrow."""
    rows = [("loss", "less the best [95 % interval]", "seeds", "options to paste")]
    for setting in ranked[:5]:
        rows.append((f"{setting.loss:.4f}", less(setting, ranked[0]), str(len(setting.losses)),
                     words(names, setting)))
    lines = [show.table(rows)]
    for i, name in enumerate(names):
        lines += range_to_widen(name, [setting.values[i] for setting in ranked])
    diverged = sum(setting.loss == math.inf for setting in ranked)
    lines.append(f"{len(ranked)} settings, {diverged} diverged.")
    return "\n".join(lines)


def range_to_widen(name, values):
    """[a sentence] if the first of the values, the best, is in an outer tenth of them; else []."""
    best = values[0]
    tried = sorted(set(values))
    place = tried.index(best) / (len(tried) - 1)
    if isinstance(best, str) or 0.1 <= place <= 0.9:
        return []
    where = "upwards" if place > 0.9 else "downwards"
    if where == "downwards" and tried[0] == 0:
        return []       # there is nothing below
    return [f"widen {name} {where}: the best is {best:.3g} of {tried[0]:.3g} to {tried[-1]:.3g}"]


def report_options(ranked, names):
    """What each setting costs against that of the commonest values, as text. Raises ValueError if
    nothing ran with all of these."""
    middle = tuple(statistics.mode(of_option) for of_option in zip(*(s.values for s in ranked)))
    unchanged = [setting for setting in ranked if setting.values == middle]
    if not unchanged:
        raise ValueError("no run has the setting from which the others differ")
    rows = [("option", "loss", "less the unchanged [95 % interval]", "seeds")]
    for setting in sorted(ranked, key=lambda setting: setting.values != middle):
        changed = words(names, setting, unchanged[0]) or "unchanged"
        rows.append((changed, f"{setting.loss:.4f}", less(setting, unchanged[0]),
                     str(len(setting.losses))))
    return (f"{show.table(rows)}\nUnchanged: {words(names, unchanged[0])}\n"
            f"Of {len(rows) - 2} changes some gain by luck.")


# ------------------------------------------------------------------------------------------------
# The lead of a column over another


def rate_in_words(row):
    """The η of a row with six digits, as a table or a person may have written it otherwise."""
    return f"{float(row['learning_rate']):.6g}"


def losses_at_best_eta(rows, column):
    """
    ({seed: loss}, η in words) of a column at its best η, or at the η that `column` names.

    Raises ValueError if three seeds did not finish, and if the runs differ in more than η and seed.
    """
    name, _, beginning = column.partition(":")
    of_column = [row for row in rows if row["parametrization"] == name]
    mine = [row for row in of_column if rate_in_words(row) == beginning]
    if not mine:
        mine = [row for row in of_column if rate_in_words(row).startswith(beginning)]
    for option in verdict.OPTIONS:
        # An older table, or one of the normalized model alone, may lack a value.
        values = {verdict.read_cell(option, row[option]) for row in mine if row.get(option)}
        if len(values) > 1 and option not in MAY_DIFFER:
            raise ValueError(f"the runs of {column} differ in {option}, too; choose some by their "
                             f"η, as in {column}:0.01")
    losses = {}         # {η: {seed: loss}}
    for row in mine:
        loss = verdict.read_cell("val_loss", row["val_loss"])
        of_seeds = losses.setdefault(rate_in_words(row), {})
        if of_seeds.setdefault(row["seed"], loss) != loss:
            raise ValueError(f"{column} has two runs of seed {row['seed']} with learning rate "
                             f"{rate_in_words(row)}")
    finished = {eta: of_seeds for eta, of_seeds in losses.items()
                if None not in of_seeds.values()}
    most = max(map(len, finished.values()), default=0)
    if most < 3:
        raise ValueError(f"{column} has no learning rate that three seeds finished")
    candidates = {eta: of_seeds for eta, of_seeds in finished.items() if len(of_seeds) == most}
    if beginning and len(candidates) > 1:
        raise ValueError(f"{column} may be any of {', '.join(candidates)}")
    best = min(candidates, key=lambda eta: statistics.fmean(candidates[eta].values()))
    return candidates[best], best


def report_lead(path, first, second, size):
    """One line on the first column's lead. Raises OSError and ValueError."""
    header, lines = show.read_rows(path)
    key, _, value = size.partition("=")
    for name in ("parametrization", "learning_rate", "seed", "val_loss", key):
        if name not in header:
            raise ValueError(f"{path} has no column {name!r}")
    rows = [row for _, row in lines if row[key] == value]
    losses, eta = losses_at_best_eta(rows, first)
    others, other_eta = losses_at_best_eta(rows, second)
    differences = [losses[seed] - others[seed] for seed in losses if seed in others]
    if len(differences) < 2:
        raise ValueError(f"the columns share {len(differences)} seed(s); an interval needs 2")
    mean, half = verdict.mean_of_seeds(differences)
    return (f"{mean:+.3f} ± {half:.3f} nats, {len(differences)} seeds, at {size}: "
            f"{first.partition(':')[0]} with η = {eta} less "
            f"{second.partition(':')[0]} with η = {other_eta}")


def main():
    parser = show.ArgumentParser("compare.py", __doc__)
    parser.add_argument("command", choices=["search", "options", "lead"])
    parser.add_argument("table", metavar="TABLE.csv", type=expanduser)
    parser.add_argument("of_lead", nargs="*", metavar="COLUMN COLUMN KEY=VALUE")
    given = parser.parse_args()
    if len(given.of_lead) != (3 if given.command == "lead" else 0):
        parser.error("lead takes two columns and a size, such as nugpt ngpt width=384; search and "
                     "options take the table alone")
    try:
        if given.command == "lead":
            print(report_lead(given.table, *given.of_lead))
            return
        (runs,), _ = verdict.read_results(given.table)
        names = options_that_vary(runs)
        if not names:
            raise ValueError(f"{given.table} has no two settings to compare")
        report = report_search if given.command == "search" else report_options
        print(report(rank(runs, names), names))
    except (OSError, ValueError) as error:
        sys.exit(f"compare.py: {error}")


if __name__ == "__main__":
    show.prepare_terminal()
    main()
