"""Kernels that are forked: like those that are started from nothing, apart from each other, and no less clear when they die."""
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "book"))

import build  # noqa: E402
import kernels  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux only")


@pytest.fixture(scope="module")
def env():
    """The environment of a build, while a module's tests run."""
    before, kept = dict(os.environ), dict(kernels._sources)
    kernels._sources.clear()
    with tempfile.TemporaryDirectory() as place:
        os.environ.update(build.child_environment(Path(place) / "runs", Path(place) / "private"))
        os.environ.pop("MPLBACKEND", None)
        yield dict(os.environ)
        kernels.close()
    os.environ.clear()
    os.environ.update(before)
    kernels._sources.update(kept)


@pytest.fixture
def execute(tmp_path, env):
    """The outputs of a notebook with these cells, as text, and the error that `build.execute` gives."""
    def done(*cells):
        path, target = tmp_path / "a.ipynb", tmp_path / "done.ipynb"
        nbformat.write(v4.new_notebook(cells=[v4.new_code_cell(source) for source in cells]), path)
        target.unlink(missing_ok=True)
        error = build.execute("a", path, target, ())[2]
        outputs = [o for c in nbformat.read(target, 4).cells for o in c.outputs] if target.exists() else []
        return "".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs), error
    return done


SEEN = """import os, sys, signal, json, threading
hidden = ("JPY_PARENT_PID", "JPY_SESSION_NAME")
print(json.dumps([sys.path, {k: v for k, v in os.environ.items() if k not in hidden}, os.getcwd(), sys.argv[0], __name__,
      [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)], os.getsid(0) == os.getpid(),
      sorted(m for m in sys.modules if m.startswith(("repspace", "build", "forks"))), sorted(t.name.split("-")[0] for t in threading.enumerate()),
      os.read(0, 9).decode(), sys.flags.safe_path, str(sys.excepthook).split(" at ")[0]]))"""


def test_a_forked_kernel_is_like_any_other(execute, monkeypatch):
    backend = "import matplotlib; print([matplotlib.rcParams['backend'], matplotlib.get_backend()])"
    forked = [execute(SEEN), execute(backend)]
    assert kernels._sources[kernels.READING][1] is not None
    monkeypatch.setattr(kernels.Forked, "_forked", lambda *_: None)
    started = [execute(SEEN), execute(backend)]
    assert json.loads(forked[0][0]) == json.loads(started[0][0])
    assert forked[1] == started[1] and forked[0][1] is started[0][1] is None


def test_nothing_of_another_notebook_is_there(execute):
    seen = ("import os, builtins, numpy, pandas, matplotlib, random, tempfile\n"
            "print([hasattr(m, 'left') for m in (builtins, numpy, pandas)], os.environ.get('LEFT'), matplotlib.rcParams['font.size'],\n"
            "      pandas.get_option('display.max_rows'), os.path.basename(os.getcwd()) == 'elsewhere')")
    before, _ = execute(seen)
    execute("import os, builtins, numpy, pandas, matplotlib\nfor m in (builtins, numpy, pandas): m.left = 1\nos.environ['LEFT'] = '1'\n"
            "matplotlib.rcParams['font.size'] = 30; pandas.set_option('display.max_rows', 3)\nos.makedirs('elsewhere'); os.chdir('elsewhere')")
    assert execute(seen)[0] == before
    drawn = "import random, numpy; print(random.random(), numpy.random.rand(), numpy.random.default_rng().random())"
    one, other = (execute(drawn)[0].split() for _ in range(2))
    assert not set(one) & set(other)


def test_what_is_forked_holds_no_threads(env):
    source = kernels.Source(kernels.MEASURING, env)
    assert list(Path(f"/proc/{source.process.pid}/task").iterdir()) == [Path(f"/proc/{source.process.pid}/task/{source.process.pid}")]
    source.close()
    with pytest.raises(kernels.Lost, match="its threads would be lost"):
        kernels.Source(("concurrent.futures.thread", "threaded"), env | {"PYTHONPATH": str(_threaded())})


def _threaded():
    folder = Path(tempfile.mkdtemp())
    (folder / "threaded.py").write_text("import threading, time; threading.Thread(target=time.sleep, args=[60], daemon=True).start()")
    return folder


@pytest.mark.parametrize("forked", [True, False])
def test_a_kernel_that_dies_is_reported_as_ever(execute, monkeypatch, forked):
    if not forked:
        monkeypatch.setattr(kernels.Forked, "_forked", lambda *_: None)
    start = time.monotonic()
    _, error = execute("1", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert error == "DeadKernelError: Kernel died" and time.monotonic() - start < 60
    _, error = execute("1", "import os; os._exit(3)")
    assert error == "DeadKernelError: Kernel died"
    assert execute("print(1)") == ("1\n", None)


def test_kernels_are_started_as_ever_where_none_can_be_forked(execute, monkeypatch, caplog):
    execute("1")
    source = kernels._sources[kernels.READING][1]
    os.kill(source.process.pid, signal.SIGKILL)
    source.process.wait()
    assert execute("print(1)") == ("1\n", None) and "a kernel is started as ever" in caplog.text
    assert execute("print(1)") == ("1\n", None) and kernels._sources[kernels.READING][1] not in (None, source)
    monkeypatch.setattr(kernels.Forked, "modules", ("a_module_that_is_not_there",))
    assert execute("print(1)") == ("1\n", None) and "every kernel imports by itself (it has ended)" in caplog.text


def test_a_kernel_dies_with_what_it_was_forked_from(execute):
    source = kernels.Source(("ipykernel.kernelapp",), dict(os.environ))
    kernel = source.fork(["x", "-f", tempfile.mktemp()], None, dict(os.environ))
    assert kernel.poll() is None
    os.kill(source.process.pid, signal.SIGKILL)
    source.process.wait()
    assert kernel.wait(5) == -signal.SIGKILL
    assert _is_gone(kernel.pid)


def _is_gone(pid):
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_kernels_end_with_the_process_that_wanted_them(env):
    code = (f"import sys, os, json; sys.path.insert(0, {str(ROOT / 'book')!r}); import kernels\n"
            "source = kernels.Source(('ipykernel.kernelapp',), dict(os.environ))\n"
            "print(json.dumps([source.process.pid, source.fork(['x', '-f', '/dev/null/x'], None, dict(os.environ)).pid]), flush=True)\n"
            "sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        pids = json.loads(process.stdout.readline())
        process.kill()
    assert all(map(_is_gone, pids))


def test_notebooks_that_speak_of_torch_get_it():
    assert kernels.manager_for("import numpy").provisioned.modules == kernels.READING
    assert "torch" in kernels.manager_for("import torch").provisioned.modules
