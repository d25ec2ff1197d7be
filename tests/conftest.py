import os
import signal
import sys

import pytest

# Tests never reach a hub: what is not local is an error at once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def pytest_configure(config):
    "Before anything imports Triton: without a GPU its kernels run in the interpreter."
    if getattr(config.option, "numprocesses", None): return  # others run the tests
    import torch
    from hypothesis import HealthCheck, settings
    if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")

    # The same examples on every machine, however slow it is.
    settings.register_profile(
        "calib-prune", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("calib-prune")


# By their seconds, the longest first: a worker that meets one of them last lets the other wait.
LONG = [f"test_{name}.py" for name in (
    "workflow", "torture", "site", "paper_preset", "wheel", "lost", "golden", "golden_sets", "keys",
    "cli", "triton", "compiled", "fetch", "sandbox", "limits", "evaluation", "project")]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda o: LONG.index(o.path.name) if o.path.name in LONG else len(LONG))


@pytest.fixture(autouse=True)
def what_ctrl_c_does():
    "The command line changes it: a test run is interrupted as ever."
    before = signal.getsignal(signal.SIGINT)
    yield
    if before is not None: signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def own_tasks_leave():
    "A file given as a task is registered under its name: the next test starts without it."
    yield
    tasks = sys.modules.get("calib_prune.evaluation.tasks")
    if tasks is None: return
    for name in [name for name, task in tasks.TASKS.items() if task.benchmark.startswith("file:")]:
        del tasks.TASKS[name]
