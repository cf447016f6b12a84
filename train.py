"""
Train a normalized Transformer: one process, one node or several.

    python train.py --width=256 --depth=4 --steps=400           one GPU, or the CPU
    torchrun train.py --width=1024                              the same, started by torchrun
    torchrun --nproc_per_node=8 train.py --width=2048           eight GPUs
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py …    on each of four nodes
    python train.py --out_dir=out --resume                      continue a run that was stopped; its options come with it
    python train.py --out_dir=out --resume --sample_only        text from a trained model
    python train.py --each CLAIMS < RUNS                        many short runs in one process: see run_each, and sweep.sh

The block below is the configuration; each line is an option, --key=value. `python train.py --help` lists them.
"""
import argparse
import copy
import csv
import ctypes
import difflib
import fcntl
import functools
import inspect
import io
import json
import math
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from model import GPT, GPTConfig, PlainGPT
from parametrize import COLUMNS, MULTS, SIZES, param_groups, parametrize, read_rows
from prepare_data import get_tokenizer, prepare_stdlib, read_folder, sync, temporary_name, write_aside, write_json


@dataclass
class Config:
    # model
    width: int = 1024                   # d_model, a multiple of head_dim
    depth: int = 10                     # number of blocks
    head_dim: int = 64                  # size of an attention head; η does not carry over from one head_dim to another
    seq_len: int = 1024                 # tokens a sequence
    vocab_size: int = 0                 # 0: the data's vocabulary, rounded up to a multiple of 64
    # parametrization: how η changes with the model. One base in every command, for tuning and for training.
    parametrization: str = "nugpt"      # a column of the table in parametrize.py
    base_width: int = 1024              # the width, depth and steps at which the table's multipliers are all 1
    base_depth: int = 10                # (see base_width)
    base_steps: int = 10_000            # (see base_width)
    embedding_lr_mult: float = 1.0      # multiplies the learning rate of the embedding
    hidden_lr_mult: float = 1.0         # multiplies that of the matrices of the blocks
    unembedding_lr_mult: float = -1.0   # multiplies that of the unembedding; -1: the table's row "× at the base"
    rescalers_lr_mult: float = 1.0      # multiplies that of the rescalers, such as the eigen learning rates
    freeze_alpha: bool = False          # an ablation: the eigen learning rates α stay where they start
    # optimization: Adam and a cosine; a normalized Transformer needs no warm-up, weight decay or gradient clipping
    # The default η is 2^-8.5, the best of 2^-10, 2^-9.5, … 2^-7.5 at width 128, depth 4, 400 steps of 64 × 256 bytes under the default base
    # (assets/default_lr.csv). A larger model, longer run or other batch size has not been tried.
    learning_rate: float = 0.0028       # η, the peak learning rate at the base
    steps: int = 10_000                 # optimizer steps
    batch_size: int = 64                # sequences a step, over all ranks and micro-batches
    micro_batch_size: int = 16          # sequences a forward on one rank, at most; 0: the rank's whole share at once
    min_lr_ratio: float = 0.1           # where the cosine ends, as a fraction of the peak
    warmup_steps: int = 0               # steps of linear warm-up; the plain GPT needs some
    weight_decay: float = 0.0           # of the matrices; the plain GPT needs some
    beta1: float = 0.9                  # Adam's decay of the first moment
    beta2: float = 0.95                 # Adam's decay of the second moment
    eps: float = 1e-16                  # Adam's ε; 1e-8 would not be small beside the gradients of wide unit-norm models
    seed: int = 0                       # of the initial weights, the data order and the sample
    # data and output
    data: str = "data/stdlib"           # folder made by prepare_data.py; this one is made when it is missing
    out_dir: str = "out"                # where config.json, log.csv and ckpt.pt go; --out_dir= writes none
    results: str = ""                   # a .csv file that gets one row for this run; many runs may share it
    resume: bool = False                # continue from out_dir/ckpt.pt, if there is one
    sample_only: bool = False           # with --resume: print a sample and stop
    prompt: str = ""                    # what the sample begins with
    sample_tokens: int = 256            # length of the sample; 0: none
    # reports
    log_every: int = 10                 # steps between rows of log.csv
    eval_every: int = 500               # steps between evaluations; there is one after the last step, too
    eval_tokens: int = 2 ** 20          # evaluate on about this many tokens, always the same, spread over val.bin
    checkpoint_every: int = 1000        # steps between checkpoints; there is one after the last step, too
    alignment_every: int = 0            # steps between measurements of the alignment exponents, before that at 1, 2, 4, …; 0: none
    # machine
    device: str = "auto"                # cuda, cpu, or auto: cuda where there is one
    dtype: str = "auto"                 # of matrix products: float32, bfloat16, or auto: bfloat16 where the device multiplies it
    compile: bool = True                # use torch.compile
    bench: bool = False                 # time a step of this model and of the plain GPT of the same shape, and stop


# Keys that may change when a run is resumed: those that do not touch the mathematics. The last three change its rounding.
FREE_ON_RESUME = ["data", "out_dir", "results", "resume", "sample_only", "prompt", "sample_tokens", "log_every", "eval_every",
                  "checkpoint_every", "bench", "micro_batch_size", "device", "compile"]      # data: the same tokens elsewhere
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}     # dense bf16
CHECKPOINT_KEYS = ["config", "model_config", "data", "model", "optimizer", "initial", "step", "seconds", "train_loss", "val_loss"]
LOG_COLUMNS = ["step", "tokens", "learning_rate", "train_loss", "val_loss", "seconds", "tokens_per_second",
               "attn_alpha", "mlp_alpha", "s_z", "status"]
ALIGNMENT_COLUMNS = ["parametrization", "width", "depth", "steps", "seed", "step", "loss", "layer", "map", "d_in",
                     "alpha", "omega", "nu", "rms_dW", "rms_dx", "rms_y", "rms_dy"]
ALIGNMENT_TOKENS = 2048     # of the validation split, on which the alignment exponents are measured
EXIT_CODES = dict(finished=0, diverged=3, stopped=4)        # 1: bad input, see fail

rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
local_rank = int(os.environ.get("LOCAL_RANK", 0))


def say(*words):
    if rank == 0:
        tqdm.write(" ".join(map(str, words)))


def fail(sentence):
    """Bad input ends here: one sentence, exit code 1. Each node says it, since it may be the only one that misses a file."""
    if dist.is_initialized():
        dist.destroy_process_group()        # or its threads may abort the exit
    sys.exit(f"train.py: {sentence}" if local_rank == 0 else 1)


# ---------------------------------------------------------------- configuration

def parse_args(argv):
    """The options given in argv as {key: value}. Leaves with one sentence if one is unknown or of the wrong type."""
    booleans = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}
    kinds = {int: (int, "a whole number"), float: (float, "a number"), str: (str, "text"),
             bool: (lambda text: booleans[text], "True or False")}
    helps = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="%(prog)s [--key=value …]", allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; `python train.py --help` lists all options")
    for field in fields(Config):
        parser.add_argument(f"--{field.name}", help=f"{helps[field.name]} [{field.default!r}]".replace("%", "%%"),
                            metavar=field.type.__name__, **(dict(nargs="?", const="True") if field.type is bool else {}))
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0].lstrip("-"), helps, n=1)
        parser.error(f"unknown option {unknown[0]!r}" + (f", did you mean --{near[0]}?" if near else ""))
    given = {}
    for field in fields(Config):
        text, (read, kind) = getattr(known, field.name), kinds[field.type]
        if text is not None:
            try:
                given[field.name] = read(text)
            except (ValueError, KeyError):
                parser.error(f"--{field.name} must be {kind}, not {text!r}")
    return given


def check(config):
    """Leave with one sentence if a value is impossible. The model's own sizes are GPTConfig's to check."""
    for keys, allowed, words in (
            ("steps batch_size log_every eval_every eval_tokens checkpoint_every base_width base_depth base_steps",
             lambda v: v >= 1, "at least 1"),
            ("micro_batch_size vocab_size sample_tokens warmup_steps alignment_every", lambda v: v >= 0, "at least 0"),
            ("seed", lambda v: 0 <= v < 2 ** 63, "at least 0 and below 2^63"),
            ("results", lambda v: not v or v.endswith(".csv") and not Path(v).is_dir(), "the name of a .csv file"),
            ("learning_rate eps", lambda v: 0 < v < math.inf, "a positive finite number"),
            ("beta1 beta2", lambda v: 0 <= v < 1, "at least 0 and less than 1"),
            ("min_lr_ratio", lambda v: 0 <= v <= 1, "between 0 and 1"),
            ("weight_decay embedding_lr_mult hidden_lr_mult rescalers_lr_mult", lambda v: 0 <= v < math.inf, "a finite number of at least 0"),
            ("unembedding_lr_mult", lambda v: v == -1 or 0 <= v < math.inf, "a finite number of at least 0, or -1"),
            ("parametrization", COLUMNS.__contains__, f"one of {', '.join(COLUMNS)}"),
            ("device", ("auto", "cuda", "cpu").__contains__, "auto, cuda or cpu"),
            ("dtype", ("auto", "float32", "bfloat16").__contains__, "auto, float32 or bfloat16")):
        for key in keys.split():
            if not allowed(getattr(config, key)):
                fail(f"{key} must be {words}, not {getattr(config, key)}")
    if config.batch_size % world_size:
        fail(f"batch_size must be a multiple of the number of processes, {world_size}, not {config.batch_size}")
    if config.sample_only and not config.resume:
        fail("sample_only needs --resume, and the --out_dir of a trained model")
    if config.resume and not config.out_dir:
        fail("resume needs the --out_dir of the run")
    if config.alignment_every and not config.out_dir:
        fail("alignment_every needs an --out_dir, where alignment.csv goes")
    gpus = torch.cuda.device_count()
    if config.device != "cpu" and (gpus or config.device == "cuda") and local_rank >= gpus:
        fail(f"device={config.device} needs a GPU for each process, but PyTorch sees {gpus} here; use fewer processes, or --device=cpu")


def load_run(given):
    """
    (configuration, checkpoint) of the run in out_dir that the options given continue; ({}, None) if they begin a new one, and
    no checkpoint if the run was stopped before its first. Leaves if the options do not go with what is in out_dir.
    """
    out_dir = Path(given.setdefault("out_dir", Config.out_dir))
    path, record = out_dir / "ckpt.pt", out_dir / "config.json"
    if not given.get("resume"):
        if given["out_dir"] and (out_dir / "log.csv").exists() and not given.get("bench"):
            fail(f"{out_dir} already holds a run; continue it with --resume, or choose another --out_dir")
        return {}, None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True) if path.exists() else None
        if checkpoint is None:
            saved = json.loads(record.read_text())["config"] if record.exists() else {}
        else:
            checkpoint = {key: dict(checkpoint)[key] for key in CHECKPOINT_KEYS}
            saved = checkpoint["config"]
        saved = saved and asdict(Config(**saved))
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError) as error:
        fail(f"{path if path.exists() else record} is damaged, or of another version of this program ({type(error).__name__})")
    if not checkpoint:
        if given.get("sample_only"):
            fail(f"there is no trained model: {path} does not exist")
        say(f"there is no {path} yet: starting at step 0")
    automatic = dict(dtype="auto", vocab_size=0)        # these were saved as what they had come to stand for
    changed = [key for key in given if key not in FREE_ON_RESUME and saved and given[key] not in (saved[key], automatic.get(key))]
    if changed:
        fail(f"{out_dir} has {', '.join(f'{key}={saved[key]} (now {given[key]})' for key in changed)}; a resumed run may change only "
             f"{', '.join(FREE_ON_RESUME)}")
    for key in automatic if saved else ():
        given.pop(key, None)        # not to be decided anew, on a machine that may be another
    return saved, checkpoint


# ---------------------------------------------------------------- data

def together(function):
    """function() on every rank. If it fails on one, all get the ValueError: none is left waiting for another in a collective."""
    result, troubles = None, [None] * world_size
    try:
        result = function()
    except (OSError, ValueError) as error:
        troubles[rank] = f"{error} (rank {rank})" if rank else str(error)
    if world_size > 1:      # patiently: the tokens of a large data set are all read when they are new
        dist.all_gather_object(troubles, troubles[rank], group=dist.new_group(backend="gloo", timeout=timedelta(hours=12)))
    if any(troubles):
        raise ValueError(next(filter(None, troubles)))
    return result


def load_data(config):
    """(train tokens, val tokens, meta) of a folder made by prepare_data.py. Raises ValueError on all ranks if it is not right."""
    def make_default():
        if rank == 0 and config.data == Config.data and not Path(config.data, "meta.json").exists():
            say(f"making the default data, Python's standard library, in {config.data}")
            prepare_stdlib(config.data, progress=False)

    def read():
        train, val, meta = read_folder(config.data, check=local_rank == 0)    # once on each node
        for split, tokens in (("train", train), ("val", val)):
            if len(tokens) <= config.seq_len:
                raise ValueError(f"{config.data} has {len(tokens):,} {split} tokens; it needs more than seq_len={config.seq_len}")
        return train, val, meta
    together(make_default)      # the other ranks wait here
    return together(read)


@functools.lru_cache(maxsize=2)
def shuffled(seed, epoch, windows):
    return np.random.default_rng((seed, epoch)).permutation(windows)


def batch_starts(seed, step, batch_size, seq_len, num_tokens):
    """
    Where the sequences of batch `step` begin: a pure function of (seed, step). An epoch cuts the tokens into windows of
    seq_len, at an offset of its own, and goes through them in an order of its own; every window comes once an epoch.
    """
    windows, starts = (num_tokens - 1) // seq_len, []
    for i in range(step * batch_size, (step + 1) * batch_size):
        epoch, i = divmod(i, windows)
        offset = epoch % ((num_tokens - 1) % seq_len + 1)
        starts.append(offset + int(shuffled(seed, epoch, windows)[i]) * seq_len)
    return starts


def sequences(tokens, starts, seq_len, device):
    """Inputs and targets, both (B, T) int64, of the sequences that begin at starts."""
    rows = torch.from_numpy(np.stack([tokens[s:s + seq_len + 1] for s in starts]).astype(np.int64))
    if device.type == "cuda":
        rows = rows.pin_memory().to(device, non_blocking=True)
    return rows[:, :-1], rows[:, 1:]


# ---------------------------------------------------------------- files

def write_csv(path, columns, rows):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_aside(path, lambda file: file.write(text.getvalue().encode()))


def read_csv(path):
    return read_rows(path) if os.path.exists(path) else []


def append_result(path, row):
    """
    Add a row to a .csv to which other processes add too: under a lock on its folder, by writing the file anew. It takes the
    place of one that the same run, resumed since, has left. Rows from before some option existed get that option's default.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        old, defaults = read_csv(path), asdict(Config())
        columns = dict.fromkeys([*row, *(old[0] if old else ())])
        run = [key for key in defaults if key in row and (key not in FREE_ON_RESUME or key == "out_dir")]
        rows = [{key: r.get(key, defaults.get(key, "")) for key in columns} for r in (*old, row)]
        replaced = [r for r in rows[:-1] if row.get("out_dir") and all(str(r[key]) == str(row[key]) for key in run)]
        write_csv(path, columns, [r for r in rows if r not in replaced])
    finally:
        os.close(lock)


def versions():
    describe = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return dict(commit=commit, python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)


# ---------------------------------------------------------------- alignment exponents

class LinearInputs(TorchFunctionMode):
    """Within it, the list `inputs` gets the input of each linear map that is called, in order."""
    def __init__(self):
        super().__init__()
        self.inputs = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear:
            self.inputs.append(args[0])
        return function(*args, **(kwargs or {}))


def linear_maps(model):
    """(layer, {name: weight (out, in)}) of the linear maps that share an input, in the order of the forward pass."""
    for layer, block in enumerate(model.blocks):
        yield layer, dict(zip(("W_q", "W_k", "W_v"), block.qkv.chunk(3)))
        yield layer, dict(W_O=block.attn_out)
        yield layer, dict(zip(("W_u", "W_nu"), block.mlp_in.chunk(2)))
        yield layer, dict(W_oMLP=block.mlp_out)
    yield len(model.blocks), dict(E_out=model.unembedding)


def rms(x):
    """Root mean square over the last dimension."""
    return x.square().mean(-1).sqrt()


def alignment_exponent(weight, x):
    """
    log_d [RMS(W x) / (RMS(W) RMS(x))], d the length of x: 1/2 if W and x are independent, 1 if W has rank one along x
    (arXiv:2407.05872, and Definition 3.1 of νGPT). weight (out, d), x (…, d); the logarithm's mean over the tokens for which
    there is one: a token that no batch has had has not moved. nan if there is none.
    """
    ratio = rms(F.linear(x, weight)) / (rms(weight.flatten()) * rms(x))
    return (ratio[ratio.isfinite() & (ratio > 0)].log().mean() / math.log(weight.size(1))).item()


@torch.no_grad()
def alignment(model, initial, tokens, targets):
    """
    (rows, loss on these tokens). A row is {layer, map, d_in, …} for each linear map y = W x of the model: with ΔW and Δx the
    changes of its weight and of its input since the initial model, the exponents α of ΔW x₀, ω of W₀ Δx and ν of ΔW Δx, and the
    RMS of ΔW, Δx, y and Δy. A map's input is the hidden state h for W_q and E_out; logits are E_out's output times s_z. In fp32.
    """
    def forward(model):
        with LinearInputs() as seen:
            logits, loss = model(tokens, targets)
        return seen.inputs, logits, loss.item()

    (inputs, logits, loss), (inputs_0, logits_0, _) = forward(model), forward(initial)
    rows = []
    for (layer, weights), (_, weights_0), x, x_0 in zip(linear_maps(model), linear_maps(initial), inputs, inputs_0, strict=True):
        for (name, W), W_0 in zip(weights.items(), weights_0.values()):
            dW, dx, y, y_0 = W - W_0, x - x_0, F.linear(x, W), F.linear(x_0, W_0)
            rows.append(dict(layer=layer, map=name, d_in=W.size(1), alpha=alignment_exponent(dW, x_0),
                             omega=alignment_exponent(W_0, dx), nu=alignment_exponent(dW, dx), rms_dW=rms(dW.flatten()).item(),
                             rms_dx=rms(dx).mean().item(), rms_y=rms(y).mean().item(), rms_dy=rms(y - y_0).mean().item()))
    rows.append(dict(layer=layer, map="logits", rms_y=rms(logits).mean().item(), rms_dy=rms(logits - logits_0).mean().item()))
    return rows, loss


# ---------------------------------------------------------------- the run

def schedule(step, config):
    """What multiplies the learning rate: after warm-up, if any, a cosine that ends at min_lr_ratio."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def print_sample(model, config, tokenizer, autocast):
    """Print config.sample_tokens tokens drawn from the model after config.prompt, or why that cannot be."""
    try:
        encode, decode, vocab_size, end_of_text = get_tokenizer(tokenizer)
        prompt = [int(token) for token in encode([config.prompt])[0]] or [ord("\n") if end_of_text is None else end_of_text]
        torch.manual_seed(config.seed)
        with autocast:
            tokens = model.generate(torch.tensor([prompt], device=model.embedding.device), config.sample_tokens, top_k=50)
        text = decode([token for token in tokens[0].tolist() if token < vocab_size])    # the model's vocabulary may be rounded up
    except (ValueError, KeyError) as error:         # no network for the vocabulary; a token that no text has
        return fail(error) if config.sample_only else say(f"no sample: {error}")
    say(f"{'-' * 30} sample {'-' * 30}\n{text}\n{'-' * 68}")


def open_device(config):
    """(device of this rank, autocast context). Starts the process group, and sets what dtype=auto stands for in config."""
    on_gpu = config.device == "cuda" or config.device == "auto" and torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if world_size > 1:      # a node that is gone is missed after 10 minutes, in which rank 0 can write any checkpoint
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", device_id=device if on_gpu else None,
                                timeout=timedelta(minutes=10))
    if config.dtype == "auto":
        cpu_flags = Path("/proc/cpuinfo")
        has_bf16 = (torch.cuda.get_device_capability(device) >= (8, 0) if on_gpu else
                    cpu_flags.exists() and "bf16" in cpu_flags.read_text())
        config.dtype = "bfloat16" if has_bf16 else "float32"
    libc = ctypes.CDLL(None)
    if not on_gpu and hasattr(libc, "mallopt"):     # glibc: keep freed memory, which costs up to a quarter of a step to get back
        libc.mallopt(-1, 2 ** 31 - 1)               # M_TRIM_THRESHOLD
        libc.mallopt(-4, 0)                         # M_MMAP_MAX
    # On short bf16 sequences PyTorch's fused attention for the CPU takes 3 times as long as its plain one, mostly backward. The
    # plain one rounds scores to bf16, too. Despite their names, these switches count on the CPU; compile caches do not see them,
    # so empty the cache after an edit here.
    plain_attention = not on_gpu and config.dtype == "bfloat16" and config.seq_len <= 256
    torch.backends.cuda.enable_flash_sdp(not plain_attention)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(plain_attention)
    return device, torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")


def build(config, device):
    """(model, optimizer) in config's parametrization. Raises ValueError for impossible sizes."""
    mults = {key: None if (mult := getattr(config, key)) == -1 else mult for key in MULTS}
    initial, lr_scale = parametrize(config.parametrization, *(getattr(config, key) for key in SIZES), **mults)
    model_config = GPTConfig(config.width, config.depth, config.head_dim, config.vocab_size, config.seq_len, **initial)
    torch.manual_seed(config.seed)
    with device:
        model = (PlainGPT if "hidden_std" in initial else GPT)(model_config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not (config.freeze_alpha and name.endswith("alpha.raw"))
    groups = param_groups(model, lr_scale)
    for group in groups:
        group["weight_decay"] = 0.0 if group["name"] == "rescalers" else config.weight_decay
    return model, torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)   # no decay: Adam


def maybe_compile(model, config):
    """(forward, normalize_weights) of the model, compiled if config says so. The model itself keeps its parameters' names."""
    if model.embedding.device.type == "cuda":
        can_compile = any(map(shutil.which, ("gcc", "clang", "cc"))) or "CC" in os.environ
    else:
        header = Path(sysconfig.get_paths()["include"]) / "Python.h"
        can_compile = header.exists() and (any(map(shutil.which, ("g++", "clang++"))) or "CXX" in os.environ)
    if config.compile and not can_compile:
        say("torch.compile needs a C++ compiler and Python's headers (python3-dev) and did not find them: going on uncompiled, more slowly")
    if not config.compile or not can_compile:
        return model, model.normalize_weights
    return torch.compile(model), torch.compile(model.normalize_weights)


def bench(config, device, autocast, repeats=30):
    """
    Print what each part of a step takes, on random tokens, for config's model and for the plain GPT of the same shape: the
    median over repeats in which the two take turns. MFU is relative to the rate of a large matrix product, measured here.
    """
    on_gpu, dtype = device.type == "cuda", getattr(torch, config.dtype)

    def measure(*parts):
        """Milliseconds that each of the functions takes, one after the other."""
        stamps = []
        for part in (lambda: None, *parts):
            part()
            stamps.append(torch.cuda.Event(enable_timing=True) if on_gpu else time.perf_counter())
            if on_gpu:
                stamps[-1].record()
        if on_gpu:
            torch.cuda.synchronize()
        return [a.elapsed_time(b) if on_gpu else 1e3 * (b - a) for a, b in zip(stamps, stamps[1:])]

    def step(kind):
        model, optimizer, forward, normalize_weights = kinds[kind]
        loss = []

        def run_forward():
            with autocast:
                loss.append(forward(tokens, tokens)[1])
        return measure(run_forward, lambda: loss[0].backward(), lambda: (optimizer.step(), optimizer.zero_grad()), normalize_weights)

    n = 8192 if on_gpu else 2048
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    flops = 2 * n ** 3 / np.median([measure(lambda: a @ b) for _ in range(10)]) * 1e3
    say(f"matrix product of {n} × {n}, {config.dtype}: {flops / 1e12:.3f} TFLOP/s")

    config.vocab_size = config.vocab_size or 50304
    micro = min(config.micro_batch_size or config.batch_size, config.batch_size)
    tokens = torch.randint(config.vocab_size, (micro, config.seq_len), device=device)
    kinds, memory = {}, {}
    for kind, name in (("normalized", config.parametrization), ("plain", "gpt_sp")):
        before = torch.cuda.memory_allocated() if on_gpu else 0
        try:
            model, optimizer = build(replace(config, parametrization=name), device)
        except ValueError as error:
            fail(error)
        kinds[kind] = model, optimizer, *maybe_compile(model, config)
        for _ in range(3):
            step(kind)
        memory[kind] = f"{(torch.cuda.max_memory_allocated() - before) / 2 ** 30:.2f} GiB" if on_gpu else "not measured on a CPU"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
    times = {kind: np.median(runs, axis=0) for kind, runs in
             zip(kinds, np.swapaxes([[step(kind) for kind in kinds] for _ in range(repeats)], 0, 1))}
    for kind, parts in times.items():
        rate = tokens.numel() / parts.sum() * 1e3
        say(f"{kind:>10}: forward {parts[0]:.2f} ms, backward {parts[1]:.2f}, optimizer {parts[2]:.2f}, weight normalization {parts[3]:.2f}; "
            f"step {parts.sum():.2f} ms, {rate:,.0f} tokens/s, MFU {rate * kinds[kind][0].flops_per_token() / flops:.1%}, peak memory {memory[kind]}")
    forward, backward, optimizer, normalization = times["normalized"]
    large_step = (forward + backward) * 2 ** 19 / tokens.numel() + optimizer + normalization
    say(f"weight normalization in a step of 0.5 M tokens: {normalization / large_step:.2%}")
    say(f"ratio: {times['normalized'].sum() / times['plain'].sum():.3f} (normalized over plain step time)")


def main(argv):
    """The run that the options in argv describe. Returns its exit code, one of EXIT_CODES."""
    started = time.perf_counter()
    given = parse_args(argv)
    saved, checkpoint = load_run(given)
    config = Config(**{**saved, **given})
    check(config)

    device, autocast = open_device(config)
    if config.bench:
        bench(config, device, autocast)
        return 0
    try:
        train, val, meta = (None, None, checkpoint["data"]) if config.sample_only else load_data(config)
        if checkpoint and any({**meta[split], "bytes": 0} != {**checkpoint["data"][split], "bytes": 0} for split in ("train", "val")):
            raise ValueError(f"{config.data} does not hold the tokens that {config.out_dir}/ckpt.pt was trained on")
        read_csv(config.results or os.devnull)      # a file that is no table is refused now, not when the run ends
        config.vocab_size = config.vocab_size or 64 * math.ceil(meta["vocab_size"] / 64)
        if config.vocab_size < meta["vocab_size"]:
            raise ValueError(f"vocab_size must be at least {meta['vocab_size']}, the vocabulary of {config.data}, "
                             f"not {config.vocab_size}")
        model, optimizer = build(config, device)
        if checkpoint and asdict(model.config) != checkpoint["model_config"]:
            raise ValueError(f"the table in parametrize.py is no longer the one that {config.out_dir}/ckpt.pt was trained with")
    except ValueError as error:
        fail(error)
    initial = copy.deepcopy(model) if config.alignment_every else None
    step, seconds, train_loss, val_loss = 0, 0.0, math.nan, math.nan
    if checkpoint:
        try:
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))      # or it would stay in the file, mapped to memory
            if initial:     # kept, as the same seed gives other weights on another device
                initial.load_state_dict(checkpoint["initial"])
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            fail(f"{config.out_dir}/ckpt.pt is of another version of this program ({type(error).__name__})")
        step, seconds, train_loss, val_loss = (checkpoint[key] for key in ("step", "seconds", "train_loss", "val_loss"))
        checkpoint = None       # or the old file would take its place on the disk after the next has replaced it
    if world_size > 1:
        steps = torch.tensor([step, -step], device=device)
        dist.all_reduce(steps, dist.ReduceOp.MAX)
        if steps.sum():
            fail(f"the processes found different checkpoints: {config.out_dir} must be one folder that every node sees")
    if config.sample_only:
        print_sample(model, config, meta["tokenizer"], autocast)
        return 0
    forward, normalize_weights = maybe_compile(model, config)
    ddp = DDP(forward, gradient_as_bucket_view=True, broadcast_buffers=False) if world_size > 1 else forward

    # How a batch is shared out
    share = config.batch_size // world_size                             # sequences of this rank
    micro = max(m for m in range(1, share + 1) if share % m == 0 and m <= (config.micro_batch_size or share))   # and of one forward
    tokens_per_step = config.batch_size * config.seq_len
    windows = (len(val) - 1) // config.seq_len                          # evaluate on windows spread evenly over val
    val_windows = min(windows, max(1, config.eval_tokens // config.seq_len))
    val_starts = [i * windows // val_windows * config.seq_len for i in range(val_windows)]
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None) if config.dtype == "bfloat16" else None
    say(f"{config.parametrization}: {model.num_params():,} parameters ({model.num_params(embeddings=False):,} without embeddings), "
        f"{config.steps:,} steps of {tokens_per_step:,} tokens, {micro} sequences a forward, {config.dtype} on {world_size} × {device_name}")
    say(f"evaluation on {val_windows} windows of {config.seq_len} tokens, spread evenly over the validation split of {config.data}"
        + ("" if meta["val"].get("bytes") else "; bits_per_byte will be nan, as nobody has counted that split's bytes"))

    out_dir = Path(config.out_dir) if config.out_dir and rank == 0 else None
    tables = {"log.csv": LOG_COLUMNS} | ({"alignment.csv": ALIGNMENT_COLUMNS} if initial else {})
    if out_dir:
        out_dir.mkdir(parents=True, exist_ok=True)
        rates = {group["name"]: group["lr_scale"] * config.learning_rate for group in optimizer.param_groups}
        record = dict(config=asdict(config), peak_learning_rates=rates, model=asdict(model.config), parameters=model.num_params(),
                      processes=world_size, device=device_name, data=meta, **versions())
        write_json(out_dir / "config.json", record)
        temporary_name(out_dir / "ckpt.pt")         # makes room now, not at the first checkpoint
        for name, columns in tables.items():
            try:        # keep what goes before the checkpoint; None: a row was cut off, by a full disk
                rows = [row for row in read_csv(out_dir / name) if row[columns[-1]] is not None and step and int(row["step"]) <= step]
            except (KeyError, TypeError, ValueError):
                fail(f"{out_dir / name} is damaged, or of another version of this program; move it away")
            write_csv(out_dir / name, columns, rows)

    def append(name, *rows):
        if out_dir:
            with open(out_dir / name, "a", newline="") as file:
                csv.DictWriter(file, tables[name]).writerows(rows)

    def measure_alignment():
        if out_dir:
            tokens, targets = sequences(val, val_starts[:max(1, ALIGNMENT_TOKENS // config.seq_len)], config.seq_len, device)
            rows, loss = alignment(model, initial, tokens, targets)
            run = {key: getattr(config, key) for key in ("parametrization", "width", "depth", "steps", "seed")}
            append("alignment.csv", *({**run, "step": step, "loss": f"{loss:.6f}", **{
                key: f"{cell:.5g}" if isinstance(cell, float) else cell for key, cell in row.items()}} for row in rows))

    def evaluate():
        """Mean loss over the sequences at val_starts, in nats a token; each rank takes its share."""
        total = torch.zeros(2, dtype=torch.float64, device=device)      # sum of losses, number of targets
        for first in range(rank * micro, len(val_starts), world_size * micro):
            starts = val_starts[first:first + micro]
            x, y = sequences(val, (starts * micro)[:micro], config.seq_len, device)     # always micro sequences: one shape to compile
            y = torch.cat((y[:len(starts)], torch.full_like(y[len(starts):], -1)))      # but none counts twice
            with torch.no_grad(), autocast:
                total[0] += forward(x, y)[1] * (len(starts) * config.seq_len)
            total[1] += len(starts) * config.seq_len
        if world_size > 1:
            dist.all_reduce(total)
        return (total[0] / total[1]).item()

    def mean_rescalers():
        """Means of |α_A|, |α_M| and s_z over channels and blocks."""
        if isinstance(model, PlainGPT):
            return {}
        vectors = dict(attn_alpha=[block.attn_alpha().abs() for block in model.blocks],
                       mlp_alpha=[block.mlp_alpha().abs() for block in model.blocks], s_z=[model.s_z()])
        return {name: f"{torch.cat(vector).mean().item():.6g}" for name, vector in vectors.items()}

    def save_checkpoint():
        """All that the next step depends on; no random state, as a step draws nothing and its batch follows from its number."""
        if out_dir:
            state = dict(config=asdict(config), model_config=asdict(model.config), data=meta, model=model.state_dict(),
                         optimizer=optimizer.state_dict(), initial=initial and initial.state_dict(), step=step, seconds=seconds,
                         train_loss=train_loss, val_loss=val_loss)
            for name in tables:
                sync(out_dir / name)            # they are never behind the checkpoint
            try:
                write_aside(out_dir / "ckpt.pt", lambda file: torch.save(state, file))
            except (OSError, RuntimeError) as error:        # torch.save hides the first behind the second
                reason = error if isinstance(error, OSError) else error.__context__ or error
                raise OSError(f"the checkpoint of step {step} could not be written ({reason}); the last is untouched") from error

    signals = []

    def on_signal(number, frame):
        """Stop after this step; at once when Ctrl-C is pressed again."""
        signals.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    # Without an out_dir there is nothing to save, and a signal ends the process as it always does
    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)} if config.out_dir else {}

    # The loop
    if step and world_size > 1:
        # After its first backward DDP sorts the gradients into other buckets, in which sums over more than two ranks have other
        # last bits. The run that is continued had done so.
        with autocast:
            thrown_away = ddp(*sequences(train, [0] * micro, config.seq_len, device))[1]
        thrown_away.backward()
        optimizer.zero_grad(set_to_none=True)
    status, rate = "finished", math.nan
    bar = tqdm(total=config.steps, initial=step, unit="step", disable=rank != 0, dynamic_ncols=True,
               mininterval=0.5 if sys.stderr.isatty() else 10)
    if initial and step == 0:
        measure_alignment()
    clock, clock_step = time.perf_counter(), None       # the training clock; it begins after the first step
    while step < config.steps:
        learning_rate = config.learning_rate * schedule(step, config)
        for group in optimizer.param_groups:
            group["lr"] = group["lr_scale"] * learning_rate
        starts = batch_starts(config.seed, step, config.batch_size, config.seq_len, len(train))[rank * share:(rank + 1) * share]
        loss = torch.zeros((), device=device)
        for i in range(0, share, micro):
            if world_size > 1:
                ddp.require_backward_grad_sync = i + micro == share     # average gradients over ranks with the last micro-batch
            x, y = sequences(train, starts[i:i + micro], config.seq_len, device)
            with autocast:
                micro_loss = ddp(x, y)[1] * (micro / share)
            micro_loss.backward()
            loss += micro_loss.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        normalize_weights()
        step += 1
        bar.update()

        stopping = bool(signals)
        if world_size > 1 and handlers:
            told = torch.tensor(len(signals))
            dist.all_reduce(told)           # a signal reaches ranks at different steps; on the CPU, so that no GPU is waited for
            stopping = bool(told)
        first, last = clock_step is None, step == config.steps
        evaluating, saving = step % config.eval_every == 0 or last, step % config.checkpoint_every == 0 or last or stopping
        logging = evaluating or step % config.log_every == 0
        measuring = initial and (step % config.alignment_every == 0 or last or step < config.alignment_every and step & (step - 1) == 0)
        if not (first or saving or logging or measuring):
            continue
        if world_size > 1:
            dist.all_reduce(loss)
        train_loss = loss.item() / world_size       # the host waits for the device here, and nowhere else in the loop
        now = time.perf_counter()
        if first:
            say(f"first step: {now - clock:.1f} s" + (", most of it torch.compile" if config.compile else ""))
            bar.unpause()       # the time left is estimated without it
        else:
            seconds, rate = seconds + now - clock, (step - clock_step) * tokens_per_step / (now - clock)
            mfu = f", MFU {rate * model.flops_per_token() / (peak * world_size):.1%}" if peak else ""
            bar.set_postfix_str(f"loss {train_loss:.3f}, {rate:,.0f} tokens/s{mfu}", refresh=False)
        row = dict(step=step, tokens=step * tokens_per_step, learning_rate=f"{learning_rate:.6g}", train_loss=f"{train_loss:.6f}",
                   seconds=f"{seconds:.2f}", tokens_per_second=f"{rate:.0f}")
        if evaluating and math.isfinite(train_loss):
            val_loss = evaluate()
            row |= dict(val_loss=f"{val_loss:.6f}", **mean_rescalers())
            say(f"step {step}/{config.steps}: train_loss {train_loss:.4f}, val_loss {val_loss:.4f}")
        finite = [train_loss, val_loss if evaluating else 0.0]
        if saving:
            finite.append(torch.stack([weight.sum() for weight in model.parameters()]).sum().item())
        if not all(map(math.isfinite, finite)):
            status, val_loss = "diverged", math.nan
            append("log.csv", row | dict(status=status))
            break
        if logging:
            append("log.csv", row | dict(status=status if last else ""))
        if measuring:
            measure_alignment()
        if saving:
            save_checkpoint()
        if stopping and not last:
            status = "stopped"
            break
        clock, clock_step = time.perf_counter(), step       # neither evaluation nor checkpoints count as training time
    bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)

    bits_per_byte = val_loss / math.log(2) * meta["val"]["tokens"] / (meta["val"].get("bytes") or math.nan)
    end = dict(step=step, val_loss=f"{val_loss:.4f}", bits_per_byte=f"{bits_per_byte:.4f}", train_loss=f"{train_loss:.4f}",
               tokens=step * tokens_per_step, parameters=model.num_params(), status=status,
               seconds=f"{time.perf_counter() - started:.2f}")
    if config.results and rank == 0 and status != "stopped":
        append_result(config.results, {**asdict(config), **end, "val_loss": f"{val_loss:.6f}", **mean_rescalers()})
    if status == "finished" and config.sample_tokens and rank == 0:
        print_sample(model, config, meta["tokenizer"], autocast)
    if status == "stopped":
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        nodes = f"--nnodes={world_size // per_node} " + ("--rdzv_endpoint=… " if world_size > per_node else "")
        launcher = "python" if world_size == 1 else f"torchrun {nodes}--nproc_per_node={per_node}"
        command = shlex.join((sys.argv[0], f"--out_dir={config.out_dir}", "--resume"))
        say(f"stopped after step {step}; to continue: {launcher} {command}")
    else:
        say("final: " + " ".join(f"{key}={value}" for key, value in end.items()))
    if world_size > 1:
        dist.barrier()      # a rank that left with an exit code would take the first down before it is done
        del ddp             # were it the last to hold the process group, PyTorch could wait for a thread that waits for Python
        dist.destroy_process_group()
    return EXIT_CODES[status]


def run_each(claims):
    """
    One run for each line of options on standard input, all in this process: what is imported and compiled once need not be
    again. Several processes may be given the same lines: the first to create the file claims/NUMBER has line NUMBER. Prints
    "ended NUMBER CODE" after each, CODE being the exit code, or the sentence with which a line was refused.
    """
    torch._dynamo.config.cache_size_limit = 64      # compiled versions of a function: two a shape of model
    for number, line in enumerate(sys.stdin, 1):
        try:
            open(Path(claims) / str(number), "x").close()
        except FileExistsError:
            continue
        try:
            code = main(shlex.split(line))
        except SystemExit as end:
            code = end.code
        print(f"ended {number} {code}", flush=True)
        if code == EXIT_CODES["stopped"]:
            sys.exit(code)


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["--each"] and len(sys.argv) == 3:
            run_each(sys.argv[2])
        else:
            sys.exit(main(sys.argv[1:]))
    except OSError as error:    # no such folder, no permission, disk full: of this rank alone, perhaps
        tqdm.write(f"train.py: {error}" + (f" (rank {rank})" if world_size > 1 else ""), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:   # with nothing to save: before the first step, or without an out_dir
        print("train.py: stopped", file=sys.stderr)
        sys.exit(EXIT_CODES["stopped"])
