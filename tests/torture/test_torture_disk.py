"Self-tests of the torture by disks, poison, programs and users: each of its checks can fail."
import ctypes
import gc
import os
import pickle
import time
from pathlib import Path

import pytest

from calib_prune.evaluation.sandbox import missing_layers
from tests.torture import alone, disk, poison, programs, users
from tests.torture.alone import SKIP, in_fork

CANNOT = alone.why_not()
mounts = pytest.mark.skipif(bool(CANNOT), reason=CANNOT.removeprefix(SKIP) or "-")


# --- forks

def test_a_fork_that_hangs_dies_or_fails_is_a_fault():
    assert in_fork(lambda: 5).value == 5 and not in_fork(lambda: 5).fault
    assert "did not end" in in_fork(lambda: time.sleep(60), 0.3).fault
    assert "died" in in_fork(lambda: os.kill(os.getpid(), 9)).fault
    assert "ZeroDivisionError" in in_fork(lambda: 1 / 0).fault
    assert "MemoryError" in in_fork(lambda: len(bytearray(1 << 30)), memory=1 << 28).fault
    assert in_fork(lambda: len(b"x" * (200 << 20))).peak_mb > 150


def test_what_a_parent_left_to_collect_does_not_hide_what_a_fork_took():
    gc.disable()
    try:
        garbage: list = [b"y" * (120 << 20)]
        garbage.append(garbage)
        del garbage
        assert in_fork(lambda: (gc.collect(), len(b"x" * (200 << 20)))).peak_mb > 150
    finally: gc.enable()


def test_what_the_allocator_holds_free_does_not_hide_what_a_fork_took():
    c = ctypes.CDLL(None)
    c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    blocks = [c.malloc(100) for _ in range(2_000_000)]
    for block in blocks: ctypes.memset(block, 1, 100)
    for block in blocks: c.free(block)
    assert in_fork(lambda: len(b"x" * (200 << 20))).peak_mb > 150


# --- disks

def write_half(path: Path, data: bytes, said: str = "") -> list[str]:
    "A writer without care."
    try: path.write_bytes(data)
    except OSError as e: return ["refused", said or f"Cannot write {path}: {e.strerror}."]
    return ["done", ""]


WRITERS = {  # name → (job, what is found)
    "half a file": (disk.Job(
        "x", lambda d, i: write_half(d / "a.bin", b"a" * 50_000)), "a.bin is half-written"),
    "a traceback": (disk.Job(
        "x", lambda d, i: disk.attempted(lambda: (d / "a.bin").write_bytes(b"a" * 50_000))),
                    "traceback"), "a silent one": (disk.Job(
                        "x", lambda d, i: write_half(d / "a.bin", b"a" * 50_000, "It failed.")),
                                                   "the reason is not said"),
    "one without a name": (disk.Job(
        "x",
        lambda d, i: write_half(d / "a.bin", b"a" * 50_000, "No space left.")), "no file is named"),
    "a rest": (disk.Job("x", lambda d, i: write_half(d / ".a.part", b"a" * 50_000)),
               ".a.part was left"), "another name": (disk.Job(
                   "x", lambda d, i: write_half(d / f"a{os.getpid()}.bin", b"a" * 50_000)),
                                                     "no whole run writes"),
    "one that does not recover": (disk.Job(
        "x", lambda d, i: ["refused", f"{d} exists"] if (d / "a").exists() else
        ((d / "a").mkdir(), write_half(d / "a/.b.part", b"a" * 50_000),
         (d / "a/.b.part").unlink(), ["refused", f"{d}: No space left"])[-1]), "with room"),
    "one that takes a user's file": (disk.Job(
        "x", lambda d, i:
        ((d / disk.MINE).write_text("yours"), ["done", ""])[1]), "the user's is changed")}


@mounts
@pytest.mark.parametrize("name", WRITERS)
def test_a_careless_writer_is_found(tmp_path, name):
    job, found = WRITERS[name]
    whole = in_fork(lambda: disk.on_disk(job, tmp_path, disk.PLENTY), memory=None).value["left"]
    told = in_fork(lambda: disk.on_disk(job, tmp_path, 8192), memory=None)
    assert found in disk.verdict(job, tmp_path / "disk", told.value, whole) and not os.path.ismount(
        tmp_path / "disk"
    )


@mounts
def test_a_careful_writer_is_not():
    from calib_prune.core import write_atomic
    job = disk.Job(
        "x", lambda d, i: disk.attempted(lambda: write_atomic(d / "a/b.bin", b"a" * 50_000))
    )
    for size in (0, 4096, 8192, 40960, 65536):
        with alone.scratch() as d:
            whole = in_fork(lambda d=d: disk.on_disk(job, d, disk.PLENTY), memory=None).value[
                "left"
            ]
            told = in_fork(lambda d=d, size=size: disk.on_disk(job, d, size), memory=None).value
            assert not disk.verdict(job, d / "disk", told, whole), told
            assert told["first"][0] == ("done" if size == 65536 else "refused")


def test_without_rights_small_files_show_the_same(tmp_path):
    job = disk.Job("x", lambda d, i: write_half(d / "a.bin", b"a" * 50_000))
    for name in "12": (tmp_path / name).mkdir()
    whole = in_fork(lambda: disk.with_small_files(job, tmp_path / "1", 1 << 30), memory=None)
    told = in_fork(lambda: disk.with_small_files(job, tmp_path / "2", 5000), memory=None)
    assert "half-written" in disk.verdict(job, tmp_path / "2", told.value, whole.value["left"]), (
        told,
        whole,
    )


@mounts
def test_a_skipped_try_is_not_a_passed_one(monkeypatch, capsys):
    monkeypatch.setattr(alone, "settle", lambda: None)
    monkeypatch.setattr("sys.argv", ["x"])
    assert (
        alone.main(lambda short, seed: iter([("p", "a", ""), ("p", "b", f"{SKIP}not root")])) == 0
    )
    assert "2 tries, 0 failures, 1 skipped" in capsys.readouterr().out
    assert alone.main(lambda short, seed: iter([("p", "a", "wrong")])) == 1


# --- poison

def poisoned_by(act, folder, seconds=120, **more):
    from tests.attack import Outcome
    found = poison.Poison("x", act, seconds=seconds, **more)
    def run():
        said = found.act(folder)
        return [said.kind, said.said] if isinstance(said, Outcome) else ["done", ""]
    return poison.what_went_wrong(found, folder, in_fork(run, seconds, 2 << 30))


def test_what_poison_does_is_seen(tmp_path):
    from tests.attack import Outcome
    assert (
        poisoned_by(lambda f: pickle.loads(pickle.dumps(poison.Bomb(f / poison.TOKEN))), tmp_path)
        == "code in it was run"
    )
    (tmp_path / poison.TOKEN).unlink()
    assert "did not end" in poisoned_by(lambda f: time.sleep(60), tmp_path, 0.3)
    assert "MB" in poisoned_by(lambda f: len(b"x" * (1700 << 20)) and None, tmp_path)
    assert "secret" in poisoned_by(
        lambda f: Outcome("refused", f"No JSON: {poison.SECRET}"), tmp_path
    )
    assert "traceback" in poisoned_by(lambda f: Outcome("traceback", "x"), tmp_path)
    assert "not refused" in poisoned_by(lambda f: Outcome("done"), tmp_path, refused=True)
    assert poisoned_by(lambda f: Outcome("refused", "No."), tmp_path, refused=True) == ""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text(poison.SECRET)
    assert "secret" in poisoned_by(lambda f: Outcome("done"), tmp_path)


# --- programs: without a sandbox, the harmless ones of them leave traces that are seen

SEEN = {  # name → (program, what is found)
    "a file": ("open('<FOLDER>/<TOKEN>', 'w')", "a file in"),
    "a changed file": ("open('<FOLDER>/secret.txt', 'w')", "a file was changed"),
    "rights": ("import os\nos.chmod('<FOLDER>/secret.txt', 0o600)", "the rights of a file"),
    "a temporary file": ("open('<FOLDER>/tmp/x', 'w')", "temporary files"),
    "a process": (
        (
            "import os, time\nif os.fork() == 0:\n    os.setsid()\n    for fd in (0, 1, 2):"
            " os.close(fd)\n    time.sleep(5)"
        ),
        "processes are left",
    ),
    "TCP": (programs.ACTS["TCP"], "a message"),
    "UDP": (programs.ACTS["UDP"], "a message"),
    "a Unix socket": (programs.ACTS["a Unix socket"], "a message"),
    "an abstract socket": (programs.ACTS["an abstract socket"], "a message"),
    "a secret": ("print(open('<FOLDER>/secret.txt').read())", "a secret was read"),
    "the environment": ("import os\nprint(os.environ['TORTURE_TOKEN'])", "a secret was read"),
    "an act": (programs.does("1 + 1"), "it could do it"),
    "output": ("print('x' * 30_000)", "ok is True"),
    "a pass": ("pass", "ok is True"),
}


@pytest.mark.parametrize("name", SEEN)
def test_without_a_sandbox_a_program_is_seen(name):
    program, found = SEEN[name]
    assert found in programs.one(name, program, "alone", False, 20.0, programs.without_a_sandbox)


@pytest.mark.skipif(bool(missing_layers()), reason="the kernel offers no Landlock or no seccomp")
def test_in_the_sandbox_a_false_pass_is_a_failure():
    assert "ok is True" in programs.one("x", programs.HONEST, "answer", False, 20.0)
    assert "ok is False" in programs.one("x", programs.ANSWER, "answer", True, 20.0)
    assert programs.one("x", programs.HONEST, "answer", True, 20.0) == ""


# --- users

def test_what_goes_wrong_between_users_is_found():
    assert "led to write" in users.met(
        [["done", ""], ["refused", "no"], ["shared/theirs/evil"]], False
    )
    assert "the second" in users.met([["done", ""], ["traceback", "x"], []], False)
    assert "the second" in users.met([["done", ""], ["refused", "x"], []], True)
    assert users.met([["done", ""], ["refused", "x"], []], False) == ""
    assert users.how(["refused", "It failed."], True) and users.how(
        ["refused", "no home directory"], False
    )
    assert not users.how(["refused", "no home directory"], True)


@mounts
def test_a_link_that_is_followed_is_seen():
    def careless(place): return disk.attempted(lambda: (place / "lock").write_text("x"))
    with alone.scratch() as world:
        world.chmod(0o755)
        (alone.PLACE / "cache").mkdir(exist_ok=True)
        found = in_fork(
            lambda: users.two_users(world, lambda p: users.links(p, "lock"), careless), memory=None
        )
    assert "led to write" in users.met(found.value, False), found


@mounts
def test_another_user_has_no_rights():
    def act():
        alone.become(users.OTHER)
        try: open("/etc/shadow").close()
        except PermissionError: return "no"
    assert in_fork(act, memory=None).value == "no"
