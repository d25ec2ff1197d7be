"""What runs ask of a cluster and of several GPUs; without a cluster and without a GPU."""
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from calib_prune.cli import reproduce as cli
from calib_prune.cli.app import app
from calib_prune.core import CalibPruneError
from calib_prune.pipeline.records import cluster_job, environment
from calib_prune.study import gpus
from calib_prune.study.cost import cell_seconds, requests_of, work
from calib_prune.study.plan import Study, plan
from calib_prune.study.presets import cells, load_preset
from tests import ROOT

pytestmark = pytest.mark.real  # the estimate reads benchmarks


@pytest.fixture(scope="module")
def default(): return load_preset(ROOT / "presets/claims/smollm2-135m.yaml")


@pytest.fixture(scope="module")
def paper(): return load_preset(ROOT / "presets/claims/llama-3.1-8b.yaml")


def study(preset, **how):
    left = dict(
        models={c.name: "new" for c in cells(preset)[:3]},
        texts={},
        metrics={"own text": "new"},
        audits={},
    )
    return Study(preset, "p.yaml", left, **how)


def test_requests_follow_the_estimate(default, paper):
    seconds, asked = cell_seconds(default), requests_of(default)
    assert set(asked) == {*seconds, "text"} and sum(seconds.values()) == pytest.approx(
        work(default).query("what not in ('writing', 'reading')")["seconds"].sum()
    )
    for name, s in seconds.items():
        assert 10 + 3 * s / 60 <= asked[name]["runtime"] < 11 + 3 * s / 60
    assert (
        asked["dense"]["mem_mb"] == round(1.25 * 1024 * default["hardware"]["cell_gib"])
        and "gpu" not in asked["dense"]
    )
    assert all(o["gpu"] == 1 for o in requests_of(paper).values())


def test_on_a_cluster_models_ask_keep_their_layers_and_are_tried_again(paper):
    jobs = {o.rule: o for o in plan(study(paper, cluster=True))}
    models = [o for o in jobs.values() if o.notebook == "prune_and_score"]
    assert len(models) == 3 and all(
        o.retries == 1 and o.cores == 1 and o.needs["gpu"] == 1 for o in models
    )
    assert (
        models[1].parameters["checkpoint"]
        == f"results/claims/llama-3.1-8b/.checkpoints/{models[1].parameters['cell']}"
    )
    assert jobs["own_text"].needs["gpu"] == 1 and not jobs["main"].needs
    here = [o for o in plan(study(paper)) if o.notebook == "prune_and_score"]
    assert all("checkpoint" not in o.parameters and o.retries == 0 for o in here)


def test_as_many_models_at_once_as_gpus(paper):
    cores = lambda **how: [
        o.cores for o in plan(study(paper, cores=16, **how)) if o.notebook == "prune_and_score"
    ][0]
    assert cores() == 16 and cores(gpus=4) == 4 and cores(gpus=32) == 1


def test_the_command_for_clusters_and_gpus(tmp_path):
    path = Path("p.yaml")
    assert "--cores" in cli.snakemake_command(
        path, 3, False, False
    ) and "--config" not in cli.snakemake_command(path, 3, False, False)
    there = cli.snakemake_command(path, 3, False, True, tmp_path, gpus=4)
    assert there[there.index("--profile") +
                 1] == str(tmp_path) and "--cores" not in there and "--resources" not in there
    assert there[3:6] == ["--config", "again=1", "cluster=1"]
    here = cli.snakemake_command(path, 3, False, False, gpus=4)
    assert here[here.index("--resources") + 1] == "gpu=4" and here[3:5] == ["--config", "gpus=4"]
    tables = cli.snakemake_command(path, 1, True, True)
    assert "--forceall" in tables and tables[3:5] == ["--config", "tables_only=1"]
    from snakemake.cli import parse_args
    for command in (here, tables):  # a file at the end is what is made, not a further value
        _, asked = parse_args([*command[3:], "results/x/dense.json"])
        assert list(asked.targets) == ["results/x/dense.json"]


def test_a_model_that_is_made_again_takes_no_option_of_a_study():
    for given in (["--dry-run"], ["--table", "T3"], ["--jobs", "2"], ["--preset", "smoke"],
                  ["--verbose"], ["--", "x.json"]):
        told = CliRunner().invoke(app, ["reproduce", "--from", "record.json", *given])
        assert told.exit_code and f"leave out {[*given, ''][given[0] == '--']}." in str(
            told.exception)
    told = CliRunner().invoke(app, ["reproduce", "--again", "--table", "T3"])
    assert told.exit_code and "leave out one" in str(told.exception)
    told = CliRunner().invoke(app, ["reproduce", "--output", "here"])
    assert told.exit_code and "--from" in f"{told.output}{told.exception}"


def test_a_preset_with_one_gpu_runs_one_model_there():
    assert cli._gpus(dict(device="cuda:1")) == 1 and cli._gpus(dict(device="cpu")) == 0


def test_a_machine_that_binds_no_processes_uses_its_cores(monkeypatch):
    "So it is on macOS."
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    command = cli.snakemake_command(Path("p.yaml"), 0, False, False)
    assert command[command.index("--cores") + 1] == "7"


def test_profiles_are_checked(tmp_path, monkeypatch):
    with pytest.raises(CalibPruneError, match="'slurm'"):
        cli.check_profile("slrm", ROOT)
    monkeypatch.setattr(cli.shutil, "which", lambda *_: None)
    with pytest.raises(CalibPruneError, match="sbatch"): cli.check_profile("slurm", ROOT)
    monkeypatch.setattr(cli, "find_spec", lambda *_: None)
    with pytest.raises(CalibPruneError, match=r"calib-prune\[cluster\]"):
        cli.check_profile("slurm", ROOT)
    (tmp_path / "config.yaml").write_text("executor: local\n")
    assert cli.check_profile(str(tmp_path), ROOT) == tmp_path


def test_what_slurm_refuses_is_reported(tmp_path):
    log = tmp_path / "snakemake.log"
    log.write_text(
        "x\nsbatch: error: invalid partition specified: nowhere\nsbatch: error: invalid partition"
        " specified: nowhere\n"
    )
    assert (
        "The cluster refused a run: invalid partition specified: nowhere. Change the profile"
        in cli.failure_report(log)
    )


def test_rows_name_their_job(monkeypatch):
    for name in ("JOB_ID", "JOB_NODELIST"): monkeypatch.delenv(f"SLURM_{name}", raising=False)
    assert cluster_job() == {} and not [o for o in environment() if o.startswith("slurm")]
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert environment()["slurm_job_id"] == "17" and cluster_job() == dict(slurm_job_id="17")


HOLD = (
    "import sys; from calib_prune.study.gpus import claim; print(claim(['a', 'b'], sys.argv[1]),"
    " flush=True); sys.stdin.read()"
)


def test_a_gpu_is_free_again_when_its_process_is_dead(tmp_path):
    start = lambda: subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    first, second = start(), start()
    try:
        assert {first.stdout.readline().strip(), second.stdout.readline().strip()} == {"0", "1"}
        with pytest.raises(CalibPruneError, match="2 GPUs"):
            gpus.claim(["a", "b"], tmp_path)
        first.kill()
        first.wait()
        assert gpus.claim(["a", "b"], tmp_path) in (0, 1)
    finally:
        for o in (first, second): o.kill()
        gpus._held.close()


def test_only_cuda_on_several_gpus_is_claimed(monkeypatch, tmp_path):
    monkeypatch.setattr(gpus.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        gpus.torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"u{i}")
    )
    monkeypatch.setattr(gpus, "gettempdir", lambda: str(tmp_path))
    assert gpus.claimed_gpu("cpu") == "cpu" and gpus.claimed_gpu("cuda:1") == "cuda:1"
    assert gpus.claimed_gpu("cuda") == "cuda:0" and gpus.claimed_gpu("cuda") == "cuda:1"
    gpus._held.close()
    monkeypatch.setattr(gpus.torch.cuda, "device_count", lambda: 1)
    assert gpus.claimed_gpu("cuda") == "cuda"


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    (log := tmp_path / "snakemake.log").write_text(
        "    log: results/x/notebooks/a.ipynb, results/x/notebooks/a.log (check log file(s) for"
        " error details)\n"
    )
    assert "No space" not in cli.failure_report(log)
    monkeypatch.setattr("shutil.disk_usage", lambda o: type("usage", (), dict(free=1000)))
    assert (
        f"a. Finished files are kept. No space left on the disk of {tmp_path}"
        in cli.failure_report(log)
    )


def test_a_profile_lies_where_the_user_is_and_not_the_study(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.yaml").write_text("executor: local\n")
    monkeypatch.chdir(tmp_path)
    def command(*given): raise CalibPruneError(f"in {given[4]}")
    monkeypatch.setattr(cli, "snakemake_command", command)
    with pytest.raises(CalibPruneError, match=f"in {tmp_path / 'mine'}"):
        cli.reproduce(SimpleNamespace(args=[]), profile="mine")
    assert Path.cwd() == ROOT


@pytest.mark.parametrize("code, said", [("exit('no model')", "no model"), ("", "notes")])
def test_wrong_notes_do_not_hide_why_a_study_failed(tmp_path, code, said):
    def note(): raise CalibPruneError("wrong notes")
    with pytest.raises(CalibPruneError, match=said):
        cli.run_workflow([sys.executable, "-c", code], tmp_path, tmp_path, [], set(), after=note)
