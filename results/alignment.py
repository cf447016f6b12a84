"""
Alignment exponents of trained models, measured on the weights that train.py saved along the way.

    python train.py --snapshot_every=20 --out_dir=out/a …           save weights at steps 0, 1, 2, 4, 8, 16, 20, 40, …
    python results/alignment.py out/a out/b … --csv=FILE.csv        measure them; print exponents and slopes over widths
    python results/alignment.py FILE.csv … --plot=FILE.png          print and draw measurements made before

Runs of several parametrizations get the coordinate check alone: how much weights, hidden states and logits have changed
at each width. Give each (parametrization, width, seed) once, all with the same depth and number of steps.
"""
import argparse
import csv
import json
import math
import pickle
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from parametrize import COLUMNS, TENSOR_CLASSES
from prepare_data import read_folder
from show import table
from verdict import student

MAPS = {"qkv": ("W_q", "W_k", "W_v"), "attn_out": ("W_O",), "mlp_in": ("W_u", "W_nu"), "mlp_out": ("W_oMLP",),
        "unembedding": ("E_out",)}      # parameter: the linear maps stacked in it; any other is one map of its own name
EXPONENTS = dict(alpha="α", omega="ω", nu="ν")
CELLS = [(tensors, key) for tensors in ("hidden", "unembedding") for key in EXPONENTS]
CHANGES = ["weights of blocks, |ΔW| / |W|", "last hidden state, |Δh|", "logits, RMS of Δz"]
FIELDS = ["parametrization", "width", "depth", "steps", "seed", "step", "loss", "layer", "map", "d_in", *EXPONENTS,
          "rms_dW", "rms_dx", "rms_y", "rms_dy"]
NUMBERS = ["loss", "d_in", *EXPONENTS, "rms_dW", "rms_dx", "rms_dy"]
TOKENS = 2048           # of the validation split, the same in every measurement


class LinearMaps(TorchFunctionMode):
    """
    Collects `inputs`, {weight's name: (input (…, d_in), True for x @ W)}, of the linear maps of a model called within.
    A matrix keeps its name through functions that keep its shape, such as a product with rescalers. Raises ValueError
    for another weight, and for a second use.
    """
    def __init__(self, model):
        super().__init__()
        self.inputs, self.names = {}, {p: name for name, p in model.named_parameters() if p.dim() == 2}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is F.linear or function in (torch.matmul, torch.Tensor.matmul) and args[1].dim() == 2:
            name = self.names.get(args[1])
            if name is None or name in self.inputs:
                raise ValueError(f"the weight of a linear map, {tuple(args[1].shape)}, is {name or 'no parameter'} "
                                 f"{'again' if name else 'as a whole'}: name it in LinearMaps of results/alignment.py")
            self.inputs[name] = args[0], function is not F.linear
        for arg in args:
            if isinstance(arg, torch.Tensor) and arg in self.names and isinstance(out, torch.Tensor):
                if (out.shape, out.stride()) == (arg.shape, arg.stride()):      # not transposed either
                    self.names[out] = self.names[arg]
        return out


def rms(x):
    """Root mean square over the last dimension, (…, n) to (…)."""
    return x.square().mean(-1).sqrt()


def alignment_exponent(weight, x):
    """
    log_d [RMS(W x) / (RMS(W) RMS(x))] of weight W (out, d) and x (…, d): 1/2 if they are independent, 1 if W has rank
    one along x. Mean over tokens that have a logarithm (a token never trained on has not moved); nan if none has.
    arXiv:2407.05872; Definition 3.1 of νGPT.
    """
    ratio = rms(F.linear(x, weight)) / (rms(weight.flatten()) * rms(x))
    return (ratio[ratio.isfinite() & (ratio > 0)].log().mean() / math.log(weight.size(1))).item()


@torch.no_grad()
def measure(model, initial, tokens, targets):
    """
    (rows, loss in nats a token) of a model on tokens and targets (B, T), in fp32. A row {layer, map, d_in, …} is a
    linear map y = W x: with ΔW and Δx the changes since the initial model, α of ΔW x₀, ω of W₀ Δx and ν of ΔW Δx, and
    the RMS of ΔW, Δx, y and Δy. W is without rescalers; the last row is of the logits. Raises ValueError as LinearMaps.
    """
    def size(x):
        return rms(x).mean().item()

    forwards = []
    for part in (model, initial):
        with LinearMaps(part) as maps:
            forwards.append((maps.inputs, *part(tokens, targets)))
    ((inputs, logits, loss), (inputs_0, logits_0, _)), rows = forwards, []
    for name, (x, transposed) in inputs.items():
        in_block, x_0 = re.fullmatch(r"blocks\.(\d+)\.(.+)", name), inputs_0[name][0]
        layer, short = (int(in_block[1]), in_block[2]) if in_block else (len(model.blocks), name)
        maps, weights = MAPS.get(short, (short,)), (part.get_parameter(name) for part in (model, initial))
        for map_, W, W_0 in zip(maps, *((W.T if transposed else W).chunk(len(maps)) for W in weights)):
            dW, dx, y, y_0 = W - W_0, x - x_0, F.linear(x, W), F.linear(x_0, W_0)
            rows.append(dict(layer=layer, map=map_, d_in=W.size(1), alpha=alignment_exponent(dW, x_0),
                             omega=alignment_exponent(W_0, dx), nu=alignment_exponent(dW, dx),
                             rms_dW=size(dW.flatten()), rms_dx=size(dx), rms_y=size(y), rms_dy=size(y - y_0)))
    rows.append(dict(layer=len(model.blocks), map="logits", rms_y=size(logits), rms_dy=size(logits - logits_0)))
    return rows, loss.item()


def measure_run(out_dir):
    """[(out_dir, row of FIELDS as text), …] of all snapshots of a run. Raises ValueError if there is none of step 0."""
    paths, rows = sorted(Path(out_dir).glob("snapshot_*.pt")), []
    try:
        config = train.Config(**json.loads((Path(out_dir) / "config.json").read_text())["config"] | dict(device="auto"))
        device, _ = train.open_device(config)
        (model, _), (initial, _) = train.build(config, device), train.build(config, device)
        _, val, _ = read_folder(config.data)
        starts = train.validation_starts(len(val), config.seq_len, config.eval_tokens)
        batch = train.sequences(val, starts[:max(1, TOKENS // config.seq_len)], config.seq_len, device)
        run = {key: str(getattr(config, key)) for key in FIELDS[:5]}
        for path in paths:
            snapshot = torch.load(path, map_location=device, weights_only=True)
            model.load_state_dict(snapshot["model"])
            if path == paths[0]:
                initial.load_state_dict(snapshot["model"])
            maps, loss = measure(model, initial, *batch)
            for row in maps:
                cells = {key: f"{cell:.5g}" if isinstance(cell, float) else str(cell) for key, cell in row.items()}
                now = dict(step=str(snapshot["step"]), loss=f"{loss:.6f}")
                rows.append((out_dir, dict.fromkeys(FIELDS, "") | run | now | cells))
    except (OSError, LookupError, RuntimeError, TypeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{out_dir} cannot be measured ({reason})") from None
    if not rows or rows[0][1]["step"] != "0":
        raise ValueError(f"{out_dir} has no snapshot of step 0; train with --snapshot_every=N")
    return rows


def read_csv(path):
    """[("FILE.csv, line 2", row as text), …] of a file, or of files put one behind the other, each with its head."""
    with open(path, newline="") as file:
        rows = enumerate(csv.DictReader(file), 2)
        return [(f"{path}, line {i}", row) for i, row in rows if row.get("step") != "step"]


def is_hidden(map_):
    """Whether the linear map is of the class "hidden": "blocks.0.W_q" is, and whatever parametrize.py says is."""
    return re.fullmatch(TENSOR_CLASSES["hidden"] + r"|blocks\.\d+\.W_\w+", map_) is not None


def quantities(numbers, maps, widths):
    """
    changes (W, seeds, S, 3) as in CHANGES, of numbers (W, seeds, S + 1 steps, maps, NUMBERS) at W widths; log_ratios,
    means over a class's maps of log [RMS(W x) / (RMS(W) RMS(x))], and exponents, both (W, seeds, S + 1, 6) as in CELLS.
    Step 0 is left out. The last of S + 1 is the mean over steps, each weighted by the decrease of the loss before it.
    """
    hidden, output, logits = (list(map(which, maps)) for which in (is_hidden, "E_out".__eq__, "logits".__eq__))
    weights, log_d_in = -np.diff(numbers[..., 0, 0])[..., None], np.log(numbers[:, :, 1:, :, 1:2])
    logs = numbers[:, :, 1:, :, 2:5] * log_d_in
    steps = np.concatenate([logs[..., of, :].mean(3) for of in (hidden, output)], axis=-1)
    mean = (weights * steps).sum(2, keepdims=True) / weights.sum(2, keepdims=True)
    log_ratios = np.concatenate((steps, mean), axis=2)
    log_d_in = np.concatenate([log_d_in[:, :, :1, of].mean(3).repeat(3, axis=-1) for of in (hidden, output)], axis=-1)
    root = np.sqrt(widths)[:, None, None]
    dW, dh, dz = (numbers[:, :, 1:, of, i].mean(3) for of, i in ((hidden, 5), (output, 6), (logits, 7)))
    return dict(changes=np.stack((root * dW, root * dh, dz), axis=-1), log_ratios=log_ratios,
                exponents=log_ratios / log_d_in)


def read_runs(rows):
    """
    {column: namespace of widths (W,), steps (S,) after step 0, check (steps near 1, 10, 100, …) and quantities} of
    [(where, row as text)], for steps that all runs and seeds that all widths have. Raises ValueError for a cell that is
    no number, a run that is there twice, and runs that do not go together.
    """
    runs, shapes, columns = {}, set(), {}
    for where, row in rows:
        try:
            run, step = (row["parametrization"], int(row["width"]), int(row["seed"])), int(row["step"])
            numbers, layer = [float(row[key] or "nan") for key in NUMBERS], row["layer"]
            map_ = row["map"] if layer == row["depth"] else f"blocks.{layer}.{row['map']}"
            shapes.add((row["depth"], row["steps"]))
            maps = runs.setdefault(run, {}).setdefault(step, {})
            if map_ in maps or len(shapes) > 1:
                raise ValueError(f"width {run[1]}, seed {run[2]} is there twice, or with another depth or length")
            maps[map_] = numbers
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where} is not as results/alignment.py --csv writes it ({error})") from None
    steps = sorted(set.intersection(*map(set, runs.values()))) if runs else []
    if len(steps) < 2 or steps[0] != 0:
        raise ValueError(f"the runs must have step 0 and a later one in common, but have only {steps}")
    check = {min(steps[1:], key=lambda step: abs(step - 10 ** i)) for i in range(1 + round(math.log10(steps[-1])))}
    for name in sorted({run[0] for run in runs}, key=[*COLUMNS, *(run[0] for run in runs)].index):
        widths = sorted({run[1] for run in runs if run[0] == name})
        seeds = [seed for seed in sorted({run[2] for run in runs}) if all((name, d, seed) in runs for d in widths)]
        if not seeds:
            raise ValueError(f"the widths of {name} have no seed in common")
        numbers = [[[[*runs[name, d, seed][step].values()] for step in steps] for seed in seeds] for d in widths]
        columns[name] = SimpleNamespace(widths=widths, steps=steps[1:], check=sorted(check),
                                        **quantities(np.array(numbers), [*runs[name, widths[0], seeds[0]][0]], widths))
    return columns


def slope(widths, values):
    """Least-squares slope of values (W, …) over the logarithm of W widths; nan for a single width."""
    x = np.log(widths) - np.mean(np.log(widths))
    return np.tensordot(x, values, 1) / (x @ x or math.nan)


def estimate(values):
    """Mean over seeds and half its 95 % interval, as text; "-" for nan."""
    if len(values) == 1:
        return "-" if math.isnan(values[0]) else f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} ± {student(len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)):.2f}"


def report_alignment(name, runs):
    """Exponents of a column as text: loss-weighted at each width, and as slopes over widths, free of constants."""
    head, near = [f"{tensors} {EXPONENTS[key]}" for tensors, key in CELLS], np.geomspace(1, runs.steps[-1], 6)
    shown = sorted({min(runs.steps, key=lambda step: abs(math.log(step / power))) for power in near})
    slopes = slope(runs.widths, runs.log_ratios).transpose(1, 2, 0)     # (S + 1, 6, seeds)
    return "\n".join((
        table(("column", "width", "seeds", *head), *(
            (name, str(width), str(len(exponents)), *map(estimate, exponents[:, -1].T))
            for width, exponents in zip(runs.widths, runs.exponents))),
        table(("slope over widths", "after step", *head),
              *((name, str(step), *map(estimate, slopes[runs.steps.index(step)])) for step in shown),
              (name, "all, loss-weighted", *map(estimate, slopes[-1]))),
        "1/2: not aligned, 1: fully. α: weight changes with initial inputs, ω: initial weights with input changes,\n"
        "ν: both changes. Above: means over training, weighted by the decrease of the loss. Below: slopes of\n"
        "log RMS(W x) / (RMS(W) RMS(x)) over log width.\n"))


def report_coordinates(columns):
    """The power of the width in each change, as text. Raises ValueError if a column has one width only."""
    if single := [name for name, runs in columns.items() if len(runs.widths) == 1]:
        raise ValueError(f"the coordinate check needs more than one width of {' and '.join(single)}")
    powers = {name: slope(runs.widths, np.log(runs.changes.mean(1))) for name, runs in columns.items()}     # (S, 3)
    return table(("power of width in", "after step", *CHANGES), *(
        (name, str(step), *(f"{power:+.2f}" for power in powers[name][runs.steps.index(step)]))
        for name, runs in columns.items() for step in runs.check))


def draw(columns, path):
    """Write a picture: of one column exponents and slopes over steps (bands: seeds), of several changes over width."""
    if len(columns) == 1:
        (name, runs), = columns.items()
        figure = Figure(figsize=(8, 3.8), dpi=150, layout="constrained")
        panels = figure.subplots(1, 2, sharex=True, sharey=True, squeeze=False)
        for panel, values, title in zip(panels[0], (runs.exponents[-1], slope(runs.widths, runs.log_ratios)),
                                        (f"{name}, width {runs.widths[-1]}", "slope over widths")):
            for (tensors, key), color, y in zip(CELLS, ("C3", "C0", "C2") * 2, values[:, :-1].transpose(2, 0, 1)):
                panel.semilogx(runs.steps, y.mean(0), "o-" if tensors == "hidden" else "s:", color=color, ms=3,
                               label=f"{EXPONENTS[key]}, {tensors}")
                panel.fill_between(runs.steps, y.min(0), y.max(0), color=color, alpha=0.15, lw=0)
            panel.set(title=title, xlabel="step", ylabel="alignment exponent", ylim=(0.4, 1.05))
            panel.grid(axis="y", ls=":")
    else:
        figure = Figure(figsize=(2.3 * len(columns), 6.5), dpi=150, layout="constrained")
        panels = figure.subplots(len(CHANGES), len(columns), sharex=True, sharey="row")
        for column, (name, runs) in zip(panels.T, columns.items()):
            for panel, change, values in zip(column, CHANGES, runs.changes.mean(1).T):      # values (S, W)
                for step in runs.check:
                    panel.loglog(runs.widths, values[runs.steps.index(step)], "o-", ms=3, label=f"step {step}")
                panel.set_xticks(runs.widths, runs.widths)
                panel.minorticks_off()
                panel.set(xlabel="width", ylabel=change)
            column[0].set_title(name, fontsize=10)
    for panel in panels.flat:
        panel.label_outer()
    panels[0, 0].legend(fontsize=7)
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"alignment.py: {message} (see --help)")
    parser.add_argument("sources", nargs="+", metavar="OUT_DIR or FILE.csv", help="runs, or measurements of runs")
    parser.add_argument("--csv", metavar="FILE.csv", help="write the measurements")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the picture")
    args, rows = parser.parse_args(), []
    try:
        for source in args.sources:
            rows += read_csv(source) if source.endswith(".csv") else measure_run(source)
        columns = read_runs(rows)
        if args.csv:
            with open(args.csv, "w", newline="") as file:
                writer = csv.DictWriter(file, FIELDS)
                writer.writeheader()
                writer.writerows(row for _, row in rows)
        (name, runs), *others = columns.items()
        if not others:
            print(report_alignment(name, runs))
        if others or len(runs.widths) > 1:
            print(report_coordinates(columns))
        if args.plot:
            draw(columns, args.plot)
    except (ValueError, OSError, csv.Error) as error:
        sys.exit(f"alignment.py: {error}")


if __name__ == "__main__":
    main()
