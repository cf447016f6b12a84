"""
Alignment exponents: how well changes of weights line up with their inputs, as models train.

    python results/alignment.py --results=out/alignment.csv --base=results/laptop.json \\
        --width=1x,2x,4x --seed=0,1,2 --every=20 --plot=out/coordinates.png
    python results/alignment.py results/alignment_tuned.csv

The first command trains the runs, one after the other, and measures them on the way: at steps 0, 1,
2, 4, 8, 16, every 20 and the last. Its options are those of results/sweep.py. Repeated, it makes
the runs that the file does not have. The second reads measurements made before.

Printed are slopes over widths, which are the exponents free of constants, and the coordinate check:
with which power of the width weights, hidden states and logits have changed. The latter is drawn.
"""
import copy
import hashlib
import math
import sys
from os.path import expanduser
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plain
import show
import sweep
import train
from parametrize import TENSOR_CLASSES
from verdict import mean_of_seeds

TOKENS = 2048       # of the validation text, the same in every measurement
# The columns of a .csv file: what was measured, and the numbers that are read again. rms_y and run
# are for people and for repeated commands.
OF_RUN = ["parametrization", "depth", "steps", "width", "seed"]
WHICH = [*OF_RUN, "step", "layer", "map"]
NUMBERS = ["loss", "d_in", "alpha", "omega", "nu", "rms_dW", "rms_dx", "rms_dy"]
FIELDS = [*WHICH, *NUMBERS, "rms_y", "run"]


# ------------------------------------------------------------------------------------------------
# Measuring a model


class LinearMaps(TorchFunctionMode):
    """
    Collects the linear maps of a model while it runs, as {weight's name: (weight, its input)} in
    `found`. Weights are (d_out, d_in), with which F.linear(input, weight) is the map.

    A weight counts without what rescales it: a matrix keeps its name through functions that keep
    its shape. Matrices that torch.cat stacks are maps of the same input, each for itself. Raises
    ValueError for a map whose weight is no parameter, and for a second use.
    """

    def __init__(self, model):
        super().__init__()
        self.found = {}
        self.matrices = dict(model.named_parameters())
        self.names = {}         # {matrix: names of the weights that are stacked in it}
        for name, matrix in self.matrices.items():
            if matrix.dim() == 2:
                self.names[matrix] = [name]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is F.linear:
            self.add(args[0], args[1], transposed=False)
        if function in (torch.matmul, torch.Tensor.matmul) and args[1].dim() == 2:
            self.add(args[0], args[1], transposed=True)     # x @ W, with W stored transposed
        if function is torch.cat and all(matrix in self.names for matrix in args[0]):
            self.names[out] = [name for matrix in args[0] for name in self.names[matrix]]
        for arg in args:
            if not isinstance(arg, torch.Tensor) or not isinstance(out, torch.Tensor):
                continue
            # of the same shape, and not transposed
            if arg in self.names and arg.shape == out.shape and arg.stride() == out.stride():
                self.names[out] = self.names[arg]
        return out

    def add(self, x, weight, transposed):
        if weight not in self.names:
            raise ValueError(f"the weight of a linear map, {tuple(weight.shape)}, is no parameter "
                             "as a whole: teach LinearMaps of results/alignment.py about it")
        for name in self.names[weight]:
            if name in self.found:
                raise ValueError(f"{name} is the weight of two linear maps: teach LinearMaps of "
                                 "results/alignment.py which is which")
            matrix = self.matrices[name]
            self.found[name] = (matrix.T if transposed else matrix, x)


def rms(x):
    """Root mean square over the last dimension, (…, n) to (…)."""
    return x.square().mean(-1).sqrt()


def mean_rms(x):
    """The mean of the root mean squares over the last dimension, a number."""
    return rms(x).mean().item()


def alignment_exponent(weight, x):
    """
    log_d [RMS(W x) / (RMS(W) RMS(x))] of a weight W (out, d) and x (…, d), a mean over tokens.

    It is 1/2 if the two are independent, and 1 if W has rank one along x. Tokens without a
    logarithm do not count: a token that was never trained on has not moved. nan if none counts.
    arXiv:2407.05872; Definition 3.1 of νGPT.
    """
    independent = rms(weight.flatten()) * rms(x)
    ratio = rms(F.linear(x, weight)) / independent
    counts = ratio.isfinite() & (ratio > 0)
    mean = ratio[counts].log().mean().item()
    return mean / math.log(weight.size(1))


@torch.no_grad()
def measure(model, initial, tokens, targets):
    """
    (rows, loss in nats a token) of a model on tokens and targets (B, T), in fp32.

    Each row {layer, map, d_in, …} is of a linear map y = W x. ΔW and Δx are the changes since the
    initial model, whose weights and inputs are W₀ and x₀: α is of ΔW x₀, ω of W₀ Δx, ν of ΔW Δx.
    The last row is of the logits. Raises ValueError as LinearMaps does.
    """
    with LinearMaps(initial) as before:
        logits_0, _ = initial(tokens)
    with LinearMaps(model) as now:
        logits, loss = model(tokens, targets)

    depth = len(model.blocks)
    rows = []
    for name, (W, x) in now.found.items():
        W_0, x_0 = before.found[name]
        dW = W - W_0
        dx = x - x_0
        y = F.linear(x, W)
        y_0 = F.linear(x_0, W_0)
        layer, map_ = place_of(name, depth)
        rows.append({
            "layer": layer,
            "map": map_,
            "d_in": W.size(1),
            "alpha": alignment_exponent(dW, x_0),
            "omega": alignment_exponent(W_0, dx),
            "nu": alignment_exponent(dW, dx),
            "rms_dW": mean_rms(dW.flatten()),
            "rms_dx": mean_rms(dx),
            "rms_y": mean_rms(y),
            "rms_dy": mean_rms(y - y_0),
        })
    rows.append({
        "layer": depth,
        "map": "logits",
        "rms_y": mean_rms(logits),
        "rms_dy": mean_rms(logits - logits_0),
    })
    return rows, loss.item()


def place_of(name, depth):
    """(layer, map) of a parameter: (3, W_q) of blocks.3.W_q; behind the blocks it is (depth, …)."""
    if name.startswith("blocks."):
        _, layer, map_ = name.split(".", 2)
        return int(layer), map_
    return depth, "E_out" if name == "unembedding" else name


# ------------------------------------------------------------------------------------------------
# Measuring runs


class Measurements:
    """
    The rows of a run, {one of FIELDS: text}. train.train calls it before and after each step.

    `run` is the identity of the run that config describes.
    """

    def __init__(self, config, run, every):
        self.config = config
        self.run = run
        self.every = every
        self.rows = []

    def __call__(self, step, model):
        if step == 0:
            self.initial = copy.deepcopy(model)
            self.batch = validation_batch(self.config, model.embedding.device)
        if not self.is_due(step):
            return
        maps, loss = measure(model, self.initial, *self.batch)
        for numbers in maps:
            row = {name: getattr(self.config, name) for name in OF_RUN}
            row.update({"step": step, "loss": f"{loss:.6f}", "run": self.run})
            for name, number in numbers.items():
                row[name] = f"{number:.5g}" if isinstance(number, float) else number
            cells = {name: str(row.get(name, "")) for name in FIELDS}
            self.rows.append(cells)

    def is_due(self, step):
        """Whether to measure: the first powers of two, every so many steps, and the last."""
        power_of_two = step.bit_count() == 1
        early = step < self.every and power_of_two
        return early or step % self.every == 0 or step == self.config.steps


def validation_batch(config, device):
    """(tokens, targets), both (B, T): the first TOKENS of each evaluation of the run."""
    _, val_tokens, _ = train.open_data(config)
    starts = train.validation_starts(len(val_tokens), config.seq_len, config.eval_tokens)
    count = max(1, TOKENS // config.seq_len)
    return train.sequences(val_tokens, starts[:count], config.seq_len, device)


def name_of(config):
    """A name for the run that config describes: 12 hex characters of its options and its text."""
    text = repr(sweep.identity(config))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def rows_in(path):
    """The rows {column: text} of a file that this script has written; none if it is missing."""
    if not Path(path).exists():
        return []
    header, lines = show.read_rows(path)
    if header and "run" not in header:
        raise ValueError(f"{path} has no column run, by which runs are known; choose another "
                         "--results")
    return [row for _, row in lines]


def make_runs(configs, every, path):
    """Train and measure the runs that the file does not have. Raises ValueError and OSError."""
    for i, config in enumerate(configs):
        what = f"{config.parametrization}, width {config.width}, seed {config.seed}"
        done = rows_in(path)
        run = name_of(config)
        if run in {row["run"] for row in done}:
            print(f"{i + 1} of {len(configs)}: {what} is there", file=sys.stderr)
            continue
        print(f"{i + 1} of {len(configs)}: {what}, {config.steps} steps", file=sys.stderr)
        measurements = Measurements(config, run, every)
        build = plain.build if config.parametrization in plain.COLUMNS else train.build
        outcome = train.train(config, build, after_step=measurements)
        if outcome["status"] != "finished":
            raise ValueError(f"{what} has {outcome['status']} at step {outcome['step']}")
        show.write_rows(path, done + measurements.rows)


# ------------------------------------------------------------------------------------------------
# Measurements of several runs


def read_measurements(paths):
    """
    {(column, width, seed): {step: {(layer, map): {one of NUMBERS: number}}}} of .csv files.

    A file may be several put one behind the other, each with its head. Raises OSError, and
    ValueError for a cell that is no number and for a run that is there twice.
    """
    runs = {}
    kinds = set()
    for path in paths:
        header, rows = show.read_rows(path)
        for name in [*WHICH, *NUMBERS]:
            if name not in header:
                raise ValueError(f"{path} has no column {name}, which results/alignment.py writes")
        for line, row in rows:
            if row["step"] == "step":
                continue
            try:
                run = (row["parametrization"], int(row["width"]), int(row["seed"]))
                step = int(row["step"])
                numbers = {name: float(row[name] or "nan") for name in NUMBERS}
            except ValueError as error:
                raise ValueError(f"{path}, line {line} is not as results/alignment.py writes it "
                                 f"({error})") from None
            maps = runs.setdefault(run, {}).setdefault(step, {})
            place = (row["layer"], row["map"])
            kinds.add((row["depth"], row["steps"]))
            if place in maps or len(kinds) > 1:
                raise ValueError(f"{path}, line {line}: width {run[1]}, seed {run[2]} is there "
                                 "twice, or with another depth or length")
            maps[place] = numbers
    return runs


def numbers_of_step(maps, width):
    """
    Nine numbers of one step's maps, {(layer, map): numbers}: those of EXPONENTS, then of CHANGES.

    An exponent is here log [RMS(W x) / (RMS(W) RMS(x))], whose slope over log width is free of
    constants. Weights and hidden states are unit vectors, whose RMS is width^-1/2.
    """
    hidden = [one for (_, map_), one in maps.items() if map_ in TENSOR_CLASSES["hidden"]]
    output = [one for (_, map_), one in maps.items() if map_ == "E_out"]
    logits = [one for (_, map_), one in maps.items() if map_ == "logits"]
    found = []
    for of_class in (hidden, output):
        for name in ("alpha", "omega", "nu"):
            logs = [one[name] * math.log(one["d_in"]) for one in of_class]
            found.append(np.mean(logs))
    found.append(math.sqrt(width) * np.mean([one["rms_dW"] for one in hidden]))
    found.append(math.sqrt(width) * output[0]["rms_dx"])
    found.append(logits[0]["rms_dy"])
    return found


def numbers_of_run(run, width, steps):
    """
    (S + 1, 9): numbers_of_step of a run {step: maps} after each of the steps.

    The last row is the mean over training, weighted by how much the loss fell since the measurement
    before; where it rose, the weight is negative.
    """
    loss = []
    for step in [0, *steps]:
        first_map, *_ = run[step].values()
        loss.append(first_map["loss"])
    weights = -np.diff(loss)
    found = np.array([numbers_of_step(run[step], width) for step in steps])
    return np.vstack((found, weights @ found / weights.sum()))


class Summary(NamedTuple):
    """What the runs of a column say: W widths, and S steps without step 0."""
    widths: list
    steps: list
    slopes: np.ndarray      # (seeds, S + 1, 6): of EXPONENTS, as in numbers_of_run
    changes: np.ndarray     # (W, S, 3): of CHANGES, means over seeds
    powers: np.ndarray      # (S, 3): powers of the width in these changes


def slope(widths, values):
    """Least-squares slope of values (W, …) over log width."""
    x = np.log(widths) - np.mean(np.log(widths))
    return np.tensordot(x, values, (0, 0)) / (x @ x)


def summarize(runs):
    """
    {column: Summary} of read_measurements' runs.

    It has the steps that all runs have, and the seeds that all widths of a column have. Raises
    ValueError if there are none.
    """
    steps = sorted(set.intersection(*map(set, runs.values()))) if runs else []
    if len(steps) < 2 or steps[0] != 0:
        raise ValueError("the runs must have step 0 and a later one in common, "
                         f"but have only {steps}")
    kinds = {frozenset(run[step]) for run in runs.values() for step in steps}
    if len(kinds) > 1:
        raise ValueError("some measurements have other linear maps than the rest")
    summaries = {}
    for column in show.in_order(name for name, _, _ in runs):
        widths = sorted({width for name, width, _ in runs if name == column})
        seeds = []
        for seed in sorted({seed for _, _, seed in runs}):
            if all((column, width, seed) in runs for width in widths):
                seeds.append(seed)
        if len(widths) < 2 or not seeds:
            raise ValueError(f"a slope over widths needs two widths of {column} with a seed in "
                             "common")
        found = []
        for width in widths:
            of_width = [runs[column, width, seed] for seed in seeds]
            found.append([numbers_of_run(run, width, steps[1:]) for run in of_width])
        found = np.array(found)                         # (W, seeds, S + 1, 9)
        slopes = slope(widths, found[..., :6])
        changes = found[:, :, :-1, 6:].mean(axis=1)
        powers = slope(widths, np.log(changes))
        summaries[column] = Summary(widths, steps[1:], slopes, changes, powers)
    return summaries


# ------------------------------------------------------------------------------------------------
# Report

EXPONENTS = ["hidden α", "hidden ω", "hidden ν",
             "unembedding α", "unembedding ω", "unembedding ν"]
CHANGES = ["|ΔW| / |W|", "|Δh|", "RMS of Δz"]


def decades(steps):
    """[(place in steps, step), …] of the steps nearest to 1, 10, 100, …, and of the last."""
    near = {steps[-1]}
    for i in range(1 + int(math.log10(steps[-1]))):
        near.add(min(steps, key=lambda step: abs(step - 10**i)))
    return [(steps.index(step), step) for step in sorted(near)]


def report(columns):
    """{column: Summary} as text: slopes over widths, then powers of the width in the changes."""
    slopes = [("slope over widths", "after step", *EXPONENTS)]
    powers = [("power of width in", "after step", *CHANGES)]
    for name, summary in columns.items():
        shown = decades(summary.steps)
        for i, step in [*shown, (-1, "all, loss-weighted")]:
            cells = []
            for of_seeds in summary.slopes[:, i].T:
                mean, half = mean_of_seeds(of_seeds)
                cells.append(f"{mean:.2f}" if math.isnan(half) else f"{mean:.2f} ± {half:.2f}")
            slopes.append((name, str(step), *cells))
        # The coordinate check counts on weights and hidden states that are unit vectors.
        for i, step in shown if name not in plain.COLUMNS else []:
            cells = [f"{power:+.2f}" for power in summary.powers[i]]
            powers.append((name, str(step), *cells))
    notes = (
        "1/2: not aligned, 1: fully. α: weight changes with initial inputs, ω: initial weights\n"
        "with input changes, ν: both changes. h: the last hidden state, z: the logits."
    )
    return "\n".join([show.table(slopes), show.table(powers), notes])


def draw(columns, path):
    """Draws a panel for each change and column: the change against width, a line a step."""
    names = [name for name in columns if name not in plain.COLUMNS]
    figure = show.new_figure(2.5 * len(names) + 2, 6.5)
    shape = (len(CHANGES), len(names))
    panels = figure.subplots(*shape, sharex=True, sharey="row", squeeze=False)
    for name, below in zip(names, panels.T):
        below[0].set_title(name)
        summary = columns[name]
        for panel, label, change in zip(below, CHANGES, summary.changes.T):
            for i, step in decades(summary.steps):      # change is (steps, widths)
                panel.loglog(summary.widths, change[i], "o-", ms=3, label=f"step {step}")
            panel.set(xlabel="width", ylabel=label)
            panel.label_outer()
    panels[0, 0].legend(fontsize=7)
    show.save(figure, path)


def main():
    parser = show.ArgumentParser("alignment.py", __doc__)
    parser.add_argument("sources", nargs="*", metavar="FILE.csv", type=expanduser,
                        help="measurements made before")
    parser.add_argument("--every", metavar="STEPS", type=int, default=20,
                        help="steps between measurements (default: 20)")
    parser.add_argument("--plot", metavar="FILE.png", type=expanduser, help="draw a picture, too")
    args, options = parser.parse_known_args()
    if bool(args.sources) == bool(options):
        parser.error("give .csv files, or options of results/sweep.py with --results=FILE.csv")
    if args.every < 1:
        parser.error(f"--every must be at least 1, not {args.every}")
    try:
        if options:
            own, base, groups = sweep.read_command(options)
            if own.dry or own.finalists:
                parser.error("--dry and --finalists are for results/sweep.py")
            args.sources = [expanduser(own.results)]
            make_runs(sweep.make_runs(groups, base, own), args.every, *args.sources)
        columns = summarize(read_measurements(args.sources))
        print(report(columns))
        if args.plot:
            draw(columns, args.plot)
    except (ValueError, OSError) as error:
        sys.exit(f"alignment.py: {error}")


if __name__ == "__main__":
    train.quiet = True      # runs print no lines and no bar of their own
    show.prepare_terminal()
    main()
