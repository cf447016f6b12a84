"""
Print how much lower the best loss of one column is than another's at one size, seed by seed.

    python results/lead.py results/width_tuned.csv nugpt ngpt width=384
    python results/lead.py results/fresh.csv gpt_sp:0.0097 gpt_sp:0.0156 steps=400

The first loss less the second: a negative number says that the first column is ahead. A column is
taken at the η that is best for it at this size, of those that three seeds or more have finished.
`gpt_sp:0.0097` is that column at the η that begins with 0.0097. The size is a column of the table
and its value.
"""
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import show
from verdict import student


def losses_at_best_eta(rows, column, key, value):
    """
    {seed: loss} of a column at its best η.

    Raises ValueError if no η has three seeds, or if a seed has two different losses at one η.
    """
    name, _, beginning = column.partition(":")
    losses = {}         # {η: {seed: loss}}
    for row in rows:
        chosen = row["parametrization"] == name and row[key] == value
        eta = row["learning_rate"]
        loss = float(row["val_loss"] or "nan")
        if not chosen or not eta.startswith(beginning) or not math.isfinite(loss):
            continue
        of_seeds = losses.setdefault(eta, {})
        # A table may have the same run twice.
        if of_seeds.get(row["seed"], loss) != loss:
            raise ValueError(f"{column} has two runs of seed {row['seed']} with learning rate {eta} "
                             f"at {key}={value}, which differ in something else")
        of_seeds[row["seed"]] = loss
    complete = [of_seeds for of_seeds in losses.values() if len(of_seeds) >= 3]
    if not complete:
        raise ValueError(f"{column} has no learning rate that three seeds finished at "
                         f"{key}={value}")
    return min(complete, key=lambda of_seeds: statistics.fmean(of_seeds.values()))


def lead(rows, first, second, key, value):
    """
    (first column's loss less the second's, half its 95 % interval, seeds) by the seeds of both.

    Raises ValueError if both share fewer than two.
    """
    ours = losses_at_best_eta(rows, first, key, value)
    theirs = losses_at_best_eta(rows, second, key, value)
    less = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if len(less) < 2:
        raise ValueError(f"{first} and {second} share {len(less)} seed(s); an interval needs 2")
    half = student(len(less) - 1) * statistics.stdev(less) / math.sqrt(len(less))
    return statistics.fmean(less), half, len(less)


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
        rows = [row for _, row in lines]
        mean, half, seeds = lead(rows, given.first, given.second, key, value)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{mean:+.3f} ± {half:.3f} nats, {seeds} seeds: "
          f"{given.first} less {given.second} at {given.size}")


if __name__ == "__main__":
    main()
