"""
Train a normalized Transformer: in one process, on one node or on several.

    python train.py --base=results/laptop.json --out_dir=out/base       the base, for a CPU
    python train.py --base=results/laptop.json --out_dir=out/wide --width=384       8 times as wide
    torchrun --nproc_per_node=8 train.py --base=results/gpu.json --data=data/fineweb --width=2048
    python train.py --out_dir=out/wide --resume                  continue a run, with its options
    python train.py --out_dir=out/wide --sample_only             print text from it

From Python, as in a notebook:

    config = train.load_config({"base": "results/laptop.json", "width": 96, "out_dir": ""})
    outcome = train.train(config)       # {"val_loss": …, "status": "finished", …}

The fields of Config are the options. This file reads from top to bottom: configuration, base,
data, model and optimizer, schedule, evaluation, files of a run, the run itself, command line.
The method is in apply_table and, in train's loop, in the learning rate of each group and in
normalize_weights; the rest trains a model as other trainers do.

Exit codes: 0 finished, 1 bad input or no memory, said in one sentence, 3 diverged, 4 stopped by a
signal (--resume continues), 130 ended by Ctrl-C.
"""
import argparse
import fcntl
import functools
import json
import math
import operator
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from model import GPT, GPTConfig
from parametrize import COLUMNS, TENSOR_CLASSES, param_groups, parametrize
from prepare_data import (fingerprint, get_tokenizer, prepare_stdlib, read_folder, sync,
                          write_aside, write_json)

# ------------------------------------------------------------------------------------------------
# Configuration

# How high each schedule stands, from 1 down to 0, at `done` = step / steps: see schedule.
SCHEDULES = {
    "cosine": lambda done, config: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done, config: 1 - done,
    "wsd": lambda done, config: min(1, (1 - done) / config.decay_fraction),
}


LIMITS = {"above": operator.gt, "at_least": operator.ge, "at_most": operator.le}


def option(default, help, **limits):
    """A field of Config. limits: those of LIMITS, or choices. See check."""
    return field(default=default, metadata={"help": help, **limits})


@dataclass
class Config:
    # The defaults are of a large model, at which η was never tuned. Give a base instead.

    # model
    width: int = option(1024, "d_model, a multiple of head_dim")
    depth: int = option(10, "number of blocks")
    head_dim: int = option(64, "size of an attention head; η does not carry over to another")
    seq_len: int = option(1024, "tokens a sequence", at_least=1)
    vocab_size: int = option(0, "0: the data's vocabulary, rounded up to a multiple of 64; or a "
                                "larger one", at_least=0)

    # how η changes with the model: see parametrize.py
    base: str = option("", "a base file, a run's folder or its config.json: the small model on "
                           "which η was tuned. It gives what the command leaves out")
    parametrization: str = option("nugpt", "a column of the table in parametrize.py")
    base_width: int = option(1024, "the width, depth, … at which the table's multipliers are 1")
    base_depth: int = option(10, "see base_width")
    base_steps: int = option(10_000, "see base_width")
    base_batch_size: int = option(64, "see base_width; only columns with m_b use it")
    alpha_init: float = option(0.05, "α₀: where α_A and α_M, the eigen learning rates, start at "
                                     "the base", above=0)
    embedding_lr_mult: float = option(1.0, "multiplies the embedding's rate; tuned at the base",
                                      at_least=0)
    hidden_lr_mult: float = option(1.0, "multiplies the rate of the blocks' matrices", at_least=0)
    unembedding_lr_mult: float = option(0.5, "multiplies the unembedding's rate; tuned at the base",
                                        at_least=0)
    rescalers_lr_mult: float = option(1.0, "multiplies the rate of the rescalers", at_least=0)

    # optimization: Adam. A normalized Transformer needs no warm-up and no weight decay
    learning_rate: float = option(0.0028, "η, the peak learning rate at the base", above=0)
    steps: int = option(10_000, "optimizer steps", at_least=1)
    batch_size: int = option(64, "sequences a step, over all processes and micro-batches",
                             at_least=1)
    micro_batch_size: int = option(16, "sequences a forward pass, at most; 0: all at once",
                                   at_least=0)
    schedule: str = option("cosine", "cosine, linear, or wsd: constant, then linear",
                           choices=SCHEDULES)
    decay_fraction: float = option(0.2, "the part of the steps in which wsd decays",
                                   above=0, at_most=1)
    min_lr_ratio: float = option(0.1, "where the schedule ends, as a fraction of the peak",
                                 at_least=0)
    warmup_steps: int = option(0, "steps of linear warm-up; fewer than steps", at_least=0)
    weight_decay: float = option(0.0, "of the matrices, as AdamW has it", at_least=0)
    beta1: float = option(0.9, "Adam's decay of the first moment")
    beta2: float = option(0.95, "Adam's decay of the second moment")
    # 1e-8, the usual ε, is not small beside the gradients of wide unit-norm models
    eps: float = option(1e-16, "Adam's ε")
    seed: int = option(0, "of initial weights, order of the data, and sample", at_least=0)
    init_from: str = option("", "a run's folder, whose weights are the initial ones")

    # data and output
    data: str = option("data/stdlib", "folder made by prepare_data.py; data/stdlib is made if it "
                                      "is missing")
    out_dir: str = option("out", "folder for config.json, log.csv and ckpt.pt; empty: none")
    resume: bool = option(False, "continue from out_dir/ckpt.pt, if there is one")
    sample_only: bool = option(False, "print a sample of the model in out_dir, and stop")
    prompt: str = option("", "what the sample begins with")
    sample_tokens: int = option(256, "length of the sample in tokens; 0: none", at_least=0)
    temperature: float = option(1.0, "of the sample; 0: always the likeliest token", at_least=0)
    top_k: int = option(50, "the sample's tokens come from the k likeliest; 0: from all",
                        at_least=0)

    # reports
    log_every: int = option(10, "steps between rows of log.csv", at_least=1)
    eval_every: int = option(500, "steps between evaluations; the last step has one, too",
                             at_least=1)
    eval_tokens: int = option(2 ** 18, "evaluate on about this many tokens, always the same, "
                                       "spread over the validation text", at_least=1)
    checkpoint_every: int = option(1000, "steps between checkpoints; the last step has one, too",
                                   at_least=1)

    # machine
    device: str = option("auto", "cuda, cpu, or auto: cuda where there is one",
                         choices=("auto", "cuda", "cpu"))
    dtype: str = option("auto", "of matrix products: float32, bfloat16, or auto: bfloat16 where "
                                "the device has it", choices=("auto", "float32", "bfloat16"))
    compile: bool = option(True, "use torch.compile")


# Options that change nothing that a run computes, but for rounding. All others make a run, and a
# resumed one cannot change them. The data's folder may move, but its tokens are compared.
MAY_CHANGE_ON_RESUME = {
    "base", "micro_batch_size", "data", "out_dir", "resume", "sample_only", "prompt",
    "sample_tokens", "temperature", "top_k", "log_every", "eval_every", "checkpoint_every",
    "device", "compile",
}
# What the rules of parametrize.py depend on
SIZES = ["width", "depth", "steps", "batch_size",
         "base_width", "base_depth", "base_steps", "base_batch_size"]
# Options that a run does not take from its base
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
signals = []            # numbers of the signals that came: see hear_signals
quiet = False           # results/sweep.py sets it: no lines, no progress bar


def options_of_a_run(config_class):
    """Names of the options that make a run: another value of one is another run."""
    return [f.name for f in fields(config_class) if f.name not in MAY_CHANGE_ON_RESUME]


def say(text):
    """Print a line above the progress bar. Only the first rank speaks."""
    if rank > 0 or quiet or sys.stdout is None:
        return
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except OSError:         # nobody reads any more, as after `| head`: train on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def require(condition, sentence):
    if not condition:
        raise ValueError(sentence)


def check(config):
    """Raises ValueError with one sentence if a value of config is impossible. Sizes of the model
    are checked by model_config and parametrize, Adam's numbers by AdamW."""
    for f in fields(config):
        value = getattr(config, f.name)
        limits = f.metadata
        if f.type is float:
            require(math.isfinite(value), f"{f.name} must be a finite number, not {value}")
        for word, holds in LIMITS.items():
            if word in limits:
                require(holds(value, limits[word]), f"{f.name} must be {word.replace('_', ' ')} "
                                                    f"{limits[word]}, not {value}")
        if "choices" in limits:
            require(value in limits["choices"],
                    f"{f.name} must be one of {', '.join(limits['choices'])}, not {value!r}")
    require(config.warmup_steps < config.steps,
            f"warmup_steps must be fewer than steps={config.steps}, not {config.warmup_steps}: "
            "else the rate never reaches η")
    require(config.out_dir or not config.resume, "resume needs an out_dir")
    require(rank < world_size, f"RANK is {rank}, but there are {world_size} processes: start "
                               "several by torchrun, or unset RANK")
    require(config.batch_size % world_size == 0,
            f"batch_size must be a multiple of the number of processes, {world_size}, "
            f"not {config.batch_size}")


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
        if isinstance(content["config"], dict):
            return content
    except OSError as error:
        raise ValueError(f"the base {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        pass        # said below
    raise ValueError(f'{path} is no base, nor of a run of train.py: it must be JSON, {{"config": '
                     '{"width": …, "depth": …, …}}, as results/laptop.json is')


def read_base(path, config_class=Config):
    """{option: value} that a base hands on. path: as in read_base_file. Raises ValueError for a
    damaged file, an unknown option or a value that is no value of it."""
    content = read_base_file(path)["config"]
    known = {f.name for f in fields(config_class)}
    base = {}
    for name, value in content.items():
        require(name in known, f"the base {path} has an unknown option, {name}")
        if name not in NOT_FROM_A_BASE:
            try:
                base[name] = parse_value(name, str(value), config_class)
            except ValueError as error:
                raise ValueError(f"the base {path} is wrong: {error}") from None
    for name in [*SIZES[:4], "learning_rate"]:
        require(name in base, f"the base {path} has no {name}")
    # A hand-written file is itself the base. A run's config.json has base_width, base_depth, … of
    # the base from which that run was scaled; they are handed on, and the run is not the base.
    for size in SIZES[:4]:
        base.setdefault(f"base_{size}", base[size])
    return base


def not_carried(config, meta):
    """What differs from the base though no rule carries η over it: [name (from → to), …]."""
    base = type(config)(**read_base(config.base, type(config)))
    base.batch_size = base.base_batch_size      # a run as base has a base of its own, see read_base
    names = ["head_dim", "seq_len", "schedule", "min_lr_ratio", "decay_fraction", *SIZES[4:7]]
    cells = COLUMNS.get(config.parametrization, {}).values()
    if not any("m_b" in cell for cell in cells):        # a column with m_b carries η over the batch
        names.append("batch_size")
    pairs = [(name, getattr(base, name), getattr(config, name)) for name in names]
    tokenizer = read_base_file(config.base).get("data", {}).get("tokenizer", meta["tokenizer"])
    pairs.append(("tokenizer", tokenizer, meta["tokenizer"]))
    return [f"{name} ({old} → {new})" for name, old, new in pairs if old != new]


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


# ------------------------------------------------------------------------------------------------
# Device, model and optimizer


def open_device(config):
    """(device of this process, autocast context). Joins this process to the others, if there are
    any, and replaces dtype="auto" in config."""
    device = pick_device(config)
    on_gpu = device.type == "cuda"
    if on_gpu:
        gpus = torch.cuda.device_count()
        processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)        # of this node
        require(processes <= gpus, f"{processes} processes need as many GPUs: PyTorch sees {gpus}; "
                                   "device may be cpu")
        torch.cuda.set_device(device)
        # this is a study of learning rates: partial sums stay fp32
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    elif config.device == "auto" and shutil.which("nvidia-smi"):
        say("nvidia-smi is here, but PyTorch sees no GPU: going on with the CPU")

    if world_size > 1 and not dist.is_initialized():
        join_ranks(device)
    config.dtype = pick_dtype(config, device)
    if not on_gpu:
        set_cpu_options(config)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")
    return device, autocast


def join_ranks(device):
    """Joins this process to the others that torchrun started."""
    # as long as the first rank may take to make data or to write a checkpoint
    timeout = timedelta(hours=2)
    store = None        # init_process_group takes torchrun's
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
        # After a restart torchrun's store still has the addresses of the processes that died. Keys
        # of this attempt's own keep them apart. Several nodes may count their attempts differently.
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    more = {"store": store, "rank": rank, "world_size": world_size, "timeout": timeout}
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, **more)
    else:
        dist.init_process_group("gloo", **more)


def pick_device(config):
    """The device of this process."""
    if config.device == "cuda" or config.device == "auto" and torch.cuda.is_available():
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def pick_dtype(config, device):
    """config.dtype, where "auto" stands for bfloat16 if the device multiplies it in hardware."""
    if config.dtype != "auto":
        return config.dtype
    cpuinfo = Path("/proc/cpuinfo")
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        has_bfloat16 = cpuinfo.exists() and "bf16" in cpuinfo.read_text(errors="replace")
    return "bfloat16" if has_bfloat16 else "float32"


def pick_vocab_size(config, meta):
    """The data's vocabulary at least, up to a multiple of 64, which GPUs multiply faster."""
    return max(config.vocab_size, 64 * math.ceil(meta["vocab_size"] / 64))


def set_cpu_options(config):
    """Set what makes training on a CPU faster."""
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
    sizes = {name: getattr(config, name) for name in SIZES}
    return parametrize(config.parametrization, **sizes, alpha_init=config.alpha_init,
                       lr_mults=lr_mults, columns=columns)


def model_config(config, settings, config_class=GPTConfig):
    """The GPTConfig of config's model. A field that Config and GPTConfig share, such as width, has
    config's value; settings are the table's. Raises ValueError for impossible sizes."""
    shared = {f.name for f in fields(config_class)} & {f.name for f in fields(config)}
    return config_class(settings, **{name: getattr(config, name) for name in shared})


def build(config, device):
    """(model, optimizer) in config's parametrization. Raises ValueError for impossible sizes."""
    settings, lr_factors = apply_table(config)
    torch.manual_seed(config.seed)
    with device:
        model = GPT(model_config(config, settings))
    return model, make_optimizer(model, lr_factors, config)


def make_optimizer(model, lr_factors, config):
    """AdamW with a group for each tensor class. Matrices decay, rescalers do not."""
    groups = param_groups(model, lr_factors)
    for group in groups:
        if all(parameter.dim() == 2 for parameter in group["params"]):
            group["weight_decay"] = config.weight_decay
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2),
                             eps=config.eps, fused=True)


def wrap(model, config, batch, autocast):
    """The model to train: compiled, if config says so and the compiler works, and as DDP wraps it.
    It has the model's own parameters. batch: any micro-batch, on which the compiler is tried."""
    if not config.compile:
        return distribute(model)
    say("compiling; the first time this takes a minute or two")
    trouble = ""
    try:
        wrapped = distribute(torch.compile(model, dynamic=False))
        wrapped.require_backward_grad_sync = False      # no rank waits for one that fails
        with autocast:
            _, loss = wrapped(*batch)
        loss.backward()
    except Exception as error:      # a compiler can fail in any way
        if isinstance(error, torch.OutOfMemoryError):
            raise
        trouble = f"{type(error).__name__}: {error}".splitlines()[0]
    model.zero_grad(set_to_none=world_size == 1)        # as in train
    troubles = [one for one in gather(trouble) if one]
    if not troubles:
        return wrapped
    say(f"going on uncompiled, since torch.compile failed: {troubles[0]:.200}")
    return distribute(model)


def distribute(model):
    """The model as DDP wraps it, or the model itself in a single process."""
    if world_size == 1:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)      # 2.13 renames broadcast_buffers
        # gradients travel in large buckets: each bucket cuts the compiled graph
        return DDP(model, bucket_cap_mb=250, gradient_as_bucket_view=True, broadcast_buffers=False)


def gather(value):
    """The values of all ranks, a list."""
    values = [value] * world_size
    if world_size > 1:
        dist.all_gather_object(values, value)
    return values


# ------------------------------------------------------------------------------------------------
# Schedule


def schedule(step, config):
    """What multiplies the learning rate in a step: from 1 in step 0 down to min_lr_ratio, which it
    would reach one step after the last. Warm-up replaces the first steps of that curve by a line
    from 0, and leaves the others as they are."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    height = SCHEDULES[config.schedule](step / config.steps, config)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * height


# ------------------------------------------------------------------------------------------------
# Evaluation and sample


@torch.no_grad()
def evaluate(model, tokens, config, autocast):
    """{"val_loss": nats a token, and means of |α_A|, |α_M| and |s_z|}. Ranks share the work; one
    may have none. The model is not compiled here, so that a fork may measure inside it."""
    device = model.embedding.device
    starts = validation_starts(len(tokens), config.seq_len, config.eval_tokens)
    micro = config.micro_batch_size or config.batch_size
    total = torch.zeros((), dtype=torch.float64, device=device)
    for first in range(rank * micro, len(starts), world_size * micro):
        some = starts[first:first + micro]
        x, y = sequences(tokens, some, config.seq_len, device)
        with autocast:
            _, loss = model(x, y)
        total += loss * len(some)
    if world_size > 1:
        dist.all_reduce(total)

    metrics = {"val_loss": round(total.item() / len(starts), 6)}
    for name in LOGGED_RESCALERS:
        values = [module().abs().flatten() for path, module in model.named_modules()
                  if path.split(".")[-1] == name]
        if values:      # a fork may have none
            metrics[name] = float(f"{torch.cat(values).mean().item():.6g}")
    return metrics


def print_sample(model, tokenizer_name, config, autocast):
    """Print config.sample_tokens tokens that the model continues the prompt with. Raises ValueError
    if the tokenizer cannot be had."""
    require(tokenizer_name, "no sample: the data has no tokenizer")
    text = config.prompt
    if not text and config.data == Config.data:
        text = "def "       # that data is Python source
    try:
        tokenizer = get_tokenizer(tokenizer_name)
        prompt = list(tokenizer.encode_prompt(text))
    except ValueError as error:         # no network for its vocabulary; an unknown token
        raise ValueError(f"no sample: {error}") from None
    if not prompt:
        prompt = [ord("\n") if tokenizer.end_of_text is None else tokenizer.end_of_text]
    torch.manual_seed(config.seed)
    tokens = torch.tensor([prompt], dtype=torch.int64, device=model.embedding.device)
    with autocast:
        tokens = model.generate(tokens, config.sample_tokens, config.temperature,
                                config.top_k or None)
    # the model's vocabulary may be rounded up beyond the tokenizer's
    tokens = [token for token in tokens[0].tolist() if token < tokenizer.vocab_size]
    try:
        text = tokenizer.decode(tokens)
    except KeyError as error:       # some vocabularies have gaps
        raise ValueError(f"no sample: {tokenizer_name} has no token {error}") from None
    # a model of bytes may utter what a terminal takes for a command
    text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    say(f"{'-' * 30} sample {'-' * 30}\n{text}\n{'-' * 68}")


# ------------------------------------------------------------------------------------------------
# Files of a run


def open_log(folder):
    """log.csv in a run's folder, open and locked, so that no second process writes there. Raises
    ValueError if another process has the lock, or if the folder holds somebody else's files."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "config.json").exists():
        read_base_file(folder)      # raises ValueError if it is not of a run
    file = open(folder / "log.csv", "a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"another process is training in {folder}; wait for it, or choose another "
                         "out_dir") from None
    except OSError as error:        # Lustre and some NFS mounts have no locks
        say(f"{folder} is not locked ({error.strerror}): let no second process train there")
    file.seek(0)
    head = file.readline().decode("utf-8-sig", "replace").strip()
    require(head in ("", ",".join(LOG)), f"{folder}/log.csv was not written by this train.py; "
                                         "choose another out_dir")
    return file


def cut_log(file, step):
    """Cuts log.csv after its row of `step`: later rows come again. Rows are counted, not bytes, for
    a spreadsheet may have saved the file with other line ends."""
    file.seek(0)
    size = 0
    for number, line in enumerate(file.readlines()):
        text = line.split(b",")[0]
        is_kept = line.endswith(b"\n") and text.isdigit() and int(text) <= step
        if number > 0 and not is_kept:
            break
        size += len(line)
    file.truncate(size)
    if size == 0:
        write_row(file, LOG)


def write_row(file, cells):
    """Adds a row to log.csv."""
    file.write((",".join(map(str, cells)) + "\n").encode())
    file.flush()


def save(path, metadata, progress, model, optimizer):
    """Writes a checkpoint to path, whole or not at all. Raises OSError if it fails."""
    content = {**metadata, "progress": progress, "model": model.state_dict(),
               "optimizer": optimizer.state_dict()}
    try:
        sync(path.with_name("log.csv"))     # never behind the checkpoint
        write_aside(path, lambda file: torch.save(content, file))
    except (OSError, RuntimeError) as error:
        reason = error.__context__ or error     # torch.save wraps an OSError in a RuntimeError
        raise OSError(f"{path} could not be written ({reason}); the last is untouched") from None


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
        raise ValueError(f"{path} is no checkpoint of train.py ({type(error).__name__})") from None


def load_weights(path, model):
    """The checkpoint at path, whose weights the model now has. Raises ValueError if it was made
    with other sizes or rescalers, or by another model.py."""
    # A GPU copies from a file that is mapped to memory. On the CPU Adam's state would go on
    # pointing into the file, and its place on the disk would stay taken.
    checkpoint = load(path, mmap=model.embedding.is_cuda)
    now = asdict(model.config)
    saved = {**now, **checkpoint["model_config"]}       # a fork's new field may be lacking
    changed = [f"{name}={saved[name]}" for name in now if saved[name] != now[name]]
    require(not changed, f"{path} has a model with {', '.join(changed)}, and not the one that is "
                         f"wanted here; --base={path.parent} takes its numbers, unless "
                         "parametrize.py has changed")
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError:
        raise ValueError(f"{path} has other parameters than the model: has model.py changed?"
                         ) from None
    return checkpoint


def restore(path, config, model, optimizer, meta):
    """The progress of the run whose checkpoint is at path; the model and the optimizer are as they
    were. Raises ValueError if that is another run."""
    checkpoint = load_weights(path, model)
    way_on = f"--init_from={path.parent} starts a new run from its weights"
    require(fingerprint(checkpoint["data"]) == fingerprint(meta),
            f"{path} was trained with another data than {config.data}; {way_on}")
    factors = [group["lr_factor"] for group in optimizer.param_groups]
    saved = [group.get("lr_factor") for group in checkpoint["optimizer"]["param_groups"]]
    require(factors == saved, f"{path} was trained with other learning rates: has parametrize.py "
                              f"changed? {way_on}")
    optimizer.load_state_dict(checkpoint["optimizer"])
    return checkpoint["progress"]


# ------------------------------------------------------------------------------------------------
# The run


def compare_ranks(config, meta, step):
    """Raises ValueError if the ranks are not about to train one run: on several machines they may
    have other options, other data or no checkpoint. step: of the checkpoint, or None."""
    mine = {name: getattr(config, name) for name in options_of_a_run(type(config))}
    mine["data"] = fingerprint(meta)
    mine["checkpoint of step"] = step
    first, *others = gather(mine)
    for number, other in enumerate(others, 1):
        for name, value in first.items():
            require(other[name] == value, f"rank {number} has {name}={other[name]}, but rank 0 has "
                                          f"{value}: give all machines one command, one data "
                                          "folder and one out_dir")


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

    # data, model and optimizer
    train_tokens, val_tokens, meta = open_data(config)
    config.vocab_size = pick_vocab_size(config, meta)
    model, optimizer = build_model(config, device)
    metadata = {"config": asdict(config), "model_config": asdict(model.config), "data": meta,
                "torch": str(torch.__version__)}

    # a new run, or one that goes on
    folder = Path(config.out_dir)
    path = folder / "ckpt.pt"
    has_checkpoint = bool(config.out_dir) and path.exists()
    if has_checkpoint and not config.resume:
        raise ValueError(f"{folder} already holds a run; continue it with --resume, or choose "
                         "another --out_dir")
    progress = {"step": 0, "train_seconds": 0.0}
    if has_checkpoint:
        progress = restore(path, config, model, optimizer, meta)
    elif config.init_from:
        load_weights(Path(config.init_from, "ckpt.pt"), model)
    step = progress["step"]
    compare_ranks(config, meta, step if has_checkpoint else None)
    describe(config, has_checkpoint, model, optimizer, meta, len(train_tokens), device)

    # files
    log_file = None
    if config.out_dir and rank == 0:
        log_file = open_log(folder)
        require(has_checkpoint or log_file.tell() == 0, f"{folder} has the log.csv of a run whose "
                                                        "ckpt.pt is gone; choose another --out_dir")
        cut_log(log_file, step)
        write_json(folder / "config.json", metadata)
        if not has_checkpoint:      # so that --resume finds this run, however early it ends
            save(path, metadata, progress, model, optimizer)

    share = config.batch_size // world_size         # sequences of this rank in a step
    micro = min(share, config.micro_batch_size or share)        # and in a forward pass
    any_batch = sequences(train_tokens, [0] * micro, config.seq_len, device)
    trained_model = wrap(model, config, any_batch, autocast)
    if after_step:
        after_step(step, model)

    status = "finished"     # unless something else happens
    bar = tqdm(total=config.steps, initial=step, mininterval=2,
               disable=rank > 0 or quiet or sys.stderr is None)
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
            some = mine[i:i + micro]        # the last may be fewer
            x, y = sequences(train_tokens, some, config.seq_len, device)
            if world_size > 1:      # ranks exchange gradients once, with the last micro-batch
                trained_model.require_backward_grad_sync = i + micro >= share
            with autocast:
                _, micro_loss = trained_model(x, y)
                micro_loss = micro_loss * (len(some) / share)
            micro_loss.backward()
            loss += micro_loss.detach() / world_size
        metrics = {}        # a fork's own numbers of this step, as floats; name them in LOG, too

        # update
        optimizer.step()
        optimizer.zero_grad(set_to_none=world_size == 1)    # None would cost DDP its buckets' views
        model.normalize_weights()
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
        tokens_per_step = config.batch_size * config.seq_len
        row = {"step": step, "tokens": step * tokens_per_step,
               "learning_rate": float(f"{learning_rate:.6g}"), "train_loss": train_loss,
               "train_seconds": round(progress["train_seconds"] + seconds, 3),
               "tokens_per_second": round(steps_per_second * tokens_per_step), **metrics}
        bar.set_postfix_str(f"loss {train_loss:.3f}, {row['tokens_per_second']:,} tokens/s",
                            refresh=False)
        if evaluating:
            row.update(evaluate(model, val_tokens, config, autocast))
            say(f"step {step}/{config.steps}: train_loss {train_loss:.4f}, "
                f"val_loss {row['val_loss']:.4f}")

        finite = math.isfinite(train_loss) and math.isfinite(row.get("val_loss", 0))
        if saving:      # a checkpoint is whole and can be gone on from
            finite = finite and all(weight.isfinite().all() for weight in model.parameters())
        if not finite:
            status = "diverged"
        elif stopping and not last:
            status = "stopped"
        progress.update(row)
        if log_file and (logging or not finite):
            # A row of a stopped run has no status: after --resume the rows are those of a run that
            # was never stopped.
            if last or not finite:
                row["status"] = status
            write_row(log_file, [row.get(name, "") for name in LOG])
        if status == "diverged":
            progress["val_loss"] = math.nan
            break
        if saving and log_file:
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


def describe(config, has_checkpoint, model, optimizer, meta, num_tokens, device):
    """Say what is about to be trained, and at which rates."""
    tokens = config.steps * config.batch_size * config.seq_len
    say(f"{config.parametrization}: {model.num_params():,} parameters, {config.steps:,} steps, "
        f"{tokens:,} tokens, {tokens / num_tokens:.1f} epochs of {config.data}, {config.dtype}, "
        f"{world_size} × {device}")
    rates = [f"{group['name']} {config.learning_rate * group['lr_factor']:.3g}"
             for group in optimizer.param_groups]
    say(f"m_w={config.width / config.base_width:g} m_d={config.depth / config.base_depth:g} "
        f"m_t={config.steps / config.base_steps:g}; η={config.learning_rate:g} becomes "
        f"{', '.join(rates)}")
    for tensor_class in TENSOR_CLASSES:
        if all(group["name"] != tensor_class for group in optimizer.param_groups):
            say(f"note: no parameter is of the class {tensor_class}: its rate is not used")
    if has_checkpoint:
        return
    if config.resume:
        say(f"{config.out_dir}/ckpt.pt is not there: a new run begins")
    if config.base:
        changed = not_carried(config, meta)
        if changed:
            say(f"note: the rule does not carry η over {', '.join(changed)}: the best η may be "
                "another than the base's")
    elif config.base_width == Config.base_width:
        say(f"note: no --base was given: η is taken as tuned at width {config.base_width}, where "
            "it never was; for a CPU there is `python train.py --base=results/laptop.json`")


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
    try:
        return float(float(base) ** float(power if sign else 1))
    except (ArithmeticError, TypeError):        # TypeError: a complex power, of a negative base
        raise ValueError from None


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
    except (ValueError, KeyError, OverflowError):
        raise ValueError(f"{name} must be of type {kind.__name__}, not {text!r}") from None
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
        may_stand_bare = {"nargs": "?", "const": "True"} if f.type is bool else {}
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text, **may_stand_bare)
    given = vars(parser.parse_args(argv))
    try:
        return {name: parse_value(name, text, config_class) for name, text in given.items()}
    except ValueError as error:
        parser.error(str(error))


def load_config(given, config_class=Config):
    """The Config of a command. given: its options, {name: value}. The value of an option is the
    command's, else the base's, if one is given, else that of the run to be resumed, else Config's.
    Raises ValueError."""
    if given.get("base"):
        given = {**read_base(given["base"], config_class), **given}
    config = config_class(**given)
    path = Path(config.out_dir, "ckpt.pt")
    wants_checkpoint = config.resume or config.sample_only
    if not (wants_checkpoint and config.out_dir and path.exists()):
        return config

    checkpoint = load(path, mmap=True)
    try:
        saved = config_class(**checkpoint["config"])
    except TypeError:
        raise ValueError(f"{path} is no checkpoint of this train.py: its options are others"
                         ) from None
    of_this_command = {"out_dir": config.out_dir, "resume": False, "sample_only": False}
    config = replace(saved, **{**of_this_command, **given})
    may_differ = {"seed"} if config.sample_only else set()
    changed = [f"{name}={getattr(saved, name)}" for name in options_of_a_run(config_class)
               if getattr(config, name) != getattr(saved, name) and name not in may_differ]
    require(not changed, f"{config.out_dir} has {', '.join(changed)}, which a resumed run cannot "
                         f"change; another --out_dir with --init_from={config.out_dir} starts a "
                         "new run from its weights")
    return config


def sample(config, build_model=build):
    """Print a sample of the model in config.out_dir. Neither its text nor another folder is needed.
    Raises ValueError if there is no trained model, or no tokenizer."""
    check(config)
    device, autocast = open_device(config)
    model, _ = build_model(config, device)
    checkpoint = load_weights(Path(config.out_dir, "ckpt.pt"), model)
    require(checkpoint["progress"]["step"] > 0, f"{config.out_dir} has no trained model yet")
    print_sample(model, checkpoint["data"].get("tokenizer"), config, autocast)


@contextmanager
def hear_signals():
    """Inside, SIGTERM, SIGUSR1, SIGHUP and Ctrl-C ask the run to stop after its step, however often
    they come; only a second Ctrl-C ends the process at once. Schedulers and torchrun both pass
    signals on, so that a process may get the same one twice."""
    def hear(number, frame):
        if number == signal.SIGINT and number in signals:
            os._exit(130)       # files are written aside and renamed: none is damaged
        signals.append(number)
        if rank == 0:
            with suppress(OSError):         # no terminal any more
                os.write(2, b"\nstopping after this step; a second Ctrl-C ends it at once\n")

    signals.clear()
    before = {}
    if threading.current_thread() is threading.main_thread():       # others may set no handlers
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            handler = signal.getsignal(number)
            if handler is not None and handler != signal.SIG_IGN:   # nohup ignores SIGHUP
                before[number] = handler
                signal.signal(number, hear)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    given = parse_args(argv, config_class)
    try:
        config = load_config(given, config_class)
        if config.sample_only:
            sample(config, build_model)
            return 0
        # without a folder there is nothing to save
        with hear_signals() if config.out_dir else nullcontext():
            outcome = train(config, build_model)
    except KeyboardInterrupt:
        return 130
    except ValueError as error:
        fail(error)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        fail("out of memory: a smaller --micro_batch_size needs less, and changes rounding only",
             everybody=True)
    except OSError as error:        # no permission, disk full
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
