"""The study from preset to figure, through Snakemake and papermill, on a tiny model: reuse,
failure, interruption."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time

import nbformat
import pandas as pd
import psutil
import pytest
import yaml

from calib_prune.model.loading import save_model
from calib_prune.model.tiny import tiny_llama, tiny_tokenizer
from tests import processes
from tests.processes import finish
from tests.tiny_study import tiny_study

pytestmark = pytest.mark.real  # scores on the fetched benchmarks


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkout")
    save_model(tiny_llama(max_position_embeddings=2048), tiny_tokenizer(), root / "tiny", {})
    (root / "a.txt").write_text(
        "".join(f"Line {i}: {i} times {i} is {i * i}.\n" for i in range(500))
    )
    scoring = dict(tasks="jeopardy,piqa,mbpp,gsm8k", limit=8)
    tiny_study(root, root / "tiny", dict(own=str(root / "a.txt"), c4="c4"), 4, 64, **scoring)
    return root


def start(root, *more, **env):
    # One core: what gets the whole machine, such as a text to write, would have its threads wait
    # for each other beside another test.
    words = ("reproduce", "--preset", "tiny.yaml", "--jobs", "1", *more)
    return processes.start(*words, cwd=root, session=True, PYTHONPATH=str(root), **env)


def reproduce(root, *more, code=0):
    done = finish(start(root, *more), code)
    return done.stdout, done.stderr


def cells(root):
    return {p.stem: json.loads(p.read_text()) for p in (root / "results/tiny").glob("*.json")}


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)  # everything at once, as a power cut would
    process.wait()


def comparable(found):
    """What a cell says that must not change from run to run: everything but what was measured of
    the run itself."""
    return {
        k: ({f: o for f, o in v["record"].items() if f != "peak_gib"}, v["rows"])
        for k, v in found.items()
    }


def test_finished_then_reused_then_tables_alone(checkout):
    out, err = reproduce(checkout)
    done = cells(checkout)
    assert set(done) == {"dense", "floor", "own-wanda-2of4-n4-s0", "c4-wanda-2of4-n4-s0"}
    assert (
        "Retention, % of the dense model's score" in out and "figures/tiny" in out and "4/4" in err
    )
    assert (checkout / "figures/tiny/F1-retention.png").stat().st_size > 10_000
    table = pd.read_csv(checkout / "figures/tiny/T2-retention.csv")
    assert set(table["strategy"]) == {"dense", "floor", "own", "c4"} and len(table) == 4 * 7
    assert ((table["ci_low"] <= table["value"]) & (table["value"] <= table["ci_high"])).all()

    times = {p: p.stat().st_mtime_ns for p in (checkout / "results/tiny").glob("*.json")}
    reproduce(checkout)
    assert times == {p: p.stat().st_mtime_ns for p in times}, "a second run reuses what is done"

    # A fresh clone: rows with new file times, no workflow memory, no figures. Nothing is run again,
    # and tables come out the same.
    before = {p.name: p.read_bytes() for p in (checkout / "figures/tiny").glob("*.csv")}
    for waste in (".snakemake", "figures/tiny", "results/tiny/.keys", "results/tiny/notebooks"):
        shutil.rmtree(checkout / waste)
    for p in (checkout / "results/tiny").glob("*.json"): os.utime(p)
    times = {p: p.stat().st_mtime_ns for p in times}
    _, err = reproduce(checkout, "--tables-only")
    assert {
        p.name: p.read_bytes() for p in (checkout / "figures/tiny").glob("*.csv")
    } == before and "4/4" in err
    listed, _ = reproduce(checkout, "--dry-run", "--verbose")
    assert "cell_" not in listed
    reproduce(checkout)
    assert times == {p: p.stat().st_mtime_ns for p in times}, "keys, not file times, decide"

    preset = yaml.safe_load((checkout / "tiny.yaml").read_text())
    (checkout / "other.yaml").write_text(
        yaml.safe_dump(preset | dict(pruning=preset["pruning"] | dict(batch_tokens=2048)))
    )
    listed, _ = reproduce(checkout, "--dry-run", "--verbose", "--preset", "other.yaml")
    assert (
        "rule cell_c4" in listed and "rule cell_own" in listed and "rule cell_dense" not in listed
    ), "other settings, other results"
    assert "pruning.batch_tokens: 4096 → 2048" in " ".join(listed.split()), "and why"

    (checkout / "results/tiny/c4-wanda-2of4-n4-s0.json").unlink()
    _, err = reproduce(checkout, "--tables-only")
    assert "3/4" in err and "4/4" not in err, "tables of part of a study say so"

    _, err = reproduce(checkout, "--", "results/tiny/dense.json", code=1)
    assert "Finished already: results/tiny/dense.json." in " ".join(err.split())
    reproduce(checkout, "--", "results/tiny/dense.json", "results/tiny/c4-wanda-2of4-n4-s0.json")
    assert set(cells(checkout)) == set(done), "what is finished may be named beside what is left"


def test_no_finished_run_keeps_waking_the_scheduler(checkout):
    """Snakemake's limit on jobs per second starts a timer per finished job that never ends: see the
    Snakefile."""
    from calib_prune.cli.reproduce import snakemake_command
    reproduce(checkout)
    spy = (
        "from snakemake.scheduling.job_scheduler import JobScheduler as J;"
        " J._schedule_reevalutation\nJ._schedule_reevalutation = lambda *_: open('woken',"
        " 'a').write('x')\nfrom snakemake.cli import main; main()"
    )
    def wakes(snakefile):
        (checkout / "woken").unlink(missing_ok=True)
        command = snakemake_command(checkout / "tiny.yaml", 1, True, False)[3:]
        command[command.index("Snakefile")] = snakefile
        processes.run(*command, program=spy, cwd=checkout, PYTHONPATH=str(checkout))
        return (checkout / "woken").is_file()
    assert not wakes("Snakefile")
    (checkout / "Limited").write_text((checkout / "Snakefile").read_text().replace(
        "workflow.scheduler.job_rate_limiter = None", "pass"))
    assert wakes("Limited")


def test_power_cuts_change_nothing(checkout):
    shutil.rmtree(checkout / "results/tiny", ignore_errors=True)
    reproduce(checkout, "--jobs", "2", "--", "rows")
    undisturbed = comparable(cells(checkout))
    assert len(undisturbed) == 4
    assert {o["threads"] for o, _ in undisturbed.values()} == {
        1
    }, "two cells side by side, a core each"
    shutil.rmtree(checkout / "results/tiny")
    rng = random.Random(0)
    for _ in range(5):
        process = start(checkout, "--", "rows")
        try: process.communicate(timeout=rng.uniform(3, 12))
        except subprocess.TimeoutExpired: kill(process)
        # it had finished: begin again, to be cut off again
        else: shutil.rmtree(checkout / "results/tiny")
        now = comparable(cells(checkout))
        assert now == {k: undisturbed[k] for k in now}
    reproduce(checkout, "--", "rows")
    assert comparable(cells(checkout)) == undisturbed


def test_two_runs_at_once_do_not_meet(checkout):
    shutil.rmtree(checkout / "results/tiny", ignore_errors=True)
    first = start(checkout, "--", "rows")
    while not (checkout / "results/tiny/snakemake.log").is_file():
        assert first.poll() is None, first.communicate()
        time.sleep(0.1)
    _, err = reproduce(checkout, "--", "rows", code=1)
    assert "Another run is working on" in err
    finish(first)
    assert len(cells(checkout)) == 4


def test_a_failing_model_does_not_stop_the_others(checkout):
    shutil.rmtree(checkout / "results/tiny", ignore_errors=True)
    hidden = checkout / "a.txt"
    content = hidden.read_text()
    hidden.write_text("too short")
    try:
        _, err = reproduce(checkout, code=1)
        assert "own-wanda-2of4-n4-s0" in err and "4 windows of 64 tokens need 256" in err
        assert set(cells(checkout)) == {"dense", "floor", "c4-wanda-2of4-n4-s0"}
        failed = nbformat.read(checkout / "results/tiny/notebooks/own-wanda-2of4-n4-s0.ipynb", 4)
        assert any(o.output_type == "error" for c in failed.cells if c.cell_type == "code"
                   for o in c.outputs)
    finally: hidden.write_text(content)


def test_dry_run_only_lists_and_names_jobs_if_asked(checkout):
    shutil.rmtree(checkout / "results/tiny", ignore_errors=True)
    out, _ = reproduce(checkout, "--dry-run")
    assert re.search(r"hours\s+memory\s+disk\s+device", out) and "rule cell_dense" not in out
    out, _ = reproduce(checkout, "--dry-run", "--verbose")
    assert "rule cell_dense" in out and not (checkout / "results/tiny/dense.json").exists()


def alive(mark):
    "The processes that inherited a variable: whatever sessions and groups they are in."
    def has(process):
        try:
            return process.environ().get(
                "STARTED_BY_TEST") == mark and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error: return False
    return [o for o in psutil.process_iter() if has(o)]


def wait_for(what, seconds=500):
    limit = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.05)


@pytest.mark.parametrize("numbers, when", [
    ([signal.SIGINT], "notebooks/dense.ipynb"),
    ([signal.SIGINT] * 3, "notebooks/dense.ipynb"),
    ([signal.SIGTERM], "snakemake.log"),
    ([signal.SIGKILL], "snakemake.log"),
    ([signal.SIGKILL], "notebooks/dense.ipynb")],
    ids=["interrupted", "thrice", "terminated", "killed early", "killed"])
def test_nothing_outlives_a_stopped_study(checkout, numbers, when):
    shutil.rmtree(checkout / "results/tiny", ignore_errors=True)
    mark = f"{os.getpid()} {time.monotonic_ns()}"
    process = start(checkout, "--", "rows", STARTED_BY_TEST=mark)
    wait_for(lambda: (checkout / "results/tiny" / when).is_file() or process.poll() is not None)
    wait_for(lambda: len(alive(mark)) > 2)
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.6)
    # it takes five seconds to clean up, and the machine may be busy
    wait_for(lambda: {o.pid for o in alive(mark)} <= {process.pid}, 120)
    out, err = process.communicate()
    assert "Traceback" not in out + err
    assert process.returncode == (-9 if numbers[0] == signal.SIGKILL else 128 + numbers[0]), (
        out + err
    )
    if numbers[0] != signal.SIGKILL:
        assert (
            "0 of 4 models are finished and kept. To go on: calib-prune reproduce --preset"
            " tiny.yaml --jobs 1 -- rows"
            in " ".join(err.split())
        )


def changed(checkout, file, **changes):
    "Another preset of the checkout."
    preset = yaml.safe_load((checkout / "tiny.yaml").read_text())
    path = checkout / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(preset | changes))
    return str(path)


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="needs a machine without a GPU")
def test_a_missing_device_is_said_before_the_first_job(checkout):
    path = changed(checkout, "cuda.yaml", name="cuda", device="cuda")
    _, err = reproduce(checkout, "--preset", path, code=1)
    assert (
        "cuda.yaml says `device: cuda`, but torch" in err
        and "finds no GPU here" in err
        and "--profile" in err
    )
    assert not (checkout / "results/cuda").exists(), "no job began"
    out, err = reproduce(checkout, "--preset", path, "--dry-run", "--verbose")
    assert (
        "rule cell_dense" in out
        and "This machine cannot run it" in err
        and "says `device: cuda`" in err
    )


def test_a_study_whose_first_jobs_fail_alike_ends_with_their_error(checkout):
    broken = shutil.copytree(checkout / "tiny", checkout / "broken", dirs_exist_ok=True)
    (broken / "model.safetensors").write_bytes(b"no weights")
    block = yaml.safe_load((checkout / "tiny.yaml").read_text())["grid"][0]
    path = changed(
        checkout,
        "broken.yaml",
        name="broken",
        model=str(broken),
        grid=[block | dict(seeds=list(range(6)))],
    )
    _, err = reproduce(checkout, "--preset", path, "--", "rows", code=1)
    assert (
        "The first 3 runs failed with the same error, so the study was stopped" in err
        and err.count("Cannot load") == 1
    )
    assert "broken/notebooks/dense.ipynb" in err and "broken/snakemake.log" in err
    tried = list((checkout / "results/broken/notebooks").glob("*.ipynb"))
    assert 3 <= len(tried) < 14, "of 14 models"
    assert "models finished, 3 failed" in " ".join(err.split()), "off a terminal too"


def test_a_preset_at_an_odd_path_works(checkout):
    path = changed(checkout, "odd {x}/a {b} 'c' \"d\" #e $HOME;&.yaml", name="odd")
    reproduce(checkout, "--preset", path, "--", "results/odd/dense.json")
    assert (checkout / "results/odd/dense.json").is_file()
