"""
Alignment exponents: how well changes of weights line up with their inputs, as models train.

    python results/alignment.py --base=results/laptop.json --width=48,96,192 --seed=0,1,2 \\
        --every=20 --csv=out/alignment.csv --plot=out/alignment.png
    python results/alignment.py results/alignment.csv --plot=alignment.png

The first command trains the runs, one after the other, and measures them on the way: at steps 0, 1,
2, 4, 8, 16, every 20 and the last. It takes the options of train.py, of which parametrization,
width and seed may be lists. Repeated, it makes the runs that the file does not have.
The second prints and draws measurements made before, of one or more files.

A single column gets its exponents, at each width and as slopes over widths. Several columns get the
coordinate check alone: how much weights, hidden states and logits have changed at each width.
"""
import copy
import hashlib
import itertools
import math
import sys
from dataclasses import dataclass
from dataclasses import replace
from os.path import expanduser
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plain
import show
import train
from parametrize import TENSOR_CLASSES
from prepare_data import fingerprint
from verdict import student

TOKENS = 2048       # of the validation text, the same in every measurement
EXPONENTS = ["alpha", "omega", "nu"]
# The columns of a .csv file: what was measured, and the numbers that are read again. rms_y and run
# are for people and for repeated commands.
WHICH = ["parametrization", "width", "depth", "steps", "seed", "step", "layer", "map"]
NUMBERS = ["loss", "d_in", *EXPONENTS, "rms_dW", "rms_dx", "rms_dy"]
RUN_FIELDS = ["parametrization", "width", "depth", "steps", "seed"]
FIELDS = [*RUN_FIELDS, "step", "loss", "layer", "map",
          "d_in", *EXPONENTS, "rms_dW", "rms_dx", "rms_y", "rms_dy", "run"]


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
        self.names = {matrix: [name] for name, matrix in self.matrices.items() if matrix.dim() == 2}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is F.linear:
            self.add(args[0], args[1], transposed=False)
        if function in (torch.matmul, torch.Tensor.matmul) and args[1].dim() == 2:
            self.add(args[0], args[1], transposed=True)     # x @ W, with W stored transposed
        if function is torch.cat and all(matrix in self.names for matrix in args[0]):
            self.names[out] = [name for matrix in args[0] for name in self.names[matrix]]
        for arg in args:
            if isinstance(arg, torch.Tensor) and arg in self.names and same_layout(arg, out):
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


def same_layout(a, b):
    """Whether b is a tensor like a, and not like a transposed."""
    return isinstance(b, torch.Tensor) and a.shape == b.shape and a.stride() == b.stride()


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
    ratio = rms(F.linear(x, weight)) / (rms(weight.flatten()) * rms(x))
    counts = ratio.isfinite() & (ratio > 0)
    return (ratio[counts].log().mean() / math.log(weight.size(1))).item()


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
            row = {name: getattr(self.config, name) for name in RUN_FIELDS}
            row.update({"step": step, "loss": f"{loss:.6f}", "run": self.run})
            for name, number in numbers.items():
                row[name] = f"{number:.5g}" if isinstance(number, float) else number
            self.rows.append({name: str(row.get(name, "")) for name in FIELDS})

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


def identity(config):
    """A name for the run that config describes: 12 hex characters of its options and its text."""
    _, _, meta = train.open_data(config)
    options = {name: getattr(config, name) for name in train.options_of_a_run(type(config))}
    text = repr(options) + fingerprint(meta)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


LISTS = ["parametrization", "width", "seed"]


def configs_of(words):
    """The Config of each run that options of train.py describe. Leaves for an unknown option."""
    lists = {}
    others = []
    for word in words:
        name, _, text = word.removeprefix("--").partition("=")
        if name in LISTS:
            lists[name] = [f"--{name}={value}" for value in text.split(",")]
        else:
            others.append(word)
    configs = []
    for chosen in itertools.product(*lists.values()):
        given = train.parse_args([*others, *chosen], plain.Config)
        config = train.load_config(given, plain.Config)
        # Only the measurements are kept.
        configs.append(replace(config, out_dir="", sample_tokens=0, eval_every=config.steps))
    return configs


def check(config):
    """Raises ValueError if the run that config describes is impossible."""
    train.check(config)
    train.apply_table(config, show.COLUMNS)
    train.model_config(config)


def rows_in(path):
    """The rows {column: text} of a file that this script has written; none if it is missing."""
    if not Path(path).exists():
        return []
    header, lines = show.read_rows(path)
    if header and "run" not in header:
        raise ValueError(f"{path} has no column run, by which runs are known; choose another --csv")
    return [row for _, row in lines]


def make_runs(configs, every, path):
    """Train and measure the runs that the file does not have. Raises ValueError and OSError."""
    for config in configs:
        check(config)
    for i, config in enumerate(configs):
        name = f"{config.parametrization}, width {config.width}, seed {config.seed}"
        run = identity(config)
        if run in {row["run"] for row in rows_in(path)}:
            print(f"{i + 1} of {len(configs)}: {name} is there", file=sys.stderr)
            continue
        print(f"{i + 1} of {len(configs)}: {name}, {config.steps} steps", file=sys.stderr)
        measurements = Measurements(config, run, every)
        build = plain.build if config.parametrization in plain.COLUMNS else train.build
        outcome = train.train(config, build, after_step=measurements)
        if outcome["status"] != "finished":
            raise ValueError(f"{name} has {outcome['status']} at step {outcome['step']}")
        show.write_rows(path, rows_in(path) + measurements.rows)


# ------------------------------------------------------------------------------------------------
# Measurements of several runs


@dataclass
class Summary:
    """
    What the runs of a column say: S steps without step 0, W widths.

    The exponents are the six of show.EXPONENTS: of each, the mean over the maps of a class.
    The last of S + 1 "steps" is the mean over training, weighted by the decrease of the loss.
    """
    widths: list
    steps: list
    changes: np.ndarray         # (W, S, 3): those of show.CHANGES, means over seeds
    powers: np.ndarray          # (S, 3): powers of the width in these changes
    exponents: np.ndarray       # (seeds, W, S + 1, 6)
    mean_exponents: tuple       # (mean, half its interval), each (W, 6), over training
    slopes: np.ndarray          # (seeds, S + 1, 6): over log width, free of constants
    mean_slopes: tuple          # (mean, half its interval), each (S + 1, 6)


def is_hidden(map_):
    """Whether a linear map, such as blocks.0.W_q, is of the tensor class hidden."""
    return map_.split(".")[-1] in TENSOR_CLASSES["hidden"]


def slope(widths, values, axis=0):
    """Least-squares slope of values over log width, which is along an axis; nan for one width."""
    x = np.log(widths) - np.mean(np.log(widths))
    return np.tensordot(x, values, (0, axis)) / (x @ x or math.nan)


def estimate(values):
    """(mean, half its 95 % interval) over seeds of values (seeds, …); half is nan for one seed."""
    seeds = len(values)
    if seeds == 1:
        return values[0], np.full_like(values[0], math.nan)
    half = student(seeds - 1) * values.std(axis=0, ddof=1) / math.sqrt(seeds)
    return values.mean(axis=0), half


def summarize(numbers, maps, widths, steps):
    """The Summary of {one of NUMBERS: array (seeds, W, S + 1, maps)}, whose first step is 0."""
    later = {name: values[:, :, 1:] for name, values in numbers.items()}
    hidden = [is_hidden(map_) for map_ in maps]
    output = [map_ == "E_out" for map_ in maps]
    logits = [map_ == "logits" for map_ in maps]

    # log [RMS(W x) / (RMS(W) RMS(x))] is what a slope over widths is taken of. An exponent is this
    # logarithm over that of d_in.
    logs = []
    logs_d_in = []
    for of_class in (hidden, output):
        log_d_in = np.log(later["d_in"][..., of_class])
        for name in EXPONENTS:
            logs.append((later[name][..., of_class] * log_d_in).mean(axis=3))
            logs_d_in.append(log_d_in.mean(axis=3))
    logs = np.stack(logs, axis=-1)                                  # (seeds, W, S, 6)
    log_d_in = np.stack(logs_d_in, axis=-1)[:, :, :1]               # (seeds, W, 1, 6)
    loss = numbers["loss"][..., 0]
    # Over training an exponent is weighted by how much the loss fell since the measurement before;
    # where the loss rose, the weight is negative.
    decrease = -np.diff(loss)[..., None]                            # (seeds, W, S, 1)
    weighted = (decrease * logs).sum(axis=2) / decrease.sum(axis=2)
    logs = np.concatenate((logs, weighted[:, :, None]), axis=2)     # (seeds, W, S + 1, 6)
    exponents = logs / log_d_in
    slopes = slope(widths, logs, axis=1)

    # Weights and hidden states are unit vectors, whose RMS is width^-1/2.
    root = np.sqrt(widths)[:, None]
    dW = later["rms_dW"][..., hidden].mean(axis=(0, 3))             # (W, S)
    dh = later["rms_dx"][..., output].mean(axis=(0, 3))
    dz = later["rms_dy"][..., logits].mean(axis=(0, 3))
    changes = np.stack((root * dW, root * dh, dz), axis=-1)
    return Summary(
        widths=widths,
        steps=steps,
        changes=changes,
        powers=slope(widths, np.log(changes)),
        exponents=exponents,
        mean_exponents=estimate(exponents[:, :, -1]),
        slopes=slopes,
        mean_slopes=estimate(slopes),
    )


def read_measurements(paths):
    """
    {(column, width, seed): {step: {map: {one of NUMBERS: number}}}} of .csv files.

    A file may be several put one behind the other, each with its head. Raises OSError, and
    ValueError for a cell that is no number and for a run that is there twice.
    """
    runs = {}
    shapes = set()
    for path in paths:
        header, rows = show.read_rows(path)
        for name in [*WHICH, *NUMBERS]:
            if name not in header:
                raise ValueError(f"{path} has no column {name}, which results/alignment.py writes")
        for line, row in rows:
            if row["step"] == "step":
                continue
            where = f"{path}, line {line}"
            try:
                run = (row["parametrization"], int(row["width"]), int(row["seed"]))
                step = int(row["step"])
                numbers = {name: float(row[name] or "nan") for name in NUMBERS}
            except ValueError as error:
                raise ValueError(f"{where} is not as results/alignment.py --csv writes it "
                                 f"({error})") from None
            in_block = row["layer"] != row["depth"]
            map_ = f"blocks.{row['layer']}.{row['map']}" if in_block else row["map"]
            maps = runs.setdefault(run, {}).setdefault(step, {})
            shapes.add((row["depth"], row["steps"]))
            if map_ in maps or len(shapes) > 1:
                raise ValueError(f"{where}: width {run[1]}, seed {run[2]} is there twice, "
                                 "or with another depth or length")
            maps[map_] = numbers
    return runs


def summarize_columns(runs):
    """
    {column: Summary} of read_measurements' runs.

    It has the steps that all runs have, and the seeds that all widths of a column have. Raises
    ValueError if there are none.
    """
    steps = sorted(set.intersection(*(set(run) for run in runs.values()))) if runs else []
    if len(steps) < 2 or steps[0] != 0:
        raise ValueError("the runs must have step 0 and a later one in common, "
                         f"but have only {steps}")
    columns = {}
    for column in show.in_order(name for name, _, _ in runs):
        widths = sorted({width for name, width, _ in runs if name == column})
        seeds = []
        for seed in sorted({seed for _, _, seed in runs}):
            if all((column, width, seed) in runs for width in widths):
                seeds.append(seed)
        if not seeds:
            raise ValueError(f"the widths of {column} have no seed in common")
        maps = list(runs[column, widths[0], seeds[0]][0])
        shape = (len(seeds), len(widths), len(steps), len(maps))
        numbers = {name: np.empty(shape) for name in NUMBERS}
        for place in np.ndindex(shape):
            seed = seeds[place[0]]
            width = widths[place[1]]
            step = steps[place[2]]
            map_ = maps[place[3]]
            measured = runs[column, width, seed][step].get(map_)
            if measured is None:
                raise ValueError(f"{column}, width {width}, seed {seed} has no {map_} "
                                 f"at step {step}")
            for name in NUMBERS:
                numbers[name][place] = measured[name]
        columns[column] = summarize(numbers, maps, widths, steps[1:])
    return columns


# ------------------------------------------------------------------------------------------------
# Command line


def parse_args():
    """(options of this script, options of train.py)."""
    parser = show.ArgumentParser("alignment.py", __doc__)
    parser.add_argument("sources", nargs="*", metavar="FILE.csv", type=expanduser,
                        help="measurements made before")
    parser.add_argument("--csv", metavar="FILE.csv", type=expanduser,
                        help="where measurements go; runs that it has are not made again")
    parser.add_argument("--every", metavar="STEPS", type=int, default=20,
                        help="steps between measurements (default: 20)")
    parser.add_argument("--plot", metavar="FILE.png", type=expanduser, help="draw a picture, too")
    args, options = parser.parse_known_args()
    if args.sources and (options or args.csv):
        parser.error("--csv and options of train.py are for runs to make, not for .csv files")
    if not args.sources and not args.csv:
        parser.error("give .csv files, or options of train.py with --csv=FILE.csv")
    if args.every < 1:
        parser.error(f"--every must be at least 1, not {args.every}")
    return args, options


def report(paths, plot):
    """Print what measurements say, and draw it if asked. Raises ValueError and OSError."""
    columns = summarize_columns(read_measurements(paths))
    # The coordinate check counts on weights and hidden states that are unit vectors.
    plain_columns = [column for column in columns if column in plain.COLUMNS]
    if len(columns) > 1:
        if plain_columns:
            raise ValueError(f"columns are compared by the coordinate check, which is for "
                             f"normalized models, not for {plain_columns[0]}")
        print(show.report_coordinates(columns))
        if plot:
            show.draw_coordinates(columns, plot)
        return
    column, summary = columns.popitem()
    print(show.report_alignment(column, summary))
    if len(summary.widths) > 1 and not plain_columns:
        print(show.report_coordinates({column: summary}))
    if plot:
        show.draw_alignment(column, summary, plot)


def main():
    args, options = parse_args()
    try:
        if not args.sources:
            make_runs(configs_of(options), args.every, args.csv)
        report(args.sources or [args.csv], args.plot)
    except (ValueError, OSError) as error:
        sys.exit(f"alignment.py: {error}")


if __name__ == "__main__":
    train.quiet = True      # runs print no lines and no bar of their own
    show.prepare_terminal()
    main()
