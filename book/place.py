"""Where the book is built: one build at a time, in folders of its own, whatever the environment lacks."""
import errno
import os
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

from repspace.study.locks import held
from repspace.study.private import is_private


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
    """`folder`, which nobody else can look into; `PermissionError` where others may, or it is a link or another user's."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    if not is_private(folder):
        raise PermissionError(errno.EPERM, "it is a link, another user's, or open to others: delete it", str(folder))
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


@contextmanager
def alone(*folders):
    """Nobody else in `folders` meanwhile; while another is there, says who that is, again and again."""
    with ExitStack() as locks:
        for folder in dict.fromkeys(folders):
            folder.mkdir(parents=True, exist_ok=True)
            locks.enter_context(held(folder / ".lock"))
        yield
