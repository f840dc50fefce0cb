"""Where the book is built: one build at a time, in folders of its own, whatever the environment lacks."""
import os
import socket
import stat
import sys
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from repspace.records.files import write_text


def open_streams():
    """Standard streams that are closed lead nowhere; else the next file that is opened would take their place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))


def private(folder):
    """`folder`, which nobody else can look into; `PermissionError` where it is another user's, or a link."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    about = folder.lstat()
    if stat.S_ISLNK(about.st_mode) or about.st_uid != os.geteuid():
        raise PermissionError(None, "it is a link or belongs to another user: delete it", str(folder))
    folder.chmod(0o700)
    return folder


def home():
    """The user's home, or None where there is none."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def _can_keep(folder):
    return folder is not None and folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


# What programs would otherwise read from the user's own folders, and write there.
FOLDERS = {"JUPYTER_CONFIG_DIR": "jupyter/config", "JUPYTER_DATA_DIR": "jupyter/data", "IPYTHONDIR": "ipython",
           "JUPYTER_RUNTIME_DIR": "jupyter/runtime", "MPLCONFIGDIR": "matplotlib"}


def folders(place):
    """{variable: folder} for programs that are started, all in the private folder `place`."""
    names = FOLDERS | ({} if _can_keep(home()) else {"XDG_CACHE_HOME": "cache"})
    made = {variable: Path(place, name) for variable, name in names.items()}
    for folder in made.values():
        folder.mkdir(parents=True, exist_ok=True)
    return {variable: str(folder) for variable, folder in made.items()}


# ---- one build at a time ----

def _holder(file):
    """The process that `file` names, in words."""
    try:
        number, host = file.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return "another process"
    words = f"process {number}" + ("" if host == socket.gethostname() else f" on {host}")
    try:  # the letter behind the name is the state: T is stopped
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return words
    return f"{words}, which is stopped (kill -CONT {number} lets it go on)" if state == "T" else words


@contextmanager
def alone(folder, say, every=60):
    """Nobody else in `folder` meanwhile; while another is there, says who that is, again after `every` seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder, waited = FileLock(folder / ".lock"), folder / ".lock.holder", False
    while True:
        try:
            lock.acquire(timeout=every if waited else 0)
            break
        except Timeout:
            say(f"{folder} is in use by {_holder(holder)}: waiting until that ends")
            waited = True
    try:
        write_text(holder, f"{os.getpid()} {socket.gethostname()}\n")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
