"""
Tests of the laboratory: `python -m pytest results/test_results.py`. Sweeps are synthetic, of known drift and noise.
"""
import contextlib
import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def command(line):
    """Output, error text and exit code of `python LINE`, run from the repository root in this process."""
    argv = shlex.split(line)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", argv)
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as end:       # of a sentence, Python prints it and exits with 1
            code = end.code or 0
            if isinstance(code, str):
                code = print(code, file=err) or 1
    return out.getvalue(), err.getvalue(), code


def quoted():
    """(command, block) for each untagged code block of the notebook and README.md with a `python results/….py …` in the text before it."""
    for path in (ROOT / "README.md", ROOT / "results/README.md"):
        text, *parts = re.split(r"^```(\S*)\n(.*?)^```$", path.read_text(), flags=re.M | re.S)
        for tag, block, following in zip(parts[::3], parts[1::3], parts[2::3]):
            commands = re.findall(r"`python (results/\w+\.py [^`]+)`", text)
            if commands and not tag:
                yield commands[-1], block
            text = following


@pytest.mark.parametrize("line, block", quoted())
def test_quoted_tables_are_what_the_commands_print(line, block):
    out, err, code = command(line)
    assert code == 0, err
    assert "\n" + block in "\n" + out, f"`python {line}` prints\n{out}"
