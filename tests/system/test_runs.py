"""Runs are forks of one process that has done the imports; their cells run without a kernel."""
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import nbformat
import psutil
import pytest

from calib_prune.core import CalibPruneError
from calib_prune.study.plan import Job, Study
from calib_prune.study.runs import run_job, start_method

FACTS = """
import json, os, sys
before = "transformers.models.llama.modeling_llama" in sys.modules
import numpy, torch
from calib_prune.kernels.compiled import threads
torch.ones(999, 999) @ torch.ones(999, 999)  # hangs if the parent of the fork computed
chance = [numpy.random.rand(), torch.rand(1).item()]
facts = [before, [name, number], threads(), os.environ["OMP_NUM_THREADS"],
         os.environ.get("CALIB_PRUNE_PROGRESS"), os.getppid(), chance]
print(json.dumps(facts))
"""
DISPLAYS = """
import sys, pandas as pd
from IPython.display import Markdown, display
from matplotlib import pyplot as plt
print("one"); display(Markdown("**two**")); print("three"); print("four", file=sys.stderr)
plt.plot([1, 2])
pd.DataFrame(dict(x=[1]))
"""
CPU = Study(dict(device="cpu"), "", {})
WAITS = """
import os, subprocess, time
child = subprocess.Popen(["sleep", "99"], start_new_session=True)
with open("waits", "w") as note: note.write(f"{os.getpid()} {child.pid}")
time.sleep(99)
"""


def run_cells(*sources, threads=1, study=CPU, **more):
    "Run cells as a study's run in this folder; the executed cells."
    cells = [*map(nbformat.v4.new_code_cell, ("name, number = '', 0", *sources))]
    cells[0].metadata.tags = ["parameters"]
    spec = dict(name="python3", display_name="python3", language="python")
    book = nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=spec))
    nbformat.write(book, "nbs/paper/book.ipynb")
    job = Job("a_run", "book", dict(name=Path("1e3"), number=2), [], [], log="done.ipynb", **more)
    try: run_job(job, threads, study)
    finally: done = nbformat.read("done.ipynb", 4).cells
    return done


@pytest.fixture
def study(tmp_path, monkeypatch):
    "`run_cells`, in a folder of the test's own."
    monkeypatch.chdir(tmp_path)
    Path("nbs/paper").mkdir(parents=True)
    return run_cells


@pytest.mark.skipif(sys.platform != "linux", reason="runs are forks on Linux")
def test_a_run_is_a_fork_with_its_own_threads_and_environment(study):
    # a process has one fork server, and another test's server has other imports
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        runs = [fresh.submit(study, FACTS, threads=o, progress=p).result()
                for o, p in ((1, ""), (2, "file"))]
        asked_by = fresh.submit(os.getpid).result()
    found = [json.loads(o[-1].outputs[0].text) for o in runs]
    cores = len(os.sched_getaffinity(0))
    assert found[0][:5] == [True, ["1e3", 2], 1, "1", None]
    assert found[1][:5] == [True, ["1e3", 2], min(2, cores), "2", "file"]
    assert found[0][5] == found[1][5] != asked_by, "one process has done the imports for both"
    assert len({*found[0][6], *found[1][6]}) == 4, "each run draws its own random numbers"


def wait_for(what, seconds=120):
    limit = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.1)


def running(number):
    try: return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess: return False


def test_outputs_are_stored_in_order(study):
    outputs = study(DISPLAYS)[-1].outputs
    text = [o.get("text") or o.data.get("text/markdown") for o in outputs[:4]]
    assert text == ["one\n", "**two**", "three\n", "four\n"]
    assert outputs[4].output_type == "execute_result" and "text/html" in outputs[4].data
    assert "image/png" in outputs[5].data


def test_the_first_error_ends_a_run_and_is_the_last_line_of_its_log(study):
    with pytest.raises(CalibPruneError, match="a_run ended with status 1"):
        study("1 / 0", "print('never')")
    cells = nbformat.read("done.ipynb", 4).cells
    errors = [o.ename for c in cells for o in c.get("outputs", []) if o.output_type == "error"]
    assert errors == ["ZeroDivisionError"] and not cells[-1].outputs
    assert Path("done.log").read_text().strip().endswith("ZeroDivisionError: division by zero")


def test_a_killed_run_is_an_error(study):
    with pytest.raises(CalibPruneError, match="a_run ended with status -9"):
        study("import os; os.kill(os.getpid(), 9)")


@pytest.mark.parametrize("where", [Study(dict(device="cuda:1"), "", {}),
                                   replace(CPU, cluster=True)], ids=["GPU", "cluster"])
def test_runs_on_a_gpu_or_a_cluster_do_their_own_imports(study, where):
    assert start_method(where).get_start_method() == "spawn"
    assert json.loads(study(FACTS, study=where)[-1].outputs[0].text)[:3] == [False, ["1e3", 2], 1]


@pytest.mark.skipif(sys.platform != "linux", reason="runs are forks on Linux")
def test_a_run_and_its_children_end_with_the_process_that_started_it(study):
    study()
    book = nbformat.read("nbs/paper/book.ipynb", 4)
    book.cells.append(nbformat.v4.new_code_cell(WAITS))
    nbformat.write(book, "nbs/paper/book.ipynb")
    code = ("from calib_prune.study.plan import Job, Study\n"
            "from calib_prune.study.runs import run_job\n"
            "job = Job('a', 'book', {}, [], [], log='done.ipynb')\n"
            "run_job(job, 1, Study(dict(device='cpu'), '', {}))")
    process, note = subprocess.Popen([sys.executable, "-c", code]), Path("waits")
    wait_for(lambda: note.is_file() and len(note.read_text().split()) == 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run, child = map(int, note.read_text().split())
    wait_for(lambda: not running(run) and not running(child))
