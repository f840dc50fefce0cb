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
PINS = {canonicalize_name(line.split("==")[0]): line.split("==")[1].strip()
        for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}


def make(folder, *words):
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "PYTHON")}
    return subprocess.run(["make", *words], cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture
def place(tmp_path):
    """A project that is not set up yet."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
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
exec {sys.executable} -c "import sys; sys.version_info, sys.version = (3, 10, 1), '3.10.1 x'; exec(sys.argv[1])" "$2"
""")
    old.chmod(old.stat().st_mode | stat.S_IXUSR)
    done = make(place, "book", f"PYTHON={old}")
    assert done.returncode and "Python 3.11 or newer is needed" in done.stderr and "3.10.1" in done.stderr
    assert "make PYTHON=" in done.stderr and not (place / ".venv").exists()


def test_missing_python_is_said(place):
    done = make(place, "test", "PYTHON=")
    assert done.returncode and "Python 3.11 or newer is needed, and none was found" in done.stderr


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
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy2(place / name, moved)
    shutil.copytree(place / ".venv", moved / ".venv")
    assert sets_up(moved)
    later = (place / ready).stat().st_mtime + 10
    os.utime(place / "constraints.txt", (later, later))
    assert sets_up(place)


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
    assert not packages - set(PINS), "not in constraints.txt"


def test_pins_meet_what_the_project_asks_for():
    asked = [Requirement(text) for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["book"],
                                            *PROJECT["optional-dependencies"]["test"]]]
    asked = [r for r in asked if r.name != "repspace"]
    assert not [str(r) for r in asked if PINS[canonicalize_name(r.name)] not in r.specifier]


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
