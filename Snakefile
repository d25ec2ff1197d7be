# The study as a graph of papermill runs: text → metrics, audits; cells → rows; all of these → tables and figures.
#   snakemake --cores 2 --configfile presets/smoke.yaml --rerun-triggers mtime
# `calib-prune reproduce --preset smoke` wraps this with progress bars and a lock.
import re
import shlex
import sys

from calib_prune.core import write_atomic
from calib_prune.study import cells, measured_strategies, mix_of, seeds_of
from pathlib import Path

NAME, PRESET = config["name"], workflow.configfiles[0]
RESULTS, FIGURES = f"results/{NAME}", f"figures/{NAME}"
PAPERMILL = f"{shlex.quote(sys.executable)} -m papermill --no-progress-bar"

GENERATED = f"{RESULTS}/generated"
CELLS = {c.name: c for c in cells(config, ablations=True)}
MAIN = {c.name for c in cells(config)}

# What each notebook of nbs/paper leaves in the figures folder.
TABLES = {"summary": ["retention", "differences"], "sources": ["T1-sources"], "main": ["T2-retention", "T2-differences"],
          "correlations": ["T3-correlations"], "sweep": ["T4-sparsity"], "draws": ["T5-draws", "T5-sizes"],
          "contamination": ["T6-contamination", "T6-retention"], "claims": ["T7-claims"],
          "protocols": ["T8-protocols", "T8-differences", "T8-tuning"], "ablations": ["T9-ablations"]}
PICTURES = {"summary": ["retention"], "main": ["F1-retention", "F6-strategies"], "correlations": ["F2-perplexity", "F3-correlations"],
            "sweep": ["F4-margin"], "draws": ["F5-averaging"],
            "protocols": ["F8-protocols"], "ablations": ["F7-frontier"]}
FILES = {book: [f"{FIGURES}/{stem}.{end}" for stems, ends in ((TABLES[book], ("csv", "md", "tex")), (PICTURES.get(book, []), ("pdf", "png")))
                for stem in stems for end in ends] for book in TABLES}
MEASURED = {"sources", "correlations", "claims"}  # notebooks that read the calibration sets' metrics
ABLATED = {"protocols", "ablations"}  # notebooks that read the cells of the preset's ablations

# File times say nothing in a fresh clone: what is finished is decided by the key in each result (nbs/13a_keys). What is left gets a
# stamp that is newer than the result. With `--config tables_only=1` the results there are taken as they are, and what is missing is
# left out.
TABLES_ONLY = bool(config.get("tables_only"))
LEFT = dict(models={}, texts={}, metrics={}, audits={})
if not TABLES_ONLY:
    from calib_prune.cost import cores_per_cell, memory_gib  # slow imports
    from calib_prune.keys import left_to_do

    LEFT = left_to_do(config, RESULTS, again=bool(config.get("again")))
    CELL_CORES = cores_per_cell(config, workflow.cores, memory_gib())  # Snakemake lets a job's libraries use as many
OWN_TEXT = f"{RESULTS}/metrics/own-text.jsonl"
MADE = {  # kind → name → file
    "models": {k: f"{RESULTS}/{k}.json" for k in LEFT["models"]},
    "texts": {k: k for k in LEFT["texts"]},
    "metrics": {k: OWN_TEXT if k == "own text" else f"{RESULTS}/metrics/{k}.json" for k in LEFT["metrics"]},
    "audits": {k: f"{RESULTS}/{k}.json" for k in LEFT["audits"]},
}


def stamp_of(kind, name):
    return f"{RESULTS}/.keys/{kind}-{Path(name).name}"


for kind, left in LEFT.items():
    for name, why in left.items():
        stamp, made = Path(stamp_of(kind, name)), Path(MADE[kind][name])
        outdated = stamp.is_file() and made.is_file() and stamp.stat().st_mtime <= made.stat().st_mtime
        if outdated or not stamp.is_file() or stamp.read_text() != why:
            write_atomic(stamp, why)

ROWS = {c: f for c in CELLS if (f := f"{RESULTS}/{c}.json") and (not TABLES_ONLY or Path(f).is_file())}
METRICS = [f for k in measured_strategies(config) if (f := f"{RESULTS}/metrics/{k}.json") and (not TABLES_ONLY or Path(f).is_file())]
AUDITS = [*MADE["audits"].values()]


# Rows and metrics are targets themselves: what only leads to tables that are already there, Snakemake would not make again.
rule all:
    input:
        [f for book in config["tables"] for f in FILES[book]],
        [*ROWS.values(), *METRICS, *AUDITS],


rule rows:
    input:
        ROWS.values(),


# Texts are written just before the first cell that reads them: priorities do not pass from a cell to what it needs.
ORDER = {name: 2 * (len(LEFT["models"]) - rank) for rank, name in enumerate(LEFT["models"])}
TEXTS = {}  # file → its priority, whose it is
for name, cell in CELLS.items():
    if cell.mix.startswith(GENERATED):
        TEXTS[cell.mix] = max(TEXTS.get(cell.mix, (0,)), (ORDER.get(name, 0) + 1, cell.strategy, cell.seed))

for text, (rank, strategy, seed) in TEXTS.items():

    rule:
        name:
            "generate_" + re.sub(r"\W", "_", f"{strategy}_s{seed}")
        input:
            [stamp_of("texts", text)] if text in LEFT["texts"] else [],
        output:
            text,
        log:
            notebook=f"{RESULTS}/notebooks/generate-{strategy}-s{seed}.ipynb",
            text=f"{RESULTS}/notebooks/generate-{strategy}-s{seed}.log",
        params:
            strategy=strategy,
            seed=seed,
        priority: rank
        threads: workflow.cores
        shell:
            "{PAPERMILL} nbs/paper/generate.ipynb {log.notebook} -r preset {PRESET:q} -r strategy {params.strategy} "
            "-p seed {params.seed} -r output {output} > {log.text} 2>&1"


def texts_of(mix):
    "The generated texts of a mix. Of an ancient input that is yet to be made, Snakemake would overlook that the job has its own reason to run."
    texts = [o for o in mix.split(",") if o.startswith(GENERATED)]
    return [o if o in LEFT["texts"] else ancient(o) for o in texts]


# One rule a cell, because a priority belongs to a rule: cells run in the order of the preset's grid.
for name in LEFT["models"]:

    rule:
        name:
            "cell_" + re.sub(r"\W", "_", name)
        input:
            stamp_of("models", name),
            texts_of(CELLS[name].mix),
        output:
            f"{RESULTS}/{name}.json",
        log:
            # A failed job's outputs are deleted, its logs are kept: the notebook that failed can be read.
            notebook=f"{RESULTS}/notebooks/{name}.ipynb",
            text=f"{RESULTS}/notebooks/{name}.log",
        params:
            cell=name,
        priority: ORDER[name]
        threads: CELL_CORES
        shell:
            "CALIB_PRUNE_PROGRESS={RESULTS}/.progress/{params.cell}.json {PAPERMILL} nbs/paper/prune_and_score.ipynb {log.notebook} "
            "-r preset {PRESET:q} -r cell {params.cell} -r results {RESULTS} > {log.text} 2>&1"


if "own text" in LEFT["metrics"]:

    rule own_text:
        input:
            stamp_of("metrics", "own text"),
        output:
            OWN_TEXT,
        log:
            notebook=f"{RESULTS}/notebooks/own_text.ipynb",
            text=f"{RESULTS}/notebooks/own_text.log",
        priority: 1000
        threads: workflow.cores
        shell:
            "{PAPERMILL} nbs/paper/own_text.ipynb {log.notebook} -r preset {PRESET:q} -r output {output} > {log.text} 2>&1"


if LEFT["metrics"]:

    rule measure:
        input:
            f"{RESULTS}/.keys/metrics-{{strategy}}",
            OWN_TEXT if "own text" in LEFT["metrics"] else ancient(OWN_TEXT),
            lambda w: [o for seed in seeds_of(config, w.strategy) for o in texts_of(mix_of(config, w.strategy, seed))],
        output:
            f"{RESULTS}/metrics/{{strategy}}.json",
        log:
            notebook=f"{RESULTS}/notebooks/measure-{{strategy}}.ipynb",
            text=f"{RESULTS}/notebooks/measure-{{strategy}}.log",
        wildcard_constraints:
            strategy="|".join(re.escape(k) for k in LEFT["metrics"] if k != "own text"),
        priority: 500
        threads: workflow.cores
        shell:
            "{PAPERMILL} nbs/paper/measure.ipynb {log.notebook} -r preset {PRESET:q} -r strategy {wildcards.strategy} "
            "-r results {RESULTS} > {log.text} 2>&1"


if LEFT["audits"]:

    rule audit:
        input:
            [stamp_of("audits", k) for k in LEFT["audits"]],
            [o for name in MAIN for o in texts_of(CELLS[name].mix)],
        output:
            AUDITS,
        log:
            notebook=f"{RESULTS}/notebooks/audit.ipynb",
            text=f"{RESULTS}/notebooks/audit.log",
        priority: 500
        threads: workflow.cores
        shell:
            "{PAPERMILL} nbs/paper/audit.ipynb {log.notebook} -r preset {PRESET:q} -r results {RESULTS} > {log.text} 2>&1"


for book in config["tables"]:

    rule:
        name:
            book
        input:
            notebook=f"nbs/paper/{book}.ipynb",
            modules=[f"calib_prune/{m}.py" for m in ("analysis", "claims", "contamination", "evaluation", "figures", "metric_rows", "audit_rows", "relations", "oit", "plots", "protocols", "study", "tables", "tuning")],
            rows=[f for c, f in ROWS.items() if c in MAIN or book in ABLATED],
            metrics=METRICS if book in MEASURED else [],
            audits=AUDITS if book == "contamination" else [],
        output:
            FILES[book],
        log:
            notebook=f"{RESULTS}/notebooks/{book}.ipynb",
            text=f"{RESULTS}/notebooks/{book}.log",
        params:
            book=book,
        shell:
            "{PAPERMILL} {input.notebook} {log.notebook} -r preset {PRESET:q} -r results {RESULTS} -r figures {FIGURES} > {log.text} 2>&1"
