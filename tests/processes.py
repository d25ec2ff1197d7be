"Processes that tests start, and the command line without one."
import contextlib
import io
import os
import subprocess
import sys

import pytest

from calib_prune.cli.app import main

COMMAND = "from calib_prune.cli.app import main; main()"
LIMIT = 600  # s; more than a slow or busy machine needs: what takes longer hangs


def start(*words, program=COMMAND, python=sys.executable, cwd=None, session=False,
          stdin=subprocess.DEVNULL, **env):
    "Python on a program, by default the command line; a variable that is None is taken away."
    return subprocess.Popen(
        [python, "-c", program, *map(str, words)],
        cwd=cwd,
        env={k: v for k, v in (os.environ | env).items() if v is not None},
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=session,
    )


def finish(process, code=0):
    "What a process said, when it has ended with this code (None: any), and not in a traceback."
    out, err = process.communicate(timeout=LIMIT)
    assert "Traceback" not in err and code in (None, process.returncode), out + err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(*words, code=0, **how): return finish(start(*words, **how), code)


def call(*words, code=0):
    "As `run` of the command line, but in this process, which has imported torch already."
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["calib-prune", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with pytest.raises(SystemExit) as done: main()
    finally:
        sys.argv = before
    said = subprocess.CompletedProcess(words, done.value.code, out.getvalue(), err.getvalue())
    assert code in (None, said.returncode), said.stdout + said.stderr
    return said
