# The study as a graph of papermill runs: cells → rows → table and figure.
#   snakemake --cores 2 --configfile presets/smoke.yaml
# `calib-prune reproduce --preset smoke` wraps this with progress bars and a lock.
import re
import shlex
import sys

from calib_prune.study import cell_files, cells, settings_hash

NAME, PRESET = config["name"], workflow.configfiles[0]
RESULTS, FIGURES = f"results/{NAME}", f"figures/{NAME}"
CELLS = {c.name: c for c in cells(config)}
PAPERMILL = f"{shlex.quote(sys.executable)} -m papermill --no-progress-bar"
# What a cell's numbers depend on; a package imported inside a notebook is invisible to Snakemake.
MODULES = [f"calib_prune/{m}.py" for m in ("core", "fetch", "models", "sources", "calibration", "hessian", "masks", "sparsegpt",
                                           "wanda", "pruning", "tasks", "sandbox", "jail", "evaluation", "study")]
SUMMARY = [f"{FIGURES}/{name}" for name in ("retention.csv", "retention.md", "retention.tex", "retention.pdf", "retention.png",
                                            "differences.csv", "differences.md", "differences.tex")]


rule all:
    input:
        SUMMARY,


rule cell:
    input:
        notebook="nbs/paper/prune_and_score.ipynb",
        modules=MODULES,
        files=lambda w: cell_files(config, CELLS[w.cell]),
    output:
        f"{RESULTS}/{{cell}}.json",
    log:
        # A failed job's outputs are deleted, its logs are kept: the notebook that failed can be read.
        notebook=f"{RESULTS}/notebooks/{{cell}}.ipynb",
        text=f"{RESULTS}/notebooks/{{cell}}.log",
    params:
        settings=settings_hash(config),
        cell=lambda w: repr(CELLS[w.cell]),
    wildcard_constraints:
        cell="|".join(map(re.escape, CELLS)),
    threads: workflow.cores
    shell:
        "CALIB_PRUNE_PROGRESS={RESULTS}/.progress/{wildcards.cell}.json {PAPERMILL} {input.notebook} {log.notebook} "
        "-r preset {PRESET:q} -r cell {wildcards.cell} -r results {RESULTS} > {log.text} 2>&1"


rule summary:
    input:
        notebook="nbs/paper/summary.ipynb",
        modules=[f"calib_prune/{m}.py" for m in ("tables", "plots")],
        cells=[f"{RESULTS}/{name}.json" for name in CELLS],
    output:
        SUMMARY,
    log:
        notebook=f"{RESULTS}/notebooks/summary.ipynb",
        text=f"{RESULTS}/notebooks/summary.log",
    shell:
        "{PAPERMILL} {input.notebook} {log.notebook} "
        "-r preset {PRESET:q} -r results {RESULTS} -r figures {FIGURES} > {log.text} 2>&1"
