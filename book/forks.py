"""The program of a process that imports modules once, and from then on is forked into a kernel on request.

    python book/forks.py FD MODULE ...

FD is a socket on which lines of JSON are exchanged. Said here: {"ready": [names of threads but the main one]} once,
then {"started": pid} by each kernel, and {"ended": pid, "code": exit code} when it is gone; asked for there: {"argv",
"cwd", "env"}. When the other side closes the socket, or is gone itself, the kernels are killed.

It imports and does nothing else, so that what is forked holds neither threads nor anything of another notebook; and
nothing of this project, so that a kernel begins with as much of it as one that is started from nothing: none.
"""
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path


def say(line, **words):
    line.sendall(json.dumps(words).encode() + b"\n")


def threads():
    """Names of the threads of this process but the main one."""
    tasks = [task for task in Path("/proc/self/task").iterdir() if int(task.name) != os.getpid()]
    return [(task / "comm").read_text().strip() for task in tasks]


def tell_ended(line, running):
    """Say which of `running`, numbers of processes, have ended, and forget them."""
    for pid in list(running):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            running.remove(pid)
            say(line, ended=pid, code=os.waitstatus_to_exitcode(status))


def draw_anew():
    """Without this all kernels would draw the same numbers; Python's own `random` sees to it itself."""
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()


def become_kernel(line, argv, cwd, env):
    """In the process that was forked: all that `Popen` would have given a new one."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env | {"JPY_PARENT_PID": str(os.getppid())})
    os.chdir(cwd)
    sys.argv = [*argv, f"--IPKernelApp.parent_handle={os.getppid()}"]
    draw_anew()
    say(line, started=os.getpid())


def serve(line):
    """Fork for each request; returns in each process that is forked, and ends this one with the other side."""
    running, rest = set(), b""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    with suppress(ConnectionError):
        while True:
            readable = select.select([line, woken], [], [])[0]
            if woken in readable:
                os.read(woken, 4096)
            tell_ended(line, running)
            received = line.recv(65536) if line in readable else None
            if received == b"":
                break
            *requests, rest = (rest + (received or b"")).split(b"\n")
            for request in requests:
                pid = os.fork()
                if not pid:
                    become_kernel(line, **json.loads(request))
                    os.close(woken)
                    os.close(wake)
                    return
                running.add(pid)
    for pid in running:
        with suppress(OSError):
            os.killpg(pid, signal.SIGKILL)
    os._exit(0)


def main(fd, *modules):
    if not sys.flags.safe_path:
        del sys.path[0]   # the folder of this file, which no kernel looks into
    with socket.socket(fileno=int(fd)) as line:
        line.set_inheritable(False)
        for name in modules:
            importlib.import_module(name)
        gc.freeze()
        say(line, ready=threads())
        serve(line)


if __name__ == "__main__":
    main(*sys.argv[1:])
    from ipykernel import kernelapp
    kernelapp.launch_new_instance()
