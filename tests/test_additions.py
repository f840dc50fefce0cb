"""One toy of each kind, in a file of its own, taken from a study's YAML all the way to the ledger and a figure."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOYS = Path(__file__).with_name("toys.py")
STUDY = """
study: toys
seeds: 2
grid:
  - data: two-blobs
    models: [pooled]
    regularizers: [none, "blur:0.5"]
    recipe: {epochs: 3, batch_size: 20, lr: 0.1}
"""
READ = """
import json, toys
from repspace import claims, figures, findings, records, vocabulary
recorded = records.load("toys")
ledger = claims.ledger(recorded)
row = ledger[ledger["claim"] == "longest-shorter"].iloc[0]
print(json.dumps(dict(
    runs=len(recorded.runs), darkened=recorded.runs["success_darken"].notna().all().item(),
    effect=row.effect, verdict=row.verdict, seeds=int(row.seeds),
    regularizer=vocabulary.regularizer_words(row.regularizer), figure=toys.drawn(recorded).svg[:4],
    shown=[figure.name for figure in figures.FIGURES.values() if figure.claim == "longest-shorter"])))
"""


@pytest.fixture
def toys(place):
    shutil.copy(TOYS, place)
    (place / "toys.yaml").write_text(STUDY)
    return place


def python(place, *words):
    return subprocess.run([sys.executable, *words], cwd=place, capture_output=True, text=True)


def test_what_is_added_from_outside_goes_all_the_way_to_a_verdict_and_a_figure(toys):
    refused = python(toys, "-m", "repspace.study", "toys.yaml")
    assert refused.returncode == 2 and "'two-blobs' is unknown" in refused.stderr
    done = python(toys, "-m", "repspace.study", "toys.yaml", "--with", "toys")
    assert done.returncode == 0, done.stdout + done.stderr
    read = python(toys, "-c", READ)
    assert read.returncode == 0, read.stderr
    said = json.loads(read.stdout.splitlines()[-1])
    assert said["runs"] == 4 and said["darkened"] and said["seeds"] == 2 and said["shown"] == ["longest"]
    assert said["regularizer"] == "blurring 0.5" and said["figure"] == "<svg" and -1 < said["effect"] < 1


def test_whoever_has_the_records_alone_reads_them(toys):
    """Another reader, who knows none of the toys: plain names, a neutral colour, and every claim of the paper judged."""
    python(toys, "-m", "repspace.study", "toys.yaml", "--with", "toys")
    code = ("from repspace import claims, figures, records, vocabulary; r = records.load('toys'); l = claims.ledger(r); "
            "print(sorted(set(l['claim'])), vocabulary.regularizer_words('blur:0.5'), figures.scorecard(l).svg[:4])")
    read = python(toys, "-c", code)
    assert read.returncode == 0 and "'magnitude'" in read.stdout and "longest-shorter" not in read.stdout, read.stderr
    assert "blur 0.5 <svg" in read.stdout


def test_the_same_again_is_allowed_and_another_under_its_name_is_not(toys):
    again = python(toys, "-c", "import toys; toys.register()")
    assert again.returncode == 0, again.stderr
    for line in ("models.register('pooled', toys.two_blobs)", "regularize.register('mixup', toys.Blur)",
                 "data.register('digits', toys.two_blobs, reference=16, grid=(16,))", "attacks.register('pgd', toys.darken)",
                 "figures.register('longest', toys.darken)"):
        taken = python(toys, "-c", f"import toys; from repspace import *; from repspace import attacks, data, figures, models, "
                                   f"regularize; {line}")
        assert taken.returncode and "is taken by" in taken.stderr, taken.stderr
