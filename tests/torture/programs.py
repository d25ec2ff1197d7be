"""Hostile programs, run as a model's answers in the sandbox. None may pass, outlive its limits, or
leave a trace outside.

`poison` runs them. Everything here happens inside the sandbox with small limits, but for `escapes`,
which the self-tests give one harmless program.
"""
import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.torture import alone
from tests.torture.alone import SKIP, Results

SECRET = "torture-secret-77aa"
ANSWER = "\ndef add(a, b): return 0\n"  # what is wrong, whatever else a program does
TESTS = """
EXPECTED = "torture-expected-31c9"
def check(f):
    assert f(2, 3) == 5
    assert f([1], [2]) == [1, 2]
    assert f(EXPECTED, "") == EXPECTED
check(_answer('add'))
"""
HONEST = "def add(a, b): return a + b"


@dataclass(frozen=True)
class Place:
    "What a program may try to reach."
    folder: Path
    token: str  # in the name of whatever it may leave
    tcp: int
    udp: int

    def fill(self, program: str) -> str:
        for name, value in dict(
            FOLDER=self.folder, TCP=self.tcp, UDP=self.udp, TOKEN=self.token, PARENT=os.getpid()
        ).items():
            program = program.replace(f"<{name}>", str(value))
        return program


def does(act: str) -> str:
    "A program that does something, says so if it could, and then answers wrongly."
    body = "\n".join("    " + o for o in act.splitlines())
    return (
        f"try:\n{body}\n    print('DID')\nexcept BaseException as e: print('no', type(e))" + ANSWER
    )


def c_call(name: str, *args: str) -> str:
    "A call of the C library that must not succeed."
    return does(
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nr ="
        f" libc.{name}({', '.join(args)})\nassert r >= 0, os.strerror(ctypes.get_errno())"
    )


def system_call(x86: int, *args: str) -> str:
    "A system call by its number on x86-64 that must not succeed."
    return does(
        "import ctypes, os, platform\nassert platform.machine() == 'x86_64'\nlibc ="
        " ctypes.CDLL(None, use_errno=True)\nr ="
        f" libc.syscall({', '.join([str(x86), *args])})\nassert r >= 0,"
        " os.strerror(ctypes.get_errno())"
    )


LATER = "open('<FOLDER>/<TOKEN>', 'w')"
WRITE_ALL = (
    "import os\nfor fd in range(3, 60):\n    try: os.write(fd, DATA)\n    except OSError: pass\n"
)

ACTS = {  # name → program; all of these say DID if the act succeeds
    "fork": does("import os\nif os.fork() == 0:\n    import time; time.sleep(60)"),
    "fork bomb": does(
        "import os\nfor _ in range(8):\n    if os.fork() == 0:\n        import time;"
        " time.sleep(20); os._exit(0)"
    ),
    "double fork and a session": does(
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n       "
        " time.sleep(1)\n        "
        + LATER
        + "\n    os._exit(0)"
    ),
    "setsid": does("import os\nos.setsid()"),
    "a group of its own": does("import os\nos.setpgid(0, 0)"),
    "posix_spawn": does("import os\nos.posix_spawn('/bin/true', ['true'], {})"),
    "a program": does(
        "import subprocess\nsubprocess.run(['/bin/touch', '<FOLDER>/<TOKEN>'], check=True)"
    ),
    "a thread": does(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(20,),"
        " daemon=True).start()"
    ),
    "clone3": system_call(435, "bytes(88)", "88"),
    "vfork": c_call("vfork"),
    "write in the home folder": does("import os\nopen(os.path.expanduser('~/<TOKEN>'), 'w')"),
    "write in the working folder": does("open('<TOKEN>', 'w')"),
    "write outside": does(LATER),
    "write in /dev/shm": does("open('/dev/shm/<TOKEN>', 'w')"),
    "write in /tmp": does("open('/tmp/<TOKEN>', 'w')"),
    "fill the disk": does(
        "with open('/var/tmp/<TOKEN>', 'wb') as f:\n    for _ in range(64): f.write(bytes(1 << 20))"
    ),
    "fill a file without a name": does(
        "import os\nfd = os.open('.', os.O_TMPFILE | os.O_RDWR)\nos.write(fd, bytes(1 << 20))"
    ),
    "fill a pipe of memory": does(
        "import os\nfd = os.memfd_create('<TOKEN>')\nos.write(fd, bytes(1 << 20))"
    ),
    "a link out": does("import os\nos.symlink('<FOLDER>/secret.txt', '<FOLDER>/<TOKEN>')"),
    "remove": does("import os\nos.remove('<FOLDER>/secret.txt')"),
    "truncate": c_call("truncate", "b'<FOLDER>/secret.txt'", "0"),
    "change rights": does("import os\nos.chmod('<FOLDER>/secret.txt', 0)"),
    "read a secret": does("print(open('<FOLDER>/secret.txt').read())"),
    "read a secret by a link of /proc": does(
        "print(open('/proc/self/root<FOLDER>/secret.txt').read())"
    ),
    "read by a descriptor of the parent": does(
        "import os\nfor o in os.listdir('/proc/<PARENT>/fd'):"
        " print(os.readlink('/proc/<PARENT>/fd/' + o))"
    ),
    "read the parent's environment": does("print(open('/proc/<PARENT>/environ').read())"),
    "read the parent's memory": does("open('/proc/<PARENT>/mem', 'rb').read(1)"),
    "read the tests' process": does(
        "import os\nfor o in os.listdir('/proc'):\n    if o.isdecimal() and int(o) != os.getpid(): "
        "print(open(f'/proc/{o}/cmdline').read())"
    ),
    "read the package": does("import calib_prune"),
    "read passwords": does("open('/etc/shadow').read()"),
    "list the home folder": does("import os\nprint(os.listdir('<FOLDER>'))"),
    "a device": does("open('/dev/mem', 'rb').read(1)"),
    "a disk": does("import os\nos.open('/dev/vda', os.O_RDONLY)"),
    "a terminal": does("open('/dev/tty', 'w').write('<TOKEN>')"),
    "make a device": does("import os\nos.mknod('/dev/shm/<TOKEN>', 0o20666, 0x101)"),
    "TCP": does(
        "import socket\nsocket.create_connection(('127.0.0.1', <TCP>), 1).send(b'<TOKEN>')"
    ),
    "UDP": does(
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'<TOKEN>',"
        " ('127.0.0.1', <UDP>))"
    ),
    "a Unix socket": does(
        "import socket\ns ="
        " socket.socket(socket.AF_UNIX)\ns.connect('<FOLDER>/socket')\ns.send(b'<TOKEN>')"
    ),
    "an abstract socket": does(
        "import socket\ns ="
        " socket.socket(socket.AF_UNIX)\ns.connect('\\0<TOKEN>')\ns.send(b'<TOKEN>')"
    ),
    "a listening socket": does(
        "import socket\ns = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.listen()"
    ),
    "a raw socket": does("import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)"),
    "kill the parent": does("import os\nos.kill(os.getppid(), 0)"),
    "kill everything": does("import os\nos.kill(-1, 0)"),
    "kill the tests": does("import os, signal\nos.killpg(os.getppid(), signal.SIGCONT)"),
    "pidfd": system_call(434, "os.getppid()", "0"),
    "ptrace": c_call("ptrace", "16", "os.getppid()", "0", "0"),
    "the parent's memory by a call": system_call(
        310, "os.getppid()", "None", "0", "None", "0", "0"
    ),
    "limits of the parent": does(
        "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))"
    ),
    "higher limits": does(
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))"
    ),
    "priority": does("import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)"),
    "mount": c_call("mount", "b'none'", "b'/tmp'", "b'tmpfs'", "0", "None"),
    "umount": c_call("umount2", "b'/proc'", "2"),
    "chroot": does("import os\nos.chroot('/')"),
    "pivot_root": system_call(155, "b'/'", "b'/'"),
    "a new user": system_call(272, "0x10000000"),
    "setns": c_call("setns", "0", "0"),
    "io_uring": system_call(425, "4", "bytes(120)"),
    "keyctl": system_call(250, "0", "-1", "0"),
    "add_key": system_call(248, "b'user'", "b'<TOKEN>'", "b'x'", "1", "-4"),
    "bpf": system_call(321, "0", "bytes(72)", "72"),
    "perf_event_open": system_call(298, "bytes(112)", "0", "-1", "-1", "0"),
    "userfaultfd": system_call(323, "0"),
    "personality": system_call(135, "0x0040000"),
    "reboot": system_call(169, "0", "0", "0", "None"),
    "open_by_handle_at": system_call(303, "-100", "b'/'", "bytes(136)", "bytes(8)", "0"),
    "swapoff": c_call("swapoff", "b'/x'"),
    "a module of the kernel": system_call(175, "b''", "0", "b''"),
    "the clock": does("import time\ntime.clock_settime(0, time.time())"),
    "the name of the host": does("import socket\nsocket.sethostname('evil')"),
    "a message queue": c_call("msgget", "0x5f1c", "0o1666"),
    "shared memory": c_call("shmget", "0x5f1c", "4096", "0o1666"),
    "a queue of POSIX": c_call("mq_open", "b'/<TOKEN>'", "0o102", "0o600", "None"),
    "set-user-id": does("import os\nassert os.getuid() != 0\nos.setuid(0)"),
    "all capabilities": c_call("capset", "b'\\x22\\x05\\x08\\x20' + bytes(4)", "b'\\xff' * 24"),
    "typing into the terminal": does("import fcntl\nfcntl.ioctl(0, 0x5412, b'x')"),
    "signals by a file": does("import fcntl, os\nfcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())"),
    "names of files that others make": c_call("fanotify_init", "0x200", "0"),
    "a watched folder": c_call("inotify_init1", "0"),
    "signals by a folder": does(
        "import fcntl, os\nfcntl.fcntl(os.open(os.path.dirname(os.__file__), os.O_RDONLY),"
        " fcntl.F_NOTIFY, 4)"
    ),
    "a lease": does(
        "import fcntl, os\nfcntl.fcntl(os.open(os.__file__, os.O_RDONLY), fcntl.F_SETLEASE,"
        " fcntl.F_RDLCK)"
    ),
    "a lock": does(
        "import fcntl, os\nfcntl.flock(os.open(os.__file__, os.O_RDONLY), fcntl.LOCK_EX |"
        " fcntl.LOCK_NB)"
    ),
    "attributes of a file": does(
        "import fcntl, os\nfd = os.open('<FOLDER>/secret.txt', 3)\nprint('DID')\nfcntl.ioctl(fd,"
        " 0x40086602, bytes(8))"
    ),
    "a life after the parent": c_call("prctl", "1", "0"),
    "core dumps": c_call("prctl", "4", "1"),
    "orphans": c_call("prctl", "36", "1"),
    "where a link leads": does("import os\nprint(os.readlink('/proc/self/exe'))"),
    "a timer with any signal": c_call("timer_create", "0", "None", "bytes(8)"),
    "memory that stays": c_call("mlockall", "2"),
    "the 32-bit calls": does(
        "import ctypes, mmap, platform\nassert platform.machine() == 'x86_64'\nm = mmap.mmap(-1,"
        " 4096, prot=7)\nm.write(b'\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3')\nf ="
        " ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\nassert"
        " f() > 0"
    ),
    "the x32 calls": does(
        "import ctypes\nassert ctypes.CDLL(None, use_errno=True).syscall(0x40000000 + 39) > 0"
    ),
}

WASTES = {  # what uses up something; (program, reasons that are right)
    "endless loop": "while True: pass",
    "endless loop in the answer": "def add(a, b):\n    while True: pass",
    "a sleep": "import time\ntime.sleep(60)",
    "a sleep with closed pipes": "import os, time\nos.closerange(0, 64)\ntime.sleep(60)",
    "a pause": "import signal\nsignal.pause()",
    "ignored signals": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass"
    ),
    "blocked signals": (
        "import signal\nsignal.pthread_sigmask(signal.SIG_SETMASK, range(1, 65))\nwhile True: pass"
    ),
    "memory": "x = []\nwhile True: x.append(bytearray(10**6))",
    "memory at once": "x = bytearray(10**12)" + ANSWER,
    "memory that is mapped": (
        "import mmap\nx = []\nwhile True:\n    x.append(mmap.mmap(-1, 1 << 20)); x[-1].write(b'x' *"
        " (1 << 20))"
    ),
    "a long number": "x = 7\nwhile True: x = x * x",
    "a long text": "x = 'x' * 10**6\nwhile True: x = x + x",
    "endless output": "while True: print('x' * 1000)",
    "endless errors": "import sys\nwhile True: sys.stderr.write('x' * 1000)",
    "endless bytes": "import os\nwhile True: os.write(1, bytes(1 << 16))",
    "endless reports": (
        "while True:\n    " + WRITE_ALL.replace("DATA", "b'x' * 1000").replace("\n", "\n    ")
    ),
    "deep recursion": "def add(a, b): return add(a, b)",
    "deeper recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef add(a, b): return add(a, b)",
    "a deep list": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef add(a, b):\n    x = []\n    for _ in range(2"
        " * 10**5): x = [x]\n    return x"
    ),
    "a huge answer": "def add(a, b): return 'x' * 10**8",
    "an endless answer": "import itertools\ndef add(a, b): return itertools.count()",
    "an answer that never compares": (
        "class E:\n    def __eq__(self, o):\n        while True: pass\ndef add(a, b): return E()"
    ),
    "a slow pattern": "import re\ndef add(a, b): return re.match(r'(a+)+$', 'a' * 64 + 'b')",
    "all descriptors": "import os\nx = []\nwhile True: x.append(os.dup(1))",
    "a null pointer": "import ctypes\nctypes.string_at(0)",
    "an end by a signal": "import signal, os\nsignal.raise_signal(9)",
    "a stopped process": "import signal, time\nsignal.raise_signal(signal.SIGSTOP)\ntime.sleep(60)",
}

CHEATS = {  # what would pass without being right
    "sys.exit(0)": "import sys\nsys.exit(0)",
    "os._exit(0)": "import os\nos._exit(0)",
    "an exit in the answer": "def add(a, b): raise SystemExit(0)",
    "os._exit(0) in the answer": "import os\ndef add(a, b): os._exit(0)",
    "an exit at the end": "import atexit, os\natexit.register(os._exit, 0)" + ANSWER,
    "a forged message": "print('passed')\nprint('ready')\nimport sys\nsys.stdout.flush()" + ANSWER,
    "a forged report": WRITE_ALL.replace("DATA", "b'0' * 32 + b'passed\\n'") + "os._exit(0)",
    "forged replies": WRITE_ALL.replace("DATA", """b'{"value": {"i": "0x5"}}\\n' * 9""") + ANSWER,
    "forged replies of the past": (
        WRITE_ALL.replace(
            "DATA", """b'{"value": null}\\n{"value": {"o": 0}}\\n{"value": {"i": "0x5"}}\\n'"""
        )
        + "os._exit(0)"
    ),
    "a stolen secret": (
        "import os, signal\ndef late(*a): raise OSError\nsignal.signal(signal.SIGALRM, late)\nfor"
        " fd in range(3, 60):\n    try:\n        signal.setitimer(signal.ITIMER_REAL, 0.05)\n      "
        "  s = os.read(fd, 32)\n        signal.setitimer(signal.ITIMER_REAL, 0)\n    except"
        " OSError: continue\n    for out in range(3, 60):\n        try: os.write(out, s +"
        " b'passed\\n')\n        except OSError: pass\nos._exit(0)"
    ),
    "equal to anything": (
        "class E:\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\n   "
        " __hash__ = None\ndef add(a, b): return E()"
    ),
    "a number equal to anything": (
        "class E(int):\n    def __eq__(self, o): return True\ndef add(a, b): return E(7)"
    ),
    "a text equal to anything": (
        "class E(str):\n    def __eq__(self, o): return True\n    def __hash__(self): return 1\ndef"
        " add(a, b): return E('x')"
    ),
    "a list equal to anything": (
        "class E(list):\n    def __eq__(self, o): return True\ndef add(a, b): return E([7])"
    ),
    "a float between": (
        "class E(float):\n    def __eq__(self, o): return True\n    def __sub__(self, o): return"
        " 0.0\n    __rsub__ = __sub__\ndef add(a, b): return E(7)"
    ),
    "unittest.mock.ANY": "from unittest.mock import ANY\ndef add(a, b): return ANY",
    "no assertions": "import builtins\nbuiltins.AssertionError = SystemExit" + ANSWER,
    "other builtins": (
        "import builtins\nbuiltins.len = builtins.abs = builtins.sum = lambda *a:"
        " 5\nbuiltins.isinstance = lambda *a: True"
        + ANSWER
    ),
    "no exceptions": (
        "import builtins\nbuiltins.BaseException = builtins.Exception = ValueError" + ANSWER
    ),
    "optimised": (
        "import sys\nsys.flags = type('F', (), {'optimize': 2})()\n__debug__ if True else 0"
        + ANSWER
    ),
    "another check": ANSWER + "def check(f): pass\n_answer = None\nTESTS = ''",
    "another compile": (
        "import builtins\nbuiltins.compile = lambda *a, **k: 'pass'\n"
        "builtins.exec = lambda *a, **k: None"
        + ANSWER
    ),
    "another os": (
        "import os\nos.write = os.read = lambda *a: b''\nos._exit = lambda c: None" + ANSWER
    ),
    "another json": (
        "import json\njson.loads = lambda *a, **k: {'value': 5}\njson.dumps = lambda *a, **k:"
        " '{\"value\": {\"i\": \"0x5\"}}'"
        + ANSWER
    ),
    "frames": (
        "import sys\ndef add(a, b):\n    f = sys._getframe()\n    while f:\n        for k, v in"
        " list(f.f_locals.items()):\n            if k == 'finish': v(b'passed')\n        f ="
        " f.f_back\n    return 0"
    ),
    "all objects": (
        "import gc\ndef add(a, b):\n    for o in gc.get_objects():\n        if getattr(o,"
        " '__name__', '') in ('finish', 'jail_main'): o(b'passed')\n    return 0"
    ),
    "a traced run": (
        "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)" + ANSWER
    ),
    "a hook": (
        "import sys\nsys.excepthook = sys.unraisablehook = lambda *a:"
        " __import__('os')._exit(0)\n1 / 0"
    ),
    "an open string": ANSWER + 'x = """',
    "a comment without an end": ANSWER + "#\\",
    "an end of the file": ANSWER + "\x1a\x00",
    "text that ends the program": ANSWER + "\n\0\n_answer = lambda n: (lambda a, b: a + b)\n",
    "a hostile exception": (
        "class E(BaseException):\n    def __str__(self): __import__('os')._exit(0)\ndef add(a, b):"
        " raise E"
    ),
    "an exception that is caught": "def add(a, b): raise GeneratorExit",
    "a keyboard": "def add(a, b): raise KeyboardInterrupt",
    "what the tests expect": (
        "import gc, sys\ndef add(a, b):\n    found = [o for o in gc.get_objects() if 'EXPECTED' in"
        " str(o)[:9999]]\n    return found and 5 or 0"
    ),
    "it learns from its calls": (
        "calls = []\ndef add(a, b):\n    calls.append((a, b))\n    return 5"
    ),
    "pickled": (
        "class E:\n    def __reduce__(self): return (open, ('<FOLDER>/<TOKEN>', 'w'))\ndef add(a,"
        " b): return E()"
    ),
    "a name that leads elsewhere": (
        "class M(type):\n    def __call__(self, *a): return 5\n    __eq__ = lambda s, o: True\n   "
        " __hash__ = None\nclass add(metaclass=M): pass"
    ),
    "it defines nothing": "",
    "it does not compile": "def add(a, b:",
    "it is binary": "\x00\x01\x02",
    "it is no Unicode": "x = '\ud800'" + ANSWER,
}

HARMLESS = {
    "right": HONEST,
    "right, and it prints": "print('hello')\n" + HONEST,
    "right, by classes": "class A:\n    def __call__(s, a, b): return a + b\nadd = A()",
    "right, with the library": (
        "import math, re, json, collections, heapq, decimal, random, hashlib\n" + HONEST
    ),
    "right, after a failed attempt": (
        does("open('/etc/passwd')").replace("return 0", "return a + b").replace("DID", "did")
    ),
}


def children(of: int) -> set[int]:
    "All processes below one."
    parents: dict[int, list[int]] = {}
    for o in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents.setdefault(
                int((o / "stat").read_text().rpartition(")")[2].split()[1]), []
            ).append(int(o.name))
    found, todo = set(), [of]
    while todo: found |= set(new := parents.get(todo.pop(), [])); todo += new
    return found


@contextlib.contextmanager
def place(folder: Path):
    "Secrets to find and sockets to reach."
    (folder / "secret.txt").write_text(SECRET)
    os.environ.update(HOME=str(folder), TORTURE_TOKEN=SECRET)
    tempfile.tempdir = str(folder / "tmp")
    (folder / "tmp").mkdir()
    token = f"torture-canary-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        def listening(kind, sort, where):
            s = stack.enter_context(socket.socket(kind, sort))
            s.bind(where)
            if sort == socket.SOCK_STREAM: s.listen()
            s.setblocking(False)
            return s
        os.chdir(folder)  # names of sockets are short
        tcp = listening(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0))
        udp = listening(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0))
        unix = [listening(socket.AF_UNIX, socket.SOCK_STREAM, o) for o in ("socket", f"\0{token}")]
        yield Place(folder, token, tcp.getsockname()[1], udp.getsockname()[1]), (tcp, udp, *unix)


def traces(folder: Path, token: str, sockets) -> str:
    "What a program left outside; empty if nothing."
    for where in (folder, folder / "tmp", Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"),
                  Path("/dev/mqueue")):
        if where.is_dir() and any(token in o.name for o in where.iterdir()):
            return f"a file in {where}"
    if not (folder / "secret.txt").is_file() or (folder / "secret.txt").read_text() != SECRET:
        return "a file was changed"
    if (folder / "secret.txt").stat().st_mode & 0o777 != 0o644:
        return "the rights of a file were changed"
    if any((folder / "tmp").iterdir()):
        return f"temporary files: {[o.name for o in (folder / 'tmp').iterdir()]}"
    for s in sockets:
        with contextlib.suppress(BlockingIOError):
            s.recv(1) if s.type == socket.SOCK_DGRAM else s.accept()
            return "a message came through a socket"
    if alive := children(os.getpid()): return f"{len(alive)} processes are left"
    return ""


def sandboxed(program: str, kind: str, timeout: float):  # how it ended
    "A program as an answer with tests, or alone."
    from calib_prune.evaluation.sandbox import run_sandboxed, run_tests
    if kind == "alone":
        return run_sandboxed(program + "\nassert False, 'the end'", timeout, 256, 20_000)
    return run_tests(program, TESTS, timeout, 256, 20_000)


def tried(
    name: str,
    program: str,
    kind: str,
    folder: Path,
    passes: bool = False,
    timeout: float = 5.0,
    run=sandboxed,
) -> str:
    "In a fork: run a program and look at everything around it. What is wrong; empty if nothing."
    # what loses its parent becomes a child of this process, and is seen
    ctypes.CDLL(None).prctl(36, 1)
    os.umask(0o022)
    with place(folder) as (where, sockets):
        began = time.monotonic()
        found = run(where.fill(program), kind, timeout)
        took = time.monotonic() - began
        time.sleep(0.05)
        left = traces(folder, where.token, sockets)
        for o in children(os.getpid()):
            with contextlib.suppress(OSError): os.kill(o, signal.SIGKILL)
    if left: return left
    said = found.stdout + found.stderr + found.detail
    if SECRET in said: return "a secret was read"
    if "DID" in found.stdout.split(): return f"it could do it: {found.stdout[-100:]}"
    if found.ok != passes: return f"ok is {found.ok}: {found.reason} {found.detail[-200:]}"
    if len(found.stdout) > 20_000 or len(found.stderr) > 20_000: return "its output is too long"
    if took > timeout + 4: return f"it took {took:.1f} s with a limit of {timeout} s"
    return ""


def without_a_sandbox(program: str, kind: str, timeout: float):
    "For self-tests, with harmless programs only: the same without any protection."
    from calib_prune.evaluation.sandbox import SandboxResult
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], capture_output=True, text=True, timeout=timeout
    )
    return SandboxResult(done.returncode == 0, "passed" if done.returncode == 0 else "exit", "",
                         done.stdout, done.stderr, 0)


def one(name: str, program: str, kind: str, passes: bool, timeout: float, run=sandboxed) -> str:
    "A try in a fork and a folder of its own."
    with alone.scratch() as folder:
        folder.chmod(0o755)
        ended = alone.in_fork(
            lambda: tried(name, program, kind, folder, passes, timeout, run), timeout + 25, None
        )
    return ended.fault[-400:] if ended.fault else ended.value


def programs(short: bool, rng: random.Random) -> Results:
    from calib_prune.evaluation.sandbox import missing_layers
    if lacks := missing_layers():
        yield (
            "programs",
            "all",
            (
                f"{SKIP}the kernel offers no {' and no '.join(lacks)}, so the sandbox refuses to"
                " run anything"
            ),
        )
        return
    for group, kinds, passes, timeout, few in (
        (ACTS, ("answer", "alone"), False, 5.0, 28),
        (WASTES, ("answer", "alone"), False, 0.8, 8),
        (CHEATS, ("answer",), False, 3.0, 14),
        (HARMLESS, ("answer",), True, 20.0, 2),
    ):
        tries = [(name, kind) for name in group for kind in kinds if alone.wanted(name)]
        if short: tries = sorted(rng.sample(tries, min(few, len(tries))))
        for name, kind in tries:
            limit = 10.0 if "memory" in name or "long" in name else timeout
            yield "programs", f"{name} ({kind})", one(name, group[name], kind, passes, limit)
