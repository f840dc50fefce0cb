"""Kernels that are forked from a process which has imported what most notebooks begin with importing.

A kernel needs seconds for these imports, a fork takes none. Where a process cannot be forked (other systems than Linux),
or threads would be lost in it, or it is gone, kernels are started as ever: only the time is another.
"""
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from multiprocessing.util import Finalize
from pathlib import Path
from uuid import uuid4

from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner

log = logging.getLogger(__name__)
PROGRAM = Path(__file__).with_name("forks.py")
PATIENCE = 180   # seconds for the imports
READING = ("ipykernel.kernelapp", "ipykernel.ipkernel", "IPython.core.completer", "numpy", "pandas", "pyarrow.parquet", "safetensors.numpy", "yaml",
           "matplotlib.pyplot", "matplotlib.backends.backend_svg", "seaborn", "scipy.stats", "scipy.optimize", "sklearn.datasets",
           "sklearn.model_selection")
MEASURING = (*READING, "torch", "torchvision")


class Lost(OSError):
    """The process that is forked is gone, or does not answer."""


class Fork:
    """A kernel that was forked, in the place of a `Popen`: its parent is another process, which says when it has ended."""
    stdin = stdout = stderr = None

    def __init__(self, source, pid):
        self.source, self.pid = source, pid

    def poll(self):
        return self.source.ended(self.pid)

    def wait(self, timeout=None):
        end = time.monotonic() + (timeout or float("inf"))
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"kernel {self.pid}", timeout)
            time.sleep(0.02)
        return code

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def terminate(self):
        self.send_signal(signal.SIGTERM)


class Source:
    """A process that has imported `modules` in the environment `env`, and is forked into kernels."""

    def __init__(self, modules, env):
        self.line, theirs = socket.socketpair()
        self.codes, self.started, self.rest, self.gone = {}, set(), b"", False
        # Matplotlib reads when it is imported which backend there is: in a kernel, the one that IPython has for it.
        # The allocator of Arrow would keep a thread, which a fork loses.
        own = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"} | env | {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
        with theirs:
            self.process = subprocess.Popen([sys.executable, PROGRAM, str(theirs.fileno()), *modules], env=own, cwd="/",
                                            stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True)
        try:
            threads = self._next("ready", PATIENCE)
            if threads:
                raise Lost(f"its threads would be lost: {', '.join(threads)}")
        except Lost:
            self.close()
            raise

    def close(self):
        """Let it end, and with it the kernels that run."""
        self.gone = True
        self.line.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _receive(self, timeout):
        """Take in what was said within `timeout` seconds; `Lost` where nothing will be."""
        self.line.settimeout(timeout or 1e-6)
        try:
            received = self.line.recv(65536)
        except TimeoutError:
            return []
        except OSError as error:
            raise Lost(str(error)) from error
        if not received:
            raise Lost("it has ended")
        *lines, self.rest = (self.rest + received).split(b"\n")
        said = [json.loads(line) for line in lines]
        for words in said:
            if "started" in words:   # the number may be that of one before
                self.codes.pop(words["started"], None)
            if "ended" in words:
                self.codes[words["ended"]] = words["code"]
        return said

    def _next(self, what, timeout):
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0:
            for words in self._receive(left):
                if what in words:
                    return words[what]
            if self.codes.keys() - self.started:
                raise Lost("a kernel ended as it began")
        raise Lost(f"it is silent for {timeout} s")

    def fork(self, argv, cwd, env):
        """A new kernel, as a `Fork`; `Lost` where there is none."""
        try:
            self.line.settimeout(PATIENCE)
            self.line.sendall(json.dumps({"argv": argv, "cwd": str(cwd or os.getcwd()), "env": env}).encode() + b"\n")
        except OSError as error:
            raise Lost(str(error)) from error
        self.started.add(pid := self._next("started", PATIENCE))
        return Fork(self, pid)

    def ended(self, pid):
        """The exit code of the kernel `pid`, None while it runs; where nobody can say any more, it is killed."""
        try:
            while not self.gone and pid not in self.codes and self._receive(0):
                pass
        except Lost:
            self.gone = True
        if self.gone and pid not in self.codes:
            with suppress(OSError):
                os.killpg(pid, signal.SIGKILL)
            self.codes[pid] = -signal.SIGKILL
        return self.codes.get(pid)


_sources = {}   # by the modules: (environment, Source), or None in the place of a source that could not be had


def close():
    """End all sources."""
    for _, found in _sources.values():
        if found:
            found.close()
    _sources.clear()


Finalize(None, close, exitpriority=1)   # at the end of a worker too, which runs nothing of `atexit`


def source(modules, env):
    """The `Source` for these modules and this environment, started when first asked for; None where there can be none."""
    env = {name: value for name, value in env.items() if not name.startswith("JPY_")}
    known, found = _sources.get(modules, (None, None))
    if known == env and (found is None or not found.gone):
        return found
    if found:
        found.close()
    try:
        found = Source(modules, env)
    except (Lost, OSError) as error:
        log.warning("every kernel imports by itself (%s)", error)
        found = None
    _sources[modules] = env, found
    return found


class Forked(LocalProvisioner):
    """Starts a kernel by a fork where that can be done, and else as ever."""
    modules = READING

    async def launch_kernel(self, cmd, **kwargs):
        process = self._forked(cmd, kwargs.get("cwd"), kwargs.get("env") or dict(os.environ))
        if process is None:
            return await super().launch_kernel(cmd, **kwargs)
        self.process, self.pid, self.pgid = process, process.pid, process.pid
        self.cwd = kwargs.get("cwd") or Path.cwd()
        return self.connection_info

    def _forked(self, cmd, cwd, env):
        if sys.platform != "linux" or cmd[:3] != [sys.executable, "-m", "ipykernel_launcher"]:
            return None
        found = source(self.modules, env)
        try:
            return found and found.fork([find_spec(cmd[2]).origin, *cmd[3:]], cwd, env)
        except Lost as error:
            log.warning("a kernel is started as ever, for it cannot be forked (%s)", error)
            found.close()
            return None


class Reading(AsyncKernelManager):
    """Manages a kernel that is `Forked`, of modules that chapters read records with."""
    provisioned = Forked

    async def start_kernel(self, **kwargs):
        if self.provisioner is None:
            self.kernel_id = self.kernel_id or str(uuid4())
            self.provisioner = self.provisioned(kernel_id=self.kernel_id, kernel_spec=self.kernel_spec, parent=self)
        await super()._async_start_kernel(**kwargs)


class WithTorch(Forked):
    modules = MEASURING


class Measuring(Reading):
    """The same with torch."""
    provisioned = WithTorch


def manager_for(text):
    """The class that manages the kernel of a notebook, from its source: with torch where it speaks of torch."""
    return Measuring if "torch" in text else Reading
