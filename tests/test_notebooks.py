"""Notebooks are the source: the package is what they export, they are clean, and they run."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
INSTRUMENTS = [p for p in NOTEBOOKS if "instruments" in p.parts]
FINDINGS = [p for p in NOTEBOOKS if p.parent.name == "findings" or p == ROOT / "nbs/index.ipynb"]


def name(path):
    return str(path.relative_to(ROOT / "nbs"))


def cells(path, kind="code"):
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def python(code, **kwargs):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **kwargs)


# ---- notebooks and package ----

def test_package_is_what_the_notebooks_export(tmp_path):
    for folder in ("nbs", "repspace"):  # repspace/__init__.py is written by hand
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.py[co]", "__pycache__"))
    shutil.copy(ROOT / "settings.ini", tmp_path)
    for path in (tmp_path / "repspace").rglob("*.py"):
        if path != tmp_path / "repspace" / "__init__.py":
            path.unlink()
    done = python("from nbdev.export import nb_export\nfrom pathlib import Path\n"
                  "for p in sorted(Path('nbs').rglob('*.ipynb')): nb_export(p, 'repspace')", cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    def package(root):
        return {str(p.relative_to(root)): p.read_text() for p in (root / "repspace").rglob("*.py") if p.name != "_modidx.py"}
    exported, committed = package(tmp_path), package(ROOT)
    assert sorted(exported) == sorted(committed), "a module without a notebook, or a notebook without its module"
    stale = [n for n in exported if exported[n] != committed[n]]
    assert not stale, f"not what the notebooks export: {stale}. Run: make export"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_no_heading_skips_a_level(path):
    """The site is rendered without warnings, and this is one; here it is found in no time."""
    text = re.sub(r"^```.*?^```", "", "\n\n".join(cells(path, "markdown")), flags=re.M | re.S)
    levels = [0, *map(len, re.findall(r"^(#+) ", text, re.M))]
    assert levels[1] == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:]))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_is_clean(path):
    notebook = json.loads(path.read_text())
    assert set(notebook["metadata"]) <= {"kernelspec"}
    assert notebook["metadata"].get("kernelspec", {}).get("name", "python3") == "python3"
    for number, cell in enumerate(notebook["cells"], 1):
        where = f"cell {number}"
        assert set(cell["metadata"]) <= {"tags", "mystnb"}, where
        assert "".join(cell["source"]).strip(), f"{where} is empty"
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None, f"{where} holds an output: make export"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_opens_with_a_title_and_a_summary(path):
    first = cells(path, "markdown")[0].splitlines()
    assert first[0].startswith("# ") and first[1].startswith("> ")
    titles = [line for text in cells(path, "markdown") for line in text.splitlines() if line.startswith("# ")]
    assert len(titles) == 1, f"more than one title: {titles}"


def test_every_notebook_has_its_place_in_the_book():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    chapters = [chapter for part in toc["parts"] for chapter in part["chapters"]]
    listed = [toc["root"]] + [each["file"] for chapter in chapters for each in [chapter, *chapter.get("sections", [])]]
    found = {str(p.relative_to(ROOT / "nbs").with_suffix("")) for p in NOTEBOOKS}
    pages = {p.stem for p in (ROOT / "book").glob("*.md")}
    assert len(listed) == len(set(listed))
    # The condition notebook is in the book as often as it was executed; lab/index is written by build.py.
    assert set(listed) == found - {"experiments/condition"} | pages | {"lab/index"}


def test_every_module_has_one_notebook():
    """A room's notebook `index` is its `__init__`, and `main` its `__main__`; every other has its module's name."""
    special = {"index": "__init__", "main": "__main__"}
    for path in INSTRUMENTS:
        targets = [line.split()[-1] for cell in cells(path) for line in cell.splitlines() if line.startswith("#| default_exp")]
        room = path.relative_to(ROOT / "nbs/instruments").parent.parts
        assert targets == [".".join([*room, special.get(path.stem, path.stem)])], path


# ---- they run ----

def test_instruments_pass_their_own_tests():
    """`nbdev_test`: every cell of every instrument, but for those marked slow."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    done = python("from nbdev.test import nbdev_test; nbdev_test('nbs/instruments', n_workers=2)", cwd=ROOT, env=env)
    assert done.returncode == 0 and "Success" in done.stdout, done.stdout + done.stderr


# ---- the wall between measuring and reading ----

# Not `sys.modules["torch"] = None`: SciPy looks there to find out what its arguments are.
WITHOUT_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision"):
            raise ImportError(f"{name} on the reading side of the wall")
sys.meta_path.insert(0, NoTorch())
"""


def test_importing_the_package_imports_nothing():
    done = python("import sys; before = set(sys.modules); import repspace; print(*(set(sys.modules) - before))")
    assert set(done.stdout.split()) <= {"repspace"}, done.stdout + done.stderr


def test_study_definitions_are_read_without_torch():
    done = python("import sys, repspace.study; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stdout + done.stderr


def imports(path):
    """Import statements of a notebook, as code."""
    found = []
    for cell in cells(path):
        code = "\n".join(line for line in cell.splitlines() if not line.lstrip().startswith(("%", "!")))
        found += [ast.unparse(node) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    return found


def test_findings_need_no_torch():
    lines = sorted({line for path in FINDINGS for line in imports(path)})
    assert lines
    done = python(WITHOUT_TORCH + "\n".join(lines))
    assert done.returncode == 0, done.stderr
