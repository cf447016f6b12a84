"""What results/sweep.py and sweep.sh promise: `python -m pytest results`."""
import csv
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
import plain
import prepare_data
import sweep
import train
import verdict

torch.set_num_threads(1)
TINY = ["--width=16", "--depth=1", "--head_dim=8", "--seq_len=16", "--steps=3", "--batch_size=4", "--base_width=16",
        "--base_depth=1", "--base_steps=3", "--base_batch_size=4", "--eval_tokens=304", "--device=cpu",
        "--dtype=float32", "--compile=False"]
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
    (folder / "words.txt").write_text(text)
    prepare_data.prepare_text(folder / "words.txt", folder / "tokens", progress=False, overwrite=True)
    return folder / "tokens"


@pytest.fixture(autouse=True)
def forked_workers(monkeypatch):
    """Workers are forked from this process, which has imported PyTorch."""
    monkeypatch.setattr(sweep, "START_METHOD", "fork")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)       # as Python begins; --dry changes it


def run(*argv):
    """results/sweep.py in this process. Returns its exit code, or the sentence with which it leaves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sweep.py", *map(str, argv)])
        try:
            return sweep.main()
        except SystemExit as end:
            return end.code


def tiny(data, table, *argv):
    """A sweep of tiny runs by one worker."""
    return run(f"--results={table}", f"--data={data}", "--workers=1", *TINY, *argv)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def column(path, name):
    return [row[name] for row in read_csv(path)]


def configs(*argv):
    """The Configs of a command line."""
    own, base, groups = sweep.read_command(["--results=x.csv", *map(str, argv)])
    runs, _ = sweep.make_runs(groups, base, own)
    return runs


def settings(runs, *names):
    return [tuple(getattr(config, name) for name in names) for config in runs]


# ------------------------------------------------------------------------------------------------
# Values


VALUES = {      # option: its values, on a base of width 48, 400 steps and η = 2^-5.5
    "--width=24,48": [24, 48],
    "--width=1x,3/2x,4x": [48, 72, 192],
    "--depth=1/3x,3/2x": [1, 6],
    "--steps=1x:16x:4": [400, 1600, 6400],
    "--learning_rate=0.001,0.01": [0.001, 0.01],
    "--learning_rate=2^-7,1e-2": [2 ** -7, 0.01],
    "--learning_rate=2^-8:2^-6:2": [2 ** -8, 2 ** -7, 2 ** -6],
    "--learning_rate=1/2x:2x:2": [0.01104855, 0.0220971, 0.0441942],
    "--schedule=cosine,wsd": ["cosine", "wsd"],
    "--seed=0,1,2": [0, 1, 2],
}


@pytest.mark.parametrize("option", VALUES)
def test_values_are_what_people_write(option, data):
    name = option[2:].split("=")[0]
    runs = configs(LAPTOP, f"--data={data}", option)
    got = [getattr(config, name) for config in runs]
    if isinstance(got[0], float):
        assert got == pytest.approx(VALUES[option], rel=1e-5)
    else:
        assert got == VALUES[option]


REFUSALS = {        # option: what the sentence says
    "--widht=3": "unrecognized", "--width=": "not understood", "--width=a": "not understood",
    "--width=1.5": "not understood", "--width=1/5x": "head_dim=24, not 10", "--learning_rate=2^": "not understood",
    "--learning_rate=0.1:0.01:2": "not understood", "--learning_rate=1:2:1": "not understood",
    "--learning_rate=0,01,x": "not understood", "--learning_rate=2^-8..2^-4": "needs --random=N",
    "--width=50": "width must be a positive multiple of head_dim=24, not 50", "--schedule=step": "impossible run",
    "--parametrization=sp": "there is no parametrization 'sp'", "--data=none": "none is no data folder",
    "--parametrization= ": "impossible run", "--depth=0": "impossible run", "--base=none": "cannot be read",
    "--embedding_std=2": "belongs to the plain GPT", "--micro_batch_size=4,8": "makes no other run",
}


@pytest.mark.parametrize("option", REFUSALS)
def test_what_is_impossible_is_refused_before_the_first_step(option, data, tmp_path):
    sentence = run(f"--results={tmp_path / 'a.csv'}", LAPTOP, f"--data={data}", option)
    assert sentence.startswith("sweep.py: ") and "\n" not in sentence
    assert REFUSALS[option] in sentence
    assert not (tmp_path / "a.csv").exists()


def test_all_combinations_run(data):
    runs = configs(LAPTOP, f"--data={data}", "--width=48,96", "--seed=0,1", "--learning_rate=0.01")
    assert settings(runs, "width", "seed") == [(48, 0), (48, 1), (96, 0), (96, 1)]


def test_groups_have_combinations_of_their_own(data):
    runs = configs(LAPTOP, f"--data={data}", "--seed=0,1", "+", "--width=48", "+", "--width=96", "--depth=2", "++", "--steps=9")
    assert settings(runs, "width", "depth", "seed", "steps") == [
        (48, 4, 0, 9), (48, 4, 1, 9), (96, 2, 0, 9), (96, 2, 1, 9)]


def test_a_run_of_two_groups_is_one_run(data):
    runs = configs(LAPTOP, f"--data={data}", "+", "--width=48,96", "+", "--width=96,192")
    assert settings(runs, "width") == [(48,), (96,), (192,)]


def test_random_settings_fill_their_ranges_the_same_ones_every_time(data):
    command = [LAPTOP, f"--data={data}", "--random=40", "--learning_rate=2^-8..2^-4", "--warmup_steps=0..40"]
    rates = np.log2([config.learning_rate for config in configs(*command)])
    warmups = [config.warmup_steps for config in configs(*command)]
    assert -8 <= rates.min() < -7.8 and -4.2 < rates.max() <= -4
    assert 0 <= min(warmups) < 2 and 38 < max(warmups) <= 40
    quarters, _ = np.histogram(rates, bins=4, range=(-8, -4))
    assert quarters.min() >= 8
    assert rates.tolist() == np.log2([config.learning_rate for config in configs(*command)]).tolist()


def test_the_base_is_in_every_run(data):
    config, = configs(LAPTOP, f"--data={data}", "--width=8x")
    assert (config.width, config.base_width, config.embedding_lr_mult) == (384, 48, 0.25)


def test_columns_of_the_plain_gpt_run_too(data):
    runs = configs(LAPTOP, f"--data={data}", "--parametrization=nugpt,gpt_sp")
    assert [type(config) for config in runs] == [train.Config, plain.Config]


def test_a_base_of_the_plain_gpt_serves_columns_of_both_models(data, tmp_path):
    base = json.loads((ROOT / "results/laptop.json").read_text())
    base["config"].update(parametrization="gpt_sp", embedding_std=2.0)
    path = tmp_path / "plain.json"
    path.write_text(json.dumps(base))
    runs = configs(f"--base={path}", f"--data={data}", "--parametrization=nugpt,gpt_sp")
    assert [type(config) for config in runs] == [train.Config, plain.Config]
    assert runs[1].embedding_std == 2


def test_a_sweep_of_both_models_that_varies_an_option_of_the_plain_gpt_runs_and_continues(data, tmp_path):
    table = tmp_path / "a.csv"
    plain_gpt = ["--parametrization=gpt_sp", "--embedding_std=0.5,2"]
    for seeds in ("--seed=0", "--seed=0,1"):
        assert tiny(data, table, seeds, "+", "--parametrization=nugpt", "+", *plain_gpt) == 0
    rows = zip(column(table, "parametrization"), column(table, "embedding_std"), column(table, "seed"))
    assert sorted(rows) == [("gpt_sp", "0.5", "0"), ("gpt_sp", "0.5", "1"), ("gpt_sp", "2.0", "0"),
                            ("gpt_sp", "2.0", "1"), ("nugpt", "1.0", "0"), ("nugpt", "1.0", "1")]


def test_dry_prints_commands_that_make_the_same_runs(data, capsys):
    command = [LAPTOP, f"--data={data}", "--width=1x,2x", "--learning_rate=2^-7", "--seed=0,1"]
    assert run("--results=x.csv", *command, "--dry") == 0
    lines = capsys.readouterr().out.splitlines()
    printed = []
    for line in lines:
        python, script, *options = shlex.split(line)
        assert (python, script) == ("python", "train.py")
        printed.append(train.load_config(train.parse_args(options)))
    names = ("width", "learning_rate", "seed", "data", "base_width", "steps")
    assert sorted(settings(printed, *names)) == sorted(settings(configs(*command), *names))


# ------------------------------------------------------------------------------------------------
# Runs


def test_a_row_is_the_run_that_train_py_makes(data, tmp_path):
    assert tiny(data, tmp_path / "a.csv", "--learning_rate=0.02") == 0
    row, = read_csv(tmp_path / "a.csv")
    config = train.load_config(train.parse_args([*TINY, f"--data={data}", "--learning_rate=0.02", "--out_dir="]))
    outcome = train.train(config)
    for name in ("val_loss", "train_loss", "status", "parameters", "bits_per_byte", "alpha_A"):
        assert row[name] == str(outcome[name])
    assert (row["learning_rate"], row["width"], row["dtype"]) == ("0.02", "16", "float32")


def test_a_repeated_command_runs_what_is_lacking_and_no_more(data, tmp_path, capsys):
    table = tmp_path / "a.csv"
    assert tiny(data, table, "--learning_rate=0.01,0.02") == 0
    assert tiny(data, table, "--learning_rate=0.01,0.02,0.03", "--workers=1") == 0
    assert "2 of 3 runs are in" in capsys.readouterr().out
    assert sorted(column(table, "learning_rate")) == ["0.01", "0.02", "0.03"]
    before = table.read_bytes()
    assert tiny(data, table, "--learning_rate=0.03,0.02") == 0
    assert table.read_bytes() == before


def begins_with_nan_for_seed_1(config, device, build=train.build):
    model, optimizer = build(config, device)
    if config.seed == 1:
        model.embedding.data.fill_(math.nan)
    return model, optimizer


def test_a_diverged_run_is_a_row(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "build", begins_with_nan_for_seed_1)
    assert tiny(data, tmp_path / "a.csv", "--seed=0,1") == 0
    statuses = dict(zip(column(tmp_path / "a.csv", "seed"), column(tmp_path / "a.csv", "status")))
    assert statuses == {"0": "finished", "1": "diverged"}


def fails_for_seed_1(config, device, build=train.build):
    if config.seed == 1:
        raise RuntimeError("the device is broken")
    return build(config, device)


def test_a_run_that_fails_is_named_and_tried_again_and_stops_no_other(data, tmp_path, monkeypatch, capsys):
    table = tmp_path / "a.csv"
    with monkeypatch.context() as patch:
        patch.setattr(train, "build", fails_for_seed_1)
        assert tiny(data, table, "--seed=0,1,2") == 1
    assert "failed, and tried again by the same command: seed=1: RuntimeError: the device is broken" in (
        capsys.readouterr().err)
    assert sorted(column(table, "seed")) == ["0", "2"]
    assert tiny(data, table, "--seed=0,1,2") == 0
    assert sorted(column(table, "seed")) == ["0", "1", "2"]


def dies_for_seed_1(config, device, build=train.build):
    if config.seed == 1:
        os._exit(9)
    return build(config, device)


def test_a_worker_that_dies_is_said_and_its_run_is_named(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "build", dies_for_seed_1)
    assert tiny(data, tmp_path / "a.csv", "--seed=1,0") == 1
    said = capsys.readouterr().err
    assert "seed=1: its process ended with exit code 9" in said
    assert "seed=0: no worker is left" in said


def test_workers_keep_to_a_shape_and_begin_with_the_largest(data):
    runs = configs(LAPTOP, f"--data={data}", "--width=48,96", "--steps=400,800")

    class Stub:
        config = None
        shape = None

    one = Stub()
    two = Stub()
    first = sweep.next_run(runs, one, [one, two])
    assert (first.width, first.steps) == (96, 800)
    one.config = first
    one.shape = sweep.shape(first)
    runs.remove(first)
    one.config = None
    second = sweep.next_run(runs, one, [one, two])
    assert (second.width, second.steps) == (96, 400)


def kill_one_run_in(data, table, seconds):
    """A sweep of six runs in another process, killed after so many seconds. Returns whether it lived
    until then."""
    child = multiprocessing.get_context("fork").Process(
        target=lambda: tiny(data, table, "--seed=0,1,2,3,4,5", "--steps=30", "--workers=2"))
    child.start()
    child.join(seconds)
    alive = child.is_alive()
    child.kill()
    child.join()
    return alive


def test_killed_at_any_moment_and_repeated_no_run_is_lost_none_twice_and_no_row_half(data, tmp_path):
    table = tmp_path / "a.csv"
    for seconds in (0.2, 0.4, 0.6, 0.8, 1.0):
        kill_one_run_in(data, table, seconds)
        if table.exists():
            assert table.read_bytes()[-1:] in (b"", b"\n")
    for _ in range(100):        # workers of the killed sweeps end by themselves
        if tiny(data, table, "--seed=0,1,2,3,4,5", "--steps=30") == 0:
            break
        time.sleep(0.1)
    assert sorted(column(table, "seed")) == list("012345")


def test_of_two_sweeps_on_one_table_the_second_says_so_and_stops(data, tmp_path):
    with open(tmp_path / "a.csv", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another sweep is writing to" in tiny(data, tmp_path / "a.csv")


# ------------------------------------------------------------------------------------------------
# The table


def as_a_spreadsheet_saves_it(path):
    """A byte order mark, CRLF, TRUE and FALSE, 1E-16, 0.0100, other columns first, no last newline."""
    rows = read_csv(path)
    names = sorted(rows[0])
    lines = [names, *[[row[name] for name in names] for row in rows]]
    text = "\r\n".join(",".join(f'"{cell}"' for cell in line) for line in lines)
    for before, after in {"1e-16": "1E-16", '"0.01"': '"0.0100"', "True": "TRUE", "False": "FALSE"}.items():
        text = text.replace(before, after)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())


def test_a_table_that_a_spreadsheet_saved_is_continued_by_names_of_columns(data, tmp_path):
    table = tmp_path / "a.csv"
    assert tiny(data, table, "--learning_rate=0.01,0.02") == 0
    as_a_spreadsheet_saves_it(table)
    assert tiny(data, table, "--learning_rate=0.01,0.02,0.03") == 0
    runs = verdict.read_results(table)
    assert sorted(run["learning_rate"] for run in runs) == [0.01, 0.02, 0.03]
    assert len({run["data_fingerprint"] for run in runs}) == 1
    assert len(table.read_text().splitlines()) == 4


BAD_TABLES = {      # name: (what is done to a table's text, what the sentence says)
    "renamed column": (lambda text: text.replace("warmup_steps", "Warmup"), "no column warmup_steps"),
    "a word for a number": (lambda text: text.replace(",0.01,", ",fast,"), "line 2"),
    "decimal comma": (lambda text: text.replace(",0.01,", ',"0,01",'), "line 2"),
    "semicolons": (lambda text: text.replace(",", ";"), "no column"),
    "half a row in the middle": (lambda text: text + "16,1\n" + text.splitlines()[1] + "\n", "line 3"),
    "no table": (lambda text: "hello\n", "no column"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_table_that_cannot_be_read_is_refused_before_anything_is_trained(name, data, tmp_path):
    change, words = BAD_TABLES[name]
    table = tmp_path / "a.csv"
    assert tiny(data, table, "--learning_rate=0.01") == 0
    table.write_text(change(table.read_text()))
    before = table.read_bytes()
    sentence = tiny(data, table, "--learning_rate=0.02")
    assert sentence.startswith("sweep.py: ") and words in sentence
    assert table.read_bytes() == before


def test_a_row_without_its_end_which_a_crash_left_goes_away(data, tmp_path):
    table = tmp_path / "a.csv"
    assert tiny(data, table, "--learning_rate=0.01") == 0
    whole = table.read_bytes()
    table.write_bytes(whole + whole.splitlines()[1][:40])
    assert tiny(data, table, "--learning_rate=0.01,0.02") == 0
    assert sorted(column(table, "learning_rate")) == ["0.01", "0.02"]


def test_a_full_disk_leaves_whole_rows_and_the_repeated_command_the_others(data, tmp_path):
    table = tmp_path / "a.csv"
    command = [f"--results={table}", f"--data={data}", "--workers=1", *TINY, "--learning_rate=0.01,0.02,0.03,0.04"]
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
    (tmp_path / "text").mkdir()
    assert tiny(make_data(tmp_path / "text", seed=0), table) == 0
    assert tiny(make_data(tmp_path / "text", seed=1), table) == 0
    assert len(set(column(table, "data_fingerprint"))) == 2


def test_a_folder_spelled_in_another_way_is_the_same_data(data, tmp_path, monkeypatch):
    table = tmp_path / "a.csv"
    assert tiny(data, table) == 0
    monkeypatch.chdir(data)
    assert tiny("./", table) == 0
    moved = shutil.copytree(data, tmp_path / "moved to")
    assert tiny(moved, table) == 0
    assert len(read_csv(table)) == 1


@pytest.mark.parametrize("name", ["my 'R&D' back\\slash", os.fsdecode(b"caf\xe9")])
def test_paths_may_hold_anything(name, data, tmp_path):
    odd = shutil.copytree(data, tmp_path / name)
    table = odd / "a|b.csv"
    assert tiny(odd, table) == 0
    assert tiny(odd, table) == 0
    assert len(verdict.read_results(table)) == 1


# ------------------------------------------------------------------------------------------------
# Tuning a base


def test_finalists_run_with_all_seeds_and_the_best_becomes_a_base(data, tmp_path):
    table = tmp_path / "a.csv"
    base = tmp_path / "base.json"
    command = ["--random=6", "--finalists=2", "--seed=0,1", "--learning_rate=2^-8..2^-3", "--alpha_init=2^-5..2^-2",
               f"--write_base={base}"]
    assert tiny(data, table, *command) == 0
    rows = verdict.read_results(table)
    seeds = [sum(run["seed"] == seed for run in rows) for seed in (0, 1)]
    assert seeds[0] == 6 and 2 <= seeds[1] < 6
    ranked, _ = verdict.rank(rows, ["learning_rate", "alpha_init"])
    config = train.load_config({"base": str(base)})
    assert (config.learning_rate, config.alpha_init) == ranked[0].values
    assert (config.base_width, config.base_steps, config.width) == (16, 3, 16)
    assert json.loads(base.read_text())["data"] == {"tokenizer": "byte"}
    before = table.read_bytes()
    assert tiny(data, table, *command) == 0
    assert table.read_bytes() == before


def test_a_base_that_no_sweep_has_written_is_not_overwritten(data, tmp_path):
    base = shutil.copy(ROOT / "results/laptop.json", tmp_path / "base.json")
    before = Path(base).read_bytes()
    command = ["--random=5", "--finalists=1", "--learning_rate=2^-8..2^-3", f"--write_base={base}"]
    assert "was not written by a sweep" in tiny(data, tmp_path / "a.csv", *command)
    assert Path(base).read_bytes() == before
    assert not (tmp_path / "a.csv").exists()


# ------------------------------------------------------------------------------------------------
# sweep.sh


def called(tmp_path, *argv):
    """The command lines that sweep.sh gives to Python, as lists of words."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done >> called\necho >> called\n')
    fake.chmod(0o755)
    done = subprocess.run(["bash", ROOT / "sweep.sh", *argv], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHON": str(fake)})
    if not (tmp_path / "called").exists():
        return done
    return [block.split("\n") for block in (tmp_path / "called").read_text().strip().split("\n\n")]


SIZES = {       # experiment: (runs of one seed, the largest size as multiples of the base's)
    "laptop": (29, {"width": 3}), "width": (63, {"width": 8}), "depth": (54, {"depth": 8}),
    "steps": (30, {"steps": 16}), "joint": (38, {"width": 2, "steps": 4}), "batch": (18, {"batch_size": 4}),
}


@pytest.mark.parametrize("name", SIZES)
def test_an_experiment_is_these_runs_and_then_the_verdict(name, data, tmp_path):
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


def test_options_after_the_name_win(data, tmp_path):
    first, second = called(tmp_path, "width", f"--data={data}", "--learning_rate=0.01", "--seed=7",
                           "--results=out/my own.csv")
    runs = configs(*[word for word in first[1:] if not word.startswith("--results")])
    assert {(config.learning_rate, config.seed) for config in runs} == {(0.01, 7)}
    assert second[1] == "out/my own.csv"


def test_dry_judges_nothing(tmp_path):
    assert len(called(tmp_path, "laptop", "--dry")) == 1


@pytest.mark.parametrize("argv", [[], ["all"], ["--help"]])
def test_without_an_experiment_sweep_sh_lists_them_and_runs_nothing(argv, tmp_path):
    done = called(tmp_path, *argv)
    assert done.returncode == 2
    assert "./sweep.sh base" in done.stderr
