"""The house: which room may know which other, and which rooms do without PyTorch. One table for all modules."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "repspace"

# room: the rooms it imports, in the order of the layers; no room imports one below itself
ROOMS = {
    "text": (),
    "vocabulary": ("text",),
    "arrays": (),
    "stats": ("vocabulary", "arrays"),
    "calibration": ("arrays",),
    "geometry": ("arrays", "stats"),
    "data": ("vocabulary", "arrays"),
    "models": ("vocabulary", "arrays", "data"),
    "regularize": ("vocabulary", "arrays"),
    "attacks": ("vocabulary", "arrays", "data"),
    "corruptions": ("arrays", "calibration", "attacks"),
    "train": ("vocabulary", "arrays", "geometry", "data", "models", "regularize"),
    "measure": ("vocabulary", "arrays", "stats", "calibration", "geometry", "data", "models", "regularize",
                "attacks", "corruptions", "train"),
    "records": ("vocabulary", "arrays"),
    "study": ("vocabulary", "arrays", "data", "models", "regularize", "train", "measure", "records"),
    "interventions": ("arrays", "stats", "calibration", "geometry", "records"),
    "claims": ("vocabulary", "arrays", "stats", "calibration", "geometry", "records", "interventions"),
    "figures": ("vocabulary", "arrays", "stats", "calibration", "geometry", "records", "claims"),
    "findings": ("vocabulary", "arrays", "stats", "calibration", "geometry", "records", "study", "interventions",
                 "claims", "figures"),   # of study: by which code, `provenance`
    "auditing": ("text", "vocabulary", "arrays", "stats", "calibration", "geometry", "data", "models", "attacks", "records",
                 "interventions", "claims"),
    "__main__": ("study", "auditing"),   # the command line
}
# What only measures may import PyTorch; what reads must not, and neither must what checks a study's YAML.
MEASURING = {"data", "models", "regularize", "attacks", "corruptions", "train", "measure", "auditing"}

MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "_modidx.py" and p != PACKAGE / "__init__.py")


def room(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def name(path):
    return ".".join(part for part in path.relative_to(PACKAGE).with_suffix("").parts if part != "__init__")


def imported(path):
    """The rooms that a module imports, at its top or in a function."""
    package = ["repspace", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[:len(package) - node.level + 1] if node.level else []
            base = [*above, *filter(None, [node.module])]
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        yield from (each.split(".")[1] for each in names if each.startswith("repspace."))


def test_the_table_lists_every_room_and_its_layers_have_no_circle():
    assert {room(p) for p in MODULES} == set(ROOMS)
    order = list(ROOMS)
    assert not [(a, b) for a, below in ROOMS.items() for b in below if order.index(b) >= order.index(a)]


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_a_module_knows_only_rooms_above_it(path):
    assert set(imported(path)) - {room(path), "__version__"} <= set(ROOMS[room(path)])


WITHOUT_TORCH = """
import importlib, sys
class NoTorch:  # not `sys.modules["torch"] = None`: SciPy looks there to find out what its arguments are
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision"):
            raise ImportError(f"{name} on the reading side of the wall")
sys.meta_path.insert(0, NoTorch())
for module in sys.argv[1:]: importlib.import_module(f"repspace.{module}")
"""


def test_only_what_measures_imports_torch():
    reading = [name(p) for p in MODULES if room(p) not in MEASURING and p.name != "__main__.py"]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *reading], capture_output=True, text=True)
    assert len(reading) > 15 and done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_a_module_is_read_in_one_sitting(path):
    """No exported file over 400 lines, no function or method over 34."""
    text = path.read_text()
    long = [f"{node.name}: {node.end_lineno - node.lineno + 1} lines" for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 34]
    assert not long and len(text.splitlines()) <= 400
