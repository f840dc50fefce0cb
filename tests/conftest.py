"""What the tests of studies share."""
import os
from types import SimpleNamespace

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


def pytest_addoption(parser):
    parser.addoption("--fuzz-seconds", type=float, default=0, help="how long a campaign of damaged files lasts")
    parser.addoption("--fuzz-seed", type=int, default=0, help="the number of its first input")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests that share a costly fixture stay in one process; the others go wherever a core is free."""
    for item in items:
        fixtures = [defs[-1] for defs in item._fixtureinfo.name2fixturedefs.values()]
        if any(fixture.baseid and fixture.scope in ("module", "session") for fixture in fixtures):
            item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.fixture
def fuzz(request):
    """How long a campaign lasts (`seconds`, 0: as it likes), and where it begins (`seed`)."""
    return SimpleNamespace(seconds=request.config.getoption("--fuzz-seconds"), seed=request.config.getoption("--fuzz-seed"))
