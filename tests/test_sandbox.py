import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from calib_prune.evaluation import jail, sandbox
from calib_prune.core import CalibPruneError
from calib_prune.data.fetch import cached
from calib_prune.data.files import read_jsonl
from calib_prune.evaluation.sandbox import missing_layers, run_sandboxed, run_tests, verdict
from calib_prune.evaluation.tasks import TASKS, render

pytestmark = pytest.mark.skipif(bool(missing_layers()), reason="the kernel offers no Landlock or no seccomp")
FAST = {"timeout": 5.0, "memory_mb": 256}


@pytest.mark.parametrize("code", [
    "assert 1 + 1 == 2",
    "import math, collections, itertools, re, json, datetime, heapq, random, hashlib, decimal, typing, functools",
    "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 1\nassert A() == A(1)",
    "import sys\nprint('out'); print('err', file=sys.stderr)",
    "def check(candidate):\n    assert candidate(2) == 4\ncheck(lambda x: x * x)"])
def test_honest_programs_pass(code):
    r = run_sandboxed(code, **FAST)
    assert r.ok and r.reason == "passed" and r.missing == (), r


def test_output_and_failure_are_reported():
    r = run_sandboxed("import sys\nprint('o'); print('e', file=sys.stderr)\nassert 1 == 2, 'one is not two'", **FAST)
    assert (r.ok, r.reason, r.stdout, r.stderr) == (False, "exception", "o\n", "e\n")
    assert r.detail == "AssertionError: one is not two"
    assert run_sandboxed("def f(:", **FAST).detail.endswith("SyntaxError: invalid syntax")


PASS_WITHOUT_TESTS = {
    "sys.exit": "import sys; sys.exit(0)",
    "exit in function": "raise SystemExit(0)",
    "os._exit": "import os; os._exit(0)",
    "atexit": "import atexit, os; atexit.register(os._exit, 0); raise SystemExit",
    "prints": "print('passed'); print('ready')\nraise SystemExit",
    "builtins": "import builtins; builtins.BaseException = ValueError; builtins.SystemExit = ValueError; 1 / 0",
    "writes to every pipe": "import os\nfor fd in range(3, 60):\n    try: os.write(fd, b'0' * 32 + b'passed\\n')\n"
                            "    except OSError: pass\nos._exit(0)",
    "patches os": "import os; os.write = os.read = lambda *a: b''; os._exit = lambda c: None; assert False",
    "closes the pipes": "import os; os.closerange(0, 64); os._exit(0)",
    "wrong hook": "import sys; sys.excepthook = lambda *a: None; sys.tracebacklimit = 0; assert False",
    "hostile exception": "class E(Exception):\n    def __str__(self): import os; os._exit(0)\nraise E",
}


@pytest.mark.parametrize("name", PASS_WITHOUT_TESTS)
def test_no_pass_without_reaching_the_end(name):
    r = run_sandboxed(PASS_WITHOUT_TESTS[name] + "\nassert False", **FAST)
    assert not r.ok and r.reason in ("exit", "exception"), r


BOMBS = {
    "endless loop": ("while True: pass", "timeout"),
    "endless loop that catches": ("while True:\n    try:\n        while True: pass\n    except BaseException: pass", "timeout"),
    "sleep": ("import time; time.sleep(60)", "timeout"),
    "sleeps with closed pipes": ("import os, time; os.closerange(0, 64); time.sleep(60)", "timeout"),
    "ignores signals": ("import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n"
                        "    except (OSError, ValueError): pass\nwhile True: pass", "timeout"),
    "memory": ("x = []\nwhile True: x.append(bytearray(10**6))", "memory"),
    "huge output": ("while True: print('x' * 1000)", "output"),
    "huge errors": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "output"),
    "huge report": ("import os\nwhile True:\n    for fd in range(3, 60):\n        try: os.write(fd, b'x' * 1000)\n"
                    "        except OSError: pass", "output"),
    "crash": ("import sys; sys.setrecursionlimit(10**9)\nx = []\nfor _ in range(2 * 10**5): x = [x]\nrepr(x)", "crash"),
    "recursion": ("def f(): return f()\nf()", "exception"),
    "null pointer": ("import ctypes; ctypes.string_at(0)", "crash"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_stopped(name):
    code, reason = BOMBS[name]
    start = time.monotonic()
    r = run_sandboxed(code, timeout=0.7 if reason == "timeout" else 20.0, memory_mb=256)
    assert (r.ok, r.reason) == (False, reason), r
    assert time.monotonic() - start < 21 and len(r.stdout) <= 100_000


REFUSED = {
    "fork": "import os; os.fork()",
    "fork through C": "import ctypes, os; r = ctypes.CDLL(None).fork(); assert r >= 0, 'refused'; r or os._exit(0)",
    "thread": "import threading; threading.Thread(target=print).start()",
    "program": "import subprocess; subprocess.run(['/bin/true'])",
    "exec": "import os; os.execv('/bin/true', ['true'])",
    "tcp": "import socket; socket.socket()",
    "local socket": "import socket; socket.socketpair()",
    "kill parent": "import os; os.kill(os.getppid(), 0)",
    "kill group of parent": "import os; os.killpg(os.getpgid(os.getppid()), 0)",
    "limits of parent": "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_CORE)",
    "raise own limit": "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))",
    "signals through a pipe": "import fcntl, os; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())",
    "signals through a terminal call": "import fcntl, os, struct\n"
                                       "fcntl.ioctl(os.pipe()[0], 0x8901, struct.pack('i', os.getppid()))",
    "priority of parent": "import os; os.setpriority(os.PRIO_PROCESS, os.getppid(), 5)",
    "new session": "import os; os.setsid()",
    "shared memory": "import os; os.memfd_create('x')",
    "namespace": "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0, 'refused'",
    "write in the folder": "open('x', 'w')",
    "write in /tmp": "open('/tmp/x', 'w')",
    "write in the home folder": "import os; open(os.path.expanduser('~/x'), 'w')",
    "write a device": "open('/dev/null', 'w')",
    "make a folder": "import os; os.mkdir('d')",
    "link": "import os; os.symlink('/etc/passwd', 'p')",
    "temporary file": "import tempfile; tempfile.TemporaryFile()",
    "read passwords": "open('/etc/passwd').read()",
    "read the parent's environment": "import os; open(f'/proc/{os.getppid()}/environ').read()",
    "list root": "import os; os.listdir('/')",
    "stdin": "input()",
}


@pytest.mark.parametrize("name", REFUSED)
def test_forbidden_acts_fail(name):
    # The program must fail at the act itself: what follows it would pass.
    r = run_sandboxed(REFUSED[name], **FAST)
    assert r.reason == "exception", r
    assert re.match(r"PermissionError|RuntimeError: can't start new thread|EOFError|ValueError: not allowed to raise|"
                    r"AssertionError: refused|FileNotFoundError: \[Errno 2\] No usable temporary", r.detail), r


@pytest.mark.parametrize("act", [
    "open(path).read()", "open(path, 'w')", "open(path, 'a')", "os.remove(path)", "os.rename(path, path + '2')",
    "os.truncate(path, 0)", "os.chmod(path, 0)", "os.utime(path, (0, 0))", "os.chown(path, 65534, 65534)",
    "os.link(path, 'here')", "os.listdir(os.path.dirname(path))", "os.rmdir(os.path.dirname(path) + '/empty')",
    "os.setxattr(path, 'user.x', b'1')", "os.open(path, os.O_WRONLY | os.O_TRUNC)"])
def test_a_file_of_the_user_is_out_of_reach(tmp_path, act):
    path = tmp_path / "precious.txt"
    path.write_text("keep me")
    (tmp_path / "empty").mkdir()
    before = path.stat()
    r = run_sandboxed(f"import os\npath = {str(path)!r}\n{act}", **FAST)
    assert r.reason == "exception" and r.detail.startswith("PermissionError"), r
    after = path.stat()
    assert path.read_text() == "keep me" and (tmp_path / "empty").is_dir()
    assert (before.st_mode, before.st_mtime_ns, before.st_uid) == (after.st_mode, after.st_mtime_ns, after.st_uid)


def test_a_verdict_never_raises():
    assert verdict(b"ready\n", b"S", -35) == ("crash", "signal 35")
    assert verdict(b"ready\nS\xff\xfe\n\xff", b"S", 0)[0] == "exit"
    for report in (b"", b"ready\n", b"S", b"ready\nS", b"ready\nSpassed", b"\xff", b"ready\nSpassed\n\xff"):
        for code in (0, 1, -1, -9, -24, -35, -64, 255): assert isinstance(verdict(report, b"S", code)[0], str)


STEAL = """
import os
def steal():
    for fd in range(3, 60):
        try:
            os.set_blocking(fd, False)
            s = os.read(fd, 32)
        except OSError: continue
        for out in range(3, 60):
            try: os.write(out, s + TAIL)
            except OSError: pass
    os._exit(0)
"""


SIGNAL_35 = """
import ctypes, struct, time
timer, libc = ctypes.c_void_p(), ctypes.CDLL(None)
libc.timer_create(0, struct.pack("Qii48x", 0, 35, 0), ctypes.byref(timer))
libc.timer_settime(timer, 0, struct.pack("qqqq", 0, 0, 0, 10**7), None)
time.sleep(3)
"""


@pytest.mark.parametrize("code", [SIGNAL_35, STEAL.replace("TAIL", r"b'\xff\xfe'") + "steal()"])
def test_a_strange_end_is_a_verdict_too(code):
    assert not run_sandboxed(code, **FAST).ok and not run_tests(code, "assert _answer('f')() == 1", **FAST).ok


TESTS = """
def check(f):
    assert f(2, 3) == 5
    assert f([1], [2]) == [1, 2]
    assert not f('', '')
    try: f(1, None)
    except TypeError: pass
    else: raise AssertionError
check(_answer('add'))
"""
ZERO = "\ndef add(a, b): return 0\n"
WRITE = "import os\nfor fd in range(3, 60):\n    try: os.write(fd, DATA)\n    except OSError: pass\n"
FALSE_PASSES = {  # most of these pass where answer and tests share an interpreter
    "steals the secret": STEAL.replace("TAIL", r"b'passed\n'") + "def add(a, b): steal()",
    "steals it at once": STEAL.replace("TAIL", r"b'passed\n'") + "steal()",
    "frames": "import sys\ndef add(a, b):\n    f = sys._getframe()\n    while f:\n        if 'finish' in f.f_locals: f.f_locals['finish'](b'passed')\n"
              "        f = f.f_back\n    return 0",
    "gc": "import gc\ndef add(a, b):\n    for o in gc.get_objects():\n        if getattr(o, '__name__', '') == 'finish': o(b'passed')\n    return 0",
    "equals everything": "class E:\n    def __eq__(self, o): return True\n    def __bool__(self): return False\ndef add(a, b): return E()",
    "a list that equals everything": "class E(list):\n    def __eq__(self, o): return True\ndef add(a, b): return E()",
    "a number that equals everything": "class E(int):\n    def __eq__(self, o): return True\ndef add(a, b): return E(7)",
    "patched AssertionError": "import builtins\nbuiltins.AssertionError = SystemExit" + ZERO,
    "patched len": "import builtins\nbuiltins.len = lambda o: 5" + ZERO,
    "an open string": ZERO + 'x = """', "a comment": ZERO + "#\\", "its own check": ZERO + "def check(f): pass",
    "exits": "def add(a, b): raise SystemExit(0)", "leaves": "import os\ndef add(a, b): os._exit(0)",
    "answers ahead": WRITE.replace("DATA", r"""b'{"value": null}\n' * 9""") + ZERO,
    "answers with noise": WRITE.replace("DATA", r"b'\xff[[[{' * 99 + b'\n'") + ZERO,
    "answers with depth": WRITE.replace("DATA", r"b'[' * 20000 + b'\n'") + ZERO,
    "a huge answer": "def add(a, b): return 'x' * 10**9", "closes the pipes": "import os\nos.closerange(3, 60)\ndef add(a, b): return 5",
    "never answers": "def add(a, b):\n    while True: pass",
    "a hostile exception": "class E(Exception):\n    def __str__(self): import os; os._exit(0)\ndef add(a, b): raise E",
    "defines nothing": "", "does not compile": "def add(a, b:", "fails at once": "1 / 0"}


@pytest.mark.parametrize("name", FALSE_PASSES)
def test_tests_are_out_of_the_answers_reach(name):
    r = run_tests(FALSE_PASSES[name], TESTS, timeout=3.0, memory_mb=256)
    assert not r.ok, r


def test_an_honest_answer_passes_and_what_it_prints_is_kept():
    r = run_tests("def add(a, b):\n    print('adding')\n    return a + b", TESTS, **FAST)
    assert r.ok and r.stdout.startswith("adding\n"), r
    node = "class Node:\n    def __init__(self, v): self.v, self.next = v, None\ndef total(n): return n.v + (total(n.next) if n.next else 0)"
    assert run_tests(node, "N = _answer('Node')\na = N(1)\na.next = N(2)\nassert _answer('total')(a) == 3 and a.next.v == 2", **FAST).ok
    assert run_tests("def pairs(n): return ((i, {i}) for i in range(n))", "assert list(_answer('pairs')(2)) == [(0, {0}), (1, {1})]", **FAST).ok


def test_how_an_answer_fails_is_told():
    reason = lambda code, **more: (r := run_tests(code, TESTS, **(FAST | more))).reason + " " + r.detail
    assert reason("def add(a, b): return 0") == "exception AssertionError"
    assert reason("def add(a, b): raise ValueError('no')") == "exception ValueError: no"
    assert reason("import os\ndef add(a, b): os._exit(3)") == "exit ended with status 3 before the last test"
    assert reason("import ctypes\ndef add(a, b): ctypes.string_at(0)").startswith("crash SIG")
    assert reason("def add(a, b):\n    while True: pass", timeout=0.7).startswith("timeout")
    assert reason("def add(a, b): return [0] * 10**9").startswith("memory")


@pytest.mark.real
@pytest.mark.parametrize("benchmark, field", [("humaneval", "canonical_solution"), ("mbpp", "code")])
def test_reference_solutions_pass(benchmark, field):
    "Some of each, spread over the benchmark."
    task, records = TASKS[f"{benchmark}_generate"], read_jsonl(cached("benchmarks", benchmark))
    items = [(render(task, o), o[field]) for o in records[::23]]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda o: run_tests(o[0]["program"].replace("\0", o[1]), o[0]["tests"], timeout=30), items))
    assert all(o.ok for o in found), [o for o in found if not o.ok]


def test_environment_is_clean(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    r = run_sandboxed("import os, sys\nprint(sorted(os.environ), os.listdir('.'), sys.path, 'numpy' in sys.modules)", **FAST)
    assert r.ok and "SECRET_TOKEN" not in r.stdout and "HOME" in r.stdout and "site-packages" not in r.stdout
    assert not run_sandboxed("import torch", **FAST).ok


def test_no_descriptor_of_the_parent_leaks(tmp_path):
    with open(tmp_path / "f", "w") as f:
        os.set_inheritable(f.fileno(), True)
        r = run_sandboxed(f"import os\nos.fstat({f.fileno() + 40})", **FAST)
        names = run_sandboxed("import os, stat\nfor i in range(64):\n    try: print(i, stat.S_ISREG(os.fstat(i).st_mode))\n"
                              "    except OSError: pass", **FAST).stdout
    assert not r.ok and "True" not in names and [o.split()[0] for o in names.splitlines()][:3] == ['0', '1', '2']
    assert len(names.splitlines()) == 5  # and the two pipes


def test_sets_have_one_order():
    code = "print(list({'a', 'b', 'c', 'd', 'e', 'f'}))"
    assert run_sandboxed(code, **FAST).stdout == run_sandboxed(code, **FAST).stdout


def test_capabilities_are_gone():
    code = "import ctypes\nd = (ctypes.c_uint32 * 6)()\nh = (ctypes.c_uint32 * 2)(0x20080522, 0)\n" \
           "assert ctypes.CDLL(None).capget(h, d) == 0\nassert not any(d), list(d)"
    assert run_sandboxed(code, **FAST).ok


def test_from_many_threads():
    # A parent with threads is where unsafe work between fork and exec would hang.
    stop = threading.Event()
    busy = [threading.Thread(target=lambda: [None for _ in iter(stop.is_set, True)], daemon=True) for _ in range(2)]
    for t in busy: t.start()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: run_sandboxed(f"assert {i} % 2 == 0", timeout=30), range(12)))
    stop.set()
    assert [r.ok for r in results] == [i % 2 == 0 for i in range(12)]


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    before = set(os.listdir("/proc/self/fd"))
    for code in ("pass", "import time; time.sleep(60)", "import os; os._exit(0)"):
        run_sandboxed(code, timeout=0.3)
    assert list(tmp_path.iterdir()) == [] and len(set(os.listdir("/proc/self/fd"))) == len(before)
    here = [o for o in Path("/proc").glob("[0-9]*/cwd") if os.path.lexists(o) and str(tmp_path) in str(o.resolve())]
    assert here == []


def test_refuses_on_a_weaker_machine(monkeypatch):
    monkeypatch.setattr(sandbox, "missing_layers", lambda: ["landlock"])
    with pytest.raises(CalibPruneError, match="does not offer landlock"): run_sandboxed("pass")
    r = run_sandboxed("open('/etc/passwd').read()", allow_weaker=True)
    assert r.ok and r.missing == ("landlock",)


def test_a_layer_that_fails_is_an_error(monkeypatch):
    monkeypatch.setattr(sandbox, "readable_paths", lambda: ["/no/such/folder"])
    with pytest.raises(CalibPruneError, match="could not be set up.*no/such/folder"): run_sandboxed("pass")


@pytest.mark.skipif(os.getuid() != 0 or bool(subprocess.run(["setpriv", "--version"], capture_output=True).returncode),
                    reason="already an ordinary user")
def test_as_an_ordinary_user():
    # Capabilities are dropped before the test, so nothing in the sandbox can rest on the superuser's powers.
    code = "from calib_prune.evaluation.sandbox import run_sandboxed as r\n" \
           "print(r('pass').reason, r('open(\"/etc/passwd\")').reason, r('import os; os.fork()').reason)"
    out = subprocess.run(["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", sys.executable, "-c", code],
                         capture_output=True, text=True, cwd=Path(sandbox.__file__).parents[1])
    assert out.stdout.split() == ["passed", "exception", "exception"], out.stderr


HEADERS = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), Path("/usr/include/asm-generic/unistd.h")


@pytest.mark.skipif(not all(o.exists() for o in HEADERS), reason="the kernel's headers are not installed")
def test_numbers_of_system_calls_match_the_kernels_headers():
    x86, arm = (dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", o.read_text())) for o in HEADERS)
    for name, numbers in jail.DENIED.items():
        assert [str(o) for o in numbers if o is not None] == [o[name] for o in (x86, arm) if name in o], name
    rules = dict(zip(("fcntl", "ioctl", "prlimit64"), [o[0] for o in jail.DENIED_ARGUMENTS] + [jail.PRLIMIT], strict=True))
    for name, numbers in rules.items(): assert numbers == (int(x86[name]), int(arm[name]))
