"""What the second half of the torture shares: tries in forks with limits of their own, private
mounts, other users, and counts.

A try that cannot be made for lack of rights yields a failure that begins with `SKIP`: it is counted
as skipped, never as passed.
"""
import contextlib
import ctypes
import gc
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.torture import PLACE, ROOT, SKIP
from tests.torture.forks import warm

Results = Iterator[tuple[str, str, str]]  # part, name, failure or ""


# --- before anything of the package is imported

def settle() -> None:
    "Import everything, once and for all forks; and prune once, so that kernels are compiled."
    warm()
    import calib_prune.statistics.tables  # noqa: F401
    import calib_prune.style  # noqa: F401


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    "An empty folder, below build/: what a try needs of /tmp may then be taken away."
    PLACE.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=PLACE, ignore_cleanup_errors=True) as d: yield Path(d)


# --- tries in forks

@dataclass(frozen=True)
class Ended:
    "How a fork ended."
    value: Any            # what its function returned; None if it did not
    fault: str            # why it did not return: a traceback, a signal, the time
    peak_mb: int          # memory beyond what it began with
    seconds: float


def address_space() -> int:
    "The bytes of address space that this process holds."
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def resident_mb() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20


def forget_peak() -> None:
    """Give back what the allocator holds free, and start this process's peak anew.

    What the allocator gave back later would be taken off the peak of the function that runs next.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def in_fork(act: Callable[[], Any],  # what it returns must be JSON
            seconds: float = 60,
            memory: int | None = 4 << 30  # bytes of address space on top; None: no limit
           ) -> Ended:
    "Call a function in a fork with limits, and kill the fork and its children when it is over."
    read, write = os.pipe()
    began = time.monotonic()
    sys.stdout.flush()
    if not (pid := os.fork()):
        os.close(read)
        gc.freeze()  # what its parent left to collect would be taken off the peak if it went here
        with contextlib.suppress(BaseException): _act(act, write, memory)
        os._exit(1)
    os.close(write)
    said, late = b"", False
    while not late:
        left = began + seconds - time.monotonic()
        if not select.select([read], [], [], max(0, left))[0]: late = True
        elif data := os.read(read, 1 << 16): said += data
        else: break
    os.close(read)
    with contextlib.suppress(OSError): os.killpg(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    before, _, said = said.partition(b"\n")
    took, peak = time.monotonic() - began, max(0, (usage.ru_maxrss >> 10) - int(before or 0))
    if late: return Ended(None, f"it did not end in {seconds:.0f} s", peak, took)
    try: told = json.loads(said)
    except ValueError:
        return Ended(None, f"it died: status {os.waitstatus_to_exitcode(status)}", peak, took)
    return Ended(told.get("value"), told.get("fault", ""), peak, took)


def _act(act: Callable[[], Any], write: int, memory: int | None) -> None:
    "The fork's part."
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # it dies with its parent
    with open(os.devnull, "r+b") as nothing:
        for fd in (0, 1, 2): os.dup2(nothing.fileno(), fd)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if memory is not None: resource.setrlimit(resource.RLIMIT_AS, (address_space() + memory,) * 2)
    forget_peak()
    # less than its parent's: pages of files are mapped when they are read
    os.write(write, b"%d\n" % resident_mb())
    try: told = {"value": act()}
    except BaseException: told = {"fault": traceback.format_exc()[-1500:]}
    data = json.dumps(told).encode()
    resource.setrlimit(resource.RLIMIT_AS, (resource.getrlimit(resource.RLIMIT_AS)[1],) * 2)
    while data: data = data[os.write(write, data):]
    os._exit(0)


def say(*argv: Any) -> list[str]:  # kind, text
    "Run the command line here, inside a fork."
    from tests.attack import call
    found = call(*map(str, argv))
    return [found.kind if found.json_ok else "traceback", found.said]


# --- mounts that only a fork sees, and other users

MS_RDONLY, MS_REMOUNT, MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE = 1, 32, 4096, 8192, 16384, 1 << 18


def mount(
    source: str | Path, target: str | Path, kind: str = "", flags: int = 0, data: str = ""
) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(
            str(source).encode(),
            str(target).encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()):
        raise OSError(ctypes.get_errno(), f"mount: {os.strerror(ctypes.get_errno())}", str(target))


def private_mounts() -> None:
    """What is mounted from now on ends with this process: nothing has to be unmounted, however a
    try ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x20000):
        raise OSError(ctypes.get_errno(), f"unshare: {os.strerror(ctypes.get_errno())}")
    mount("none", "/", flags=MS_REC | MS_PRIVATE)


def small_disk(folder: Path, size: int, files: int = 0) -> None:
    "Mount a disk of some bytes (and at most so many files), or change its size."
    room = f"size={size}" + (f",nr_inodes={files}" if files else "")
    if os.path.ismount(folder): mount("none", folder, "tmpfs", MS_REMOUNT, room)
    else:
        folder.mkdir(exist_ok=True)
        mount("none", folder, "tmpfs", 0, f"{room},mode=777")


def read_only(folder: Path | str, keep: Sequence[Path] = ()) -> None:
    "Make a folder read-only by a mount, but for some folders below it."
    mount("none", "/mnt", "tmpfs")
    for i, o in enumerate(keep):
        Path(f"/mnt/{i}").mkdir()
        mount(o, f"/mnt/{i}", flags=MS_BIND)
    mount(folder, folder, flags=MS_BIND | MS_REC)
    mount("none", folder, flags=MS_REMOUNT | MS_BIND | MS_RDONLY)
    for i, o in enumerate(keep): mount(f"/mnt/{i}", o, flags=MS_BIND)


def needed_folders() -> list[Path]:
    "What a process needs to read in order to run this package."
    data = [o for o in (PLACE / "cache").iterdir()
            if o.is_symlink()] if (PLACE / "cache").is_dir() else []
    return [*dict.fromkeys(Path(o).resolve() for o in (sys.base_prefix, sys.prefix, ROOT, *data))]


def let_others_read(*more: Path) -> None:
    """Let other users reach the interpreter and the package, in this process's view of the disk.

    They may lie below a home folder that is closed to others: an open folder is mounted over that
    one, with what is needed in it.
    """
    closed = {}
    for path in (*needed_folders(), *more):
        for above in reversed(path.parents):
            if not above.stat().st_mode & 0o001:
                closed.setdefault(above, []).append(path)
                break
    if closed: mount("none", "/mnt", "tmpfs")
    for above, paths in closed.items():
        for i, o in enumerate(paths):
            Path(f"/mnt/{i}").mkdir()
            mount(o, f"/mnt/{i}", flags=MS_BIND)
        mount("none", above, "tmpfs", 0, "mode=755")
        for i, o in enumerate(paths):
            o.mkdir(parents=True, exist_ok=True)
            mount(f"/mnt/{i}", o, flags=MS_BIND)


def become(uid: int, home: Path | None = None) -> None:
    "Become an ordinary user for good."
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    libc = ctypes.CDLL(None)
    libc.prctl(1, signal.SIGKILL)  # a change of user forgets it
    libc.prctl(4, 1, 0, 0, 0)      # and makes /proc/self root's
    for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME"): os.environ.pop(name, None)
    if home is not None: os.environ["HOME"] = str(home)


def why_not() -> str:
    "Why mounts and other users cannot be tried here; empty if they can."
    if sys.platform != "linux": return f"{SKIP}mounts need Linux"
    if os.geteuid() != 0:
        return f"{SKIP}not root, so nothing can be mounted and no other user be tried"
    found = in_fork(lambda: private_mounts(), memory=None)
    return (
        f"{SKIP}nothing can be mounted here: {found.fault.strip().splitlines()[-1]}"
        if found.fault
        else ""
    )


# --- running alone

def main(results: Callable[[bool, int], Results]) -> int:
    "Print tries and failures; 1 if there are any."
    short = "--short" in sys.argv
    seed = next((int(o) for o in sys.argv[1:] if o.isdecimal()), 0)
    # a part of a name, to look at some only
    only = [o for o in sys.argv[1:] if not o.startswith("-") and not o.isdecimal()]
    os.environ["TORTURE_ONLY"] = ",".join(only)
    settle()
    counts: dict[str, Counter] = {}
    began = last = time.monotonic()
    for part, name, failure in results(short, seed):
        now = time.monotonic()
        kind = "skipped" if failure.startswith(SKIP) else "failed" if failure else "passed"
        counts.setdefault(part, Counter())[kind] += 1
        if kind != "passed" or "-v" in sys.argv:
            print(f"{part}: {name}: {now - last:.1f} s: {failure or 'well'}", flush=True)
        last = now
    for part, found in counts.items():
        print(
            f"{part:10} {found.total():5} tries {found['failed']:4} failures {found['skipped']:4}"
            " skipped"
        )
    print(
        f"{sum(o.total() for o in counts.values())} tries,"
        f" {sum(o['failed'] for o in counts.values())} failures,"
        f" {sum(o['skipped'] for o in counts.values())} skipped, {time.monotonic() - began:.0f} s"
    )
    return int(any(o["failed"] for o in counts.values()))


def wanted(name: str) -> bool:
    "Is this try to be made?"
    only = [o for o in os.environ.get("TORTURE_ONLY", "").split(",") if o]
    return not only or any(o in name for o in only)
