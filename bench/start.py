"""What a model of a study costs before its work begins: papermill, a kernel, imports, the model;
cold, and in a fork of a process that has done the imports."""
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat

from calib_prune.study.plan import Job, Study
from calib_prune.study.runs import begin_imports, run_job

ROOT = Path(__file__).resolve().parent.parent
BOOK, ROUNDS = "nbs/paper/prune_and_score.ipynb", 5
CPU = Study(dict(device="cpu"), "", {})
LOAD = "model, tokenizer = load_model('smollm2-135m', 'float32', 'cpu')"
NOTES = (
    "import time; began = time.time()",
    "imported = time.time()",
    "[began, imported, time.time()]",
)


def notebook() -> nbformat.NotebookNode:
    "The imports of the notebook that prunes and scores, and the load of a model."
    book = nbformat.read(ROOT / BOOK, 4)
    imports = next(
        o.source for o in book.cells if "from calib_prune.model.loading" in o.source
    )
    cells = [nbformat.v4.new_code_cell(o) for o in (NOTES[0], imports, NOTES[1], LOAD, NOTES[2])]
    spec = dict(name="python3", display_name="python3", language="python")
    return nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=spec))


def run_cold(folder: Path) -> None:
    "papermill with a kernel."
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(folder / "book.ipynb"),
               str(folder / "done.ipynb")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def run_warm(folder: Path) -> None:
    "As a study does."
    book = os.path.relpath(folder / "book", "nbs/paper")
    run_job(Job("start", book, {}, [], [], log=str(folder / "done.ipynb")), 1, CPU)


def once(folder: Path, run: Callable[[Path], None]) -> dict[str, float]:
    "Seconds of one run, by part."
    start = time.time()
    run(folder)
    end, done = time.time(), nbformat.read(folder / "done.ipynb", 4)
    began, imported, loaded = json.loads(done.cells[-1].outputs[0].data["text/plain"])
    return dict(
        total=end - start,
        start=began - start,
        imports=imported - began,
        load=loaded - imported,
        end=end - loaded,
    )


def measure(rounds: int = ROUNDS) -> dict:
    "Cold and warm runs in turn."
    os.chdir(ROOT)
    found: dict[str, list[dict[str, float]]] = dict(cold=[], warm=[])
    with TemporaryDirectory() as d:
        folder = Path(d)
        nbformat.write(notebook(), folder / "book.ipynb")
        begin_imports(CPU)
        first = once(folder, run_warm)  # it waits for the imports
        for _ in range(rounds):
            for name, run in (("cold", run_cold), ("warm", run_warm)):
                found[name].append(once(folder, run))
    middle = {
        k: {part: round(statistics.median(o[part] for o in runs), 2) for part in runs[0]}
        for k, runs in found.items()
    }
    totals = {k: [round(o["total"], 2) for o in runs] for k, runs in found.items()}
    return dict(seconds=middle, totals=totals, first_warm=round(first["total"], 2))


if __name__ == "__main__": print(json.dumps(measure()))
