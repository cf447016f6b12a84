"""
The learning-rate rules of normalized Transformers as one table: what changes when a model is made wider, deeper, or is
trained for longer than the base model on which the learning rate η was tuned. Rows are quantities, columns rules.

    python parametrize.py                                           print the table
    python parametrize.py --width=4096 --depth=48 --steps=100000    that model's actual numbers in every column
    python parametrize.py RESULTS.csv --plot=FILE.png               does η transfer? The verdict on a sweep (see sweep.sh)

m_w = width / base_width, m_d = depth / base_depth, m_t = steps / base_steps (steps at a fixed batch size), d = width,
c = base_width^-1/2. A cell is a product of powers. "?" marks what the paper does not settle: see the notes below.
"""
import argparse
import csv
import functools
import math
import os
import re
import statistics
import sys
from fractions import Fraction

import numpy as np

TABLE = """
                | ngpt    | mup          | depth_mup               | nugpt_full   | nugpt_none   | nugpt        | what it sets
lr              | 1       | m_t^-1/3     | m_t^-1/3                | m_t^-1/3     | m_t^-1/3     | m_t^-1/3     | η of all tensors, times, for the
lr_embedding    | 1       | m_w^-1/2     | m_w^-1/2                | m_w^-1/2     | m_w^-1/2     | m_w^-1/2     |   embedding E_in
lr_hidden       | 1       | m_w^-1       | m_w^-3/4 ? · m_d^-1/2   | m_w^-1       | m_w^-1/2     | m_w^-3/4     |   matrices of the blocks
lr_unembedding  | 1       | m_w^-1/2     | m_w^-3/4 ?              | m_w^-1       | m_w^-1/2     | m_w^-3/4     |   unembedding E_out
 × at the base  | 1       | 1/2          | 1/2                     | 1/2          | 1/2          | 1/2          |     and this; tuned at the base
lr_rescalers    | 1       | 1            | 1                       | 1            | 1            | 1            |   rescalers (all rows below)
alpha_init      | 0.05    | 0.05 · m_d^-1| 0.05 · m_d^-1/2         | 0.05 · m_d^-1| 0.05 · m_d^-1| 0.05 · m_d^-1|   α_A, α_M: the eigen learning rates
alpha_scale     | d^-1/2  | c            | c                       | c            | c            | c            |          (a rescaler is raw · init/scale:
qk_init         | 1       | 1            | 1                       | 1            | 1            | 1            |   s_qk   init is where it starts,
qk_scale        | d^-1/2  | c            | c                       | c            | c            | c            |          1/scale how fast it goes)
mlp_init        | 1       | 1            | 1                       | 1            | 1            | 1            |   s_u, s_ν
mlp_scale       | 1       | 1            | 1                       | 1            | 1            | 1            |
logit_init      | 1       | 1            | m_w^1/2 ?               | m_w^1/2      | m_w^1/2      | m_w^1/2      |   s_z
logit_scale     | d^-1/2  | c            | c                       | c            | c            | c            |
"""

# The opponent, model.PlainGPT, in the standard parametrization and in μP (arXiv:2203.03466 table 3). head_dim is fixed, so
# the softmax scale stays 1/√d_head in both. Instead of an output multiplier m_w^-1, μP's E_out starts and learns m_w^-1 as
# fast, which Adam cannot tell from it. Train both with decay and warm-up: --weight_decay=0.1 --warmup_steps=…
PLAIN_TABLE = """
                | gpt_sp  | gpt_mup      | what it sets
lr              | 1       | 1            | η of all tensors, times, for the
lr_embedding    | 1       | 1            |   embedding
lr_hidden       | 1       | m_w^-1       |   matrices of the blocks
lr_unembedding  | 1       | m_w^-1       |   unembedding
 × at the base  | 1       | 1            |     and this; tuned at the base
embedding_std   | 1       | 1            | initialization: the embedding's standard deviation
hidden_std      | d^-1/2  | d^-1/2       |   the blocks' (their outputs' (2 · depth)^-1/2 as much)
unembedding_std | d^-1/2  | c · m_w^-1   |   the unembedding's
"""

# Your own column: the column it starts from, and the cells it changes. One line here, and every script knows it.
OWN = {
    # The alignment measured here, in runs of 400 steps (assets/alignment.csv), instead of the paper's 3/4
    "measured": ("nugpt", dict(lr_hidden="m_w^-0.86", lr_unembedding="m_w^-0.83")),
}

NOTES = """
  ngpt        nGPT as published (arXiv:2410.01131): one η for everything, rescaler scales that follow the width.
  nugpt       νGPT (arXiv:2604.27077). The hidden and unembedding exponents, -3/4, are its measured alignment between no
              alignment (-1/2, nugpt_none) and full alignment (-1, nugpt_full).
  mup         the paper's μP for widths ("CompleteP"). Its m_t power is stated there, the other cells follow from a lemma.
  depth_mup   the counter-example: its m_d^-1/2 on the hidden rate breaks transfer over depth (section 4.5 there).
  s_z         logit_init ∝ m_w^1/2 is missing from the paper's list of rules, but Lemma 6.8 and section 7.5 there need it.
  lr          m_t^-1/3 is a fit, not a theorem (section 4.6 there). It may depend on the schedule.
  ?           depth_mup's power of the width, its unembedding and its s_z: the public text does not settle them. Here they
              are νGPT's, so that the column differs from nugpt in the rules for depth alone.
  × at the base: one number tuned at the base and kept (--unembedding_lr_mult). To compare columns, give all the same.
  The paper's base is width 1020, depth 10, c = 0.03; its number of base steps is not given. At the base size, with one
  × for all, the columns are the same model and the same optimizer.
"""

TENSOR_CLASSES = {      # class: its parameters' names in model.py; param_groups checks that each parameter is in just one
    "embedding": r"embedding",
    "hidden": r"blocks\.\d+\.(qkv|attn_out|mlp_in|mlp_out)",
    "unembedding": r"unembedding",
    "rescalers": r"(.*\.)?(s_qk|s_u|s_v|s_z|attn_alpha|mlp_alpha)\.raw",
}


def read_table(text):
    """A table as {column: {row: cell}}. Raises ValueError for a row with too many or too few cells."""
    (_, *names, _), *rows = ([cell.strip() for cell in line.split("|")] for line in text.strip("\n").splitlines())
    for row, *cells in rows:
        if len(cells) != len(names) + 1:
            raise ValueError(f"row {row!r} of the table has {len(cells) - 1} cells, but there are {len(names)} columns")
    return {name: {row: cells[i] for row, *cells in rows} for i, name in enumerate(names)}


def add_columns(table, own):
    """table and the columns of `own`, as OWN describes them. Raises ValueError for an unknown column or row."""
    table = dict(table)
    for name, (start, changes) in own.items():
        if start not in table:
            raise ValueError(f"your column {name!r} must start from one of {', '.join(table)}, not from {start!r}")
        if unknown := changes.keys() - table[start].keys():
            raise ValueError(f"your column {name!r} changes {', '.join(unknown)}, but the rows are {', '.join(table[start])}")
        table[name] = {**table[start], **changes}
    return table


COLUMNS = add_columns(read_table(TABLE) | read_table(PLAIN_TABLE), OWN)


def value(cell, **symbols):
    """The number a cell stands for: value("0.05 · m_d^-1/2", m_d=4) = 0.025. Raises ValueError if it cannot be read."""
    product = 1.0
    for factor in re.split("[·*]", cell.replace("?", "")):
        base, _, power = factor.strip().partition("^")
        try:
            product *= (symbols[base] if base in symbols else float(Fraction(base))) ** float(Fraction(power or 1))
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"cannot read the factor {factor.strip()!r} of the cell {cell!r}: it must be a number or one "
                             f"of {', '.join(symbols)}, with or without a power such as ^-3/4") from None
    return product


def parametrize(name, width, depth, steps, base_width=1024, base_depth=10, base_steps=10_000,
                embedding_lr_mult=1.0, hidden_lr_mult=1.0, unembedding_lr_mult=None, rescalers_lr_mult=1.0):
    """
    Column `name` for one model. Returns
        initial:   {"alpha_init": …, "alpha_scale": …, …}, keywords of model.GPTConfig;
        lr_scale:  {"embedding": …, "hidden": …, "unembedding": …, "rescalers": …}, what to multiply η by.
    The *_lr_mult multiply the rates of one tensor class each; unembedding_lr_mult takes the place of the row "× at the base".
    Raises ValueError for an unknown column or a size below 1.
    """
    sizes = dict(width=width, depth=depth, steps=steps, base_width=base_width, base_depth=base_depth, base_steps=base_steps)
    for key, size in sizes.items():
        if size < 1:
            raise ValueError(f"{key} must be at least 1, not {size}")
    if name not in COLUMNS:
        raise ValueError(f"there is no parametrization {name!r}; the columns are {', '.join(COLUMNS)}")
    symbols = dict(m_w=width / base_width, m_d=depth / base_depth, m_t=steps / base_steps, d=width, c=base_width ** -0.5)
    numbers = {row: value(cell, **symbols) for row, cell in COLUMNS[name].items()}
    tuned = numbers.pop("× at the base") if unembedding_lr_mult is None else unembedding_lr_mult
    mults = dict(embedding=embedding_lr_mult, hidden=hidden_lr_mult, unembedding=tuned, rescalers=rescalers_lr_mult)
    lr_scale = {tensors: numbers["lr"] * numbers["lr_" + tensors] * mult for tensors, mult in mults.items()
                if "lr_" + tensors in numbers}
    return {row: number for row, number in numbers.items() if row.endswith(("_init", "_scale", "_std"))}, lr_scale


def param_groups(model, lr_scale):
    """
    Adam's parameter groups, one a tensor class, each with its "lr_scale": set group["lr"] = group["lr_scale"] · η.
    Raises ValueError if a parameter of the model belongs to no class or to more than one.
    """
    groups = {tensors: dict(params=[], name=tensors, lr_scale=scale) for tensors, scale in lr_scale.items()}
    for name, parameter in model.named_parameters():
        classes = [tensors for tensors, pattern in TENSOR_CLASSES.items() if re.fullmatch(pattern, name)]
        if len(classes) != 1:
            raise ValueError(f"parameter {name} must be in one of TENSOR_CLASSES, but is in {' and '.join(classes) or 'none'}")
        groups[classes[0]]["params"].append(parameter)
    return list(groups.values())


def main():
    if any(re.fullmatch(r"[^-].*\.csv", arg) for arg in sys.argv[1:]):
        verdict_main()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"parametrize.py: {message} (see --help)")
    sizes = dict(width=1024, depth=10, steps=10_000, base_width=1024, base_depth=10, base_steps=10_000)
    for key, default in sizes.items():
        parser.add_argument(f"--{key}", type=int, default=default, help=f"default {default}")
    args = vars(parser.parse_args())
    if len(sys.argv) == 1:
        own = [f"\n{name}: {start}, but {', '.join(f'{row} {cell}' for row, cell in changes.items())}"
               for name, (start, changes) in OWN.items()]
        print("\n".join((TABLE.strip("\n"), NOTES.rstrip(), PLAIN_TABLE.rstrip(), *own)))
        return
    try:
        columns = {name: parametrize(name, **args) for name in COLUMNS}
    except ValueError as error:
        parser.error(error)
    print(", ".join(f"{key} {args[key]:,}" for key in sizes))
    for model in (read_table(TABLE), read_table(PLAIN_TABLE)):      # side by side: the columns, OWN ones too, with the same rows
        rows = next(iter(model.values())).keys()
        names = [name for name in columns if COLUMNS[name].keys() == rows]
        print(f"\n{'':>18}" + "".join(f"{name:>12}" for name in names))
        for part, prefix in ((1, "η × "), (0, "")):
            for row in columns[names[0]][part]:
                print(f"{prefix + row:>18}" + "".join(f"{columns[name][part][row]:>12.4g}" for name in names))


# ---------------------------------------------------------------- the verdict: does the learning rate transfer?

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
    mults = {key: None if key == "unembedding_lr_mult" and run[key] == -1 else run[key] for key in MULTS}
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


def missing(rows, verdicts, wanted):
    """
    The runs still to do, as lines of train.py's options: those of the lines `wanted` that are not among the rows, each once;
    and when all of these are done, those that grids too narrow lack. Raises ValueError if the rows are of another sweep.
    """
    from train import Config        # here, for it takes seconds to import, and imports this file

    lines = [(line.strip(), dict((word if "=" in word else word + "=True").removeprefix("--").split("=", 1) for word in line.split()))
             for line in wanted]
    runs = [read_run(options, RUN, f"the run {line!r}") for line, options in lines]
    recipes(rows + runs)
    may_differ = MAY_DIFFER.union(MULTS if one_class_at_a_time(rows + runs) else ())
    defaults = {key: str(default) for key, default in vars(Config()).items() if key not in may_differ}
    done, todo, options, run = {identity(run) for run in rows}, {}, {}, {}
    for (line, options), run in zip(lines, runs):
        # of the sweep's configuration, too, what the line leaves at its default; the rows have what automatic ones came to
        for key in defaults.keys() - {"vocab_size", "dtype"} | defaults.keys() & options.keys() if rows else ():
            there, here = ({**defaults, **its}[key] for its in (rows[0], run))
            if there != here:
                raise ValueError(f"the results are of {key}={there}, not {key}={here}; give each its own file")
        todo.setdefault(identity(run), line)
    if todo.keys() <= done:
        add = [(verdict["key"], one["run"], *point) for verdict in verdicts.values() for one in verdict["curves"].values()
               for point in one["add"] if one["own"]]
        for key, like, x, seed in add:     # as the last line, with these changes
            new = {**like, key: 2 ** x, "seed": seed}
            changes = {key: new[key] for key in ("parametrization", *RUN) if new[key] != run.get(key)}
            todo.setdefault(identity(new), " ".join(f"--{key}={value}" for key, value in {**options, **changes}.items()))
    return [line for run, line in todo.items() if run not in done]


# ---------------------------------------------------------------- alignment exponents, as train.py --alignment_every measures them

EXPONENTS = dict(alpha="α", omega="ω", nu="ν")
CLASSES = dict(hidden="W_", unembedding="E_out")        # what the names of their maps begin with


def read_alignment(rows, path):
    """
    The measurements of one or several alignment.csv of train.py, put one behind the other, as
    {(column, width, seed): {step: {"loss": …, "W_q": [a row a layer], …}}}, with the steps that all of them have. Raises
    ValueError for a cell that is no number, if step 0 and another are not among them, or if a measurement comes twice or the
    runs have different depths or steps.
    """
    runs, seen, shapes = {}, set(), set()
    for i, row in enumerate(rows, 2):
        if row["step"] == "step":       # the next file's head
            continue
        try:
            run, step = (row["parametrization"], int(row["width"]), int(row["seed"])), int(row["step"])
            numbers = {key: float(row[key] or "nan") for key in ("layer", "d_in", *EXPONENTS, "rms_dW", "rms_dx", "rms_dy")}
            at = runs.setdefault(run, {}).setdefault(step, dict(loss=float(row["loss"])))
            shapes.add((row["depth"], row["steps"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {i} is not as train.py --alignment_every writes it ({error})") from None
        at.setdefault(row["map"], []).append(numbers)
        if (*run, step, row["layer"], row["map"]) in seen or len(shapes) > 1:
            raise ValueError(f"{path}, line {i}: {run[0]} at width {run[1]}, seed {run[2]} is there twice, or in another depth or number "
                             "of steps; give each its own file")
        seen.add((*run, step, row["layer"], row["map"]))
    steps = sorted(set.intersection(*map(set, runs.values())))
    if len(steps) < 2 or steps[0] != 0:
        raise ValueError(f"{path}: its runs must have step 0 and a later one in common, but have only {steps}")
    return {name: {step: run[step] for step in steps} for name, run in runs.items()}


def log_ratio(at, tensors, key, layer=None):
    """Mean of log [RMS(W x) / (RMS(W) RMS(x))] over the maps of a tensor class and layers (or of one), and of log d_in."""
    rows = [row for name in at if name.startswith(CLASSES[tensors]) for row in at[name] if layer in (None, row["layer"])]
    logs = np.log([row["d_in"] for row in rows])
    return np.array([np.mean([row[key] for row in rows] * logs), logs.mean()])


def loss_weighted(run, quantity):
    """Mean of quantity(measurement) over training, each measurement weighted by the loss's decrease since the one before."""
    steps = sorted(run)
    weights = [run[a]["loss"] - run[b]["loss"] for a, b in zip(steps, steps[1:])]
    return sum(weight * quantity(run[step]) for weight, step in zip(weights, steps[1:])) / sum(weights)


def estimate(values):
    """Mean over seeds with half its 95 % interval, as text."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} ± {student(len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)):.2f}"


def widths_of(runs, name):
    return sorted({width for column, width, _ in runs if column == name})


def slopes(runs, name, quantity):
    """Slope of a log_ratio over log width, a seed each, for the seeds that all widths have; [] for a single width."""
    widths = widths_of(runs, name)
    if len(widths) == 1:
        return []
    seeds = sorted(set.intersection(*({s for column, w, s in runs if (column, w) == (name, width)} for width in widths)))
    return [np.polyfit(np.log(widths), [quantity(runs[name, width, seed])[0] for width in widths], 1)[0] for seed in seeds]


def report_alignment(runs):
    """The exponents as text: loss-weighted, of single widths, and as slopes over the widths, which no constant biases."""
    cells = [(tensors, key) for tensors in CLASSES for key in EXPONENTS]
    head = [f"{tensors} {EXPONENTS[key]}" for tensors, key in cells]
    lines, sloped = [], []
    for name in in_order(runs):
        for width in widths_of(runs, name):
            its = [run for (column, w, _), run in runs.items() if (column, w) == (name, width)]
            ratios = ([loss_weighted(run, lambda at: log_ratio(at, *cell)) for run in its] for cell in cells)
            lines.append((name, str(width), str(len(its)), *(estimate([a / b for a, b in ratio]) for ratio in ratios)))
        first = next(run for (column, _, _), run in runs.items() if column == name)
        steps = [step for step in sorted(first) if step]
        shown = sorted({min(steps, key=lambda step: abs(math.log(step / near))) for near in np.geomspace(1, steps[-1], 6)})
        for when in (*shown, "all, loss-weighted"):
            pick = (lambda run, f: loss_weighted(run, f)) if isinstance(when, str) else (lambda run, f: f(run[when]))
            sloped.append((name, str(when), *(estimate(slopes(runs, name, lambda run: pick(run, lambda at: log_ratio(at, *cell))))
                                              for cell in cells)))
    return "\n".join((
        table(("column", "width", "seeds", *head), *lines),
        table(("slope over widths", "after step", *head), *sloped),
        "1/2: not aligned, 1: fully. α: of weight changes with the initial inputs, ω: of input changes with the initial weights, ν: of",
        "both changes. Above: means over training, weighted by the loss's decrease. Below: slope of log RMS(W x) / (RMS(W) RMS(x))."))


def draw_alignment(runs, path):
    """Four panels: exponents of the widest model over training, against the loss's decrease and by layer; slopes over widths."""
    _, figure_of = plotting()
    figure = figure_of(14, 3.8)
    panels = figure.subplots(1, 4, sharey=True)
    name = next(iter(runs))[0]
    widest = max(width for _, width, _ in runs)
    its = [run for (_, width, _), run in runs.items() if width == widest]
    steps = [step for step in sorted(its[0]) if step]
    decrease = [np.mean([run[0]["loss"] - run[step]["loss"] for run in its]) for step in steps]
    layers = [row["layer"] for row in its[0][steps[-1]]["W_q"]]
    for key, color in zip(EXPONENTS, ("C3", "C0", "C2")):
        for tensors, style in zip(CLASSES, ("o-", "o--")):
            label = f"{EXPONENTS[key]}, {tensors}"
            mean = [np.mean([np.divide(*log_ratio(run[step], tensors, key)) for run in its]) for step in steps]
            for panel, x in zip(panels, (steps, decrease)):
                panel.plot(x, mean, style, color=color, ms=3, mfc="white" if tensors == "unembedding" else color, label=label)
            over = [slopes(runs, name, lambda run: log_ratio(run[step], tensors, key)) for step in steps]
            if all(over):
                panels[3].plot(steps, np.mean(over, axis=1), style, color=color, ms=3, mfc="white" if tensors == "unembedding" else color)
                panels[3].fill_between(steps, np.min(over, axis=1), np.max(over, axis=1), color=color, alpha=0.15, lw=0)
        by_layer = [np.mean([np.divide(*loss_weighted(run, lambda at: log_ratio(at, "hidden", key, layer))) for run in its])
                    for layer in layers]
        panels[2].plot([layer + 1 for layer in layers], by_layer, "o-", color=color, ms=3)
    for panel, label, title in zip(panels, ("step", "loss, decrease so far (nats)", "layer", "step"),
                                   (f"{name}, width {widest}", "", "hidden, loss-weighted", "slope over widths (band: seeds)")):
        panel.set_xlabel(label)
        panel.set_title(title, fontsize=10)
        panel.set_ylim(0.4, 1.05)
        for value in (0.5, 0.75, 1):
            panel.axhline(value, color="gray", lw=0.8, ls=":")
    panels[0].set_xscale("log")
    panels[3].set_xscale("log")
    panels[2].set_xticks([layer + 1 for layer in layers])
    panels[0].set_ylabel("alignment exponent")
    panels[0].legend(fontsize=7, ncols=2)
    save(figure, path)


CHANGES = {     # what the coordinate check looks at: f(measurement, width). States and logits should change as much at every width.
    "weights of blocks, |ΔW| / |W|":
        lambda at, d: d ** 0.5 * np.mean([row["rms_dW"] for name in at if name.startswith("W_") for row in at[name]]),
    "last hidden state, |Δh|": lambda at, d: d ** 0.5 * at["E_out"][0]["rms_dx"],
    "logits, RMS of Δz": lambda at, d: at["logits"][0]["rms_dy"]}


def coordinates(runs, name, step, change):
    """(widths, mean over seeds of a change since initialization at each)."""
    changes = {width: [] for width in widths_of(runs, name)}
    for (column, width, _), run in runs.items():
        if column == name:
            changes[width].append(CHANGES[change](run[step], width))
    return list(changes), [np.mean(values) for values in changes.values()]


def in_order(runs):
    """The names of the runs' columns, as they stand in the table."""
    return sorted({name for name, _, _ in runs}, key=[*COLUMNS, *(name for name, _, _ in runs)].index)


def coordinate_steps(runs):
    """The measured steps nearest to 1, 10, 100, …"""
    steps = [step for step in sorted(next(iter(runs.values()))) if step]
    return sorted({min(steps, key=lambda step: abs(step - 10 ** i)) for i in range(1 + round(math.log10(steps[-1])))})


def report_coordinates(runs):
    """Powers of the width in each change, as text. Raises ValueError if a column has one width only."""
    names = in_order(runs)
    if single := [name for name in names if len(widths_of(runs, name)) == 1]:
        raise ValueError(f"the coordinate check needs more than one width of {' and '.join(single)}")
    def power(*which):
        return np.polyfit(*np.log(coordinates(runs, *which)), 1)[0]

    return table(("power of width in", "after step", *CHANGES),
                 *((name, str(step), *(f"{power(name, step, change):+.2f}" for change in CHANGES))
                   for name in names for step in coordinate_steps(runs)))


def draw_coordinates(runs, path):
    """The coordinate check: a panel a column of the table and change, a line a step, over the width."""
    _, figure_of = plotting()
    names = in_order(runs)
    figure = figure_of(2.3 * len(names), 6.5)
    panels = figure.subplots(len(CHANGES), len(names), sharex=True, sharey="row", squeeze=False)
    for change, row in zip(CHANGES, panels):
        for name, panel in zip(names, row):
            for step in coordinate_steps(runs):
                widths, values = coordinates(runs, name, step, change)
                panel.loglog(widths, values, "o-", ms=3, label=f"step {step}")
            panel.set_xticks(widths, widths)
            panel.minorticks_off()
        row[0].set_ylabel(change)
    for name, top, bottom in zip(names, panels[0], panels[-1]):
        top.set_title(name, fontsize=10)
        bottom.set_xlabel("width")
    panels[0][0].legend(fontsize=7)
    save(figure, path)


def verdict_main():
    parser = argparse.ArgumentParser(usage="python parametrize.py RESULTS.csv [options]", allow_abbrev=False, description=(
        "Judge a sweep made with train.py --results=RESULTS.csv: does the best learning rate stay where it is?"))
    parser.add_argument("results", metavar="RESULTS.csv")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the picture, too")
    parser.add_argument("--axis", choices=("width", "depth", "steps", "parameters"),
                        help="what the size is; default: what differs between the runs, parameters if several do")
    parser.add_argument("--control", default="ngpt", choices=COLUMNS, help="the column that others are compared to [ngpt]")
    parser.add_argument("--missing", action="store_true", help="print instead the runs to do, a line of train.py's options "
                        "each: those on standard input that are not in the results or, if all are, those that grids lack")
    parser.error = lambda message: sys.exit(f"parametrize.py: {message} (see python parametrize.py RESULTS.csv --help)")
    args = parser.parse_args()
    try:
        measured = read_rows(args.results) if os.path.exists(args.results) else []
        if measured and "omega" in measured[0]:
            runs = read_alignment(measured, args.results)
            several = len({name for name, _, _ in runs}) > 1        # columns are compared, a single one is looked into
            print((report_coordinates if several else report_alignment)(runs))
            if not several and len({width for _, width, _ in runs}) > 1:
                print("\n" + report_coordinates(runs).rstrip())
            if args.plot:
                (draw_coordinates if several else draw_alignment)(runs, args.plot)
            return
        rows = [] if args.missing and not os.path.exists(args.results) else read_results(args.results)
        axis, verdicts = judge(rows, args.axis, args.control)
        if args.missing:
            for line in missing(rows, verdicts, () if sys.stdin.isatty() else sys.stdin):
                print(line)
            return
        print(report(axis, verdicts, args.control))
        if args.plot:
            draw(axis, verdicts, args.plot)
    except (ValueError, OSError) as error:
        sys.exit(f"parametrize.py: {error}")


if __name__ == "__main__":
    main()
