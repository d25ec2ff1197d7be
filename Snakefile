# The study as a graph of papermill runs: cells → rows → table and figure.
#   snakemake --cores 2 --configfile presets/smoke.yaml
# `calib-prune reproduce --preset smoke` wraps this with progress bars and a lock.
import sys
from calib_prune.core import content_hash
from calib_prune.study import cells

NAME, PRESET = config["name"], workflow.configfiles[0]
RESULTS, FIGURES = f"results/{NAME}", f"figures/{NAME}"
CELLS = {c.name: c for c in cells(config)}
PAPERMILL = f"{sys.executable} -m papermill --no-progress-bar"
# What a cell's numbers depend on; a package imported inside a notebook is invisible to Snakemake.
MODULES = [f"calib_prune/{m}.py" for m in ("models", "sources", "calibration", "masks", "hessian", "sparsegpt", "wanda", "pruning",
                                           "tasks", "evaluation")]


rule all:
    input:
        f"{FIGURES}/retention.csv",


rule cell:
    input:
        notebook="nbs/paper/prune_and_score.ipynb",
        modules=MODULES,
    output:
        f"{RESULTS}/{{cell}}.json",
    log:
        # A failed job's outputs are deleted, its logs are kept: the notebook that failed can be read.
        notebook=f"{RESULTS}/notebooks/{{cell}}.ipynb",
        text=f"{RESULTS}/notebooks/{{cell}}.log",
    params:
        about=lambda w: content_hash({k: v for k, v in config.items() if k not in ("strategies", "methods", "sparsities", "seeds")}),
        cell=lambda w: repr(CELLS[w.cell]),
    wildcard_constraints:
        cell="|".join(CELLS),
    threads: workflow.cores
    shell:
        "CALIB_PRUNE_PROGRESS={RESULTS}/.progress/{wildcards.cell}.json {PAPERMILL} {input.notebook} {log.notebook} "
        "-r preset {PRESET} -r cell {wildcards.cell} -r results {RESULTS} > {log.text} 2>&1"


rule summary:
    input:
        notebook="nbs/paper/summary.ipynb",
        cells=[f"{RESULTS}/{name}.json" for name in CELLS],
    output:
        f"{FIGURES}/retention.csv",
    log:
        notebook=f"{RESULTS}/notebooks/summary.ipynb",
        text=f"{RESULTS}/notebooks/summary.log",
    shell:
        "{PAPERMILL} {input.notebook} {log.notebook} "
        "-r preset {PRESET} -r results {RESULTS} -r figures {FIGURES} > {log.text} 2>&1"
