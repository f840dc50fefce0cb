"""The rules came first: what is kept about it agrees with the repository's history, and studies are what was announced."""
import subprocess
from pathlib import Path

import pytest

from repspace import study
from repspace.claims import PREREGISTERED, preregistration

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "results" / preregistration.FILE


def git(*words):
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(not KEPT.exists(), reason="nothing was published under these rules")
def test_what_is_kept_agrees_with_the_history():
    kept = preregistration.read([KEPT.parent])
    if kept.rules != preregistration.RULES:
        pytest.skip("the rules are others since, so every row is exploratory")
    if not git("cat-file", "-t", kept.commit):
        pytest.skip("this copy has no history")
    assert preregistration.in_history(ROOT, kept.later) == kept


@pytest.mark.parametrize("name", PREREGISTERED)
def test_a_study_runs_the_seeds_that_were_announced(name):
    file = ROOT / "nbs" / "experiments" / f"{name}.yaml"
    if not file.exists():
        pytest.skip("announced, not there yet")
    assert set(study.definition.read(file).seeds) == set(PREREGISTERED[name].seeds)
