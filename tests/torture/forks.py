"""A parent that has imported everything, whose forks run the commands: a try costs no start-up. And
how forks are killed and watched."""
import ctypes
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.torture import PLACE

CHECKOUT = PLACE.parent.parent
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def own_cache() -> Path:
    "A cache of the torture: fetched data are links to the user's, all else is written here."
    from platformdirs import user_cache_dir
    real, mine = (
        Path(os.environ.get("CALIB_PRUNE_CACHE") or user_cache_dir("calib-prune")),
        PLACE / "cache",
    )
    if real == mine: return mine
    mine.mkdir(parents=True, exist_ok=True)
    for name in ("benchmarks", "models", "sources"):
        if (real / name).is_dir() and not (mine / name).exists():
            (mine / name).symlink_to(real / name)
    if (real / "manifest.json").is_file():
        shutil.copyfile(real / "manifest.json", mine / "manifest.json")
    if (real / "kernels").is_dir() and not (mine / "kernels").exists():
        shutil.copytree(real / "kernels", mine / "kernels")
    return mine


def warm() -> None:
    """Import everything, and prune and score once, so that forks find libraries and compiled
    kernels ready."""
    # where kernels lie is read by an import
    if "torch" not in sys.modules: os.environ["CALIB_PRUNE_CACHE"] = str(own_cache())
    os.environ.update(
        HF_HUB_OFFLINE="1",
        PIP_NO_INDEX="1",
        TOKENIZERS_PARALLELISM="false",
        TQDM_DISABLE="1",
        COLUMNS="200",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        PIP_DISABLE_PIP_VERSION_CHECK="1",
        PYTHONPATH=str(CHECKOUT),
    )
    import lm_eval.models.huggingface  # noqa: F401
    import torch

    import calib_prune.calibration.oit  # noqa: E401, F401
    import calib_prune.cli.app  # noqa: E401, F401
    import calib_prune.evaluation.scoring
    import calib_prune.generation.igsp
    import calib_prune.study.cost
    import calib_prune.study.keys
    import calib_prune.study.results
    from calib_prune.model.tiny import tiny_llama
    from calib_prune.pruning.walk import prune
    assert Path(calib_prune.__file__).parent.parent == CHECKOUT, calib_prune.__file__
    torch.set_num_threads(1)  # threads would not survive a fork
    prune(tiny_llama(), torch.ones(2, 16, dtype=torch.int64), "wanda")
    adopt()


def adopt() -> None:
    "Become the parent of whatever a killed fork leaves behind, so that it can be found."
    if sys.platform == "linux": ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def start(act: Callable[[], object], log: Path) -> int:
    """Do something in a fork with a session of its own, which is the leader of it; what it prints
    goes to a file."""
    sys.stdout.flush()
    from calib_prune.core import CalibPruneError
    if pid := os.fork(): return pid
    code = 70
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for fd in (1, 2): os.dup2(out, fd)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2,
                                                                   "w",
                                                                   closefd=False,
                                                                   buffering=1)
        act()
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str): os.write(2, e.code.encode())
    except CalibPruneError as e:  # the library's way to refuse
        os.write(2, f"Error: {e}".encode())
        code = 1
    except BaseException: os.write(2, traceback.format_exc().encode())
    finally:
        with suppress(BaseException): sys.stdout.flush()
        os._exit(code)


def command(*argv: object) -> Callable[[], None]:
    "A call of the command line, for a fork."
    def act():
        from calib_prune.cli.app import main
        sys.argv = ["calib-prune", *map(str, argv)]
        main()
    return act


def children(pid: int) -> list[int]:
    "The children of a process."
    found = []
    with suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError):
                found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


def family(pid: int) -> list[int]:
    "A process and all that it began, in whichever session or group they are."
    found = [pid]
    for o in found: found += [c for c in children(o) if c not in found]
    return found


def kill(pid: int) -> None:
    "End a fork and all that it began at once, as a power cut would."
    for o in family(pid):
        with suppress(OSError): os.kill(o, signal.SIGKILL)
    with suppress(OSError): os.killpg(pid, signal.SIGKILL)


def sweep(keep: set[int] = frozenset()) -> None:  # forks that still run
    "End and bury what forks left behind: it has become a child of this process."
    while left := [o for o in children(os.getpid()) if o not in keep]:
        for o in left:
            kill(o)
            with suppress(ChildProcessError): os.waitpid(o, 0)


def cpu(pid: int) -> float:
    "The seconds that the main thread of a process has computed."
    try: return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except (OSError, IndexError, ValueError): return 0.0


@dataclass(frozen=True)
class Ended:
    "How a fork ended."
    code: int       # -9: killed
    said: str       # what it printed
    wall: float     # seconds
    cpu: float

    @property
    def wrong(self) -> str:
        "What must not happen, however it ends."
        if "Traceback (most recent call last)" in self.said: return self.said[-1500:]
        return (
            "" if self.code in (0, 1, -signal.SIGKILL) else f"exit {self.code}: {self.said[-600:]}"
        )


def watch(pid: int, log: Path,
          until: Callable[[float, float], bool] = lambda wall, cpu: False,  # is it time to kill it?
          patience: float = 900) -> Ended:
    "Wait for a fork, or kill it at its moment."
    began = time.monotonic()
    while True:
        wall, used = time.monotonic() - began, cpu(pid)
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT): break
        late = wall > patience
        if late or until(wall, used):
            kill(pid)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            break
        time.sleep(.001)
    late = wall > patience
    used = cpu(pid)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    said = log.read_text(errors="replace") if log.is_file() else ""
    return Ended(
        71 if late else code, said + late * f"\nit did not end in {patience:.0f} s", wall, used
    )
