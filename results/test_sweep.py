"""What results/sweep.py and sweep.sh promise: `python -m pytest results`."""
import csv
import errno
import fcntl
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
import compare
import prepare_data
import sweep
import train
import verdict

torch.set_num_threads(1)
TINY = [
    "--width=16", "--depth=1", "--head_dim=8", "--seq_len=16", "--steps=3", "--batch_size=4",
    "--base_width=16", "--base_depth=1", "--base_steps=3", "--base_batch_size=4",
    "--eval_tokens=304", "--device=cpu", "--dtype=float32", "--compile=False",
]
LAPTOP = f"--base={ROOT / 'results/laptop.json'}"


# ------------------------------------------------------------------------------------------------
# Helpers


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data folder of 8,000 bytes."""
    return make_data(tmp_path_factory.mktemp("data"), seed=0)


def make_data(folder, seed):
    words = "norm sphere rescaler alpha residual width depth head".split()
    text = " ".join(np.random.default_rng(seed).choice(words, 2000))[:8000]
    path = folder / f"words{seed}.txt"
    path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        out = folder / "tokens"
        patch.setattr(sys, "argv", ["prepare_data.py", str(path), f"--out={out}", "--overwrite"])
        prepare_data.main()
    return out


@pytest.fixture(autouse=True)
def forked_workers(monkeypatch):
    """Workers are forked from this process, which has imported PyTorch."""
    monkeypatch.setattr(sweep, "START_METHOD", "fork")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)       # as Python begins; --dry changes it


def run(*argv):
    """results/sweep.py in this process: its exit code, or the sentence with which it leaves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sweep.py", *map(str, argv)])
        try:
            return sweep.main()
        except SystemExit as end:
            return end.code


def tiny(data, table, *argv):
    """A sweep of tiny runs by one worker."""
    return run(f"--results={table}", f"--data={data}", "--workers=1", *TINY, *argv)


def column(path, name):
    with open(path, newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


def configs(*argv):
    """The Configs of a command line."""
    own, base, groups = sweep.read_command(["--results=x.csv", *map(str, argv)])
    return sweep.make_runs(groups, base, own)


def settings(runs, *names):
    return [tuple(getattr(config, name) for name in names) for config in runs]


# ------------------------------------------------------------------------------------------------
# Values


VALUES = {      # option: its values, on a base of width 48, 400 steps and η = 2^-5.5
    "--width=24,48": [24, 48],
    "--width=1x,3/2x,4x": [48, 72, 192],
    "--steps=1x:16x:4": [400, 1600, 6400],
    "--learning_rate=2^-7,1e-2": [2 ** -7, 0.01],
    "--learning_rate=2^-8:2^-6:2": [2 ** -8, 2 ** -7, 2 ** -6],
    "--learning_rate=1/2x:2x:2": [0.01104855, 0.0220971, 0.0441942],
    "--schedule=cosine,wsd": ["cosine", "wsd"],
}


@pytest.mark.parametrize("option", VALUES)
def test_values_are_what_people_write(option, data):
    name = option[2:].split("=")[0]
    got = [getattr(config, name) for config in configs(LAPTOP, f"--data={data}", option)]
    if isinstance(got[0], float):
        assert got == pytest.approx(VALUES[option], rel=1e-5)
    else:
        assert got == VALUES[option]


REFUSALS = {        # option: what the sentence says
    "--widht=3": "unrecognized",
    "--width=": "not understood",
    "--width=1.5": "not understood",
    "--width=1/5x": "head_dim=24, not 10",
    "--learning_rate=2^": "not understood",
    "--learning_rate=0.1:0.01:2": "not understood",
    "--learning_rate=1:2:1": "not understood",
    "--learning_rate=0,01,x": "not understood",
    "--learning_rate=2^-8..2^-4": "needs --random=N",
    "--schedule=step": "impossible run",
    "--parametrization=sp": "there is no parametrization 'sp'",
    "--data=none": "none is no data folder",
    "--depth=0": "impossible run",
    "--base=none": "cannot be read",
    "--embedding_std=2": "belongs to the plain GPT",
    "--micro_batch_size=4,8": "makes no other run",
}


@pytest.mark.parametrize("option", REFUSALS)
def test_what_is_impossible_is_refused_at_once(option, data, tmp_path):
    sentence = run(f"--results={tmp_path / 'a.csv'}", LAPTOP, f"--data={data}", option)
    assert sentence.startswith("sweep.py: ") and "\n" not in sentence
    assert REFUSALS[option] in sentence
    assert not (tmp_path / "a.csv").exists()


def test_all_combinations_of_each_group_run_once(data):
    groups = ["+", "--width=48", "+", "--width=48,96", "--depth=2,4", "++", "--steps=9"]
    runs = configs(LAPTOP, f"--data={data}", "--seed=0,1", *groups)
    wanted = [(width, depth, seed, 9) for width, depth in ((48, 4), (48, 2), (96, 2), (96, 4))
              for seed in (0, 1)]
    assert sorted(settings(runs, "width", "depth", "seed", "steps")) == sorted(wanted)


def test_random_settings_fill_their_ranges_and_are_the_same(data):
    command = [LAPTOP, f"--data={data}", "--random=40", "--learning_rate=2^-8..2^-4",
               "--warmup_steps=0..40"]
    runs = configs(*command)
    for values in (np.log2(settings(runs, "learning_rate")) + 8, settings(runs, "warmup_steps")):
        quarters, _ = np.histogram(values, bins=4)
        assert quarters.min() >= 8
    assert configs(*command) == runs


def test_the_base_is_in_every_run(data):
    config, = configs(LAPTOP, f"--data={data}", "--width=8x")
    assert (config.width, config.base_width, config.embedding_lr_mult) == (384, 48, 0.25)


def test_a_sweep_of_both_models_runs_and_continues(data, tmp_path):
    table = tmp_path / "a.csv"
    groups = ["+", "--parametrization=nugpt", "+", "--parametrization=gpt_sp",
              "--embedding_std=0.5,2"]
    for seeds in ("--seed=0", "--seed=0,1"):
        assert tiny(data, table, seeds, *groups) == 0
    columns = [column(table, name) for name in ("parametrization", "embedding_std", "seed")]
    assert sorted(zip(*columns)) == [
        ("gpt_sp", "0.5", "0"), ("gpt_sp", "0.5", "1"), ("gpt_sp", "2.0", "0"),
        ("gpt_sp", "2.0", "1"), ("nugpt", "1.0", "0"), ("nugpt", "1.0", "1")]


def test_dry_prints_commands_that_make_the_same_runs(data, capsys):
    command = [LAPTOP, f"--data={data}", "--width=1x,2x", "--learning_rate=2^-7", "--seed=0,1"]
    assert run("--results=x.csv", *command, "--dry") == 0
    printed = []
    for line in capsys.readouterr().out.splitlines():
        python, script, *options = shlex.split(line)
        assert (python, script) == ("python", "train.py")
        printed.append(train.load_config(train.parse_args(options)))
    names = ("width", "learning_rate", "seed", "data", "base_width", "steps", "dtype")
    assert sorted(settings(printed, *names)) == sorted(settings(configs(*command), *names))


# ------------------------------------------------------------------------------------------------
# Runs


def test_a_row_is_the_run_that_train_py_makes(data, tmp_path):
    table = tmp_path / "a.csv"
    assert tiny(data, table, "--learning_rate=0.02") == 0
    options = [*TINY, f"--data={data}", "--learning_rate=0.02", "--out_dir="]
    outcome = train.train(train.load_config(train.parse_args(options)))
    for name in ("val_loss", "train_loss", "status", "parameters", "bits_per_byte", "alpha_A"):
        assert column(table, name) == [str(outcome[name])]
    assert column(table, "learning_rate") == ["0.02"]


def test_a_repeated_command_runs_what_is_lacking(data, tmp_path, capsys):
    table = tmp_path / "a.csv"
    assert tiny(data, table, "--learning_rate=0.01,0.02") == 0
    assert tiny(data, table, "--learning_rate=0.01,0.02,0.03") == 0
    assert "2 of 3 runs are in" in capsys.readouterr().out
    assert sorted(column(table, "learning_rate")) == ["0.01", "0.02", "0.03"]
    before = table.read_bytes()
    assert tiny(data, table, "--learning_rate=0.03,0.02") == 0
    assert table.read_bytes() == before


def test_rates_of_6_and_of_17_digits_are_one_grid_point(data, tmp_path):
    table = tmp_path / "a.csv"
    assert tiny(data, table, "--learning_rate=2^-5.5") == 0
    table.write_text(table.read_text().replace(",0.0220971,", ",0.02209708691207961,"))
    assert tiny(data, table, "--learning_rate=2^-5.5") == 0
    assert column(table, "learning_rate") == ["0.02209708691207961"]


def build_for(seed_1):
    """A train.build that calls seed_1(model) where the seed is 1."""

    def build(config, device, build=train.build):
        model, optimizer = build(config, device)
        if config.seed == 1:
            seed_1(model)
        return model, optimizer

    return build


def test_a_diverged_run_is_a_row(data, tmp_path, monkeypatch):
    fill = build_for(lambda model: model.embedding.data.fill_(math.nan))
    monkeypatch.setattr(train, "build", fill)
    assert tiny(data, tmp_path / "a.csv", "--seed=0,1") == 0
    statuses = dict(zip(column(tmp_path / "a.csv", "seed"), column(tmp_path / "a.csv", "status")))
    assert statuses == {"0": "finished", "1": "diverged"}


def is_broken(model):
    raise RuntimeError("the device is broken")


def test_a_run_that_fails_is_named_and_tried_again(data, tmp_path, monkeypatch, capsys):
    table = tmp_path / "a.csv"
    with monkeypatch.context() as patch:
        patch.setattr(train, "build", build_for(is_broken))
        assert tiny(data, table, "--seed=0,1,2") == 1
    said = capsys.readouterr().err
    assert "tried again by the same command: seed=1: RuntimeError: the device is broken" in said
    assert sorted(column(table, "seed")) == ["0", "2"]
    assert tiny(data, table, "--seed=0,1,2") == 0
    assert sorted(column(table, "seed")) == ["0", "1", "2"]


def test_a_worker_that_dies_is_said(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "build", build_for(lambda model: os._exit(9)))
    assert tiny(data, tmp_path / "a.csv", "--seed=1,0") == 1
    said = capsys.readouterr().err
    assert "seed=1: its process ended with exit code 9" in said
    assert "seed=0: no worker is left" in said


class Silent(sweep.Worker):
    """A Worker without a process."""

    def __init__(self):
        self.shape = None
        self.connection = self

    def send(self, config):
        pass


def test_a_worker_keeps_to_a_shape_from_the_largest_run_on(data):
    waiting = configs(LAPTOP, f"--data={data}", "--width=48,96", "--steps=400,1600")
    worker = Silent()
    taken = []
    while waiting:
        worker.give(waiting)
        taken.append((worker.config.width, worker.config.steps))
    assert taken == [(96, 1600), (96, 400), (48, 1600), (48, 400)]


@pytest.mark.parametrize("visible, gpus", [(None, 2), ("4,6", 2), ("0,1,-1,2", 2), ("", 0)])
def test_workers_are_as_many_as_gpus_or_cores(visible, gpus, monkeypatch):
    names = []

    class Started:
        def __init__(self):
            names.append(os.environ.get("CUDA_VISIBLE_DEVICES"))

    monkeypatch.setattr(sweep, "Worker", Started)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 7})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    sweep.start_workers(0, "auto")
    assert names == ((visible or "0,1").split(",")[:2] if gpus else [""] * 3)


def kill_a_sweep_in(data, table, seconds):
    """A sweep of six runs in another process, killed after so many seconds."""
    child = multiprocessing.get_context("fork").Process(
        target=lambda: tiny(data, table, "--seed=0,1,2,3,4,5", "--steps=30", "--workers=2"))
    child.start()
    child.join(seconds)
    child.kill()
    child.join()


def test_a_killed_sweep_loses_no_run_and_has_none_twice(data, tmp_path):
    table = tmp_path / "a.csv"
    for seconds in (0.2, 0.4, 0.6, 0.8):
        kill_a_sweep_in(data, table, seconds)
        if table.exists():
            assert table.read_bytes()[-1:] in (b"", b"\n")
    for _ in range(100):        # workers of the killed sweeps end by themselves
        if tiny(data, table, "--seed=0,1,2,3,4,5", "--steps=30") == 0:
            break
        time.sleep(0.1)
    assert sorted(column(table, "seed")) == list("012345")


def test_the_second_sweep_on_one_table_is_refused(data, tmp_path):
    with open(tmp_path / "a.csv", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another sweep is writing to" in tiny(data, tmp_path / "a.csv")


def test_a_disk_without_locks_is_no_error(data, tmp_path, monkeypatch, capsys):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert tiny(data, tmp_path / "a.csv") == 0
    assert f"{tmp_path} has no file locks" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# The table


def test_a_table_that_a_spreadsheet_saved_is_continued(data, tmp_path):
    table = tmp_path / "a.csv"
    assert tiny(data, table, "--learning_rate=0.01,0.02") == 0
    lines = [reversed(line.split(",")) for line in table.read_text().splitlines()]
    text = "\r\n".join(",".join(line) for line in lines)
    text = text.replace("1e-16", "1E-16").replace(",0.01,", ",0.0100,")
    table.write_bytes(text.encode("utf-8-sig"))
    assert tiny(data, table, "--learning_rate=0.01,0.02,0.03") == 0
    (runs,), _ = verdict.read_results(table)
    assert sorted(run["learning_rate"] for run in runs) == [0.01, 0.02, 0.03]
    assert len(table.read_text().splitlines()) == 4


BAD_TABLES = [      # what is done to a table's text, what the sentence says
    (lambda text: text.replace("warmup_steps", "Warmup"), "no column warmup_steps"),
    (lambda text: text.replace(",0.01,", ",fast,"), "line 2"),
    (lambda text: text.replace(",0.01,", ',"0,01",'), "line 2"),
    (lambda text: text.replace(",", ";"), "no column"),
    (lambda text: text + "16,1\n" + text.splitlines()[1] + "\n", "line 3"),
    (lambda text: "my notes, of May\nnot a table", "no column"),
]


@pytest.mark.parametrize("change, words", BAD_TABLES)
def test_a_bad_table_is_refused_and_left_alone(change, words, data, tmp_path):
    table = tmp_path / "a.csv"
    assert tiny(data, table, "--learning_rate=0.01") == 0
    table.write_text(change(table.read_text()))
    before = table.read_bytes()
    sentence = tiny(data, table, "--learning_rate=0.02")
    assert sentence.startswith("sweep.py: ") and words in sentence
    assert table.read_bytes() == before


def test_half_a_row_that_a_crash_left_goes_away(data, tmp_path):
    table = tmp_path / "a.csv"
    assert tiny(data, table, "--learning_rate=0.01") == 0
    whole = table.read_bytes()
    table.write_bytes(whole + whole.splitlines()[1][:40])
    assert tiny(data, table, "--learning_rate=0.01,0.02") == 0
    assert sorted(column(table, "learning_rate")) == ["0.01", "0.02"]


def test_a_full_disk_leaves_whole_rows(data, tmp_path):
    table = tmp_path / "a.csv"
    command = [f"--results={table}", f"--data={data}", "--workers=1", *TINY,
               "--learning_rate=0.01,0.02,0.03,0.04"]
    code = """if True:
        import resource, sweep
        start_workers = sweep.start_workers
        def start_workers_then_limit(*args):        # the disk is full for the table alone
            workers = start_workers(*args)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
            return workers
        sweep.start_workers = start_workers_then_limit
        sweep.START_METHOD = "fork"
        raise SystemExit(sweep.main())
    """
    done = subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT / "results",
                          capture_output=True, text=True)
    assert done.returncode == 1
    assert "sweep.py: " in done.stderr and "Traceback" not in done.stderr
    assert table.read_bytes()[-1:] in (b"", b"\n")
    assert run(*command) == 0
    assert sorted(column(table, "learning_rate")) == ["0.01", "0.02", "0.03", "0.04"]


def test_a_changed_text_makes_other_runs(tmp_path):
    table = tmp_path / "a.csv"
    assert tiny(make_data(tmp_path, seed=0), table) == 0
    assert tiny(make_data(tmp_path, seed=1), table) == 0
    assert len(set(column(table, "data_fingerprint"))) == 2


def test_a_folder_spelled_in_another_way_is_the_same_data(data, tmp_path, monkeypatch):
    table = tmp_path / "a.csv"
    assert tiny(data, table) == 0
    monkeypatch.chdir(data)
    assert tiny("./", table) == 0
    assert tiny(shutil.copytree(data, tmp_path / "moved to"), table) == 0
    assert len(column(table, "seed")) == 1


@pytest.mark.parametrize("name", ["my 'R&D' back\\slash", os.fsdecode(b"caf\xe9")])
def test_paths_may_hold_anything(name, data, tmp_path):
    odd = shutil.copytree(data, tmp_path / name)
    table = odd / "a|b.csv"
    assert tiny(odd, table) == 0
    assert tiny(odd, table) == 0
    assert len(column(table, "seed")) == 1


# ------------------------------------------------------------------------------------------------
# Tuning a base


def test_finalists_get_all_seeds_and_the_best_is_the_base(data, tmp_path):
    table = tmp_path / "a.csv"
    base = tmp_path / "base.json"
    command = ["--random=6", "--finalists=2", "--seed=0,1", "--learning_rate=2^-8..2^-3",
               "--alpha_init=2^-5..2^-2", f"--write_base={base}"]
    assert tiny(data, table, *command) == 0
    (rows,), _ = verdict.read_results(table)
    seeds = [sum(run["seed"] == seed for run in rows) for seed in (0, 1)]
    assert seeds[0] == 6 and 2 <= seeds[1] < 6
    best, *_ = compare.rank(rows, ["learning_rate", "alpha_init"])
    config = train.load_config({"base": str(base)})
    assert (config.learning_rate, config.alpha_init) == best.values
    assert (config.base_width, config.base_steps, config.width) == (16, 3, 16)
    assert json.loads(base.read_text())["data"] == {"tokenizer": "byte"}
    before = table.read_bytes()
    assert tiny(data, table, *command) == 0
    assert table.read_bytes() == before


def test_a_base_that_no_sweep_has_written_is_kept(data, tmp_path):
    base = shutil.copy(ROOT / "results/laptop.json", tmp_path / "base.json")
    before = Path(base).read_bytes()
    command = ["--random=5", "--finalists=1", "--learning_rate=2^-8..2^-3", f"--write_base={base}"]
    assert "was not written by a sweep" in tiny(data, tmp_path / "a.csv", *command)
    assert Path(base).read_bytes() == before
    assert not (tmp_path / "a.csv").exists()


# ------------------------------------------------------------------------------------------------
# sweep.sh


def called(tmp_path, *argv, shell="bash"):
    """The command lines that sweep.sh gives to Python, as lists of words."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done >> called; echo >> called')
    fake.chmod(0o755)
    done = subprocess.run([shell, ROOT / "sweep.sh", *argv], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "PYTHON": str(fake)})
    if not (tmp_path / "called").exists():
        return done
    blocks = (tmp_path / "called").read_text().strip().split("\n\n")
    return [block.split("\n") for block in blocks]


SIZES = {       # experiment: (runs of one seed, the largest sizes as multiples of the base's)
    "laptop": (29, {"width": 3}),
    "width": (63, {"width": 8}),
    "depth": (54, {"depth": 8}),
    "steps": (30, {"steps": 16}),
    "joint": (38, {"width": 2, "steps": 4}),
    "batch": (18, {"batch_size": 4}),
}


@pytest.mark.parametrize("name", SIZES)
def test_an_experiment_is_these_runs_and_the_verdict(name, data, tmp_path):
    first, second = called(tmp_path, name, "--seed=0", f"--data={data}")
    assert Path(first[0]).name == "sweep.py"
    runs = configs(*[word for word in first[1:] if not word.startswith("--results")])
    count, largest = SIZES[name]
    assert len(runs) == count
    for size, factor in largest.items():
        base = {"width": 48, "depth": 4, "steps": 400, "batch_size": 16}[size]
        assert max(getattr(config, size) for config in runs) == factor * base
    assert Path(second[0]).name == "verdict.py"
    assert second[1] == f"out/sweeps/{name}.csv"


def test_a_base_is_searched(tmp_path):
    first, second = called(tmp_path, "base")
    assert "--write_base=out/sweeps/base.json" in first
    assert [Path(second[0]).name, *second[1:]] == ["compare.py", "search", "out/sweeps/base.csv"]


def test_options_after_the_name_win(data, tmp_path):
    first, second = called(tmp_path, "width", f"--data={data}", "--learning_rate=0.01", "--seed=7",
                           "--results=out/my own.csv")
    runs = configs(*[word for word in first[1:] if not word.startswith("--results")])
    assert {(config.learning_rate, config.seed) for config in runs} == {(0.01, 7)}
    assert second[1] == "out/my own.csv"


def test_dry_judges_nothing(tmp_path):
    assert len(called(tmp_path, "laptop", "--dry")) == 1


def test_sh_is_as_good_as_bash(tmp_path):
    assert len(called(tmp_path, "laptop", shell="sh")) == 2


@pytest.mark.parametrize("argv", [[], ["all"], ["--help"]])
def test_without_an_experiment_sweep_sh_lists_them(argv, tmp_path):
    done = called(tmp_path, *argv)
    assert done.returncode == 2
    assert "./sweep.sh base" in done.stderr
