"""
Alignment exponents of trained models, measured on the weights that train.py saved along the way.

    python train.py --snapshot_every=20 --out_dir=out/a …           save weights at steps 0, 1, 2, 4, 8, 16, 20, 40, …
    python results/alignment.py out/a out/b … --csv=FILE.csv        measure them; print exponents and slopes over widths
    python results/alignment.py FILE.csv … --plot=FILE.png          print and draw measurements made before

Runs of several parametrizations get the coordinate check alone: how much weights, hidden states and logits have changed at
each width. Give each (parametrization, width, seed) once, all with the same depth and number of steps.
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
from verdict import student, table

MAPS = {"qkv": ("W_q", "W_k", "W_v"), "attn_out": ("W_O",), "mlp_in": ("W_u", "W_nu"), "mlp_out": ("W_oMLP",),
        "unembedding": ("E_out",)}      # parameter: the linear maps stacked in it; any other is one map of its own name
EXPONENTS = dict(alpha="α", omega="ω", nu="ν")
CELLS = [(tensors, key) for tensors in ("hidden", "unembedding") for key in EXPONENTS]
CHANGES = ["weights of blocks, |ΔW| / |W|", "last hidden state, |Δh|", "logits, RMS of Δz"]
FIELDS = ["parametrization", "width", "depth", "steps", "seed", "step", "loss", "layer", "map", "d_in", *EXPONENTS,
          "rms_dW", "rms_dx", "rms_y", "rms_dy"]
TOKENS = 2048           # of the validation split, the same in every measurement


class LinearMaps(TorchFunctionMode):
    """
    Collects `inputs`, {weight's name: input (…, d_in)}, of the linear maps of a model called within. A matrix keeps its
    name through functions that keep its shape, such as a product with rescalers. Raises ValueError for another weight.
    """
    def __init__(self, model):
        super().__init__()
        self.inputs, self.names = {}, {p: name for name, p in model.named_parameters() if p.dim() == 2}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is F.linear:
            name = self.names.get(args[1])
            if name is None or name in self.inputs:
                raise ValueError(f"a linear map with a {tuple(args[1].shape)} weight uses {name or 'no parameter'} "
                                 f"{'again' if name else 'as a whole'}; teach LinearMaps in results/alignment.py its name")
            self.inputs[name] = args[0]
        for matrix in args:
            if isinstance(matrix, torch.Tensor) and matrix in self.names and getattr(out, "shape", 0) == matrix.shape:
                self.names[out] = self.names[matrix]
        return out


def rms(x):
    """Root mean square over the last dimension, (…, n) to (…)."""
    return x.square().mean(-1).sqrt()


def alignment_exponent(weight, x):
    """
    log_d [RMS(W x) / (RMS(W) RMS(x))] of weight W (out, d) and x (…, d): 1/2 if they are independent, 1 if W has rank one
    along x. Mean over tokens that have a logarithm (a token never trained on has not moved); nan if none has.
    arXiv:2407.05872; Definition 3.1 of νGPT.
    """
    ratio = rms(F.linear(x, weight)) / (rms(weight.flatten()) * rms(x))
    return (ratio[ratio.isfinite() & (ratio > 0)].log().mean() / math.log(weight.size(1))).item()


@torch.no_grad()
def measure(model, initial, tokens, targets):
    """
    (rows, loss in nats a token) of a model on tokens and targets (B, T), in fp32. A row {layer, map, d_in, …} is one linear
    map y = W x: with ΔW and Δx the changes since the initial model, α of ΔW x₀, ω of W₀ Δx and ν of ΔW Δx, and the RMS of
    ΔW, Δx, y and Δy. W is without rescalers. The last row is of the logits. Raises ValueError as LinearMaps does.
    """
    def forward(model):
        with LinearMaps(model) as maps:
            logits, loss = model(tokens, targets)
        return maps.inputs, logits, loss.item()

    (inputs, logits, loss), (inputs_0, logits_0, _), rows = forward(model), forward(initial), []
    for name, x in inputs.items():
        in_block, x_0 = re.fullmatch(r"blocks\.(\d+)\.(.+)", name), inputs_0[name]
        layer, short = (int(in_block[1]), in_block[2]) if in_block else (len(model.blocks), name)
        maps = MAPS.get(short, (short,))
        for map_, W, W_0 in zip(maps, *(part.get_parameter(name).chunk(len(maps)) for part in (model, initial))):
            dW, dx, y, y_0 = W - W_0, x - x_0, F.linear(x, W), F.linear(x_0, W_0)
            rows.append(dict(layer=layer, map=map_, d_in=W.size(1), alpha=alignment_exponent(dW, x_0),
                             omega=alignment_exponent(W_0, dx), nu=alignment_exponent(dW, dx),
                             rms_dW=rms(dW.flatten()).item(), rms_dx=rms(dx).mean().item(),
                             rms_y=rms(y).mean().item(), rms_dy=rms(y - y_0).mean().item()))
    rows.append(dict(layer=len(model.blocks), map="logits", rms_y=rms(logits).mean().item(),
                     rms_dy=rms(logits - logits_0).mean().item()))
    return rows, loss


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
        for path in paths:
            snapshot = torch.load(path, map_location=device, weights_only=True)
            model.load_state_dict(snapshot["model"])
            if path == paths[0]:
                initial.load_state_dict(snapshot["model"])
            maps, loss = measure(model, initial, *batch)
            run = {key: getattr(config, key) for key in FIELDS[:5]} | dict(step=snapshot["step"], loss=f"{loss:.6f}")
            for row in maps:
                text = {key: f"{cell:.5g}" if isinstance(cell, float) else str(cell) for key, cell in (run | row).items()}
                rows.append((out_dir, {key: text.get(key, "") for key in FIELDS}))
    except (LookupError, RuntimeError, TypeError, EOFError, json.JSONDecodeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{out_dir} is damaged, or of another version of train.py ({type(error).__name__})") from None
    if not rows or rows[0][1]["step"] != "0":
        raise ValueError(f"{out_dir} has no snapshot of step 0; train with --snapshot_every=N")
    return rows


def tensor_class(map_):
    """The tensor class of a linear map: "hidden" for "W_q"; None for the logits and what parametrize.py does not name."""
    parameter = next((name for name, maps in MAPS.items() if map_ in maps), map_)
    return next((tensors for tensors, pattern in TENSOR_CLASSES.items()
                 if re.fullmatch(pattern, parameter) or re.fullmatch(pattern, f"blocks.0.{parameter}")), None)


def summary(rows, width):
    """16 numbers of one measurement: loss, CHANGES, and for each of CELLS the means over the class's maps of
    log [RMS(W x) / (RMS(W) RMS(x))] and log d_in. rows: {(layer, map): numbers}."""
    classes = {tensors: [row for row in rows.values() if row["tensors"] == tensors] for tensors, _ in CELLS}
    log_d_in = {tensors: np.log([row["d_in"] for row in chosen]) for tensors, chosen in classes.items()}
    last, logits = (next(row for (_, map_), row in rows.items() if map_ == name) for name in ("E_out", "logits"))
    return [logits["loss"],
            width ** 0.5 * np.mean([row["rms_dW"] for row in classes["hidden"]]), width ** 0.5 * last["rms_dx"], logits["rms_dy"],
            *(np.mean([row[key] for row in classes[tensors]] * log_d_in[tensors]) for tensors, key in CELLS),
            *(np.mean(log_d_in[tensors]) for tensors, _ in CELLS)]


def read_runs(rows):
    """
    {column: namespace of arrays} of [(where, row as text)], for steps that all runs and seeds that all widths have:
        steps (S,) after step 0, widths (W,), changes (W, seeds, S, 3); log_ratios and log_d_in (W, seeds, S + 1, 6), at
        each step and, last, their mean over steps, weighted by the decrease of the loss since the step before.
    Raises ValueError for a cell that is no number, for a run that is given twice, and for runs that do not go together.
    """
    runs, shapes, columns = {}, set(), {}
    for where, row in rows:
        try:
            run, step, which = (row["parametrization"], int(row["width"]), int(row["seed"])), int(row["step"]), row["map"]
            numbers = {key: float(row[key] or "nan") for key in ("loss", "d_in", *EXPONENTS, "rms_dW", "rms_dx", "rms_dy")}
            shapes.add((row["depth"], row["steps"]))
            maps = runs.setdefault(run, {}).setdefault(step, {})
            twice = (row["layer"], which) in maps
            maps[row["layer"], which] = numbers | dict(tensors=tensor_class(which))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where} is not as results/alignment.py --csv writes it ({error})") from None
        if twice or len(shapes) > 1:
            raise ValueError(f"{where}: {run[0]} at width {run[1]}, seed {run[2]} is there twice, or in another depth or "
                             "number of steps; look at such runs one after the other")
    steps = sorted(set.intersection(*map(set, runs.values()))) if runs else []
    if len(steps) < 2 or steps[0] != 0:
        raise ValueError(f"the runs must have step 0 and a later one in common, but have only {steps}")
    for name in sorted({run[0] for run in runs}, key=[*COLUMNS, *(run[0] for run in runs)].index):
        widths = sorted({run[1] for run in runs if run[0] == name})
        seeds = [seed for seed in sorted({run[2] for run in runs}) if all((name, width, seed) in runs for width in widths)]
        if not seeds:
            raise ValueError(f"the widths of {name} have no seed in common")
        numbers = np.array([[[summary(runs[name, width, seed][step], width) for step in steps]
                             for seed in seeds] for width in widths])
        weights, logs = -np.diff(numbers[..., :1], axis=2), numbers[:, :, 1:, 4:]
        logs = np.concatenate((logs, (weights * logs).sum(2, keepdims=True) / weights.sum(2, keepdims=True)), axis=2)
        columns[name] = SimpleNamespace(steps=steps[1:], widths=widths, changes=numbers[:, :, 1:, 1:4],
                                        log_ratios=logs[..., :6], log_d_in=logs[..., 6:])
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
    """Exponents of a column as text: loss-weighted at each width, and as slopes over widths, which are free of constants."""
    steps, head = runs.steps, [f"{tensors} {EXPONENTS[key]}" for tensors, key in CELLS]
    single = (runs.log_ratios / runs.log_d_in)[:, :, -1]        # (W, seeds, 6)
    slopes = slope(runs.widths, runs.log_ratios)                # (seeds, S + 1, 6)
    shown = sorted({min(steps, key=lambda step: abs(math.log(step / near))) for near in np.geomspace(1, steps[-1], 6)})
    return "\n".join((
        table(("column", "width", "seeds", *head), *(
            (name, str(width), str(len(seeds)), *map(estimate, seeds.T)) for width, seeds in zip(runs.widths, single))),
        table(("slope over widths", "after step", *head), *(
            (name, str(step), *map(estimate, slopes[:, steps.index(step)].T)) for step in shown),
            (name, "all, loss-weighted", *map(estimate, slopes[:, -1].T))),
        "1/2: not aligned, 1: fully. α: of weight changes with the initial inputs, ω: of input changes with the initial weights,",
        "ν: of both changes. Above: means over training, weighted by the decrease of the loss. Below: slopes of",
        "log [RMS(W x) / (RMS(W) RMS(x))] over log width.\n"))


def check_steps(runs):
    """The measured steps nearest to 1, 10, 100, …"""
    powers = [10 ** i for i in range(1 + round(math.log10(runs.steps[-1])))]
    return sorted({min(runs.steps, key=lambda step: abs(step - power)) for power in powers})


def report_coordinates(columns):
    """The power of the width in each change, as text. Raises ValueError if a column has one width only."""
    if single := [name for name, runs in columns.items() if len(runs.widths) == 1]:
        raise ValueError(f"the coordinate check needs more than one width of {' and '.join(single)}")
    powers = {name: slope(runs.widths, np.log(runs.changes.mean(1))) for name, runs in columns.items()}     # (S, 3)
    return table(("power of width in", "after step", *CHANGES), *(
        (name, str(step), *(f"{power:+.2f}" for power in powers[name][runs.steps.index(step)]))
        for name, runs in columns.items() for step in check_steps(runs)))


def draw_alignment(name, runs, path):
    """Write a picture: exponents over training at the largest width, and slopes over widths. Bands: all seeds."""
    figure = Figure(figsize=(8, 3.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    values = (runs.log_ratios / runs.log_d_in)[-1], slope(runs.widths, runs.log_ratios)     # each (seeds, S + 1, 6)
    for panel, seeds, title in zip(panels, values, (f"{name}, width {runs.widths[-1]}", "slope over widths")):
        for (tensors, key), color, lines in zip(CELLS, ("C3", "C0", "C2") * 2, seeds[:, :-1].transpose(2, 0, 1)):
            panel.semilogx(runs.steps, lines.mean(0), "o-" if tensors == "hidden" else "s:", color=color, ms=3,
                           label=f"{EXPONENTS[key]}, {tensors}")
            panel.fill_between(runs.steps, lines.min(0), lines.max(0), color=color, alpha=0.15, lw=0)
        for exponent in (0.5, 0.75, 1):
            panel.axhline(exponent, color="gray", lw=0.8, ls=":")
        panel.set(xlabel="step", ylim=(0.4, 1.05), title=title)
    panels[0].set_ylabel("alignment exponent")
    panels[0].legend(fontsize=7, ncols=2)
    figure.savefig(path)


def draw_coordinates(columns, path):
    """Write the coordinate check as a picture: a panel a column of the table and change, a line a step, over the width."""
    figure = Figure(figsize=(2.3 * len(columns), 6.5), dpi=150, layout="constrained")
    panels = figure.subplots(len(CHANGES), len(columns), sharex=True, sharey="row")
    for (name, runs), column in zip(columns.items(), panels.T):
        for panel, values in zip(column, runs.changes.mean(1).T):      # values (S, W)
            for step in check_steps(runs):
                panel.loglog(runs.widths, values[runs.steps.index(step)], "o-", ms=3, label=f"step {step}")
            panel.set_xticks(runs.widths, runs.widths)
            panel.minorticks_off()
        column[0].set_title(name, fontsize=10)
        column[-1].set_xlabel("width")
    for panel, change in zip(panels[:, 0], CHANGES):
        panel.set_ylabel(change)
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
            if source.endswith(".csv"):
                with open(source, newline="") as file:
                    rows += [(f"{source}, line {i}", row) for i, row in enumerate(csv.DictReader(file), 2)
                             if row.get("step") != "step"]      # the head of a file that was put behind another
            else:
                rows += measure_run(source)
        columns = read_runs(rows)
        if args.csv:
            with open(args.csv, "w", newline="") as file:
                writer = csv.DictWriter(file, FIELDS)
                writer.writeheader()
                writer.writerows(row for _, row in rows)
        (name, runs), *others = columns.items()
        reports = [] if others else [report_alignment(name, runs)]
        if others or len(runs.widths) > 1:
            reports.append(report_coordinates(columns))
        print("\n".join(reports), end="")
        if args.plot:
            draw_coordinates(columns, args.plot) if others else draw_alignment(name, runs, args.plot)
    except (ValueError, OSError, csv.Error) as error:
        sys.exit(f"alignment.py: {error}")


if __name__ == "__main__":
    main()
