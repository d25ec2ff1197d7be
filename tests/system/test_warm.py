"""Programs in forks of a warm process are what they would be in a fresh one: exit, signals,
environment, threads, kernels."""
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

from calib_prune.study.preload import warm_process
from calib_prune.warm import PLACE, THREADS, listen
from tests import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="warm processes need Linux")

SERVER = """
import os, random, socket, sys
from calib_prune.warm import serve
def prepare():
    {prepare}
    os.environ["MADE_BY_IMPORT"] = "yes"
serve(socket.socket(fileno=int(sys.argv[1])), prepare, lambda env: None)
"""
PROGRAM = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
do, *more = sys.argv[1:]
if do == "say": print(json.dumps([os.getppid(), sys.argv, os.getcwd(), dict(os.environ), sys.path[0], __name__])); print("late", file=sys.stderr)
if do == "read": print(sys.stdin.read().upper())
if do == "exit": sys.exit(eval(more[0]))
if do == "raise": raise ValueError("broken")
if do == "die": os.kill(os.getpid(), int(more[0]))
if do == "atexit":
    import atexit; atexit.register(print, "registered")
if do == "wait":  # with a child of its own
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    signal.signal(signal.SIGINT, lambda *_: (print("interrupted", flush=True), sys.exit(7)))
    Path(more[0]).write_text(f"{os.getpid()} {child.pid} {os.getppid()}")
    time.sleep(60)
"""  # noqa: E501


@pytest.fixture(scope="module", autouse=True)
def interrupts_are_heeded():
    """A shell without job control starts what runs in the background with SIGINT ignored, and
    children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    here = tmp_path_factory.mktemp("warm")
    (here / "program.py").write_text(PROGRAM)
    return here


ENV = {k: v for k, v in os.environ.items() if k not in THREADS}


@contextmanager
def server(folder, name="socket", prepare="pass"):
    "A warm process that imports nothing."
    with listen(str(folder / name)) as listener, open(folder / f"{name}.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c",
             SERVER.format(prepare=prepare),
             str(listener.fileno())],
            cwd=folder,
            env=ENV,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=[listener.fileno()])
    process.place = str(folder / name)
    try: yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()


@pytest.fixture(scope="module")
def warm(folder):
    with server(folder) as process: yield process


def client(place, *argv, cwd, module="program", **env):
    more = {PLACE: place} if place else {}
    return subprocess.Popen(
        [sys.executable, "-m", "calib_prune.warm", "-m", module, *argv],
        cwd=cwd,
        env=ENV | more | env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process, typed=""):
    out, err = process.communicate(typed, timeout=30)
    return process.returncode, out, err


def gone(pid, seconds=10):
    "Does a process end within some seconds?"
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try: state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError): return True
        if state == "Z": return True
        time.sleep(.02)
    return False


def parts(place, folder, note, **env):
    "A client whose program waits, and the numbers of the program, its child, and its parent."
    process = client(place, "wait", str(note), cwd=folder, **env)
    until = time.monotonic() + 20
    while not (note.is_file() and note.read_text()):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    return process, *map(int, note.read_text().split())


@pytest.mark.parametrize("do", [("exit", "0"), ("exit", "3"), ("exit", "None"),
                                ("exit", "'a message'"), ("exit", "300"), ("raise", ), ("atexit", ),
                                ("die", "9"), ("die", "15"), ("say", )],
                         ids=" ".join)
def test_a_program_ends_warm_as_it_does_cold(warm, folder, do):
    cold, hot = (ended(client(place, *do, cwd=folder)) for place in ("", warm.place))
    assert hot[0] == cold[0]
    last = lambda text: text.strip().splitlines()[-1:]
    assert last(hot[2]) == last(cold[2])
    if do != ("say",): assert hot[1] == cold[1]


def test_a_program_sees_what_a_fresh_one_sees(warm, folder):
    env = {"CALIB_PRUNE_PROGRESS": "some file"} | dict.fromkeys(THREADS, "3")
    (parent, *hot), (other, *cold) = (
        json.loads(ended(client(o, "say", "ä", "", cwd=folder, **env))[1]) for o in (warm.place, "")
    )
    assert parent != other
    assert hot[2].pop("MADE_BY_IMPORT") == "yes", "what the imports set is kept"
    assert hot[2].pop(PLACE) == warm.place
    assert hot == cold


def test_a_program_has_the_clients_files(warm, folder):
    assert ended(client(warm.place, "read", cwd=folder), "some text") == (0, "SOME TEXT\n", "")


def is_warm(process): return "MADE_BY_IMPORT" in json.loads(ended(process)[1])[3]


@pytest.mark.parametrize("env", [
    dict(HF_HUB_OFFLINE="another"),
    dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="2"),
    dict(OMP_NUM_THREADS="0"),
    dict(OMP_NUM_THREADS="2,1"),
    dict(MKL_NUM_THREADS="1"),
    dict(TMPDIR="/var/tmp"),
    dict(NEW="1")],
                         ids=str)
def test_what_a_fork_cannot_take_over_starts_cold(warm, folder, env):
    assert is_warm(client(warm.place, "say", cwd=folder))
    assert not is_warm(client(warm.place, "say", cwd=folder, **env))


def test_another_folder_starts_cold(warm, folder, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    assert not is_warm(client(warm.place, "say", cwd=tmp_path))


def test_the_log_names_variables_but_not_their_values(folder):
    with server(folder, "s1") as process:
        assert not is_warm(client(process.place, "say", cwd=folder, A_TOKEN="a secret"))
    said = (folder / "s1.log").read_text()
    assert "A_TOKEN" in said and "a secret" not in said


def test_no_warm_process_starts_cold(folder, tmp_path):
    assert not is_warm(client(str(tmp_path / "nothing"), "say", cwd=folder))
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / "left"))
    left.close()
    assert not is_warm(
        client(str(tmp_path / "left"), "say", cwd=folder)
    ), "a socket that nobody listens to"


@pytest.mark.parametrize(
    "prepare", ["sys.exit('no')", "raise ImportError", "os.kill(os.getpid(), 9)"]
)
def test_a_warm_process_that_fails_costs_nothing(folder, tmp_path, prepare):
    with server(tmp_path, prepare=f"import time; time.sleep(.5); {prepare}") as process:
        (tmp_path / "program.py").write_text(PROGRAM)
        assert not is_warm(
            client(process.place, "say", cwd=tmp_path)
        ), "the client came during the imports"


def test_a_client_that_comes_early_waits(folder):
    with server(folder, "s2", prepare="import time; time.sleep(1)") as process:
        assert is_warm(client(process.place, "say", cwd=folder))


@pytest.mark.parametrize(
    "number, code, out", [(signal.SIGINT, 7, "interrupted\n"), (signal.SIGTERM, -15, "")]
)
def test_signals_reach_the_program(warm, folder, tmp_path, number, code, out):
    process, program, child, _ = parts(warm.place, folder, tmp_path / "note")
    process.send_signal(number)
    assert ended(process)[:2] == (code, out)
    assert gone(program) and gone(child), "its children too"


@pytest.mark.parametrize("who", ["client", "supervisor"])
def test_a_program_ends_with_its_client_and_its_supervisor(warm, folder, tmp_path, who):
    process, program, child, supervisor = parts(warm.place, folder, tmp_path / "note")
    os.kill(process.pid if who == "client" else supervisor, signal.SIGKILL)
    assert gone(program)
    if who == "client": assert gone(child) and gone(supervisor)
    else: os.kill(child, signal.SIGKILL)  # nobody else knows it
    code, _, err = ended(process)
    if who == "supervisor": assert code == 1 and "was killed from outside" in err and PLACE in err
    assert is_warm(client(warm.place, "say", cwd=folder)), "the others go on"


def test_a_running_program_outlives_the_warm_process(folder, tmp_path):
    with server(folder, "s3") as process:
        started, program, *_ = parts(process.place, folder, tmp_path / "note")
    assert not gone(program, .3)
    started.send_signal(signal.SIGINT)
    assert ended(started)[0] == 7


def test_the_warm_process_ends_with_its_input_and_takes_its_socket_along(folder):
    with server(folder, "s4") as process:
        assert is_warm(client(process.place, "say", cwd=folder))
        process.stdin.close()
        assert process.wait(10) == 0 and not (folder / "s4").exists()


def test_the_socket_is_this_users(warm, folder):
    assert stat.S_IMODE(os.stat(warm.place).st_mode) == 0o600


def test_many_at_once(warm, folder):
    found = [ended(o) for o in [client(warm.place, "exit", str(n), cwd=folder) for n in range(8)]]
    assert [o[0] for o in found] == [*range(8)]


def test_nonsense_breaks_nothing(warm, folder):
    for data in (b"", b"x", b"\0\0\0\5hallo", b"\xff" * 9):
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(warm.place)
            s.sendall(data)
    assert is_warm(client(warm.place, "say", cwd=folder))


# --- the real thing: kernels

FACTS = """
import json, locale, logging, os, sys, warnings
import IPython, matplotlib, numpy, pandas, torch, tqdm.auto, threadpoolctl
from matplotlib import pyplot as plt
from calib_prune.evaluation.scoring import evaluate
from calib_prune.kernels.compiled import threads
free = {"JPY_SESSION_NAME", "JPY_PARENT_PID", "CALIB_PRUNE_WARM"}
facts = dict(
    environment={k: v for k, v in os.environ.items() if k not in free}, path=sys.path, folder=os.getcwd(), python=sys.executable,
    pandas={k: str(pandas.get_option(k)).lower() for k in pandas._config.config._registered_options},
    bars=str(tqdm.auto.tqdm), matplotlib={k: str(v) for k, v in matplotlib.rcParams.items()}, locale=locale.setlocale(locale.LC_ALL),
    logging=[logging.root.level, str(logging.root.handlers)], flags=str(sys.flags),
    threads=[torch.get_num_threads(), torch.get_num_interop_threads(), threads()],
    pools=sorted((o["internal_api"], o["num_threads"]) for o in threadpoolctl.threadpool_info()))
print(json.dumps(facts))
"""  # noqa: E501
CHANCE = (
    "import random; print(json.dumps([random.random(), float(numpy.random.rand()),"
    " torch.rand(1).item()]))"
)
DRAWN = "plt.plot([1, 3, 2]); plt.show()"
HAD = "import sys; print(json.dumps('transformers.modeling_utils' in sys.modules))"


def papermill(folder, name, place, threads=""):
    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(o) for o in (f"import json\n{HAD}", FACTS, CHANCE, DRAWN)]
    )
    book.metadata["kernelspec"] = dict(name="python3", display_name="python3", language="python")
    nbformat.write(book, folder / "book.ipynb")
    env = dict(OMP_NUM_THREADS=threads) if threads else {}
    return client(
        place,
        "--no-progress-bar",
        str(folder / "book.ipynb"),
        str(folder / f"{name}.ipynb"),
        cwd=ROOT,
        module="papermill",
        **env,
    )


def shown(folder, name, process):
    code, _, err = ended(process)
    assert not code, err
    had, facts, chance, drawn = (
        o.outputs for o in nbformat.read(folder / f"{name}.ipynb", 4).cells
    )
    return *(json.loads(o[0].text) for o in (had, facts, chance)), drawn[0].data["image/png"]


def test_notebooks_run_warm_as_they_do_cold(tmp_path, monkeypatch):
    # other tests may have imported what sets variables
    for name in os.environ.keys() - ENV.keys(): monkeypatch.delenv(name)
    for name in (*THREADS, "PYTEST_CURRENT_TEST"): monkeypatch.delenv(name, raising=False)
    cold = papermill(tmp_path, "cold", "", "1")
    with warm_process(ROOT, tmp_path / "warm.log") as env:
        place = env[PLACE]
        assert stat.S_IMODE(os.stat(Path(place).parent).st_mode) == 0o700
        # two and more at once
        runs = {n: papermill(tmp_path, f"warm{n}", place, n) for n in ("1", "2", "")}
        found = {n: shown(tmp_path, f"warm{n}", o) for n, o in runs.items()}
    assert not Path(place).parent.exists()
    said = (tmp_path / "warm.log").read_text()
    assert "modules are ready" in said and "cold" not in said
    had, facts, chance, drawn = shown(tmp_path, "cold", cold)
    assert not had and all(o[0] for o in found.values())
    assert found["1"][1] == facts and found["1"][3] == drawn
    assert (
        len({str(o[2]) for o in found.values()} | {str(chance)}) == 4
    ), "no two draw the same random numbers"
    assert len({n for o in found.values() for n in o[2]}) == 9
    for n in ("2", ""):
        code = (
            "import torch; from calib_prune.kernels.compiled import threads;"
            " print(torch.get_num_threads(), threads())"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=ENV | (dict(OMP_NUM_THREADS=n) if n else {}),
            capture_output=True,
            text=True,
        )
        assert [*map(int, done.stdout.split())] == [
            found[n][1]["threads"][0],
            found[n][1]["threads"][2],
        ]


def test_a_study_goes_on_without_its_warm_process(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no python"))
    with warm_process(ROOT, tmp_path / "warm.log") as env: assert env == {}
    assert "no python" in (tmp_path / "warm.log").read_text()
