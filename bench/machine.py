"""What a measurement ran on, and how much memory its process held. Standard library only: peers
import it as well."""
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def threads_environment(threads: int) -> dict[str, str]:
    "Environment variables that hold every library of a child process to a number of threads."
    names = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "NUMBA")
    return {f"{o}_NUM_THREADS": str(threads) for o in names} | {"TOKENIZERS_PARALLELISM": "false"}


def resident() -> int:
    "Bytes of memory that this process holds now."
    return _status("VmRSS")


def peak() -> int:
    """The most that this process has held, in bytes (`ru_maxrss` would count what the parent held
    when it forked)."""
    return _status("VmHWM")


def reset_peak() -> None:
    "From here on, `peak` tells of what follows."
    CLEAR.write_text("5")


def _status(key: str) -> int:
    line = next(o for o in STATUS.read_text().splitlines() if o.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def versions(*packages: str) -> dict[str, str]:
    "Versions of installed packages, without the part that tells how one was built."
    found = {}
    for package in packages:
        try: found[package] = version(package).split("+")[0]
        except PackageNotFoundError: continue
    return found


def describe(threads: int) -> dict:
    "The machine and the setting that a set of measurements shares; holds no date and no name."
    facts = [o.split(":", 1) for o in Path("/proc/cpuinfo").read_text().splitlines() if ":" in o]
    cpu = {key.strip(): value.strip() for key, value in facts}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    wide = [o for o in ("avx2", "avx512f", "amx_tile") if o in cpu.get("flags", "").split()]
    return dict(
        cpu=cpu.get("model name", platform.machine()),
        cores=os.cpu_count(),
        memory_gib=round(memory / 2**30),
        vectors=wide,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        threads=threads,
        dtype="float32",
        **versions("torch", "transformers", "numba", "lm_eval"),
    )
