"""
Alignment exponents of trained models, measured on the weights that train.py saved along the way.

    python train.py --snapshot_every=20 --out_dir=out/a …           save weights at steps 0, 1, 2, 4, 8, 16, 20, 40, …
    python results/alignment.py out/a out/b … --csv=FILE.csv        measure them; print exponents and slopes over widths
    python results/alignment.py FILE.csv … --plot=FILE.png          print and draw measurements made before

Runs of several parametrizations get the coordinate check alone: how much weights, hidden states and logits have changed
at each width. Give each (parametrization, width, seed) once, all with the same depth and number of steps.
"""
import argparse, csv, json, math, pickle, re, sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import show, train
from parametrize import COLUMNS, TENSOR_CLASSES
from prepare_data import read_folder
from verdict import student

MAPS = {"qkv": ("W_q", "W_k", "W_v"), "attn_out": ("W_O",), "mlp_in": ("W_u", "W_nu"), "mlp_out": ("W_oMLP",),
        "unembedding": ("E_out",)}      # parameter: the linear maps stacked in it; any other is one map of its own name
EXPONENTS = ["alpha", "omega", "nu"]
FIELDS = ["parametrization", "width", "depth", "steps", "seed", "step", "loss", "layer", "map", "d_in", *EXPONENTS,
          "rms_dW", "rms_dx", "rms_y", "rms_dy"]
NUMBERS = ["loss", "d_in", *EXPONENTS, "rms_dW", "rms_dx", "rms_dy"]
TOKENS = 2048           # of the validation split, the same in every measurement


class LinearMaps(TorchFunctionMode):
    """Collects `inputs`, {weight's name: (input (…, d_in), True for x @ W)}, of a model's linear maps while in use.
    A matrix keeps its name through functions that keep its shape, such as a product with rescalers. Raises ValueError
    for another weight, and for a second use."""
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
    """log_d [RMS(W x) / (RMS(W) RMS(x))] of weight W (out, d) and x (…, d): 1/2 if the two are independent, 1 if W has
    rank one along x. Mean over tokens that have a logarithm: one never trained on has not moved. nan if none has.
    arXiv:2407.05872; Definition 3.1 of νGPT."""
    ratio = rms(F.linear(x, weight)) / (rms(weight.flatten()) * rms(x))
    return (ratio[ratio.isfinite() & (ratio > 0)].log().mean() / math.log(weight.size(1))).item()


@torch.no_grad()
def measure(model, initial, tokens, targets):
    """(rows, loss in nats a token) of a model on tokens and targets (B, T), in fp32. Each row {layer, map, d_in, …} is
    of a linear map y = W x: with ΔW and Δx the changes since the initial model, α of ΔW x₀, ω of W₀ Δx and ν of ΔW Δx,
    and the RMS of ΔW, Δx, y and Δy. W is without rescalers. The last row is of logits. Raises as LinearMaps."""
    def size(x):
        return rms(x).mean().item()

    rows = []
    with LinearMaps(initial) as maps_0:
        logits_0, _ = initial(tokens)
    with LinearMaps(model) as maps:
        logits, loss = model(tokens, targets)
    for name, (x, transposed) in maps.inputs.items():
        in_block, x_0 = re.fullmatch(r"blocks\.(\d+)\.(.+)", name), maps_0.inputs[name][0]
        layer, short = (int(in_block[1]), in_block[2]) if in_block else (len(model.blocks), name)
        stacked, weights = MAPS.get(short, (short,)), (part.get_parameter(name) for part in (model, initial))
        for map_, W, W_0 in zip(stacked, *((W.T if transposed else W).chunk(len(stacked)) for W in weights)):
            dW, dx, y, y_0 = W - W_0, x - x_0, F.linear(x, W), F.linear(x_0, W_0)
            rows.append(dict(layer=layer, map=map_, d_in=W.size(1), alpha=alignment_exponent(dW, x_0),
                             omega=alignment_exponent(W_0, dx), nu=alignment_exponent(dW, dx),
                             rms_dW=size(dW.flatten()), rms_dx=size(dx), rms_y=size(y), rms_dy=size(y - y_0)))
    rows.append(dict(layer=len(model.blocks), map="logits", rms_y=size(logits), rms_dy=size(logits - logits_0)))
    return rows, loss.item()


def measure_run(out_dir):
    """[(out_dir, row of FIELDS as text), …] of all snapshots of a run. Raises ValueError if there is none of step 0."""
    paths, rows = sorted(Path(out_dir).glob("snapshot_*.pt")), []
    if not paths or int(paths[0].stem[len("snapshot_"):]) > 0:
        raise ValueError(f"{out_dir} has no snapshot of step 0; train with --snapshot_every=N")
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
            for part in (model, initial) if path == paths[0] else (model,):
                part.load_state_dict(snapshot["model"])
            maps, loss = measure(model, initial, *batch)
            for row in maps:
                cells = {key: f"{cell:.5g}" if isinstance(cell, float) else str(cell) for key, cell in row.items()}
                cells |= dict(step=str(snapshot["step"]), loss=f"{loss:.6f}")
                rows.append((out_dir, dict.fromkeys(FIELDS, "") | run | cells))
    except (OSError, LookupError, RuntimeError, TypeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{out_dir} cannot be measured ({reason})") from None
    return rows


def read_csv(path):
    """[("FILE.csv, line 2", row as text), …] of a file, or of files put one behind the other, each with its head."""
    with open(path, newline="") as file:
        rows = enumerate(csv.DictReader(file), 2)
        return [(f"{path}, line {i}", row) for i, row in rows if row.get("step") != "step"]


def is_hidden(map_):
    """Whether the linear map is of the class "hidden": "blocks.0.W_q" is, and whatever parametrize.py says is."""
    return re.fullmatch(TENSOR_CLASSES["hidden"] + r"|blocks\.\d+\.W_\w+", map_) is not None


def slope(widths, values, axis=0):
    """Least-squares slope over the logarithm of the widths, which lie along an axis of values; nan for one width."""
    x = np.log(widths) - np.mean(np.log(widths))
    return np.tensordot(x, values, (0, axis)) / (x @ x or math.nan)


def estimate(values):
    """(mean, half its 95 % interval) over seeds of values (seeds, …); half is nan for one seed."""
    seeds = len(values)
    half = student(seeds - 1) * values.std(0, ddof=1) / math.sqrt(seeds) if seeds > 1 else math.nan * values[0]
    return values.mean(0), half


def summarize(numbers, maps, widths, steps):
    """A namespace of numbers (seeds, W widths, S + 1 steps, maps, NUMBERS), with step 0 left out:
    changes (W, S, 3) as in show.CHANGES, means over seeds, and powers (S, 3) of the width in these changes;
    exponents (seeds, W, S + 1, 6) as in show.EXPONENTS, means over a class's maps, and slopes (seeds, S + 1, 6) of
    log [RMS(W x) / (RMS(W) RMS(x))] over log width. The last of S + 1 is the mean, weighted by the loss's decrease."""
    hidden, output, logits = (numbers[:, :, 1:, list(map(which, maps))]
                              for which in (is_hidden, "E_out".__eq__, "logits".__eq__))
    log_d_in = [np.log(of[..., 1:2]) for of in (hidden, output)]
    logs = np.concatenate([(of[..., 2:5] * log_d).mean(3) for of, log_d in zip((hidden, output), log_d_in)], axis=-1)
    decrease = -np.diff(numbers[..., 0, 0])[..., None]
    logs = np.concatenate((logs, (decrease * logs).sum(2, keepdims=True) / decrease.sum(2, keepdims=True)), axis=2)
    exponents = logs / np.concatenate([log_d[:, :, :1].mean(3).repeat(3, axis=-1) for log_d in log_d_in], axis=-1)
    root, slopes = np.sqrt(widths)[:, None], slope(widths, logs, axis=1)
    dW, dh, dz = hidden[..., 5].mean((0, 3)), output[..., 6].mean((0, 3)), logits[..., 7].mean((0, 3))
    changes = np.stack((root * dW, root * dh, dz), axis=-1)
    return SimpleNamespace(widths=widths, steps=steps, changes=changes, powers=slope(widths, np.log(changes)),
                           exponents=exponents, mean_exponents=estimate(exponents[:, :, -1]),
                           slopes=slopes, mean_slopes=estimate(slopes))


def read_runs(rows):
    """{column: summary} of [(where, row as text)], of the steps that all runs have and the seeds that all widths have.
    Raises ValueError for a cell that is no number, a run given twice, and runs that do not go together."""
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
    names = dict.fromkeys(name for name, _, _ in runs)
    for name in sorted(names, key=[*COLUMNS, *names].index):
        widths = sorted({width for column, width, _ in runs if column == name})
        seeds = [seed for seed in sorted({run[2] for run in runs}) if all((name, d, seed) in runs for d in widths)]
        if not seeds:
            raise ValueError(f"the widths of {name} have no seed in common")
        numbers = [[[[*runs[name, d, seed][step].values()] for step in steps] for d in widths] for seed in seeds]
        columns[name] = summarize(np.array(numbers), [*runs[name, widths[0], seeds[0]][0]], widths, steps[1:])
    return columns


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
            print(show.report_alignment(name, runs))
        if others or len(runs.widths) > 1:
            print(show.report_coordinates(columns))
        if args.plot and others:
            show.draw_coordinates(columns, args.plot)
        elif args.plot:
            show.draw_alignment(name, runs, args.plot)
    except (ValueError, OSError, csv.Error) as error:
        sys.exit(f"alignment.py: {error}")


if __name__ == "__main__":
    main()
