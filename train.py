"""
Train a normalized Transformer: in one process, on one node or on several.

    python train.py --base=results/laptop.json --out_dir=out/base       the base, for a CPU
    python train.py --base=results/laptop.json --out_dir=out/wide --width=384       8 times as wide
    torchrun --nproc_per_node=8 train.py --base=results/gpu.json --data=data/fineweb --width=2048
    python train.py --out_dir=out/wide --resume                  continue a run, with its options
    python train.py --out_dir=out/wide --sample_only             print text from it

The fields of Config below are the options. This file reads from top to bottom: configuration, base,
data, model and optimizer, schedule, evaluation, files of a run, the run itself, command line.
The method is in apply_table and, in train's loop, in the learning rate of each group and in
normalize_weights; the rest trains a model as other trainers do.

Exit codes: 0 finished, 1 bad input or no memory, said in one sentence, 3 diverged, 4 stopped by a
signal (--resume continues), 130 or 143 ended by a second one.
"""
import argparse
import csv
import ctypes
import fcntl
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import warnings
from contextlib import suppress
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from dataclasses import fields
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from model import GPT
from model import GPTConfig
from parametrize import COLUMNS
from parametrize import param_groups
from parametrize import parametrize
from prepare_data import fingerprint
from prepare_data import get_tokenizer
from prepare_data import prepare_stdlib
from prepare_data import read_folder
from prepare_data import sync
from prepare_data import write_aside
from prepare_data import write_json

# ------------------------------------------------------------------------------------------------
# Configuration


def option(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    # The defaults are of a large model, at which η was never tuned. Give a base instead.

    # model
    width: int = option(1024, "d_model, a multiple of head_dim")
    depth: int = option(10, "number of blocks")
    head_dim: int = option(64, "size of an attention head; η does not carry over to another")
    seq_len: int = option(1024, "tokens a sequence")
    vocab_size: int = option(0, "0: the data's vocabulary, rounded up to a multiple of 64; or a "
                                "larger one")

    # how η changes with the model: see parametrize.py
    base: str = option("", "a base file, a run's folder or its config.json: the small model on "
                           "which η was tuned. It gives what the command leaves out")
    parametrization: str = option("nugpt", "a column of the table in parametrize.py")
    base_width: int = option(1024, "the width, depth, … at which the table's multipliers are 1")
    base_depth: int = option(10, "see base_width")
    base_steps: int = option(10_000, "see base_width")
    base_batch_size: int = option(64, "see base_width; only columns with m_b use it")
    alpha_init: float = option(0.05, "α₀: where α_A and α_M, the eigen learning rates, start at "
                                     "the base")
    embedding_lr_mult: float = option(1.0, "multiplies the embedding's rate; tuned at the base")
    hidden_lr_mult: float = option(1.0, "multiplies the rate of the blocks' matrices")
    unembedding_lr_mult: float = option(0.5, "multiplies the unembedding's rate; tuned at the base")
    rescalers_lr_mult: float = option(1.0, "multiplies the rate of the rescalers")

    # optimization: Adam. A normalized Transformer needs no warm-up and no weight decay
    learning_rate: float = option(0.0028, "η, the peak learning rate at the base")
    steps: int = option(10_000, "optimizer steps")
    batch_size: int = option(64, "sequences a step, over all processes and micro-batches")
    micro_batch_size: int = option(16, "sequences a forward pass, at most; 0: all at once")
    schedule: str = option("cosine", "cosine, linear, or wsd: constant, then linear")
    decay_fraction: float = option(0.2, "the part of the steps in which wsd decays")
    min_lr_ratio: float = option(0.1, "where the schedule ends, as a fraction of the peak")
    warmup_steps: int = option(0, "steps of linear warm-up")
    weight_decay: float = option(0.0, "of the matrices, as AdamW has it")
    beta1: float = option(0.9, "Adam's decay of the first moment")
    beta2: float = option(0.95, "Adam's decay of the second moment")
    # 1e-8, the usual ε, is not small beside the gradients of wide unit-norm models
    eps: float = option(1e-16, "Adam's ε")
    seed: int = option(0, "of initial weights, order of the data, and sample")
    init_from: str = option("", "a run's folder, whose weights are the initial ones")

    # data and output
    data: str = option("data/stdlib", "folder made by prepare_data.py; data/stdlib is made if it "
                                      "is missing")
    out_dir: str = option("out", "folder for config.json, log.csv and ckpt.pt; empty: none")
    resume: bool = option(False, "continue from out_dir/ckpt.pt, if there is one")
    sample_only: bool = option(False, "print a sample of the model in out_dir, and stop")
    prompt: str = option("", "what the sample begins with")
    sample_tokens: int = option(256, "length of the sample in tokens; 0: none")
    temperature: float = option(1.0, "of the sample; 0: always the likeliest token")
    top_k: int = option(50, "the sample's tokens come from the k likeliest; 0: from all")

    # reports
    log_every: int = option(10, "steps between rows of log.csv")
    eval_every: int = option(500, "steps between evaluations; the last step has one, too")
    eval_tokens: int = option(2 ** 18, "evaluate on about this many tokens, always the same, "
                                       "spread over the validation text")
    checkpoint_every: int = option(1000, "steps between checkpoints; the last step has one, too")

    # machine
    device: str = option("auto", "cuda, cpu, or auto: cuda where there is one")
    dtype: str = option("auto", "of matrix products: float32, bfloat16, or auto: bfloat16 where "
                                "the device has it")
    compile: bool = option(True, "use torch.compile")


# These change nothing that a run computes, but for rounding. Another value of any other field makes
# another run; steps with base_steps are the exception, see goes_on_to_another_horizon. The folder of
# the data may move, but a run goes on with the same tokens only: see restore.
MAY_CHANGE_ON_RESUME = {
    "base", "micro_batch_size", "data", "out_dir", "resume", "sample_only", "prompt",
    "sample_tokens", "temperature", "top_k", "log_every", "eval_every", "checkpoint_every",
    "device", "compile",
}
# A base hands on none of the options in that set, and none of these four.
NOT_FROM_A_BASE = MAY_CHANGE_ON_RESUME | {"seed", "vocab_size", "dtype", "init_from"}

LOGGED_RESCALERS = ["alpha_A", "alpha_M", "s_z"]        # means of |α_A|, |α_M| and |s_z|
# train_seconds: without evaluations and checkpoints
LOG = ["step", "tokens", "learning_rate", "train_loss", "val_loss", "train_seconds",
       "tokens_per_second", *LOGGED_RESCALERS, "status"]
# What results/sweep.py writes of a run. seconds: of all that `train` does, but for the sample
OUTCOME = ["step", "val_loss", "bits_per_byte", "train_loss", "tokens", "parameters", "status",
           "seconds", *LOGGED_RESCALERS]
EXIT_CODES = {"finished": 0, "diverged": 3, "stopped": 4}       # 1: bad input

rank = int(os.environ.get("RANK") or 0)             # torchrun sets these
local_rank = int(os.environ.get("LOCAL_RANK") or 0)
world_size = int(os.environ.get("WORLD_SIZE") or 1)
long_timeout_group = None       # of processes, in which all wait while one writes a checkpoint
signals = []            # SIGTERM and Ctrl-C that came
quiet = False           # results/sweep.py sets it: no lines, no progress bar


def options_of_a_run(config_class):
    """Names of the options that make a run: another value of one is another run."""
    return [f.name for f in fields(config_class) if f.name not in MAY_CHANGE_ON_RESUME]


def say(text):
    """Print a line above the progress bar. Only the first rank speaks."""
    if rank > 0 or quiet:
        return
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except BrokenPipeError:         # nobody reads any more, as after `| head`: train on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def require(condition, sentence):
    if not condition:
        raise ValueError(sentence)


def check(config):
    """Raises ValueError with one sentence if a value of config is impossible. Sizes of the model
    are checked by model_config and parametrize, Adam's numbers by AdamW."""
    for name in ("learning_rate", "alpha_init", "seq_len", "steps", "batch_size", "log_every",
                 "eval_every", "eval_tokens", "checkpoint_every"):
        value = getattr(config, name)
        require(0 < value < math.inf, f"{name} must be more than 0, not {value}")
    for name in ("embedding_lr_mult", "hidden_lr_mult", "unembedding_lr_mult", "rescalers_lr_mult",
                 "micro_batch_size", "warmup_steps", "weight_decay", "min_lr_ratio", "seed",
                 "sample_tokens", "temperature", "top_k", "vocab_size"):
        value = getattr(config, name)
        require(0 <= value < math.inf, f"{name} must be at least 0, not {value}")
    require(0 < config.decay_fraction <= 1,
            f"decay_fraction must be more than 0 and at most 1, not {config.decay_fraction}")
    require(config.schedule in ("cosine", "linear", "wsd"),
            f"schedule must be cosine, linear or wsd, not {config.schedule!r}")
    require(config.dtype in ("auto", "float32", "bfloat16"),
            f"dtype must be auto, float32 or bfloat16, not {config.dtype!r}")
    require(config.device in ("auto", "cuda", "cpu"),
            f"device must be auto, cuda or cpu, not {config.device!r}")
    require(config.out_dir or not config.resume, "resume needs an out_dir")
    require(config.batch_size % world_size == 0,
            f"batch_size must be a multiple of the number of processes, {world_size}, "
            f"not {config.batch_size}")
    gpus = torch.cuda.device_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or local_rank + 1)      # of this node
    wants_gpu = config.device == "cuda" or config.device == "auto" and gpus > 0
    require(not wants_gpu or processes <= gpus,
            f"{processes} processes need as many GPUs: PyTorch sees {gpus}; device may be cpu")
    require(rank < world_size, f"RANK is {rank}, but there are {world_size} processes: start "
                               "several by torchrun, or unset RANK")
    if world_size > 1:
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            require(name in os.environ, f"WORLD_SIZE is {world_size}, but {name} is not set: start "
                                        "several processes by torchrun, or unset WORLD_SIZE")


# ------------------------------------------------------------------------------------------------
# The base


def read_base_file(path):
    """The content of a base file, {"config": {option: value}, …}. path: the file, or the folder of
    a run, whose config.json is such a file. Raises ValueError if it is damaged."""
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content["config"], dict):
            raise TypeError
        return content
    except OSError as error:
        raise ValueError(f"the base {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f'the base {path} is damaged: it must be JSON, {{"config": {{"width": …, '
                         '"depth": …, …}}, as results/laptop.json is') from None


def read_base(path, config_class=Config):
    """{option: value} that a base hands on. path: as in read_base_file. Raises ValueError for a
    damaged file, an unknown option or an impossible value."""
    numbers = read_base_file(path)["config"]
    types = {f.name: f.type for f in fields(config_class)}
    for name, value in numbers.items():
        require(name in types, f"the base {path} has an unknown option, {name}")
        if types[name] is float and type(value) is int:
            numbers[name] = float(value)
        require(type(numbers[name]) is types[name], f"the base {path} has {name}={value!r}, which "
                                                    f"must be of type {types[name].__name__}")
    for name in ("width", "depth", "steps", "batch_size", "learning_rate"):
        require(name in numbers, f"the base {path} has no {name}")
    base = {name: value for name, value in numbers.items() if name not in NOT_FROM_A_BASE}

    # A hand-written file is itself the base. A run's config.json has base_width, base_depth, …
    # already. They are kept: models are scaled from that run's base, not from the run.
    for size in ("width", "depth", "steps", "batch_size"):
        base.setdefault(f"base_{size}", base[size])
    try:
        trial = config_class(**base)
        # whether this machine can train it as it stands is checked later
        check(replace(trial, batch_size=world_size, device="cpu"))
        model_config(trial)
    except ValueError as error:
        raise ValueError(f"the base {path} is impossible: {error}") from None
    return base


def not_carried(config, meta):
    """A sentence on what differs from the base though the rule does not carry η over it; or ""."""
    base = type(config)(**read_base(config.base, type(config)))
    tokenizer = read_base_file(config.base).get("data", {}).get("tokenizer")
    tuned_at = {"head_dim": base.head_dim, "seq_len": base.seq_len, "schedule": base.schedule}
    cells = COLUMNS.get(config.parametrization, {}).values()
    if not any("m_b" in cell for cell in cells):
        tuned_at["batch_size"] = base.base_batch_size       # of the base's own base, if it has one
    changed = []
    for name, value in tuned_at.items():
        if getattr(config, name) != value:
            changed.append(f"{name} ({value} → {getattr(config, name)})")
    if tokenizer and tokenizer != meta["tokenizer"]:
        changed.append(f"tokenizer ({tokenizer} → {meta['tokenizer']})")
    if not changed:
        return ""
    return (f"note: the rule does not carry η over {', '.join(changed)}: the best η may be another "
            "than the base's")


# ------------------------------------------------------------------------------------------------
# Data: where sequences begin depends on nothing but seed, step and sizes


def open_data(config):
    """(training tokens, validation tokens, meta.json's content) of config's data folder. The
    default one is made if it is missing. Raises ValueError as read_folder does."""
    if config.data == Config.data and local_rank == 0:
        if not Path(config.data, "meta.json").exists():
            prepare_stdlib(config.data)
    if world_size > 1:
        dist.barrier()
    train_tokens, val_tokens, meta = read_folder(config.data)
    fewest = min(len(train_tokens), len(val_tokens))
    require(fewest > config.seq_len, f"{config.data} has only {fewest:,} tokens in a split; both "
                                     f"need more than seq_len={config.seq_len}")
    return train_tokens, val_tokens, meta


@functools.lru_cache(maxsize=2)
def epoch_starts(seed, epoch, seq_len, num_tokens):
    """Where the windows of an epoch begin. Each epoch has another order, and cuts the tokens at
    another offset as long as there are spare tokens for that."""
    windows = (num_tokens - 1) // seq_len
    spare = (num_tokens - 1) % seq_len
    offset = epoch % (spare + 1)
    order = np.random.default_rng((seed, epoch)).permutation(windows)
    return offset + seq_len * order


def batch_starts(seed, step, batch_size, seq_len, num_tokens):
    """Where the sequences of batch `step` begin. Each epoch has every window once."""
    windows = (num_tokens - 1) // seq_len
    starts = []
    for i in range(step * batch_size, (step + 1) * batch_size):
        epoch, window = divmod(i, windows)
        starts.append(int(epoch_starts(seed, epoch, seq_len, num_tokens)[window]))
    return starts


def validation_starts(num_tokens, seq_len, eval_tokens):
    """Where the sequences of an evaluation begin: about eval_tokens tokens, evenly spread."""
    windows = (num_tokens - 1) // seq_len
    count = min(windows, max(1, eval_tokens // seq_len))
    return [(i * windows // count) * seq_len for i in range(count)]


def sequences(tokens, starts, seq_len, device):
    """Inputs and targets, both (B, T) int64, of the sequences that begin at starts."""
    rows = np.stack([tokens[start:start + seq_len + 1] for start in starts])
    rows = torch.from_numpy(rows.astype(np.int64))
    if device.type == "cuda":
        rows = rows.pin_memory().to(device, non_blocking=True)
    return rows[:, :-1], rows[:, 1:]


def split_batch(config):
    """(sequences of one process a step, sequences of its micro-batches). Micro-batches have equal
    sizes: the largest that divides the process's share and is allowed."""
    share = config.batch_size // world_size
    micro = min(share, config.micro_batch_size or share)
    while share % micro:
        micro -= 1
    return share, micro


def say_if_micro_batches_are_tiny(config):
    """Say which batches nearby split better, if the batch has no divisor near micro_batch_size."""
    share, micro = split_batch(config)
    allowed = min(share, config.micro_batch_size or share)
    if 2 * micro <= allowed:
        below = world_size * (share - share % allowed)
        above = below + world_size * allowed
        say(f"note: {share} sequences a process split only into micro-batches of {micro}, which is "
            f"slow: batch_size {below} or {above} splits into {allowed}")


# ------------------------------------------------------------------------------------------------
# Device, model and optimizer


def open_device(config):
    """(device of this process, autocast context). Joins this process to the others, if there are
    any, and replaces dtype="auto" in config."""
    device = pick_device(config)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
        # this is a study of learning rates: partial sums stay fp32
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    elif config.device == "auto" and shutil.which("nvidia-smi"):
        say("nvidia-smi is here, but PyTorch sees no GPU: going on with the CPU")

    if world_size > 1 and not dist.is_initialized():
        start_process_group(device)
    config.dtype = pick_dtype(config, device)
    if not on_gpu:
        set_cpu_options(config)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")
    return device, autocast


def start_process_group(device):
    """Joins this process to the others that torchrun started."""
    global long_timeout_group
    # a node that is gone is missed after 10 minutes; a checkpoint may take longer
    timeout = timedelta(minutes=10)
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, timeout=timeout)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    long_timeout_group = dist.new_group(backend="gloo", timeout=timedelta(hours=2))


def pick_device(config):
    """The device of this process."""
    if config.device == "cuda" or config.device == "auto" and torch.cuda.is_available():
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def pick_dtype(config, device):
    """config.dtype, where "auto" stands for bfloat16 if the device multiplies it in hardware."""
    if config.dtype != "auto":
        return config.dtype
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        has_bfloat16 = cpuinfo.exists() and "bf16" in cpuinfo.read_text(errors="replace")
    return "bfloat16" if has_bfloat16 else "float32"


def pick_vocab_size(config, meta):
    """The data's vocabulary at least, up to a multiple of 64, which GPUs multiply faster."""
    return max(config.vocab_size, 64 * math.ceil(meta["vocab_size"] / 64))


def set_cpu_options(config):
    """Set what makes training on a CPU faster."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # glibc shall keep freed memory: giving it away and getting it back is slow
        libc.mallopt(-1, 2 ** 31 - 1)       # M_TRIM_THRESHOLD
        libc.mallopt(-4, 0)                 # M_MMAP_MAX
    # PyTorch's plain attention is 3 times as fast on short bf16 sequences as its fused one. Despite
    # their names these switches count on the CPU. torch.compile's cache on the disk does not see
    # them: empty it after an edit here.
    plain_attention = config.dtype == "bfloat16" and config.seq_len <= 256
    torch.backends.cuda.enable_flash_sdp(not plain_attention)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(plain_attention)


def apply_table(config, columns=COLUMNS):
    """(settings of the rescalers, factors of η) for config's model: what parametrize returns. This
    is the method. Raises ValueError as parametrize does."""
    lr_mults = {}       # of embedding_lr_mult, hidden_lr_mult, …; a fork's class may have no option
    for f in fields(config):
        if f.name.endswith("_lr_mult"):
            lr_mults[f.name.removesuffix("_lr_mult")] = getattr(config, f.name)
    return parametrize(
        config.parametrization,
        width=config.width, base_width=config.base_width,
        depth=config.depth, base_depth=config.base_depth,
        steps=config.steps, base_steps=config.base_steps,
        batch_size=config.batch_size, base_batch_size=config.base_batch_size,
        alpha_init=config.alpha_init, lr_mults=lr_mults, columns=columns)


def model_config(config, config_class=GPTConfig, **settings):
    """The GPTConfig of config's model. A field that Config and GPTConfig share, such as width, has
    config's value; settings are the table's. Raises ValueError for impossible sizes."""
    shared = {f.name for f in fields(config_class)} & {f.name for f in fields(config)}
    return config_class(**{name: getattr(config, name) for name in shared}, **settings)


def build(config, device):
    """(model, optimizer) in config's parametrization. Raises ValueError for impossible sizes."""
    settings, lr_factors = apply_table(config)
    torch.manual_seed(config.seed)
    with device:
        model = GPT(model_config(config, **settings))
    return model, make_optimizer(model, lr_factors, config)


def make_optimizer(model, lr_factors, config):
    """AdamW with a group for each tensor class. Matrices decay, rescalers do not."""
    groups = param_groups(model, lr_factors)
    for group in groups:
        are_matrices = all(parameter.dim() == 2 for parameter in group["params"])
        group["weight_decay"] = config.weight_decay if are_matrices else 0.0
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2),
                             eps=config.eps, fused=True)


def maybe_compile(model, config):
    """(compiled_model, normalize_weights): the model and its method, compiled if config says so and
    a compiler is there. The compiled model has the model's own parameters."""
    compiler = os.environ.get("CXX", "g++")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    possible = header.exists() and shutil.which(compiler) is not None
    if config.compile and not possible:
        say(f"torch.compile needs {compiler}, or another as CXX, and {header} (python3-dev): "
            "going on uncompiled")
    if not (config.compile and possible):
        return model, model.normalize_weights
    return torch.compile(model), torch.compile(model.normalize_weights)


@functools.lru_cache
def matrix_rate(device, dtype):
    """FLOP/s of a large matrix product on the device, measured."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    fastest = math.inf
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * n ** 3 / fastest


# ------------------------------------------------------------------------------------------------
# Schedule


def schedule(step, config):
    """What multiplies the learning rate in a step. It starts at 1, and would reach min_lr_ratio one
    step after the last; wsd falls only in the last decay_fraction of the steps. Linear warm-up
    replaces the first steps of that curve and leaves the others as they are: unlike nanoGPT's, the
    decay is counted from step 0."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    done = step / config.steps
    if config.schedule == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * done))
    elif config.schedule == "linear":
        height = 1 - done
    else:       # wsd
        height = min(1, (1 - done) / config.decay_fraction)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * height


# ------------------------------------------------------------------------------------------------
# Evaluation and sample


def evaluate(model, compiled_model, tokens, micro, config, autocast):
    """{"val_loss": nats a token, and means of |α_A|, |α_M| and |s_z|}. Ranks share the work; one
    may have none. To measure inside the model call `model` itself: compiled_model runs no hooks."""
    device = model.embedding.device
    starts = validation_starts(len(tokens), config.seq_len, config.eval_tokens)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for first in range(rank * micro, len(starts), world_size * micro):
        some = starts[first:first + micro]
        x, y = sequences(tokens, some, config.seq_len, device)
        with autocast:
            if len(some) == micro:
                # not under no_grad, for which torch.compile would compile a second graph
                _, loss = compiled_model(x, y)
            else:       # a last, smaller batch is not worth compiling
                with torch.no_grad():
                    _, loss = model(x, y)
        total += loss.detach() * len(some)
        del loss        # and with it what was kept for a backward pass, before the next forward
    if world_size > 1:
        dist.all_reduce(total)

    metrics = {"val_loss": round(total.item() / len(starts), 6)}
    for name in LOGGED_RESCALERS:
        values = [module().detach().abs().flatten() for path, module in model.named_modules()
                  if path.split(".")[-1] == name]
        if values:      # a fork may have none
            metrics[name] = float(f"{torch.cat(values).mean().item():.6g}")
    return metrics


def draw_sample(model, tokenizer, config, autocast):
    """Text of config.sample_tokens tokens that the model continues the prompt with."""
    text = config.prompt
    if not text and config.data == Config.data:
        text = "def "       # that data is Python source
    prompt = tokenizer.encode(text)
    if len(prompt) == 0:
        prompt = [ord("\n") if tokenizer.end_of_text is None else tokenizer.end_of_text]
    torch.manual_seed(config.seed)
    tokens = torch.tensor([list(prompt)], dtype=torch.int64, device=model.embedding.device)
    top_k = config.top_k or None
    with autocast:
        tokens = model.generate(tokens, config.sample_tokens, config.temperature, top_k)
    # the model's vocabulary may be rounded up beyond the tokenizer's
    return tokenizer.decode([token for token in tokens[0].tolist() if token < tokenizer.vocab_size])


def print_sample(model, tokenizer_name, config, autocast):
    """Print a sample. Raises ValueError if the tokenizer cannot be had."""
    require(tokenizer_name, "no sample: the data has no tokenizer")
    try:
        text = draw_sample(model, get_tokenizer(tokenizer_name), config, autocast)
    except (ValueError, KeyError) as error:     # no network for its vocabulary; an unknown token
        raise ValueError(f"no sample: {error}") from None
    say(f"{'-' * 30} sample {'-' * 30}\n{text}\n{'-' * 68}")


# ------------------------------------------------------------------------------------------------
# Files of a run


def lock_folder(folder):
    """Makes the folder and locks it, so that no second process writes there; returns log.csv, open.
    The lock lasts until that file is closed. Rows are written by append_log. Raises ValueError if
    another process has the lock, or if log.csv or config.json is not of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "config.json").exists():
        try:
            read_base_file(folder)
        except ValueError:
            raise ValueError(f"{folder}/config.json was not written by train.py; choose another "
                             "out_dir") from None
    file = open(folder / "log.csv", "a+", newline="", encoding="utf-8", errors="replace")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"another process is training in {folder}; wait for it, or choose another "
                         "out_dir") from None
    file.seek(0)
    head = file.readline().strip()
    require(head in ("", ",".join(LOG)), f"{folder}/log.csv was not written by this version of "
                                         "train.py; choose another out_dir")
    file.seek(0, os.SEEK_END)
    return file


def append_log(path, row):
    """Adds a row to log.csv, and before the first row the columns. Returns the file's size."""
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, LOG, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
        return file.tell()


def save(path, metadata, progress, model, optimizer):
    """Rank 0 writes a checkpoint to path, whole or not at all, while the others wait. All raise
    OSError if it fails."""
    content = {**metadata, "progress": progress, "model": model.state_dict(),
               "optimizer": optimizer.state_dict()}
    trouble = None
    if rank == 0:
        try:
            sync(path.with_name("log.csv"))     # never behind the checkpoint
            write_aside(path, lambda file: torch.save(content, file))
        except (OSError, RuntimeError) as error:
            reason = error.__context__ or error     # torch.save wraps an OSError in a RuntimeError
            trouble = f"{path} could not be written ({reason}); the last is untouched"
    if world_size > 1:
        everybody = [trouble]
        dist.broadcast_object_list(everybody, group=long_timeout_group)
        trouble = everybody[0]
    if trouble:
        raise OSError(trouble)


def load(path, mmap=False):
    """The content of a checkpoint. Raises ValueError if path is missing or is no checkpoint."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        for key in ("config", "model_config", "data", "progress", "model", "optimizer"):
            checkpoint[key]
        return checkpoint
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:      # unpickling what is no checkpoint can raise anything
        reason = type(error).__name__
        raise ValueError(f"{path} is damaged, or of another version ({reason})") from None


def git_commit():
    """The commit of this checkout, "" outside of git or inside another project's repository."""
    here = Path(__file__).resolve().parent
    with suppress(OSError):
        def git(*words):
            done = subprocess.run(["git", "-C", here, *words], capture_output=True)
            return os.fsdecode(done.stdout).strip()
        if git("rev-parse", "--show-toplevel") == str(here):
            return git("describe", "--always", "--dirty")
    return ""


# ------------------------------------------------------------------------------------------------
# The run


def train(config, build_model=build, after_step=None):
    """
    The outcome of the run that config describes, as {column of OUTCOME: value}; its "status" is
    finished, diverged or stopped. Raises ValueError, with one sentence, for bad input, and OSError
    if a file cannot be written.

    build_model(config, device) makes the model and its optimizer; a fork may pass its own.
    after_step(step, model) is called before the first step, with the step a run begins at, and
    after each step. The globals rank, world_size, quiet and signals of this module are read, too.
    """
    started = time.perf_counter()
    check(config)
    config = replace(config)        # a copy, in which "auto" is replaced
    device, autocast = open_device(config)

    # data
    train_tokens, val_tokens, meta = open_data(config)
    config.vocab_size = pick_vocab_size(config, meta)

    # model and optimizer
    model, optimizer = build_model(config, device)
    metadata = {"config": asdict(config), "model_config": asdict(model.config), "data": meta,
                "commit": git_commit(), "torch": str(torch.__version__),
                "cudnn": torch.backends.cudnn.version()}

    # a new run, or one that goes on
    folder = Path(config.out_dir)
    path = folder / "ckpt.pt"
    has_checkpoint = bool(config.out_dir) and path.exists()
    require(config.resume or not has_checkpoint, f"{folder} already holds a run; continue it with "
                                                 "--resume, or choose another --out_dir")
    progress = {"step": 0, "train_seconds": 0.0, "log_bytes": 0}
    if has_checkpoint:
        progress = restore(path, config, model, optimizer, metadata)
    else:
        if config.resume:
            say(f"{path} is not there: a new run begins")
        if config.init_from:
            start_from(config.init_from, model)
    step = progress["step"]

    # what is about to happen, in a few lines
    share, micro = split_batch(config)
    say_if_micro_batches_are_tiny(config)
    tokens_per_step = config.batch_size * config.seq_len
    flops_per_step = model.flops_per_token() * tokens_per_step
    flops_per_second = matrix_rate(device, config.dtype) * world_size
    describe(config, has_checkpoint, model, optimizer, meta, train_tokens, device,
             seconds_per_step=flops_per_step / flops_per_second)

    # files
    if world_size > 1:
        dist.barrier()      # no rank looks for ckpt.pt any more when the first one writes it
    log_file = None
    if config.out_dir and rank == 0:
        log_file = lock_folder(folder)      # log.csv, open at its end
        require(has_checkpoint or log_file.tell() == 0, f"{folder} has the log.csv of a run whose "
                                                        "ckpt.pt is gone; choose another --out_dir")
        if log_file.tell() > progress["log_bytes"]:
            log_file.truncate(progress["log_bytes"])    # rows after the checkpoint come again
        write_json(folder / "config.json", metadata)
    if step == 0 and config.out_dir:    # so that --resume finds this run, however early it ends
        save(path, metadata, progress, model, optimizer)

    compiled_model, normalize_weights = maybe_compile(model, config)
    trained_model = compiled_model
    if world_size > 1:
        trained_model = distribute(compiled_model)
        if step > 0:
            any_batch = sequences(train_tokens, [0] * micro, config.seq_len, device)
            match_buckets(trained_model, optimizer, any_batch, autocast)
    if after_step:
        after_step(step, model)

    status = "finished"     # stays if a finished run is resumed, since no step is left
    bar = tqdm(total=config.steps, initial=step, disable=rank > 0 or quiet,
               mininterval=1 if sys.stderr.isatty() else 10)
    clock = time.perf_counter()         # at the last report
    clock_step = step
    while step < config.steps:
        # learning rate
        learning_rate = config.learning_rate * schedule(step, config)
        for group in optimizer.param_groups:
            group["lr"] = group["lr_factor"] * learning_rate

        # gradients, summed over micro-batches and averaged over ranks
        starts = batch_starts(config.seed, step, config.batch_size, config.seq_len,
                              len(train_tokens))
        mine = starts[rank * share:(rank + 1) * share]
        loss = torch.zeros((), device=device)
        for i in range(0, share, micro):
            x, y = sequences(train_tokens, mine[i:i + micro], config.seq_len, device)
            if world_size > 1:      # ranks exchange gradients once, with the last micro-batch
                trained_model.require_backward_grad_sync = i + micro == share
            with autocast:
                _, micro_loss = trained_model(x, y)
                micro_loss = micro_loss * (micro / share)
            micro_loss.backward()
            loss += micro_loss.detach() / world_size

        # update
        optimizer.step()
        optimizer.zero_grad(set_to_none=world_size == 1)    # None would cost DDP its buckets' views
        normalize_weights()
        step += 1
        bar.update()
        if after_step:
            after_step(step, model)

        # is there anything to report?
        stopping = len(signals) > 0
        if world_size > 1:      # a signal comes to the ranks at different steps
            everywhere = torch.tensor(float(stopping))
            dist.all_reduce(everywhere)         # on the CPU, so that no GPU waits
            stopping = everywhere.item() > 0
        last = step == config.steps
        evaluating = last or step % config.eval_every == 0
        saving = last or stopping or step % config.checkpoint_every == 0
        logging = evaluating or step % config.log_every == 0
        if not (logging or saving):
            continue

        # report
        if world_size > 1:
            dist.all_reduce(loss)
        train_loss = round(loss.item(), 6)      # only here the host waits for the device
        seconds = time.perf_counter() - clock
        steps_per_second = (step - clock_step) / seconds
        row = {"step": step, "tokens": step * tokens_per_step,
               "learning_rate": float(f"{learning_rate:.6g}"), "train_loss": train_loss,
               "train_seconds": round(progress["train_seconds"] + seconds, 3),
               "tokens_per_second": round(steps_per_second * tokens_per_step)}
        utilization = steps_per_second * flops_per_step / flops_per_second
        bar.set_postfix_str(f"loss {train_loss:.3f}, {row['tokens_per_second']:,} tokens/s, "
                            f"{utilization:.0%} of the matrix rate", refresh=False)
        if evaluating:
            row.update(evaluate(model, compiled_model, val_tokens, micro, config, autocast))
            say(f"step {step}/{config.steps}: train_loss {train_loss:.4f}, "
                f"val_loss {row['val_loss']:.4f}")

        finite = math.isfinite(train_loss) and math.isfinite(row.get("val_loss", 0))
        if finite and saving:
            finite = all(parameter.isfinite().all() for parameter in model.parameters())
        if not finite:
            status = "diverged"
        elif last:
            status = "finished"
        elif stopping:
            status = "stopped"
        else:
            status = "running"
        progress.update(row)
        if config.out_dir and rank == 0 and (logging or not finite):
            # A row of a stopped run has no status: after --resume the rows are those of a run that
            # was never stopped.
            if status in ("diverged", "finished"):
                row["status"] = status
            progress["log_bytes"] = append_log(folder / "log.csv", row)
        if status == "diverged":
            progress["val_loss"] = math.nan
            break
        if saving and config.out_dir:
            save(path, metadata, progress, model, optimizer)
        if status == "stopped":
            break
        clock = time.perf_counter()     # neither evaluation nor checkpoints count as training time
        clock_step = step
    bar.close()
    if log_file:
        log_file.close()        # and with it the lock

    # outcome
    outcome = {name: progress.get(name) for name in OUTCOME}
    outcome["status"] = status
    outcome["parameters"] = model.num_params()
    outcome["seconds"] = round(time.perf_counter() - started, 2)
    if outcome["val_loss"] is not None and meta["val"]["bytes"]:
        bits = outcome["val_loss"] / math.log(2)
        outcome["bits_per_byte"] = round(bits * meta["val"]["tokens"] / meta["val"]["bytes"], 4)
    if status == "finished" and config.sample_tokens and rank == 0:
        try:
            print_sample(model, meta["tokenizer"], config, autocast)
        except ValueError as error:
            say(str(error))
    return outcome


def start_from(folder, model):
    """Load the weights of the run in another folder. Raises ValueError if its model differs."""
    path = Path(folder, "ckpt.pt")
    load_weights(model, load(path), path, f"--base={folder} takes its numbers from there")


def load_weights(model, checkpoint, path, advice="has parametrize.py changed?"):
    """Gives the model the weights of the checkpoint that was loaded from path. Raises ValueError if
    it was made with other sizes or rescalers, for which advice says what to do, or by another
    model.py."""
    unlike = f"{path} has other parameters than the model: has model.py changed?"
    try:
        # a fork's new field is at its default in a checkpoint that is older than the field
        saved = asdict(type(model.config)(**checkpoint["model_config"]))
    except TypeError:
        raise ValueError(unlike) from None
    now = asdict(model.config)
    changed = [f"{name}={value}" for name, value in saved.items() if now[name] != value]
    require(not changed, f"{path} has a model with {', '.join(changed)}, and not the one that is "
                         f"wanted here; {advice}")
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError:
        raise ValueError(unlike) from None


def restore(path, config, model, optimizer, metadata):
    """The progress of the run whose checkpoint is at path. Loads its weights and Adam's state, too.
    Raises ValueError if it is not the run that config and metadata describe."""
    # A GPU copies from a file that is mapped to memory. On the CPU Adam's state would go on
    # pointing into the file, and its place on the disk would stay taken.
    checkpoint = load(path, mmap=model.embedding.is_cuda)
    require(fingerprint(checkpoint["data"]) == fingerprint(metadata["data"]),
            f"{path} was trained with another data than {config.data}; --init_from={path.parent} "
            "starts a new run from its weights")
    factors = [group["lr_factor"] for group in optimizer.param_groups]
    saved = [group.get("lr_factor") for group in checkpoint["optimizer"]["param_groups"]]
    require(factors == saved, f"{path} was trained with other learning rates: has parametrize.py "
                              "changed?")
    load_weights(model, checkpoint, path)
    optimizer.load_state_dict(checkpoint["optimizer"])
    return checkpoint["progress"]


def describe(config, resumes, model, optimizer, meta, train_tokens, device, seconds_per_step):
    """Say what is about to be trained, at which rates, and how long a step will take."""
    tokens = config.steps * config.batch_size * config.seq_len
    epochs = tokens / len(train_tokens)
    say(f"{config.parametrization}: {model.num_params():,} parameters, {config.steps:,} steps, "
        f"{tokens:,} tokens, {epochs:.1f} epochs of {config.data}, {config.dtype}, "
        f"{world_size} × {device}")
    rates = [f"{group['name']} {config.learning_rate * group['lr_factor']:.3g}"
             for group in optimizer.param_groups]
    say(f"m_w={config.width / config.base_width:g} m_d={config.depth / config.base_depth:g} "
        f"m_t={config.steps / config.base_steps:g}; η={config.learning_rate:g} becomes "
        f"{', '.join(rates)}")
    if config.base and not resumes:
        sentence = not_carried(config, meta)
        if sentence:
            say(sentence)
    if not config.base and not resumes:
        say(f"note: no --base was given: η is taken as tuned at width {config.base_width}, "
            f"{config.base_depth} blocks and {config.base_steps:,} steps; the default η was never "
            "tuned there")
    if epochs > 4:
        say("more than 4 epochs teach little; new text: "
            f"`python prepare_data.py fineweb --tokens={tokens:.0e}`")
    say(f"a step takes at least {seconds_per_step:.3g} s: its matrix products alone, at the rate of "
        "a large one; the bar shows the percentage of that rate that is reached")
    if device.type == "cpu" and seconds_per_step > 60:
        say("that is for a GPU; for a CPU there is `python train.py --base=results/laptop.json`")


def distribute(model):
    """The model as DDP wraps it: backward averages the gradients of all ranks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)      # 2.13 renames broadcast_buffers
        # gradients travel in large buckets: each bucket cuts the compiled graph
        return DDP(model, bucket_cap_mb=250, gradient_as_bucket_view=True, broadcast_buffers=False)


def match_buckets(ddp, optimizer, batch, autocast):
    """Run one backward pass that changes no weight. After its first backward pass DDP sorts the
    gradients into other buckets, which changes the rounding of their sums. The original run was
    already past that point, so a resumed run must be, too."""
    with autocast:
        _, loss = ddp(*batch)
    loss.backward()
    optimizer.zero_grad(set_to_none=False)


# ------------------------------------------------------------------------------------------------
# Command line


def integer(text):
    """10000 of "10000", "1e4" or "10_000". Raises ValueError."""
    number = float(text)
    if number != int(number):
        raise ValueError
    return int(number)


def number(text):
    """0.0078125 of "0.0078125", "7.8125e-3" or "2^-7". Raises ValueError."""
    base, sign, power = text.partition("^")
    value = float(base) ** float(power if sign else 1)
    if isinstance(value, complex):      # of a negative base
        raise ValueError
    return value


def boolean(text):
    """True or False of "True", "false", "1", … Raises KeyError."""
    return {"true": True, "1": True, "false": False, "0": False}[text.lower()]


PARSERS = {int: integer, float: number, bool: boolean, str: str}
PATHS = {"base", "init_from", "data", "out_dir"}


def parse_value(name, text, config_class=Config):
    """The value of an option from its text. Raises ValueError with one sentence."""
    kind = {f.name: f.type for f in fields(config_class)}[name]
    try:
        value = PARSERS[kind](text)
    except (ValueError, KeyError, ArithmeticError):
        raise ValueError(f"--{name} must be of type {kind.__name__}, not {text!r}") from None
    if name in PATHS and value:
        value = os.path.normpath(os.path.expanduser(value))
    return value


def parse_args(argv, config_class=Config):
    """{option: value} of the options in argv. Leaves with one sentence for an unknown option or an
    impossible value."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message}; `python train.py --help` lists all options")
    for f in fields(config_class):
        default = "" if f.default == "" else f" (default {f.default})"
        text = (f.metadata.get("help", "") + default).replace("%", "%%")
        if f.type is bool:      # may stand bare: --resume
            parser.add_argument(f"--{f.name}", nargs="?", const="True", default=argparse.SUPPRESS,
                                help=text)
        else:
            parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text)
    given = vars(parser.parse_args(argv))
    try:
        return {name: parse_value(name, text, config_class) for name, text in given.items()}
    except ValueError as error:
        parser.error(str(error))


def load_config(given, config_class=Config):
    """The Config of the options given. What they leave out comes from the base, if one is given,
    then from the run that is resumed, then from Config. Raises ValueError."""
    if given.get("base"):
        given = {**read_base(given["base"], config_class), **given}
    config = config_class(**given)
    path = Path(config.out_dir, "ckpt.pt")
    has_checkpoint = bool(config.out_dir) and path.exists()
    wants_checkpoint = config.resume or config.sample_only
    if not (has_checkpoint and wants_checkpoint):
        return config

    checkpoint = load(path, mmap=True)
    try:
        saved = config_class(**checkpoint["config"])
    except TypeError:
        raise ValueError(f"{path} is damaged, or of another version") from None
    done = checkpoint["progress"]["step"]
    # "auto" and 0, if given, stand for what the run has
    automatic = {"dtype": "auto", "vocab_size": 0}
    given = {name: value for name, value in given.items() if automatic.get(name) != value}
    of_this_command = {"out_dir": config.out_dir, "resume": False, "sample_only": False}
    config = replace(saved, **{**of_this_command, **given})
    may_differ = {"seed"} if config.sample_only else set()
    changed = [name for name in options_of_a_run(config_class)
               if getattr(config, name) != getattr(saved, name) and name not in may_differ]
    if changed and not goes_on_to_another_horizon(saved, config, changed, done):
        had = ", ".join(f"{name}={getattr(saved, name)}" for name in changed)
        raise ValueError(f"{config.out_dir} has {had}, which a resumed run cannot change")
    return config


def goes_on_to_another_horizon(before, now, changed, done):
    """Whether the resumed run only ends earlier or later, with the learning rates it had so far. So
    it is before the decay of schedule wsd, if steps / base_steps stays, since m_t multiplies the
    rates; and for any schedule before the end of warm-up."""
    return (set(changed) <= {"steps", "base_steps"}
            and done < now.steps
            and now.steps * before.base_steps == before.steps * now.base_steps
            and all(schedule(step, now) == schedule(step, before) for step in range(done)))


def sample(config, build_model=build):
    """Print a sample of the model in config.out_dir. Neither its text nor another folder is needed.
    Raises ValueError if there is no trained model, or no tokenizer."""
    path = Path(config.out_dir, "ckpt.pt")
    checkpoint = load(path)
    require(checkpoint["progress"]["step"] > 0, f"{config.out_dir} has no trained model yet")
    check(config)
    device, autocast = open_device(config)
    model, _ = build_model(config, device)
    load_weights(model, checkpoint, path)
    print_sample(model, checkpoint["data"].get("tokenizer"), config, autocast)


def watch_signals():
    """From now on the first SIGTERM or Ctrl-C asks the run to stop after its step, and the second
    ends the process at once. The signal's number goes to a pipe, which a thread reads: so it is
    heard even in the middle of a long matrix product, where Python itself hears nothing."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)

    def only_wake_the_pipe(signal_number, frame):
        pass

    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, only_wake_the_pipe)

    def listen():
        while True:
            heard = os.read(reader, 1)[0]
            if heard not in (signal.SIGTERM, signal.SIGINT):
                continue
            if signals:
                os._exit(128 + heard)       # files are written aside and renamed: none is damaged
            signals.append(heard)
            say("stopping after this step; a second signal ends the process at once")

    threading.Thread(target=listen, daemon=True).start()


def fail(sentence, everybody=False):
    """Leave with one sentence and exit code 1. Bad input is the same for all processes of a node:
    the first one says it. What hits one process alone is said by everybody it hits."""
    if dist.is_initialized():
        dist.destroy_process_group()        # or its threads may abort the exit
    sys.exit(f"train.py: {sentence}" if local_rank == 0 or everybody else 1)


def main(argv, config_class=Config, build_model=build):
    """The exit code of the run that the options in argv describe. Leaves with one sentence, and
    exit code 1, for bad input."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")        # a terminal may lack letters of a sample
    signals.clear()
    given = parse_args(argv, config_class)
    try:
        config = load_config(given, config_class)
        if config.sample_only:
            sample(config, build_model)
            return 0
        if config.out_dir:      # without a folder there is nothing to save
            watch_signals()
        outcome = train(config, build_model)
    except ValueError as error:
        fail(error)
    except torch.OutOfMemoryError:
        fail("out of memory: a smaller --micro_batch_size needs less, and changes rounding only",
             everybody=True)
    except OSError as error:        # no permission, disk full
        print(file=sys.stderr)      # below the progress bar
        fail(error, everybody=True)

    if outcome["status"] == "stopped":
        say(f"stopped after step {outcome['step']}; the same command with --resume continues")
    else:
        known = [f"{name}={value}" for name, value in outcome.items() if value is not None]
        say("final: " + " ".join(known))
    if world_size > 1:
        dist.barrier()      # torchrun ends all ranks once one leaves with an exit code
        dist.destroy_process_group()
    return EXIT_CODES[outcome["status"]]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
