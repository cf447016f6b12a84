"""
Train a normalized Transformer: one process, one node or several.

    python train.py --width=256 --depth=4 --steps=400           one GPU, or the CPU
    torchrun train.py --width=1024                              the same, started by torchrun
    torchrun --nproc_per_node=8 train.py --width=2048           eight GPUs
    python train.py --out_dir=out --resume                      continue a run that was stopped, with its options
    python train.py --learning_rate=0.01,0.02 --seed=0,1 --results=tune.csv     four runs, compiled once: a row each

The block below is the configuration; each line is an option, --key=value. `python train.py --help` lists them.
"""
import argparse, csv, ctypes, fcntl, inspect, math, os, re, shutil, signal, sys, sysconfig, time
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from model import GPT, GPTConfig, PlainGPT
from parametrize import ALPHA_INIT, BASE_BATCH, BASE_DEPTH, BASE_STEPS, BASE_WIDTH, param_groups, parametrize
from prepare_data import batch_starts, get_tokenizer, prepare_stdlib, read_folder, validation_starts
from prepare_data import sync, write_aside, write_json

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
    vocab_size: int = 0                 # at least the data's vocabulary, rounded up to a multiple of 64
    # parametrization: how η changes with the model. One base in every command, for tuning and for training.
    parametrization: str = "nugpt"      # a column of the table in parametrize.py
    base_width: int = BASE_WIDTH        # the width, depth, … at which the table's multipliers are all 1
    base_depth: int = BASE_DEPTH        # (see base_width)
    base_steps: int = BASE_STEPS        # (see base_width)
    base_batch_size: int = BASE_BATCH   # (see base_width); columns with m_b use it, as nugpt_batch
    alpha_init: float = ALPHA_INIT      # α₀: where the eigen learning rates start at the base
    embedding_lr_mult: float = -1.0     # multiplies the embedding's learning rate; -1: the table's embedding_mult
    hidden_lr_mult: float = 1.0         # multiplies the learning rate of the blocks' matrices
    unembedding_lr_mult: float = -1.0   # multiplies the unembedding's learning rate; -1: the table's unembedding_mult
    rescalers_lr_mult: float = 1.0      # multiplies the learning rate of the rescalers
    freeze_alpha: bool = False          # an ablation: the eigen learning rates α stay where they start
    # optimization: Adam; a normalized Transformer needs no warm-up, weight decay or gradient clipping
    learning_rate: float = 0.0028       # η, the peak at the base (results/default_lr.csv); with commas: a run each
    steps: int = BASE_STEPS             # optimizer steps
    batch_size: int = BASE_BATCH        # sequences a step, over all ranks and micro-batches
    micro_batch_size: int = free(16)    # sequences a forward on one rank, at most; 0: the rank's whole share at once
    schedule: str = "cosine"            # of the learning rate: cosine, linear, or wsd: constant, then linear
    decay_fraction: float = 0.2         # the part of the steps in which wsd decays
    min_lr_ratio: float = 0.1           # where the schedule ends, as a fraction of the peak
    warmup_steps: int = 0               # steps of linear warm-up; the plain GPT needs some
    weight_decay: float = 0.0           # of the matrices; the plain GPT needs some
    beta1: float = 0.9                  # Adam's decay of the first moment
    beta2: float = 0.95                 # Adam's decay of the second moment
    eps: float = 1e-16                  # Adam's ε; 1e-8 is not small beside the gradients of wide unit-norm models
    seed: int = 0                       # of initial weights, data order and sample; several with commas: a run each
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
    device: str = free("auto")          # cuda, cpu, or auto: cuda where there is one
    dtype: str = "auto"                 # of matrix products: float32, bfloat16, or auto: bfloat16 if the device has it
    compile: bool = free(True)          # use torch.compile

MATHEMATICS = [f.name for f in fields(Config) if not f.metadata.get("free")]     # these make a run
RESCALERS = ["attn_alpha", "mlp_alpha", "s_z"]      # their means at an evaluation
LOG = "step tokens learning_rate train_loss val_loss seconds tokens_per_second".split() + RESCALERS + ["status"]
END = "step val_loss bits_per_byte train_loss tokens parameters status seconds".split() + RESCALERS
RESULTS = [*vars(Config()), *END]
EXIT_CODES = dict(finished=0, diverged=3, stopped=4)        # 1: bad input, see fail
rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
world_size = int(os.environ.get("WORLD_SIZE", 1))
patient = None      # the group in which ranks wait while the first one writes to a slow disk
signals = []        # SIGTERM and Ctrl-C that came

def say(text):
    if rank == 0:
        tqdm.write(text)

def fail(sentence):
    """Bad input ends here: one sentence a node, since one node may miss a file; exit code 1."""
    if dist.is_initialized():
        dist.destroy_process_group()        # or its threads may abort the exit
    sys.exit(f"train.py: {sentence}" if local_rank == 0 else 1)

def parse_args(argv):
    """The options given in argv, a {key: value} for each run. Leaves with one sentence for an impossible option."""
    block = re.sub(r"free\((.*?)\)", r"\1      ", inspect.getsource(Config).split("class Config:")[1])
    parser = argparse.ArgumentParser(usage=(__doc__ + block).replace("%", "%%"), allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; `python train.py --help` lists all options")
    for option in fields(Config):
        parser.add_argument(f"--{option.name}", default=argparse.SUPPRESS, help=argparse.SUPPRESS,
                            **(dict(nargs="?", const="True") if option.type is bool else {}))
    runs, booleans = [{}], {"true": True, "1": True, "false": False, "0": False}
    for name, text in sorted(vars(parser.parse_args(argv)).items()):    # "seed" sorts last: whole seeds first
        kind = Config.__annotations__[name]
        try:
            values = [booleans[part.lower()] if kind is bool else kind(part)
                      for part in (text.split(",") if name in ("learning_rate", "seed") else [text])]
        except (ValueError, KeyError):
            parser.error(f"--{name} must be of type {kind.__name__}, not {text!r}")
        runs = [{**run, name: value} for value in values for run in runs]
    return runs if len(runs) == 1 else [{"out_dir": "", **run} for run in runs]     # a list of runs keeps no folder

def check(config):
    """Leave with one sentence if a value is impossible; parametrize, GPTConfig and AdamW check the others."""
    gpus = torch.cuda.device_count()
    for keys, words, allowed in (
            ("learning_rate alpha_init seq_len steps batch_size log_every eval_every eval_tokens checkpoint_every",
             "more than 0", lambda v: v > 0),
            ("micro_batch_size snapshot_every warmup_steps weight_decay seed min_lr_ratio sample_tokens",
             "at least 0", lambda v: v >= 0),
            ("embedding_lr_mult hidden_lr_mult unembedding_lr_mult rescalers_lr_mult",
             "at least 0, or -1 for the table's", lambda v: v >= 0 or v == -1),
            ("batch_size", f"a multiple of the number of processes, {world_size}", lambda v: v % world_size == 0),
            ("out_dir", "a folder for resume and snapshot_every",
             lambda v: v or not (config.resume or config.snapshot_every)),
            ("decay_fraction", "more than 0 and at most 1", lambda v: 0 < v <= 1),
            ("schedule", "cosine, linear or wsd", lambda v: v in ("cosine", "linear", "wsd")),
            ("dtype", "auto, float32 or bfloat16", lambda v: v in ("auto", "float32", "bfloat16")),
            ("device", f"auto, cuda or cpu (cuda: a GPU for each process, and PyTorch sees {gpus})",
             lambda v: v == "cpu" or v == "auto" and not gpus or v in ("auto", "cuda") and local_rank < gpus)):
        for key in keys.split():
            if not allowed(getattr(config, key)):
                fail(f"{key} must be {words}, not {getattr(config, key)!r}")

def load_run(given):
    """(Config, checkpoint or None) of the run that the options given begin or, with resume, continue."""
    config = Config(**given)
    path = Path(config.out_dir, "ckpt.pt")
    if not (config.out_dir and path.exists()):
        return config, None
    if not config.resume:
        fail(f"{config.out_dir} already holds a run; continue it with --resume, or choose another --out_dir")
    try:        # mapped to memory for a GPU, which copies it; on the CPU the file would stay open
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=torch.cuda.is_available())
        saved = vars(Config(**checkpoint["config"]))
    except Exception as error:      # unpickling what is no checkpoint can raise anything
        fail(f"{path} is damaged, or of another version ({type(error).__name__})")
    automatic = dict(dtype="auto", vocab_size=0)        # saved as what they had come to stand for
    given = {key: value for key, value in given.items() if automatic.get(key) != value}
    before, now, done = Config(**saved), Config(**{**saved, **given}), checkpoint["progress"]["step"]
    changed = [key for key in given if key in MATHEMATICS and key != "data" and given[key] != saved[key]]
    # wsd may go on to another horizon before its decay: that run would have had the same learning rates so far
    if changed and not ({*changed} <= {"steps", "base_steps"} and
                        done < now.steps and now.steps * before.base_steps == before.steps * now.base_steps and
                        all(schedule(step, now) == schedule(step, before) for step in range(done))):
        had = ", ".join(f"{key}={saved[key]}" for key in changed)
        fail(f"{config.out_dir} has {had}, which a resumed run cannot change")
    return now, checkpoint      # its data may have moved: see run

def sequences(tokens, starts, seq_len, device):
    """Inputs and targets, both (B, T) int64, of the sequences that begin at starts."""
    rows = torch.from_numpy(np.stack([tokens[s:s + seq_len + 1] for s in starts]).astype(np.int64))
    if device.type == "cuda":
        rows = rows.pin_memory().to(device, non_blocking=True)
    return rows[:, :-1], rows[:, 1:]

def append_row(path, columns, row):
    """The size of a .csv file after a row was added under a lock. An empty file gets the columns first."""
    with open(path, "a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if file.seek(0, os.SEEK_END) == 0:
            writer.writeheader()
        writer.writerow(row)
        return file.tell()

def find_result(config):
    """The last row, {column: text}, of this run in config.results, or None. Raises ValueError for other columns."""
    Path(config.results).parent.mkdir(parents=True, exist_ok=True)
    with open(config.results, "a+", newline="", errors="replace") as file:
        file.seek(0)
        rows = csv.DictReader(file)
        if differ := set(rows.fieldnames or RESULTS) ^ set(RESULTS):
            raise ValueError(f"{config.results} has other columns ({', '.join(differ)}); give another --results")
        run = {key: str(getattr(config, key)) for key in MATHEMATICS}
        return next((row for row in reversed(list(rows)) if run.items() <= row.items()), None)

def save(path, **content):
    """Rank 0 writes content to path, whole or not at all; the others wait for that. All raise OSError if it fails."""
    trouble = [None]
    try:
        if rank == 0:
            sync(path.with_name("log.csv"))     # never behind the checkpoint
            write_aside(path, lambda file: torch.save(content, file))
    except (OSError, RuntimeError) as error:    # torch.save hides the first behind the second
        trouble = [f"{path} could not be written ({error.__context__ or error}); the last is untouched"]
    if world_size > 1:
        dist.broadcast_object_list(trouble, group=patient)
    if trouble[0]:
        raise OSError(trouble[0])

def open_device(config):
    """(device of this rank, autocast context). Starts the process group, and replaces dtype=auto in config."""
    global patient
    on_gpu = config.device == "cuda" or config.device == "auto" and torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False   # sums are fp32
    elif config.device == "auto" and shutil.which("nvidia-smi"):
        say("nvidia-smi is here, but PyTorch sees no GPU: going on with the CPU")
    if world_size > 1 and not dist.is_initialized():    # a node that is gone is missed after 10 minutes
        backend, device_id = ("cpu:gloo,cuda:nccl", device) if on_gpu else ("gloo", None)
        dist.init_process_group(backend, device_id=device_id, timeout=timedelta(minutes=10))
        patient = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
    if config.dtype == "auto":
        has_bf16 = (torch.cuda.get_device_capability(device) >= (8, 0) if on_gpu else
                    "bf16" in os.popen("cat /proc/cpuinfo 2>/dev/null").read())
        config.dtype = "bfloat16" if has_bf16 else "float32"
    if not on_gpu and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2 ** 31 - 1)   # M_TRIM_THRESHOLD: glibc keeps freed memory; getting it back is slow
        libc.mallopt(-4, 0)             # M_MMAP_MAX
    # PyTorch's plain attention for the CPU is 3 times as fast on short bf16 sequences as its fused one. Despite the
    # names these switches count on the CPU; compile caches do not see them, so empty the cache after an edit.
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
    return model, torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)

def maybe_compile(model, config):
    """(forward, normalize_weights) of the model, compiled if config says so. The model keeps its parameters' names."""
    header, compiler = Path(sysconfig.get_paths()["include"], "Python.h"), os.environ.get("CXX", "g++")
    possible = header.exists() and shutil.which(compiler)
    if config.compile and not possible:
        say(f"torch.compile needs {compiler}, or another as CXX, and {header} (python3-dev): going on uncompiled")
    return [torch.compile(part, disable=not (config.compile and possible)) for part in (model, model.normalize_weights)]

def schedule(step, config):
    """What multiplies the learning rate: warm-up, if any; then the schedule, which ends at min_lr_ratio."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    left = 1 - step / config.steps
    decay = dict(cosine=0.5 * (1 + math.cos(math.pi * step / config.steps)), linear=left,
                 wsd=min(1, left / config.decay_fraction))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * decay[config.schedule]

def evaluate(model, forward, tokens, micro, config, autocast):
    """{val_loss: nats a token over the windows of validation_starts, and the means of |α_A|, |α_M| and s_z}."""
    starts = validation_starts(len(tokens), config.seq_len, config.eval_tokens)
    total = torch.zeros((), dtype=torch.float64, device=model.embedding.device)
    for first in range(rank * micro, len(starts), world_size * micro):
        some = starts[first:first + micro]
        x, y = sequences(tokens, some, config.seq_len, total.device)
        with torch.no_grad(), autocast:     # the last may be fewer, for which nothing is compiled
            total += (forward if len(some) == micro else model)(x, y)[1] * len(some)
    if world_size > 1:
        dist.all_reduce(total)
    metrics = dict(val_loss=round(total.item() / len(starts), 6))
    for name in RESCALERS:      # the plain GPT has none
        if vectors := [module().abs() for key, module in model.named_modules() if key.endswith(name)]:
            metrics[name] = float(f"{torch.cat(vectors).mean().item():.6g}")
    return metrics

def print_sample(model, config, tokenizer, autocast):
    """Print config.sample_tokens tokens drawn from the model after config.prompt, or why that cannot be."""
    try:
        encode, decode, vocab_size, end_of_text = get_tokenizer(tokenizer)
        prompt = [*encode([config.prompt])[0]] or [end_of_text or ord("\n")]
        torch.manual_seed(config.seed)
        with autocast:
            tokens = torch.tensor([prompt], dtype=torch.int64, device=model.embedding.device)
            tokens = model.generate(tokens, config.sample_tokens, top_k=50)[0].tolist()
        text = decode([token for token in tokens if token < vocab_size])    # the model's may be rounded up
    except (ValueError, KeyError) as error:         # no network for the vocabulary; a token that no text has
        text = f"no sample: {error}"
    say(f"{'-' * 30} sample {'-' * 30}\n{text}\n{'-' * 68}")

def train(config, model, optimizer, record, progress, train_tokens, val_tokens, autocast):
    """The status after training from progress["step"] on: finished, diverged or stopped. Keeps progress up to date."""
    folder, device, step, status = Path(config.out_dir), model.embedding.device, progress["step"], "finished"
    forward, normalize_weights = maybe_compile(model, config)
    ddp = forward if world_size == 1 else DDP(          # in few buckets, as each cuts the compiled graph
        forward, bucket_cap_mb=250, gradient_as_bucket_view=True, broadcast_buffers=False)
    share = config.batch_size // world_size     # sequences of a rank; a micro-batch is the largest part of it allowed
    micro = max(m for m in range(1, share + 1) if share % m == 0 and m <= (config.micro_batch_size or share))
    tokens_per_step, every = config.batch_size * config.seq_len, config.snapshot_every
    state = dict(record, progress=progress, model=model.state_dict())   # all the next step needs, but Adam's state
    if step == 0 and config.out_dir:            # so that --resume finds this run, however early it ends
        save(folder / "ckpt.pt", **state, optimizer=optimizer.state_dict())
    if step == 0 and every:
        save(folder / "snapshot_00000000.pt", step=step, model=state["model"])
    if step and world_size > 1:
        # DDP sorts gradients into other buckets after its first backward, whose sums over ranks have other last bits.
        # The run that is continued had done so; here a backward that changes no weight does it.
        with autocast:
            warmup_loss = ddp(*sequences(train_tokens, [0] * micro, config.seq_len, device))[1]
        warmup_loss.backward()
        optimizer.zero_grad(set_to_none=False)
    bar = tqdm(total=config.steps, initial=step, disable=rank > 0, mininterval=1 if sys.stderr.isatty() else 10)
    clock = time.perf_counter(), step           # at the last report
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
            loss += micro_loss.detach() / world_size
        optimizer.step()
        optimizer.zero_grad(set_to_none=world_size == 1)        # None would cost DDP its views of the buckets
        normalize_weights()
        step += 1
        bar.update()

        stopping, last = torch.tensor(len(signals)), step == config.steps
        if world_size > 1:
            dist.all_reduce(stopping)           # a signal comes to ranks at different steps; on the CPU: no GPU waits
        evaluating = last or step % config.eval_every == 0
        saving = last or stopping or step % config.checkpoint_every == 0
        logging = evaluating or step % config.log_every == 0
        snapshot = every and (last or step % every == 0 or step < every and step.bit_count() == 1)
        if not (logging or saving or snapshot):
            continue
        if world_size > 1:
            dist.all_reduce(loss)
        train_loss = round(loss.item(), 6)      # the host waits for the device here, and nowhere else in the loop
        seconds = time.perf_counter() - clock[0]
        row = dict(step=step, tokens=step * tokens_per_step, learning_rate=float(f"{learning_rate:.6g}"),
                   train_loss=train_loss, seconds=round(progress["seconds"] + seconds, 2),
                   tokens_per_second=round((step - clock[1]) * tokens_per_step / seconds))
        bar.set_postfix_str(f"loss {train_loss:.3f}, {row['tokens_per_second']:,} tokens/s", refresh=False)
        if evaluating:
            row |= evaluate(model, forward, val_tokens, micro, config, autocast)
            say(f"step {step}/{config.steps}: train_loss {train_loss:.4f}, val_loss {row['val_loss']:.4f}")
        finite = math.isfinite(train_loss + row.get("val_loss", 0)) and (
            not saving or all(weight.isfinite().all() for weight in model.parameters()))
        status = "diverged" if not finite else "finished" if last else ""
        progress |= row | ({} if finite else dict(val_loss=math.nan))
        if config.out_dir and rank == 0 and (logging or not finite):
            progress["log_bytes"] = append_row(folder / "log.csv", LOG, row | dict(status=status))
        if not finite:
            break
        if snapshot:
            save(folder / f"snapshot_{step:08d}.pt", step=step, model=state["model"])
        if saving and config.out_dir:
            save(folder / "ckpt.pt", **state, optimizer=optimizer.state_dict())
        if stopping:
            break
        clock = time.perf_counter(), step       # neither evaluation nor checkpoints count as training time
    bar.close()
    return status or "stopped"

def run(given):
    """The exit code of the run that the options given describe: training, a row in --results, sample and last line."""
    started, (config, checkpoint) = time.perf_counter(), load_run(given)
    check(config)
    device, autocast = open_device(config)
    try:
        if config.data == Config.data and not Path(config.data, "meta.json").exists():
            prepare_stdlib(config.data)
        train_tokens, val_tokens, meta = read_folder(config.data)
        if (fewest := min(len(train_tokens), len(val_tokens))) <= config.seq_len:
            raise ValueError(f"{config.data} has only {fewest:,} tokens in a split; both need more than seq_len")
        config.vocab_size = max(config.vocab_size, 64 * math.ceil(meta["vocab_size"] / 64))
        if config.results and not config.sample_only and (done := find_result(config)):
            say("skipped: " + " ".join(f"{key}={done[key]}" for key in ("learning_rate", "seed", "val_loss", "status")))
            return EXIT_CODES[done["status"]]
        model, optimizer = build(config, device)
        commit = os.popen(f"git -C '{Path(__file__).parent}' describe --always --dirty 2>/dev/null").read().strip()
        data = {**meta, "val": {**meta["val"], "bytes": None}}      # which may be counted later
        record = dict(config=asdict(config), model_config=asdict(model.config), data=data, commit=commit,
                      torch=str(torch.__version__), cudnn=torch.backends.cudnn.version())
        progress = dict(step=0, seconds=0.0, log_bytes=0)
        if checkpoint:
            if differ := [key for key in ("model_config", "data") if checkpoint.get(key) != record[key]]:
                raise ValueError(f"{config.out_dir}/ckpt.pt was trained with another {' and '.join(differ)}")
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            progress, checkpoint = checkpoint["progress"], None     # or its file keeps its place on the disk
    except ValueError as error:
        fail(error)
    if config.sample_only:
        if progress["step"] == 0:
            fail(f"{config.out_dir} has no trained model; sample_only needs one, and --resume")
        print_sample(model, config, meta["tokenizer"], autocast)
        return 0
    tokens = config.steps * config.batch_size * config.seq_len
    epochs = tokens / len(train_tokens)
    say(f"{config.parametrization}: {model.num_params():,} parameters, {config.steps:,} steps, {tokens:,} tokens, "
        f"{epochs:.1f} epochs of {config.data}, {config.dtype}, {world_size} × {device}")
    if epochs > 4:
        say(f"more than 4 epochs teach little; new text: `python prepare_data.py fineweb_edu --tokens={tokens:.0e}`")
    if config.out_dir and rank == 0:
        Path(config.out_dir).mkdir(parents=True, exist_ok=True)
        write_json(Path(config.out_dir, "config.json"), record)
        with open(Path(config.out_dir, "log.csv"), "a") as log:
            log.truncate(min(log.tell(), progress["log_bytes"]))    # without the rows after the checkpoint
    status = train(config, model, optimizer, record, progress, train_tokens, val_tokens, autocast)
    if status == "stopped":
        say(f"stopped after step {progress['step']}; the same command with --resume continues")
        return EXIT_CODES[status]
    bits = progress["val_loss"] / math.log(2) * meta["val"]["tokens"] / (meta["val"]["bytes"] or math.nan)
    end = progress | dict(bits_per_byte=round(bits, 4), parameters=model.num_params(), status=status,
                          seconds=round(time.perf_counter() - started, 2))
    end = {key: end[key] for key in END if key in end}
    if config.results and rank == 0:
        append_row(config.results, RESULTS, asdict(config) | end)
    if status == "finished" and config.sample_tokens and rank == 0:
        print_sample(model, config, meta["tokenizer"], autocast)
    say("final: " + " ".join(f"{key}={value}" for key, value in end.items()))
    return EXIT_CODES[status]

def main(argv):
    """Do the runs that the options in argv ask for. Returns the largest of their exit codes."""
    runs, signals[:] = parse_args(argv), []
    for number in (signal.SIGTERM, signal.SIGINT):      # train stops after its step; without a folder nothing is saved
        saves = runs[0].get("out_dir", Config.out_dir)
        signal.signal(number, (lambda number, frame: signals.append(number)) if saves else signal.SIG_DFL)
    code = max(map(run, runs))
    if world_size > 1:
        dist.barrier()      # a rank that left with an exit code would take the first down before it is done
        dist.destroy_process_group()
    return code

if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except OSError as error:    # no such folder, no permission, disk full: of this rank alone, perhaps
        print(file=sys.stderr)  # below the progress bar
        fail(error)
