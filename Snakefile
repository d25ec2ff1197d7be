# A study as a graph of papermill runs: text → models → rows; rows, metrics, audits → tables and figures.
#   snakemake --cores 2 --configfile presets/smoke.yaml --rerun-triggers mtime --force-use-threads
# `calib-prune reproduce --preset smoke` wraps this with progress bars and a lock. Which runs there are: nbs/study/10_plan.
from calib_prune.study.plan import plan, planned_files, results_of, study_of, write_stamps
from calib_prune.study.presets import load_preset
from calib_prune.study.runs import begin_imports, run_job

CORES = 1 if config.get("cluster") else workflow.cores  # a cluster has no number of its own
said = {o: bool(config.get(o)) for o in ("tables_only", "again", "cluster")}
study = study_of(load_preset(workflow.configfiles[0]), workflow.configfiles[0], CORES, **said, gpus=int(config.get("gpus", 1)))
write_stamps(study)
rows = results_of(study)


onstart:
    begin_imports(study)
    # Snakemake's limit on jobs per second starts a timer for each finished job, and each of them wakes the scheduler every second from
    # then on (its pull request 3744): a quarter of a core after 50 jobs, and growing. Our runs take minutes, so no limit is needed.
    workflow.scheduler.job_rate_limiter = None


rule all:
    input:
        planned_files(study),


rule rows:
    input:
        rows["models"],
        rows["ablations"],


# A rule for each run, because a priority belongs to a rule. A failed run's outputs are deleted, its logs are kept: the notebook that
# failed can be read.
for job in plan(study):

    rule:
        name:
            job.rule
        input:
            job.inputs,
            [ancient(o) for o in job.unchanged],
        output:
            job.outputs,
        log:
            notebook=job.log,
            text=job.log.removesuffix("ipynb") + "log",
        params:
            job=lambda _, job=job: job,  # `run` begins after the loop
        priority: job.priority
        retries: job.retries
        threads: job.cores or CORES  # Snakemake lets a run's libraries use this many
        resources:
            **job.needs,
        run:
            run_job(params.job, threads, study)
