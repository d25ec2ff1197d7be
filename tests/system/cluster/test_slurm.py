"""A study on a real Slurm of one node: rows that ran there, and what can happen to a cluster in the
middle of a cell. See `make test-slurm`."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from calib_prune.study.presets import load_preset
from tests import ROOT

BIN = Path(sys.executable).parent
CELL = "math-sparsegpt-0.6-n8-s0"


def slurm(*words, check=True):
    "A client's output; clients wait for ever where the controller is lost."
    return subprocess.run(
        ["timeout", "20", *words], capture_output=True, text=True, check=check
    ).stdout.strip()


def jobs():
    "Queued and running jobs: id → state."
    return dict(o.split() for o in slurm("squeue", "-h", "-o", "%i %T", check=False).splitlines())


def wait(what, until, seconds=600):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := until(): return found
        time.sleep(0.5)
    pytest.fail(f"waited {seconds} s for {what}; queue: {jobs()}")


@pytest.fixture(scope="session", autouse=True)
def cluster():
    subprocess.run(["bash", ROOT / "scripts/slurm.sh", "start"], check=True)
    yield
    subprocess.run(["bash", ROOT / "scripts/slurm.sh", "stop"], check=True)


@pytest.fixture
def study(tmp_path):
    "Two models of the default model, few windows, few items."
    subprocess.run(
        [BIN / "calib-prune", "init", tmp_path / "s"], check=True, stdout=subprocess.DEVNULL
    )
    root = tmp_path / "s"
    preset = load_preset(root / "presets/smoke.yaml")
    preset |= dict(
        name="small",
        strategies=dict(c4="c4", math="math"),
        calibration=dict(windows=8, length=256),
        tables=["main"],
    )
    preset["scoring"] |= dict(
        tasks=["jeopardy", "piqa", "mbpp", "gsm8k"], limit=dict(choice=8, bpb=4)
    )
    preset["heldout"] |= dict(documents=1, window=128)
    preset["hardware"] |= dict(cell_gib=1.2)
    preset["grid"] = [
        dict(strategies="all",
             methods=["sparsegpt"],
             sparsities=[0.6],
             seeds=[0],
             windows=["default"])]
    (root / "presets/small.yaml").write_text(yaml.safe_dump(preset))
    profile = root / "profiles/slurm/config.yaml"
    text = re.sub(r"(status-checks:) \d+", r"\1 2", profile.read_text())
    profile.write_text(
        re.sub(r"(latency-wait:) \d+", r"\1 10", text).replace(
            "# slurm_partition: main", "slurm_partition: main"
        )
    )
    yield root
    slurm("scancel", "--user", "root", check=False)
    wait("an empty queue", lambda: not jobs(), 60)


def start(root, *more):
    command = [
        BIN / "calib-prune", "reproduce", "--preset", "presets/small.yaml", "--profile", "slurm",
        *more]
    return subprocess.Popen(
        command,
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def only(root, *strategies):
    "Keep some strategies of the preset."
    path = root / "presets/small.yaml"
    preset = yaml.safe_load(path.read_text())
    preset["strategies"] = {k: preset["strategies"][k] for k in strategies}
    path.write_text(yaml.safe_dump(preset))


def rows(root):
    return {
        o.stem: json.loads(o.read_text())["record"] for o in (root / "results/small").glob("*.json")
    }


def layers(root, cell=CELL):
    return {
        o.name: o.stat().st_mtime_ns
        for o in (root / "results/small/.checkpoints" / cell).glob("*.safetensors")
    }


def job_of(root, cell=CELL):
    "The job that runs a cell, from its log."
    rule = re.sub(r"\W", "_", f"rule_cell_{cell}")
    found = re.search(rf"{rule}/(\d+)\.log", (root / "results/small/snakemake.log").read_text())
    return found and found[1]


def finished(process, code=0, seconds=1200):
    out = process.communicate(timeout=seconds)[0]
    assert process.returncode == code, out
    return out


def pruned_layers(root, n):
    return lambda: len(layers(root)) >= n and layers(root)


def test_a_study_runs_in_the_cluster(study):
    finished(start(study))
    found = rows(study)
    assert (
        set(found) == {"dense", "floor", "c4-sparsegpt-0.6-n8-s0", CELL}
        and (study / "figures/small/T2-retention.csv").is_file()
    )
    for name, record in found.items():
        said = slurm("scontrol", "show", "job", record["slurm_job_id"])
        assert "JobState=COMPLETED" in said and "JobName=calib-prune" in said, name
    assert len({o["slurm_job_id"] for o in found.values()}) == 4
    asked = slurm("scontrol", "show", "job", found[CELL]["slurm_job_id"])
    assert re.search(r"mem=(1536M|1.50?G)", asked) and re.search(
        r"TimeLimit=00:1\d", asked
    ), "memory and time come from the estimate"
    assert not (study / "results/small/.checkpoints" / CELL).exists() or not layers(
        study
    ), "nothing is left of the checkpoint"


def test_a_requeued_cell_goes_on_at_its_layer(study):
    only(study, "math")
    process = start(study)
    before = wait("layers", pruned_layers(study, 4))
    job = job_of(study)
    slurm("scontrol", "requeue", job)
    wait(
        "the job to start again",
        lambda: "Restarts=1" in slurm("scontrol", "show", "job", job)
        and jobs().get(job) == "RUNNING",
    )
    after = wait("more layers", pruned_layers(study, len(before) + 2))
    assert {k: after[k] for k in before} == before, "finished layers were not pruned again"
    finished(process)
    record = rows(study)[CELL]
    assert record["slurm_job_id"] == job and record["restored_layers"] >= len(before)
    print(
        f"job {job} was requeued after {len(before)} layers; the second run restored"
        f" {record['restored_layers']}"
    )


def test_a_node_that_dies_gives_its_cell_back(study):
    only(study, "math")
    process, node = start(study), slurm("hostname", "-s")
    before = wait("layers", pruned_layers(study, 3))
    job = job_of(study)
    slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    wait("the job to wait", lambda: jobs().get(job) == "PENDING")
    # it may be back by itself
    slurm("scontrol", "update", f"nodename={node}", "state=resume", check=False)
    finished(process)
    assert rows(study)[CELL]["restored_layers"] >= len(before) >= 3


def test_a_lost_controller_is_waited_for(study):
    only(study, "math")
    process = start(study)
    wait("layers", pruned_layers(study, 2))
    subprocess.run(["pkill", "-9", "-x", "slurmctld"], check=True)
    time.sleep(12)
    subprocess.run(["slurmctld"], check=True)
    finished(process)
    assert CELL in rows(study)


def test_an_interrupt_cancels_and_keeps(study):
    process = start(study)
    wait("the first row", lambda: (study / "results/small/dense.json").is_file())
    os.killpg(process.pid, signal.SIGINT)
    out = process.communicate(timeout=120)[0]
    assert (
        process.returncode == 130
        and "models are finished and kept. To go on: calib-prune reproduce" in " ".join(out.split())
    )
    wait("an empty queue", lambda: not jobs(), 60)
    finished(start(study))
    assert set(rows(study)) == {"dense", "floor", "c4-sparsegpt-0.6-n8-s0", CELL}


def test_what_the_cluster_refuses_is_said(study):
    profile = study / "profiles/slurm/config.yaml"
    text = profile.read_text()
    profile.write_text(text.replace("slurm_partition: main", "slurm_partition: nowhere"))
    out = " ".join(finished(start(study), code=1).split())
    assert "invalid partition specified: nowhere" in out, out
    profile.write_text(text)
    preset = yaml.safe_load((study / "presets/small.yaml").read_text())
    preset["hardware"]["cell_gib"] = 4000.0
    (study / "presets/small.yaml").write_text(yaml.safe_dump(preset))
    out = " ".join(finished(start(study), code=1).split())
    assert "Memory specification can not be satisfied" in out, out
    assert not rows(study)


def test_profiles_that_cannot_be_used(study):
    done = subprocess.run(
        [BIN / "calib-prune", "reproduce", "--profile", "slrm"],
        cwd=study,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Did you mean 'slurm'" in done.stderr
    path = os.pathsep.join(
        o for o in os.environ["PATH"].split(os.pathsep) if not shutil.which("sbatch", path=o)
    )
    done = subprocess.run(
        [BIN / "calib-prune", "reproduce", "--profile", "slurm"],
        cwd=study,
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path},
    )
    assert done.returncode == 1 and "has no `sbatch`" in done.stderr
