"""
Train a normalized Transformer: one process, one node or several.

    python train.py --width=256 --depth=4 --steps=400           one GPU, or the CPU
    torchrun train.py --width=1024                              the same, started by torchrun
    torchrun --nproc_per_node=8 train.py --width=2048           eight GPUs
    python train.py --out_dir=out --resume                      continue a run that was stopped, with its options
    python train.py --out_dir=out --resume --sample_only        print text from a trained model
    python train.py --learning_rate=0.01,0.02 --seed=0,1 --results=tune.csv     four runs, compiled once: a row each

The block below is the configuration; each line is an option, --key=value. `python train.py --help` lists them.
"""
import argparse, csv, ctypes, fcntl, functools, inspect, math, os, re, shlex, shutil, signal, sys, sysconfig, time
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from model import GPT, GPTConfig, PlainGPT
from parametrize import ALPHA_INIT, BASE_DEPTH, BASE_STEPS, BASE_WIDTH, COLUMNS, param_groups, parametrize
from prepare_data import get_tokenizer, prepare_stdlib, read_folder, sync, write_aside, write_json


def free(default):
    """A field of Config that leaves the mathematics alone: it may change on resume, and does not make another run."""
    return field(default=default, metadata=dict(free=True))


@dataclass
class Config:
    # model
    width: int = BASE_WIDTH             # d_model, a multiple of head_dim
    depth: int = BASE_DEPTH             # number of blocks
    head_dim: int = 64                  # size of an attention head; η does not carry over to another head_dim
    seq_len: int = 1024                 # tokens a sequence
    vocab_size: int = 0                 # 0: the data's vocabulary, rounded up to a multiple of 64
    # parametrization: how η changes with the model. One base in every command, for tuning and for training.
    parametrization: str = "nugpt"      # a column of the table in parametrize.py
    base_width: int = BASE_WIDTH        # the width, depth and steps at which the table's multipliers are all 1
    base_depth: int = BASE_DEPTH        # (see base_width)
    base_steps: int = BASE_STEPS        # (see base_width)
    alpha_init: float = ALPHA_INIT      # α₀: where the eigen learning rates start at the base
    embedding_lr_mult: float = -1.0     # multiplies the embedding's learning rate; -1: the table's embedding_mult
    hidden_lr_mult: float = 1.0         # multiplies the learning rate of the blocks' matrices
    unembedding_lr_mult: float = -1.0   # multiplies the unembedding's learning rate; -1: the table's unembedding_mult
    rescalers_lr_mult: float = 1.0      # multiplies the learning rate of the rescalers
    freeze_alpha: bool = False          # an ablation: the eigen learning rates α stay where they start
    # optimization: Adam and a cosine; a normalized Transformer needs no warm-up, weight decay or gradient clipping
    # η's default, 2^-8.5, is the best of a small model under the default base (results/default_lr.csv).
    learning_rate: float = 0.0028       # η, the peak learning rate at the base; several with commas: a run each
    steps: int = BASE_STEPS             # optimizer steps
    batch_size: int = 64                # sequences a step, over all ranks and micro-batches
    micro_batch_size: int = free(16)    # sequences a forward on one rank, at most; 0: the rank's whole share at once
    min_lr_ratio: float = 0.1           # where the cosine ends, as a fraction of the peak
    warmup_steps: int = 0               # steps of linear warm-up; the plain GPT needs some
    weight_decay: float = 0.0           # of the matrices; the plain GPT needs some
    beta1: float = 0.9                  # Adam's decay of the first moment
    beta2: float = 0.95                 # Adam's decay of the second moment
    eps: float = 1e-16                  # Adam's ε; 1e-8 would not be small beside the gradients of wide unit-norm models
    seed: int = 0                       # of the initial weights, data order and sample; several with commas: a run each
    # data and output
    data: str = "data/stdlib"           # folder made by prepare_data.py; this one is made when it is missing
    out_dir: str = free("out")          # where config.json, log.csv and ckpt.pt go; --out_dir= writes none
    results: str = free("")             # a .csv file that gets one row for each run; a run that has its row is skipped
    resume: bool = free(False)          # continue from out_dir/ckpt.pt, if there is one
    sample_only: bool = free(False)     # with --resume: print a sample and stop
    prompt: str = free("")              # what the sample begins with
    sample_tokens: int = free(256)      # length of the sample; 0: none
    # reports
    log_every: int = free(10)           # steps between rows of log.csv
    eval_every: int = free(500)         # steps between evaluations; there is one after the last step, too
    eval_tokens: int = 2 ** 20          # evaluate on about this many tokens, always the same, spread over val.bin
    checkpoint_every: int = free(1000)  # steps between checkpoints; there is one after the last step, too
    snapshot_every: int = free(0)       # steps between snapshots of the weights, before that at 0, 1, 2, 4, …; 0: none
    # machine
    device: str = free("auto")          # cuda, cpu, or auto: cuda where there is one
    dtype: str = "auto"                 # of matrix products: float32, bfloat16, or auto: bfloat16 where the device has it
    compile: bool = free(True)          # use torch.compile


MATHEMATICS = [f.name for f in fields(Config) if not f.metadata.get("free")]     # these make a run
RESCALERS = ["attn_alpha", "mlp_alpha", "s_z"]      # their means at an evaluation
LOG = ["step", "tokens", "learning_rate", "train_loss", "val_loss", "seconds", "tokens_per_second", *RESCALERS, "status"]
RESULTS = [*vars(Config()), "step", "val_loss", "bits_per_byte", "train_loss", "tokens", "parameters", "status", "seconds",
           *RESCALERS]
EXIT_CODES = dict(finished=0, diverged=3, stopped=4)        # 1: bad input, see fail

rank, local_rank, world_size = (int(os.environ.get(*key)) for key in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
signals = []        # SIGTERM and Ctrl-C that came


def say(*words):
    if rank == 0:
        tqdm.write(" ".join(map(str, words)))


def fail(sentence):
    """Bad input ends here: one sentence a node, since one node may miss a file; exit code 1."""
    if dist.is_initialized():
        dist.destroy_process_group()        # or its threads may abort the exit
    sys.exit(f"train.py: {sentence}" if local_rank == 0 else 1)


# ---------------------------------------------------------------- configuration

def parse_args(argv):
    """The options given in argv, a {key: value} for each run. Leaves with one sentence for an impossible option."""
    block = re.sub(r"free\((.*?)\)", r"\1      ", inspect.getsource(Config).split("class Config:")[1])
    parser = argparse.ArgumentParser(usage=__doc__ + block, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; `python train.py --help` lists all options")
    for option in fields(Config):
        parser.add_argument(f"--{option.name}", default=argparse.SUPPRESS, help=argparse.SUPPRESS,
                            **(dict(nargs="?", const="True") if option.type is bool else {}))
    runs, booleans = [{}], {"true": True, "1": True, "false": False, "0": False}
    for name, text in sorted(vars(parser.parse_args(argv)).items()):    # the seed comes last: a list has whole seeds first
        kind = Config.__annotations__[name]
        try:
            values = [booleans[part.lower()] if kind is bool else kind(part)
                      for part in (text.split(",") if name in ("learning_rate", "seed") else [text])]
        except (ValueError, KeyError):
            parser.error(f"--{name} must be of type {kind.__name__}, not {text!r}")
        runs = [{**run, name: value} for value in values for run in runs]
    if len(runs) > 1 and any(run.setdefault("out_dir", "") for run in runs):
        parser.error("several runs cannot share a folder: leave out --out_dir, and give --results")
    return runs


def check(config):
    """Leave with one sentence if a value is impossible; parametrize, GPTConfig and AdamW check the others."""
    positive = "learning_rate alpha_init steps batch_size log_every eval_every eval_tokens checkpoint_every"
    not_negative = "micro_batch_size vocab_size sample_tokens warmup_steps snapshot_every seed min_lr_ratio"
    for keys, words, allowed in (
            (positive, "more than 0", lambda v: v > 0), (not_negative, "at least 0", lambda v: v >= 0),
            ("device", "auto, cuda or cpu", ("auto", "cuda", "cpu").__contains__),
            ("dtype", "auto, float32 or bfloat16", ("auto", "float32", "bfloat16").__contains__),
            ("batch_size", f"a multiple of the number of processes, {world_size}", lambda v: v % world_size == 0)):
        for key in keys.split():
            if not allowed(getattr(config, key)):
                fail(f"{key} must be {words}, not {getattr(config, key)}")
    if not config.out_dir and (config.resume or config.snapshot_every):
        fail("resume and snapshot_every need the --out_dir of the run")
    gpus = torch.cuda.device_count()
    if config.device != "cpu" and (gpus or config.device == "cuda") and local_rank >= gpus:
        fail(f"device={config.device} needs a GPU for each process, but PyTorch sees {gpus}; use --device=cpu")


def load_run(given):
    """(Config, checkpoint or None) of the run that the options given begin or, with resume, continue."""
    config = Config(**given)
    path = Path(config.out_dir, "ckpt.pt")
    if config.out_dir and path.exists() and not config.resume:
        fail(f"{config.out_dir} already holds a run; continue it with --resume, or choose another --out_dir")
    if config.sample_only and not path.exists():
        fail(f"{config.out_dir} has no trained model to sample from")
    if not config.resume or not path.exists():
        return config, None
    try:        # mapped to memory for a GPU, which copies it; on the CPU the file would stay open
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=torch.cuda.is_available())
        saved = vars(Config(**checkpoint["config"]))
    except Exception as error:      # unpickling what is no checkpoint can raise anything
        fail(f"{path} is damaged, or of another version ({type(error).__name__})")
    automatic = dict(dtype="auto", vocab_size=0)        # saved as what they had come to stand for
    given = {key: value for key, value in given.items() if automatic.get(key) != value}
    may_change = ["data", *(key for key in saved if key not in MATHEMATICS)]      # data may have moved: see run
    if changed := [f"{key}={saved[key]}" for key in given if key not in may_change and given[key] != saved[key]]:
        fail(f"{config.out_dir} has {', '.join(changed)}; a resumed run may change only {', '.join(may_change)}")
    return Config(**{**saved, **given}), checkpoint


# ---------------------------------------------------------------- data

def load_data(config):
    """(train tokens, val tokens, meta) of config's data folder, the default one made if missing. Raises ValueError."""
    if config.data == Config.data and not Path(config.data, "meta.json").exists() and local_rank == 0:
        say(f"making the default data, Python's standard library, in {config.data}")
        prepare_stdlib(config.data, progress=False)
    if world_size > 1:
        dist.barrier()
    train, val, meta = read_folder(config.data)
    if min(len(train), len(val)) <= config.seq_len:
        raise ValueError(f"{config.data} needs more than seq_len={config.seq_len} tokens in train and val, "
                         f"but has {len(train):,} and {len(val):,}")
    return train, val, meta


@functools.lru_cache(maxsize=2)
def shuffled(seed, epoch, windows):
    return np.random.default_rng((seed, epoch)).permutation(windows)


def batch_starts(seed, step, batch_size, seq_len, num_tokens):
    """Where the sequences of batch `step` begin: a pure function of (seed, step). An epoch cuts the tokens into windows,
    at an offset of its own, and goes through them in an order of its own; every window comes once an epoch."""
    windows, starts = (num_tokens - 1) // seq_len, []
    for i in range(step * batch_size, (step + 1) * batch_size):
        epoch, i = divmod(i, windows)
        offset = epoch % ((num_tokens - 1) % seq_len + 1)
        starts.append(offset + int(shuffled(seed, epoch, windows)[i]) * seq_len)
    return starts


def validation_starts(num_tokens, seq_len, eval_tokens):
    """Where the sequences of an evaluation begin: about eval_tokens tokens, spread evenly over num_tokens."""
    windows = (num_tokens - 1) // seq_len
    count = min(windows, max(1, eval_tokens // seq_len))
    return [i * windows // count * seq_len for i in range(count)]


def sequences(tokens, starts, seq_len, device):
    """Inputs and targets, both (B, T) int64, of the sequences that begin at starts."""
    rows = torch.from_numpy(np.stack([tokens[s:s + seq_len + 1] for s in starts]).astype(np.int64))
    if device.type == "cuda":
        rows = rows.pin_memory().to(device, non_blocking=True)
    return rows[:, :-1], rows[:, 1:]


# ---------------------------------------------------------------- files

def append_row(path, columns, row):
    """Add a row to a .csv to which other processes may add, too: under a lock, the columns first if it is empty."""
    with open(path, "a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if file.seek(0, os.SEEK_END) == 0:
            writer.writeheader()
        writer.writerow(row)


def find_result(config):
    """The last row, {column: text}, that config.results has of this run, or None. Raises ValueError for other columns."""
    if not config.results or not os.path.exists(config.results):
        return None
    with open(config.results, newline="", errors="replace") as file:
        rows = csv.DictReader(file)
        if differ := set(rows.fieldnames or RESULTS) ^ set(RESULTS):
            raise ValueError(f"{config.results} has other columns ({', '.join(sorted(differ))}); give another --results")
        run = {key: str(getattr(config, key)) for key in MATHEMATICS}
        return next((row for row in reversed(list(rows)) if run.items() <= row.items()), None)


def open_folder(config, step, record):
    """Make out_dir for a run that goes on at `step`: write config.json, and drop the rows of log.csv after that step."""
    log, here = Path(config.out_dir, "log.csv"), shlex.quote(str(Path(__file__).parent))
    log.parent.mkdir(parents=True, exist_ok=True)
    commit = os.popen(f"git -C {here} describe --always --dirty 2>/dev/null").read().strip()
    write_json(log.with_name("config.json"), dict(config=asdict(config), **record, commit=commit, torch=torch.__version__))
    rows = log.read_text().splitlines(keepends=True)[1:] if step and log.exists() else []
    rows = [row for row in rows if row.endswith("\n") and int(row.split(",")[0]) <= step]      # the last may have been cut
    write_aside(log, lambda file: file.write("".join([",".join(LOG) + "\n", *rows]).encode()))


def save(path, **state):
    """Write state to path, which stays the old file until the new one is whole and on the disk. Raises OSError."""
    try:
        write_aside(path, lambda file: torch.save(state, file))
    except (OSError, RuntimeError) as error:    # torch.save hides the first behind the second
        raise OSError(f"{path} could not be written ({error.__context__ or error}); the last is untouched") from error


def save_checkpoint(config, model, optimizer, same, progress):
    """Save all that the next step depends on: no random state, as a batch follows from its number."""
    sync(Path(config.out_dir, "log.csv"))       # never behind the checkpoint
    save(Path(config.out_dir, "ckpt.pt"), config=asdict(config), **same, model=model.state_dict(),
         optimizer=optimizer.state_dict(), progress=progress)


def save_snapshot(config, model, step):
    """Save the weights alone at steps 0, 1, 2, 4, …, then every snapshot_every steps, and at the last."""
    every = config.snapshot_every
    if every and rank == 0 and (step % every == 0 or step == config.steps or step < every and step & (step - 1) == 0):
        save(Path(config.out_dir, f"snapshot_{step:08d}.pt"), step=step, model=model.state_dict())


def open_device(config):
    """(device of this rank, autocast context). Starts the process group, and sets what dtype=auto stands for in config."""
    on_gpu = config.device == "cuda" or config.device == "auto" and torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():    # a node that is gone is missed after 10 minutes
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", device_id=device if on_gpu else None,
                                timeout=timedelta(minutes=10))
    if config.dtype == "auto":
        cpu_flags = Path("/proc/cpuinfo")
        has_bf16 = (torch.cuda.get_device_capability(device) >= (8, 0) if on_gpu else
                    cpu_flags.exists() and "bf16" in cpu_flags.read_text())
        config.dtype = "bfloat16" if has_bf16 else "float32"
    libc = ctypes.CDLL(None)
    if not on_gpu and hasattr(libc, "mallopt"):     # glibc: keep freed memory; getting it back can take a quarter of a step
        libc.mallopt(-1, 2 ** 31 - 1)               # M_TRIM_THRESHOLD
        libc.mallopt(-4, 0)                         # M_MMAP_MAX
    # PyTorch's plain attention for the CPU is 3 times as fast on short bf16 sequences as its fused one. Despite the names
    # these switches count on the CPU; compile caches do not see them, so empty the cache after an edit.
    plain_attention = not on_gpu and config.dtype == "bfloat16" and config.seq_len <= 256
    torch.backends.cuda.enable_flash_sdp(not plain_attention)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(plain_attention)
    return device, torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")


def build(config, device):
    """(model, optimizer) in config's parametrization. Raises ValueError for impossible sizes."""
    initial, lr_scale = parametrize(**{key: getattr(config, key) for key in inspect.signature(parametrize).parameters})
    model_config = GPTConfig(config.width, config.depth, config.head_dim, config.vocab_size, config.seq_len, **initial)
    torch.manual_seed(config.seed)
    with device:
        model = (PlainGPT if "hidden_std" in initial else GPT)(model_config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not (config.freeze_alpha and name.endswith("alpha.raw"))
    groups = param_groups(model, lr_scale)
    for group in groups:
        group["weight_decay"] = 0.0 if group["name"] == "rescalers" else config.weight_decay
    return model, torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)     # no decay: Adam


def maybe_compile(model, config):
    """(forward, normalize_weights) of the model, compiled if config says so. The model keeps its parameters' names."""
    compilers, variable = (("gcc", "clang", "cc"), "CC") if model.embedding.is_cuda else (("g++", "clang++"), "CXX")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    off = not header.exists() or not (variable in os.environ or any(map(shutil.which, compilers)))
    if config.compile and off:
        say(f"torch.compile did not find a C++ compiler or {header} (python3-dev): going on uncompiled")
    return [torch.compile(part, disable=off or not config.compile) for part in (model, model.normalize_weights)]


def on_signal(number, frame):
    """Ask the loop to stop after its step; a second Ctrl-C ends the process at once."""
    signals.append(number)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# ---------------------------------------------------------------- the run

def schedule(step, config):
    """What multiplies the learning rate: after warm-up, if any, a cosine that ends at min_lr_ratio."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def evaluate(forward, tokens, micro, config, device, autocast):
    """Mean loss in nats a token over the windows of validation_starts; each rank takes its share, micro at a time."""
    starts = validation_starts(len(tokens), config.seq_len, config.eval_tokens)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for first in range(rank * micro, len(starts), world_size * micro):
        some = starts[first:first + micro]
        x, y = sequences(tokens, (some * micro)[:micro], config.seq_len, device)    # always micro: one shape to compile
        y = torch.cat((y[:len(some)], torch.full_like(y[len(some):], -1)))          # but none counts twice
        with torch.no_grad(), autocast:
            total += forward(x, y)[1] * len(some)
    if world_size > 1:
        dist.all_reduce(total)
    return total.item() / len(starts)


def mean_rescalers(model):
    """{name: mean over channels and blocks} of |α_A|, |α_M| and s_z, as text; {} for the plain GPT."""
    values = {name: [module().abs() for key, module in model.named_modules() if key.endswith(name)] for name in RESCALERS}
    return {name: f"{torch.cat(vectors).mean().item():.6g}" for name, vectors in values.items() if vectors}


def print_sample(model, config, tokenizer, autocast):
    """Print config.sample_tokens tokens drawn from the model after config.prompt, or why that cannot be."""
    try:
        encode, decode, vocab_size, end_of_text = get_tokenizer(tokenizer)
        prompt = [int(token) for token in encode([config.prompt])[0]] or [ord("\n") if end_of_text is None else end_of_text]
        torch.manual_seed(config.seed)
        with autocast:
            tokens = model.generate(torch.tensor([prompt], device=model.embedding.device), config.sample_tokens, top_k=50)
        text = decode([token for token in tokens[0].tolist() if token < vocab_size])    # the model's may be rounded up
    except (ValueError, KeyError) as error:         # no network for the vocabulary; a token that no text has
        text = f"no sample: {error}"
    say(f"{'-' * 30} sample {'-' * 30}\n{text}\n{'-' * 68}")


def train(config, model, optimizer, train_tokens, val_tokens, same, progress, device, autocast):
    """The status, finished, diverged or stopped, after training from progress["step"] on, with progress kept up to date."""
    forward, normalize_weights = maybe_compile(model, config)
    ddp = DDP(forward, gradient_as_bucket_view=True, broadcast_buffers=False) if world_size > 1 else forward
    share = config.batch_size // world_size     # sequences of a rank; a micro-batch is the largest part of it allowed
    micro = max(m for m in range(1, share + 1) if share % m == 0 and m <= (config.micro_batch_size or share))
    tokens_per_step, saves, step = config.batch_size * config.seq_len, config.out_dir and rank == 0, progress["step"]
    if step and world_size > 1:
        # After its first backward DDP sorts the gradients into other buckets, whose sums over ranks have other last bits.
        # The run that is continued had done so; here a backward that changes no weight does it.
        with autocast:
            warmup_loss = ddp(*sequences(train_tokens, [0] * micro, config.seq_len, device))[1]
        warmup_loss.backward()
        optimizer.zero_grad(set_to_none=True)
    if saves and step == 0:     # a full disk is met now, and --resume finds this run however early it ends
        save_checkpoint(config, model, optimizer, same, progress)
    save_snapshot(config, model, step)
    bar = tqdm(total=config.steps, initial=step, unit="step", disable=rank != 0, dynamic_ncols=True,
               mininterval=0.5 if sys.stderr.isatty() else 10)
    clock, diverged = None, False       # (time, step) of the last report; the training clock begins after the first step
    while step < config.steps:
        learning_rate = config.learning_rate * schedule(step, config)
        for group in optimizer.param_groups:
            group["lr"] = group["lr_scale"] * learning_rate
        starts = batch_starts(config.seed, step, config.batch_size, config.seq_len, len(train_tokens))
        loss = torch.zeros((), device=device)
        for i in range(rank * share, (rank + 1) * share, micro):
            if world_size > 1:
                ddp.require_backward_grad_sync = i + micro == (rank + 1) * share    # average with the last micro-batch
            x, y = sequences(train_tokens, starts[i:i + micro], config.seq_len, device)
            with autocast:
                micro_loss = ddp(x, y)[1] * (micro / share)
            micro_loss.backward()
            loss += micro_loss.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        normalize_weights()
        step += 1
        bar.update()

        stopping, last = torch.tensor(len(signals)), step == config.steps
        if world_size > 1:
            dist.all_reduce(stopping)       # a signal comes to ranks at different steps; on the CPU: no GPU is waited for
        evaluating = last or step % config.eval_every == 0
        logging = evaluating or step % config.log_every == 0
        saving = last or stopping or step % config.checkpoint_every == 0
        save_snapshot(config, model, step)
        if clock and not (logging or saving):
            continue
        if world_size > 1:
            dist.all_reduce(loss)
        train_loss = loss.item() / world_size       # the host waits for the device here, and nowhere else in the loop
        rate, now = math.nan, time.perf_counter()
        if clock:
            rate = (step - clock[1]) * tokens_per_step / (now - clock[0])
            progress["seconds"] += now - clock[0]
            bar.set_postfix_str(f"loss {train_loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
        else:
            bar.unpause()       # the time left is estimated without the first step
        progress.update(step=step, train_loss=train_loss)
        row = dict(step=step, tokens=step * tokens_per_step, learning_rate=f"{learning_rate:.6g}",
                   train_loss=f"{train_loss:.6f}", seconds=f"{progress['seconds']:.2f}", tokens_per_second=f"{rate:.0f}")
        if evaluating:
            progress["val_loss"] = evaluate(forward, val_tokens, micro, config, device, autocast)
            row |= dict(val_loss=f"{progress['val_loss']:.6f}", **mean_rescalers(model))
            say(f"step {step}/{config.steps}: train_loss {train_loss:.4f}, val_loss {progress['val_loss']:.4f}")
        diverged = not math.isfinite(train_loss + (progress["val_loss"] if evaluating else 0))
        if saves and (logging or diverged):
            append_row(Path(config.out_dir, "log.csv"), LOG, row | dict(status="diverged" * diverged or "finished" * last))
        if diverged:
            progress["val_loss"] = math.nan
            break
        if saves and saving:
            save_checkpoint(config, model, optimizer, same, progress)
        if stopping:
            break
        clock = time.perf_counter(), step       # neither evaluation nor checkpoints count as training time
    bar.close()
    return "diverged" if diverged else "finished" if step == config.steps else "stopped"


def run(given, started):
    """The exit code of the run that the options given describe: training, its row in --results, sample and last line."""
    config, checkpoint = load_run(given)
    check(config)
    device, autocast = open_device(config)
    try:
        train_tokens, val_tokens, meta = load_data(config)
        config.vocab_size = config.vocab_size or 64 * math.ceil(meta["vocab_size"] / 64)
        if config.vocab_size < meta["vocab_size"]:
            raise ValueError(f"vocab_size must be at least {meta['vocab_size']}, as in {config.data}, not {config.vocab_size}")
        if done := find_result(config):
            say(f"skipped, as {config.results} has it: {config.parametrization} learning_rate={config.learning_rate} "
                f"seed={config.seed} val_loss={done['val_loss']} status={done['status']}")
            return EXIT_CODES[done["status"]]
        model, optimizer = build(config, device)
        same = dict(model_config=asdict(model.config), data={split: {**meta[split], "bytes": None} for split in ("train", "val")})
        progress = dict(step=0, seconds=0.0, train_loss=math.nan, val_loss=math.nan)
        if checkpoint:
            if differ := [key for key in same if checkpoint.get(key) != same[key]]:
                raise ValueError(f"{config.out_dir}/ckpt.pt was trained with another {' and '.join(differ)}")
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            progress, checkpoint = checkpoint["progress"], None     # or its file keeps its place on the disk
    except ValueError as error:
        fail(error)
    if config.sample_only:
        print_sample(model, config, meta["tokenizer"], autocast)
        return 0
    tokens = config.steps * config.batch_size * config.seq_len
    epochs = tokens / len(train_tokens)
    say(f"{config.parametrization}: {model.num_params():,} parameters, {config.steps:,} steps, {tokens:,} tokens, "
        f"{epochs:.1f} epochs of {config.data}, {config.dtype}, {world_size} × {device}")
    if epochs > 4:
        say(f"more than 4 epochs teach little: `python prepare_data.py fineweb_edu --tokens={tokens:.0e}` downloads new text")
    if config.out_dir and rank == 0:
        rates = {group["name"]: group["lr_scale"] * config.learning_rate for group in optimizer.param_groups}
        open_folder(config, progress["step"], dict(model=asdict(model.config), peak_learning_rates=rates, data=meta))
    status = train(config, model, optimizer, train_tokens, val_tokens, same, progress, device, autocast)
    if status == "stopped":
        say(f"stopped after step {progress['step']}; the same command with --resume continues")
        return EXIT_CODES[status]
    bits = progress["val_loss"] / math.log(2) * meta["val"]["tokens"] / (meta["val"]["bytes"] or math.nan)
    end = dict(step=progress["step"], val_loss=f"{progress['val_loss']:.6f}", bits_per_byte=f"{bits:.4f}",
               train_loss=f"{progress['train_loss']:.4f}", tokens=progress["step"] * config.batch_size * config.seq_len,
               parameters=model.num_params(), status=status, seconds=f"{time.perf_counter() - started:.2f}")
    if config.results and rank == 0:
        append_row(config.results, RESULTS, {**asdict(config), **end, **mean_rescalers(model)})
    if status == "finished" and config.sample_tokens and rank == 0:
        print_sample(model, config, meta["tokenizer"], autocast)
    say("final: " + " ".join(f"{key}={value}" for key, value in end.items()))
    return EXIT_CODES[status]


def main(argv):
    """Do the runs that the options in argv ask for. Returns the largest of their exit codes."""
    runs, signals[:] = parse_args(argv), []
    for number in (signal.SIGTERM, signal.SIGINT) if runs[0].get("out_dir", Config.out_dir) else ():
        signal.signal(number, on_signal)     # without a folder there is nothing to save
    code = max(run(given, time.perf_counter()) for given in runs)
    if world_size > 1:
        dist.barrier()      # a rank that left with an exit code would take the first down before it is done
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except OSError as error:    # no such folder, no permission, disk full: of this rank alone, perhaps
        fail(error)
    except KeyboardInterrupt:   # with nothing to save
        print("train.py: stopped", file=sys.stderr)
        sys.exit(EXIT_CODES["stopped"])
