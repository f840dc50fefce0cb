"""What the tests of studies share."""
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a study runs a worker per core; and one result everywhere


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with folders for runs and results."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REPSPACE_RUNS", raising=False)
    for name in ("runs", "results"):
        (tmp_path / name).mkdir()
    return tmp_path
