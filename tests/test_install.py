"""Set-up: what make says and does, what the pins cover, what an installed package needs."""
import importlib.metadata
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = {name: (ROOT / f"locks/{name}.txt").read_text() for name in ("build", "book", "test")}


def pins(lock):
    """{package: version} of what a lock installs here; its other lines are hashes."""
    lines = [line.removesuffix("\\") for line in LOCKS[lock].splitlines() if re.match(r"\w", line)]
    here = [r for r in map(Requirement, lines) if not r.marker or r.marker.evaluate()]
    return {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in here}


def make(folder, *words):
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "PYTHON")}
    return subprocess.run(["make", *words], cwd=folder, env=env, capture_output=True, text=True)


def copy_project(project, to):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy2(project / name, to)
    shutil.copytree(project / "locks", to / "locks")


@pytest.fixture
def place(tmp_path):
    """A project that is not set up yet."""
    copy_project(ROOT, tmp_path)
    return tmp_path


# ---- make ----

def test_make_alone_explains_every_target():
    done = make(ROOT)
    targets = re.search(r"^\.PHONY: help (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert done.returncode == 0 and {"book", "test"} <= set(targets)
    assert not [t for t in targets if not re.search(rf"^make {t}\b", done.stdout, re.MULTILINE)]


def test_old_python_is_refused_with_a_way_out(place):
    old = place / "oldpython"
    old.write_text(f"""#!/bin/sh
exec {sys.executable} -c "import sys; sys.version_info, sys.version = (3, 11, 4), '3.11.4 x'; exec(sys.argv[1])" "$2"
""")
    old.chmod(old.stat().st_mode | stat.S_IXUSR)
    done = make(place, "book", f"PYTHON={old}")
    assert done.returncode and "Python 3.11.5 or newer is needed" in done.stderr and "3.11.4" in done.stderr
    assert "make PYTHON=" in done.stderr and not (place / ".venv").exists()


def test_missing_python_is_said(place):
    done = make(place, "test", "PYTHON=")
    assert done.returncode and "Python 3.11.5 or newer is needed, and none was found" in done.stderr


def test_set_up_is_not_done_twice_and_again_after_a_change_or_a_move(place):
    def sets_up(folder):
        return "pip install" in make(folder, "-n", "book", f"PYTHON={sys.executable}").stdout
    assert sets_up(place)
    ready = re.search(r"touch (\S+)", make(place, "-n", "book", f"PYTHON={sys.executable}").stdout)[1]
    (place / ready).parent.mkdir(parents=True)
    (place / ready).touch()
    assert not sets_up(place)
    moved = place / "moved"  # packages of the first folder would be used there
    moved.mkdir()
    copy_project(place, moved)
    shutil.copytree(place / ".venv", moved / ".venv")
    assert sets_up(moved)
    later = (place / ready).stat().st_mtime + 10
    os.utime(place / "locks/book.txt", (later, later))
    assert sets_up(place)


def test_book_installs_less_than_test_and_takes_nothing_away(place):
    def said(*words):
        return make(place, "-n", *words, f"PYTHON={sys.executable}").stdout
    assert "locks/book.txt" in said("book") and "locks/test.txt" not in said("book")
    assert "locks/test.txt" in said("test")
    stamps = re.search(r"touch (\S+) (\S+)", said("test"))
    (place / ".venv").mkdir()
    for stamp in stamps.groups():
        (place / stamp).touch()
    assert "pip" not in said("book") + said("test"), "after test there is nothing to do for book"
    assert pins("build").items() <= pins("book").items() <= pins("test").items()
    assert {"ray", "torchmetrics", "pytest"} <= set(pins("test")) - set(pins("book"))


@pytest.mark.parametrize("variable", ["STUDY", "ON", "GPUS", "BENCH"])
def test_what_is_written_behind_a_variable_is_not_executed(place, variable):
    for stamp in ("book", "test"):
        done = make(place, "-n", "study", "bench", f"PYTHON={sys.executable}")
        for ready in re.findall(rf"touch (\.venv/\.{stamp}-\d+)", done.stdout):
            (place / ready).parent.mkdir(exist_ok=True)
            (place / ready).touch()
    (place / ".venv/bin").mkdir(exist_ok=True)
    said = place / ".venv/bin/python"
    said.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    said.chmod(0o755)
    for text in ("`touch executed`", "$(shell touch executed)", "$$(touch executed)", "; touch executed", "'\"; touch executed #"):
        done = make(place, "bench" if variable == "BENCH" else "study", f"{variable}={text}", f"PYTHON={sys.executable}")
        assert not (place / "executed").exists(), text
        assert text in done.stdout or variable == "BENCH", done.stdout + done.stderr


def test_clean_keeps_environment_and_records(place):
    said = make(place, "-n", "clean").stdout
    assert "_build" in said and not re.search(r"(^|\s)(\.venv|runs|results)(/|\s|$)", said)


# ---- pins ----

def needed(name, extras=(), seen=None):
    """Names of all installed packages that `name` with `extras` needs here."""
    seen = set() if seen is None else seen
    for text in importlib.metadata.requires(name) or []:
        requirement = Requirement(text)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in ["", *extras]):
            continue
        key = (canonicalize_name(requirement.name), tuple(sorted(requirement.extras)))
        if key not in seen:
            seen.add(key)
            needed(key[0], requirement.extras, seen)
    return {package for package, _ in seen} - {"repspace"}


def test_every_package_is_pinned():
    packages = needed("repspace", ["book", "test"])
    assert {"torch", "jupyter-book", "papermill", "pytest"} <= packages
    assert not packages - set(pins("test")), "not in locks/test.txt"
    assert not needed("repspace", ["book"]) - set(pins("book")), "not in locks/book.txt"


def test_every_pin_has_a_hash():
    for name, text in LOCKS.items():
        entries = [entry for entry in re.split(r"\n(?=\w)", text) if entry.strip()]
        assert entries and all("--hash=sha256:" in entry and "==" in entry for entry in entries), name


def test_pins_meet_what_the_project_asks_for():
    asked = [Requirement(text) for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["book"],
                                            *PROJECT["optional-dependencies"]["test"]]]
    asked = [r for r in asked if r.name != "repspace"]
    assert not [str(r) for r in asked if pins("test")[canonicalize_name(r.name)] not in r.specifier]


# ---- the package ----

def test_package_needs_nothing_of_the_book(tmp_path):
    """Every module imports without the extras: a bare machine with a GPU has none of them."""
    code = """
import importlib, pathlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("papermill", "nbdev", "fastcore", "execnb", "jupyter_book", "sphinx", "ipykernel",
                                  "IPython", "nbformat", "nbclient", "pytest"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
for module in sys.argv[1:]:
    importlib.import_module(f"repspace.{module}")
"""
    paths = [p.relative_to(ROOT / "repspace").with_suffix("") for p in (ROOT / "repspace").rglob("*.py")]
    modules = [".".join(path.parts) for path in paths if not path.stem.startswith("_")]
    done = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, cwd=tmp_path)
    assert len(modules) > 10 and done.returncode == 0, done.stderr


def test_wheel_holds_the_package_and_nothing_else(tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE", "repspace"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index",
                           "--quiet", "-w", tmp_path / "out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = zipfile.ZipFile(next((tmp_path / "out").glob("*.whl"))).namelist()
    modules = {name for name in files if not re.match(r"repspace-[\d.]+\.dist-info/", name)}
    assert modules == {str(p.relative_to(ROOT)) for p in (ROOT / "repspace").rglob("*.py")}


def test_citation_and_package_have_one_version():
    import repspace
    assert f"\nversion: {repspace.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\nversion = {repspace.__version__}\n" in (ROOT / "settings.ini").read_text()
    assert f"\n## {repspace.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
