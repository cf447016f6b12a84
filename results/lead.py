"""
Print the best loss of one column less that of another at one size, seed by seed. A negative number
says that the first column is ahead.

    python results/lead.py results/width_tuned.csv nugpt ngpt width=384
    python results/lead.py results/fresh.csv gpt_sp:0.00978 gpt_sp:0.0156 steps=400

The size is a column of the table and its value. A column is taken at the η with the lowest mean
loss of those that the most seeds have finished, at least three. The interval of 95 % knows nothing
of that choice. `gpt_sp:0.00978` chooses nothing: it is that column at the η which begins so.
"""
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import show
from verdict import OPTIONS
from verdict import read_cell
from verdict import student

# Runs of one column and size may differ in these.
MAY_DIFFER = ["learning_rate", "seed", "dtype"]


def rate_in_words(row):
    """The η of a row with six digits, as a table or a person may have written it otherwise."""
    return f"{float(row['learning_rate']):.6g}"


def loss_of(row):
    """The loss of a row; inf if the run diverged."""
    loss = float(row["val_loss"] or "inf")
    return loss if math.isfinite(loss) else math.inf


def check_one_setting(rows, column):
    """Raises ValueError if the runs differ in more than η and seed."""
    for name in OPTIONS:
        # An older table, or one of the normalized model alone, may lack a value.
        values = {read_cell(name, row[name]) for row in rows if row.get(name)}
        if len(values) > 1 and name not in MAY_DIFFER:
            found = ", ".join(map(str, sorted(values)))
            raise ValueError(f"the runs of {column} differ in {name}, too ({found}); "
                             f"choose some by their η, as in {column}:0.01")


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
    check_one_setting(mine, column)

    losses = {}         # {η: {seed: loss}}
    for row in mine:
        of_seeds = losses.setdefault(rate_in_words(row), {})
        seed = row["seed"]
        # A table may have the same run twice.
        if of_seeds.get(seed, loss_of(row)) != loss_of(row):
            raise ValueError(f"{column} has two runs of seed {seed} with learning rate "
                             f"{rate_in_words(row)}")
        of_seeds[seed] = loss_of(row)
    finished = {eta: of_seeds for eta, of_seeds in losses.items()
                if math.inf not in of_seeds.values()}

    most = max(map(len, finished.values()), default=0)
    if most < 3:
        raise ValueError(f"{column} has no learning rate that three seeds finished")
    candidates = {eta: of_seeds for eta, of_seeds in finished.items() if len(of_seeds) == most}
    if beginning and len(candidates) > 1:
        raise ValueError(f"{column} may be any of {', '.join(candidates)}")
    best = min(candidates, key=lambda eta: statistics.fmean(candidates[eta].values()))
    return candidates[best], best


def difference(first, second):
    """
    (mean of first less second, half its 95 % interval, number of seeds) of two {seed: loss}.

    Raises ValueError if both share fewer than two seeds.
    """
    differences = [first[seed] - second[seed] for seed in first if seed in second]
    if len(differences) < 2:
        raise ValueError(f"the columns share {len(differences)} seed(s); an interval needs 2")
    scatter = statistics.stdev(differences)
    half = student(len(differences) - 1) * scatter / math.sqrt(len(differences))
    return statistics.fmean(differences), half, len(differences)


def main():
    show.prepare_terminal()
    parser = show.ArgumentParser("lead.py", __doc__)
    parser.add_argument("table", metavar="TABLE.csv")
    parser.add_argument("first", metavar="COLUMN")
    parser.add_argument("second", metavar="COLUMN")
    parser.add_argument("size", metavar="KEY=VALUE")
    given = parser.parse_args()
    key, _, value = given.size.partition("=")
    try:
        header, lines = show.read_rows(given.table)
        for name in ("parametrization", "learning_rate", "seed", "val_loss", key):
            if name not in header:
                raise ValueError(f"{given.table} has no column {name!r}")
        rows = [row for _, row in lines if row[key] == value]
        first, first_eta = losses_at_best_eta(rows, given.first)
        second, second_eta = losses_at_best_eta(rows, given.second)
        mean, half, seeds = difference(first, second)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{mean:+.3f} ± {half:.3f} nats, {seeds} seeds, at {given.size}: "
          f"{given.first.partition(':')[0]} with η = {first_eta} less "
          f"{given.second.partition(':')[0]} with η = {second_eta}")


if __name__ == "__main__":
    main()
