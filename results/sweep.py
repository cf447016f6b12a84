"""
Many runs of train.py into one table. Every option may have several values. All combinations are
run, except those that the table has already: a repeated command continues.

    python results/sweep.py --results=out/width.csv --base=results/laptop.json \\
        --width=1x,2x,4x --seed=0,1,2 --learning_rate=2^-7:2^-4:2^.5
    python results/sweep.py --results=out/two.csv --base=results/laptop.json --seed=0 \\
        + --width=1x,2x --learning_rate=0.02,0.03 + --width=4x --learning_rate=0.01 ++ --steps=100

    a,b,c              these values; powers may be written 2^-7
    from:to:factor     from, from · factor, … up to to
    1x,2x,1/4x         multiples of the base's value, rounded where that is whole
    low..high          with --random=N: N settings fill all such ranges evenly, on a log scale
                       unless low is 0
    A + B + C ++ D     two groups of runs, with the options A B D and A C D; later ones win

Worker processes, one for each GPU that PyTorch sees or each core that we may use, import once and
compile once a shape. This process alone writes rows. results/verdict.py judges the table.
"""
import argparse
import csv
import errno
import fcntl
import functools
import io
import itertools
import math
import multiprocessing
import multiprocessing.connection
import os
import shlex
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import asdict
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import compare
import plain
import train
import verdict
from parametrize import COLUMNS
from prepare_data import fingerprint
from prepare_data import write_json

tqdm.set_lock(threading.RLock())       # threads share the bar here, not processes
PRIMES = [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]
START_METHOD = "spawn"      # of workers: forking a process that has used a GPU would fail
ABOUT = "Tuned by results/sweep.py:"
# A run of a sweep leaves a row, and nothing else.
NOT_IN_A_SWEEP = {"out_dir", "resume", "sample_only", "prompt", "sample_tokens", "temperature",
                  "top_k", "log_every", "eval_every", "checkpoint_every"}


class Range(NamedTuple):
    """low..high of --random."""
    low: float
    high: float


# ------------------------------------------------------------------------------------------------
# What is to be run


def parse_number(text, base_value):
    """The number of a text: 0.01, 1e-3, 2^-7, or a multiple of the base's, as 2x or 1/4x, which is
    rounded where the base's value is whole. Raises ValueError."""
    if not text.endswith("x"):
        return train.number(text)
    factor = text[:-1]
    number = float(Fraction(factor)) if "/" in factor else train.number(factor)
    if isinstance(base_value, int):
        return round(base_value * number)
    return base_value * number


def tidy(kind, number):
    """The number as an option's type has it: whole, or with six digits. Raises ValueError."""
    if kind is int:
        if abs(number - round(number)) > 1e-9:
            raise ValueError
        return round(number)
    return float(f"{number:.6g}")


def parse_option(name, text, base):
    """The values, a list, or the Range that an option's text stands for. Raises ValueError."""
    kind = verdict.OPTION_TYPES[name]
    if kind not in (int, float):
        return [train.parse_value(name, part, plain.Config) for part in text.split(",")]
    try:
        if ".." in text:
            low, high = [parse_number(part, base[name]) for part in text.split("..")]
            if not low < high:
                raise ValueError
            return Range(low, high)
        if ":" in text:
            first, last, factor = [parse_number(part, base[name]) for part in text.split(":")]
            if not (0 < first <= last and factor > 1):
                raise ValueError
            count = math.floor(math.log(last / first, factor) + 1e-6) + 1
            return [tidy(kind, first * factor ** i) for i in range(count)]
        return [tidy(kind, parse_number(part, base[name])) for part in text.split(",")]
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"--{name}={text} is not understood: it may be {kind.__name__} values "
                         "such as a,b,c or from:to:factor, multiples of the base's such as 1x,2x, "
                         "or low..high with --random") from None


def spread(ranges, count):
    """`count` settings, {option: value}, that fill the ranges evenly, the same ones every time:
    multiples of √2, √3, √5, … modulo 1. Ranges that begin above 0 are filled on a log scale."""
    settings = []
    for i in range(1, count + 1):
        setting = {}
        for (name, (low, high)), prime in zip(ranges.items(), PRIMES):
            place = i * math.sqrt(prime) % 1
            if low > 0:
                number = low * (high / low) ** place
            else:
                number = low + (high - low) * place
            is_whole = verdict.OPTION_TYPES[name] is int
            setting[name] = round(number) if is_whole else float(f"{number:.4g}")
        settings.append(setting)
    return settings


def combinations_of(options, count):
    """All combinations of a group's options, as a list of {option: value}. Raises ValueError."""
    ranges = {name: wanted for name, wanted in options.items() if isinstance(wanted, Range)}
    lists = {name: values for name, values in options.items() if name not in ranges}
    if ranges and not count:
        raise ValueError(f"--{next(iter(ranges))} is a range low..high, which needs --random=N")
    if len(ranges) > len(PRIMES):
        raise ValueError(f"at most {len(PRIMES)} options may be ranges")
    settings = spread(ranges, count) if ranges else [{}]
    combinations = []
    for values in itertools.product(*lists.values()):
        for setting in settings:
            combinations.append({**dict(zip(lists, values)), **setting})
    return combinations


def make_config(options, base, is_base):
    """The Config of a run, with "auto" replaced. Raises ValueError for an impossible one."""
    is_plain = options.get("parametrization", base.get("parametrization")) in plain.COLUMNS
    config_class = plain.Config if is_plain else train.Config
    if not is_plain and "embedding_std" in options:
        raise ValueError("embedding_std belongs to the plain GPT alone")
    known = {f.name for f in fields(config_class)}
    # a base of the plain GPT has embedding_std, too
    base = {name: value for name, value in base.items() if name in known}
    config = config_class(**{**base, **options, "out_dir": "", "sample_tokens": 0,
                             "eval_every": 10 ** 9, "checkpoint_every": 10 ** 9})
    if is_base:     # each candidate for --write_base is itself the base
        for name in ("width", "depth", "steps", "batch_size"):
            setattr(config, f"base_{name}", getattr(config, name))
    # three checks, which raise
    train.check(config)
    train.model_config(config, {})
    train.apply_table(config, plain.COLUMNS if is_plain else COLUMNS)
    meta = read_meta(config.data, config.seq_len)
    config.dtype = train.pick_dtype(config, train.pick_device(config))
    config.vocab_size = train.pick_vocab_size(config, meta)
    return config


@functools.lru_cache
def read_meta(data, seq_len):
    """meta.json's content of a data folder. Raises ValueError as train.open_data does."""
    _, _, meta = train.open_data(train.Config(data=data, seq_len=seq_len))
    return meta


def row_of(config):
    """{option: value} of a run, and its text. What the plain GPT alone has is at its default in
    other runs."""
    row = {**verdict.DEFAULTS, **asdict(config)}
    row["data_fingerprint"] = fingerprint(read_meta(config.data, config.seq_len))
    # bytes of a path that are not UTF-8 are written out, as \udce9
    return {name: value.encode(errors="backslashreplace").decode()
            if isinstance(value, str) else value for name, value in row.items()}


def identity(config):
    """What makes the run: two runs with the same are one run."""
    return verdict.identity(row_of(config))


def flops(config):
    """About the FLOPs of a run: a block has 12 · width² weights, as far as 8/3 is exact."""
    products = config.depth * 12 * config.width ** 2 + config.width * config.vocab_size
    attention = 12 * config.depth * config.width * config.seq_len
    return (6 * products + attention) * config.steps * config.batch_size * config.seq_len


def shape(config):
    """What torch.compile compiles for: all sizes of the model, a fork's among them, and the batch."""
    sizes = str(train.model_config(config, {}))
    return (config.parametrization in plain.COLUMNS, sizes, config.batch_size,
            config.micro_batch_size, config.dtype)


# ------------------------------------------------------------------------------------------------
# The table


class Table:
    """A results table, locked, to which rows are added. A half row at its end is removed. Raises
    ValueError if another sweep has the table, or if it has not the columns of this sweep."""

    def __init__(self, path, config_class):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "ab", buffering=0)
        self.lock()
        self.columns = [*train.options_of_a_run(config_class), "data", "data_fingerprint",
                        *train.OUTCOME]
        content = self.path.read_bytes()
        if content:
            self.columns = self.header(content)
            self.drop_half_row(content)
        self.rows()         # raises ValueError, before anything is trained, if one is wrong

    def header(self, content):
        """The columns of the file, in its order. Raises ValueError if rows would not fit."""
        first_line = content.splitlines()[0].decode("utf-8-sig", errors="replace")
        columns = next(csv.reader([first_line]))
        missing = [name for name in self.columns if name not in columns]
        if missing:
            raise ValueError(f"{self.path} has no column {missing[0]}, so this sweep cannot "
                             "continue it; choose another --results")
        return columns

    def drop_half_row(self, content):
        """Remove the last line if a crash left it without its end. A whole row whose newline an
        editor took away stays."""
        last = content.splitlines()[-1]
        if not content.endswith(b"\n") and last.count(b",") + 1 < len(self.columns):
            self.file.truncate(len(content) - len(last))

    def lock(self):
        """Raises ValueError if another sweep has the table. Goes on where there are no locks."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another sweep is writing to {self.path}; wait for it, or choose "
                             "another --results") from None
        except OSError as error:        # as on Lustre
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            print(f"{self.path.parent} has no file locks: give this table to one sweep at a time",
                  file=sys.stderr)

    def rows(self):
        """The runs of the table, as verdict.read_results gives them."""
        (runs,), _ = verdict.read_results(self.path)
        return runs

    def append(self, row):
        """Add a row, whole or not at all. Raises OSError."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        before = self.path.read_bytes()
        if not before:
            writer.writeheader()
        elif not before.endswith(b"\n"):
            text.write("\n")        # which an editor took away
        writer.writerow({name: row.get(name) for name in self.columns})
        content = text.getvalue().encode()
        try:
            if self.file.write(content) < len(content):
                raise OSError(f"there is no room for a row of {self.path}")
            os.fsync(self.file.fileno())
        except OSError:
            self.file.truncate(len(before))
            raise


# ------------------------------------------------------------------------------------------------
# Workers


def work(connection):
    """A worker process: trains one Config after the other."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C reaches the parent, too
    threading.Thread(target=end_with_parent, daemon=True).start()
    train.quiet = True
    compiled = None
    while True:
        try:
            config = connection.recv()
        except EOFError:        # the parent is gone
            return
        if compiled != shape(config):
            torch.compiler.reset()      # or the compiler gives up after some shapes
            compiled = shape(config)
        build = plain.build if config.parametrization in plain.COLUMNS else train.build
        try:
            connection.send((train.train(config, build), None))
        except Exception as error:      # of whatever kind: it is named at the end of the sweep
            text = str(error) or "no message"
            connection.send((None, f"{type(error).__name__}: {text.splitlines()[0]}"))


def end_with_parent():
    """End this process when its parent is gone, even in the middle of a run."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


class Worker:
    """A worker process, seen from the parent."""

    def __init__(self):
        context = multiprocessing.get_context(START_METHOD)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.config = None      # what it is training
        self.shape = None       # what it has compiled last

    def give(self, waiting):
        """Take the largest run of those waiting: of the shape it has compiled, if one is left."""
        same = [config for config in waiting if shape(config) == self.shape]
        self.config = max(same or waiting, key=flops)
        self.shape = shape(self.config)
        waiting.remove(self.config)
        with suppress(BrokenPipeError):     # it has died: take() will say so
            self.connection.send(self.config)

    def take(self):
        """(Config, outcome, None) of the run that ended, or (Config, None, why it failed)."""
        config = self.config
        self.config = None
        try:
            return config, *self.connection.recv()
        except EOFError:
            self.process.join()
            return config, None, f"its process ended with exit code {self.process.exitcode}"


def start_workers(count, device):
    """Worker processes: `count` of them, or one a GPU, or one for each core that we may use."""
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    count = count or gpus or len(os.sched_getaffinity(0))
    # Workers inherit the environment. PyTorch counts the GPUs of this list, from its beginning.
    os.environ["OMP_NUM_THREADS"] = "1"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(gpus)]
    workers = []
    for i in range(count):
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = names[i % gpus]
        workers.append(Worker())
    return workers


class Sweep:
    """The runs of one command, on one table, by one set of workers."""

    def __init__(self, configs, table, worker_count):
        self.configs = configs
        self.table = table
        self.worker_count = worker_count
        self.workers = []                   # started when there is something to do
        self.varying = compare.options_that_vary([row_of(config) for config in configs])
        if len({config.seed for config in configs}) > 1 or not self.varying:
            self.varying.append("seed")
        self.failed = {}                    # {description of a run: why it failed}

    def describe(self, config):
        row = row_of(config)
        return " ".join(f"{name}={row[name]}" for name in self.varying)

    def done(self):
        """Those of the Configs that have a row in the table."""
        identities = {verdict.identity(run) for run in self.table.rows()}
        return [config for config in self.configs if identity(config) in identities]

    def run(self, configs):
        """Train those of configs that have no row yet."""
        done = {identity(config) for config in self.done()}
        waiting = [config for config in configs if identity(config) not in done]
        if len(waiting) < len(configs):
            train.say(f"{len(configs) - len(waiting)} of {len(configs)} runs are in "
                      f"{self.table.path}")
        if not waiting:
            return
        self.workers = self.workers or start_workers(self.worker_count, configs[0].device)
        layout = "{percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"
        with tqdm(total=sum(map(flops, waiting)), bar_format=layout, mininterval=1) as bar:
            while True:
                for worker in self.workers:
                    if waiting and worker.config is None and worker.process.is_alive():
                        worker.give(waiting)
                busy = {worker.connection: worker for worker in self.workers if worker.config}
                if not busy:
                    break
                for connection in multiprocessing.connection.wait(list(busy)):
                    config, outcome, reason = busy[connection].take()
                    line = self.record(config, outcome, reason)
                    bar.write(f"{self.describe(config)}: {line}", file=sys.stderr)
                    bar.update(flops(config))
        for config in waiting:
            self.failed[self.describe(config)] = "no worker is left"

    def record(self, config, outcome, reason):
        """Add the run's row, or its name to those that failed. Returns a few words on it."""
        if outcome is None:
            self.failed[self.describe(config)] = reason
            return f"failed: {reason}"
        self.table.append({**row_of(config), **outcome})
        return f"val_loss {outcome['val_loss']:.4f}, {outcome['status']}"

    def tune(self, count):
        """The Config of the best setting, or None. Every setting runs with the first seed, then the
        best `count` with all seeds; and again, until the best `count` of all have run with all."""
        names = [name for name in self.varying if name != "seed"]

        def setting_of(run):
            return tuple(verdict.rounded(run[name]) for name in names)

        chosen = [config for config in self.configs if config.seed == self.configs[0].seed]
        while True:
            self.run(chosen)
            done = {identity(config) for config in self.done()}
            if self.failed or not done:
                return None
            rows = [run for run in self.table.rows() if verdict.identity(run) in done]
            best = [setting.values for setting in compare.rank(rows, names)[:count]]
            chosen = [config for config in self.configs if setting_of(row_of(config)) in best]
            if all(identity(config) in done for config in chosen):
                return next(one for one in chosen if setting_of(row_of(one)) == best[0])

    def stop(self):
        """End the workers, busy ones in the middle of their runs, and release the table's lock."""
        for worker in self.workers:
            worker.process.terminate()
            worker.process.join()
        self.table.file.close()


# ------------------------------------------------------------------------------------------------
# The sweep


def split_groups(argv):
    """The words of A + B + C ++ D as (A, [B, C], D). Without groups there is one, of no words."""
    last = []
    if "++" in argv:
        place = argv.index("++")
        last = argv[place + 1:]
        argv = argv[:place]
    parts = [[]]
    for word in argv:
        if word == "+":
            parts.append([])
        else:
            parts[-1].append(word)
    return parts[0], parts[1:] or [[]], last


def read_command(argv):
    """(sweep's own options, base's options, list of groups {option: values}). Raises ValueError."""
    parser = argparse.ArgumentParser(prog="sweep.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="and all options of train.py but those for files, "
                                            "samples and reports")
    parser.error = lambda message: sys.exit(f"sweep.py: {message} (see --help)")
    parser.add_argument("--results", metavar="FILE.csv", required=True, help="the table")
    parser.add_argument("--random", metavar="N", type=int, default=0,
                        help="settings to draw from ranges")
    parser.add_argument("--finalists", metavar="N", type=int, default=0,
                        help="run one seed first, and the others for the N best settings alone")
    parser.add_argument("--write_base", metavar="FILE.json",
                        help="write the best setting as a base")
    parser.add_argument("--workers", metavar="N", type=int, default=0,
                        help="default: one a GPU or core")
    parser.add_argument("--dry", action="store_true", help="print the runs as commands of train.py")
    own_options = ["results", "random", "finalists", "write_base", "workers", "dry"]
    for f in fields(plain.Config):
        if f.name not in NOT_IN_A_SWEEP:
            parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    common, groups, last = split_groups(argv)
    own = parser.parse_args([*common, *last])
    if own.write_base and not own.finalists:
        raise ValueError("--write_base writes the best of --finalists=N, which is not given")
    texts = []
    for group in groups:
        for word in group:
            if word.split("=")[0].lstrip("-") in own_options:
                raise ValueError(f"{word} belongs before the first + or after ++")
        given = vars(parser.parse_args([*common, *group, *last]))
        texts.append({f.name: given[f.name] for f in fields(plain.Config) if f.name in given})

    base = {}
    path = texts[0].get("base", "")
    for group in texts:
        if group.pop("base", "") != path:
            raise ValueError("one sweep has one --base, before the first +")
    if path:
        path = train.parse_value("base", path)
        base = {**train.read_base(path, plain.Config), "base": path}
    values = {**verdict.DEFAULTS, **base}
    groups = []
    for group in texts:
        options = {name: parse_option(name, text, values) for name, text in group.items()}
        for name, values_of_one in options.items():
            makes_a_run = name == "data" or name not in train.MAY_CHANGE_ON_RESUME
            if not makes_a_run and (isinstance(values_of_one, Range) or len(values_of_one) > 1):
                raise ValueError(f"--{name} makes no other run: give it one value")
        groups.append(options)
    return own, base, groups


def make_runs(groups, base, own):
    """The Configs of all runs, without repetition. Raises ValueError."""
    runs = {}
    read_meta.cache_clear()     # of an earlier call: the folder's text may have changed
    for group in groups:
        for options in combinations_of(group, own.random):
            try:
                config = make_config(options, base, bool(own.write_base))
            except ValueError as error:
                what = " ".join(f"{name}={value}" for name, value in options.items())
                raise ValueError(f"impossible run, {what}: {error}") from None
            runs[identity(config)] = config
    return list(runs.values())


def script_of(config):
    """The script that makes a run."""
    return "results/plain.py" if isinstance(config, plain.Config) else "train.py"


def command(config, base):
    """The command of train.py, or of plain.py, that makes the run."""
    known = {f.name for f in fields(config)}
    default = type(config)(**{name: value for name, value in base.items() if name in known})
    words = ["python", script_of(config)]
    if config.base:
        words.append(f"--base={config.base}")
    for name in ["data", *train.options_of_a_run(type(config))]:
        if getattr(config, name) != getattr(default, name):
            words.append(f"--{name}={getattr(config, name)}")
    return shlex.join(words)


def check_base_path(path):
    """Raises ValueError if a file stands at path that no sweep has written."""
    if os.path.exists(path):
        about = train.read_base_file(path).get("about", "")
        if not about.startswith(ABOUT):
            raise ValueError(f"{path} was not written by a sweep; choose another --write_base")


def save_base(path, config, settings):
    """Write the config as a base file."""
    meta = read_meta(config.data, config.seq_len)
    names = [name for name in train.options_of_a_run(type(config))
             if name not in train.NOT_FROM_A_BASE]
    numbers = {name: getattr(config, name) for name in names}
    about = f"{ABOUT} the best of {settings} settings on {config.data}."
    write_json(path, {"about": about, "config": numbers, "data": {"tokenizer": meta["tokenizer"]}})
    print(f"{path}: the best setting. Train with it: "
          f"python {script_of(config)} --base={path} --width=…")


def main():
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")        # a terminal may lack letters of a path
    sweep = None
    try:
        own, base, groups = read_command(sys.argv[1:])
        configs = make_runs(groups, base, own)
        if own.dry:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # `| head` ends this quietly
            for config in sorted(configs, key=flops, reverse=True):
                print(command(config, base))
            return 0
        if own.write_base:
            own.write_base = os.path.expanduser(own.write_base)
            check_base_path(own.write_base)
        has_plain = any(isinstance(config, plain.Config) for config in configs)
        table = Table(os.path.expanduser(own.results), plain.Config if has_plain else train.Config)
        sweep = Sweep(configs, table, own.workers)
        if own.finalists:
            winner = sweep.tune(own.finalists)
            if winner and own.write_base:
                settings = sum(config.seed == configs[0].seed for config in configs)
                save_base(own.write_base, winner, settings)
        else:
            sweep.run(configs)
    except (ValueError, OSError) as error:
        sys.exit(f"sweep.py: {error}")
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 4        # as train.py
    finally:
        if sweep:
            sweep.stop()
    for what, reason in sweep.failed.items():
        print(f"failed, and tried again by the same command: {what}: {reason}", file=sys.stderr)
    return 1 if sweep.failed else 0


if __name__ == "__main__":
    sys.exit(main())
