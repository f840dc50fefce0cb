"""The rules came first: what is kept about it agrees with the repository's history, and studies are what was announced."""
import subprocess
from pathlib import Path

import pytest

from repspace import records, study
from repspace.claims import PREREGISTERED, preregistration
from repspace.findings import cause, held
from repspace.study import rates

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"


def git(*words):
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("registration", preregistration.REGISTRATIONS, ids=lambda of: of.file)
def test_what_is_kept_agrees_with_the_history(registration):
    if not (RESULTS / registration.file).exists():
        pytest.skip("nothing was published under these rules")
    kept = preregistration.read([RESULTS], registration.file)
    if kept.rules != registration.rules:
        pytest.skip("the rules are others since, so every row is exploratory")
    if not git("cat-file", "-t", kept.commit):
        pytest.skip("this copy has no history")
    assert preregistration.in_history(ROOT, kept.later, rules=kept.rules) == kept


@pytest.mark.parametrize("name", PREREGISTERED)
def test_a_study_runs_the_seeds_that_were_announced(name):
    file = ROOT / "nbs" / "experiments" / f"{name}.yaml"
    if not file.exists():
        pytest.skip("announced, not there yet")
    assert set(study.definition.read(file).seeds) == set(PREREGISTERED[name].seeds)


def test_arms_are_trained_at_the_rates_that_were_chosen():
    """digits-rates chose them by training loss, on seeds that nothing is judged on."""
    chosen = rates.best(records.load("digits-rates", "published").runs)
    arms = [(c.model, *rates.without_rate(c.regularizer), c.recipe["lr"]) for c in study.definition.read("digits-cause").conditions]
    held = {(model, text): rate or usual for model, text, rate, usual in arms if "logit-" in text}
    assert held == chosen.to_dict()
    assert {rate for _, text, rate, _ in arms if "logit-" not in text} == {None}


def test_scales_are_held_where_the_gap_closed_on_other_seeds():
    """The scale and rate of digits-held are those that digits-rates gives by the rule, and its seeds judge nothing else."""
    found = held.closing(records.load("digits-rates", "published").runs)
    asked = study.definition.read("digits-held")
    arms = {c.model: cause.arm(c.regularizer).scale for c in asked.conditions if "logit-scale" in c.regularizer}
    rate = {c.model: rates.without_rate(c.regularizer)[1] for c in asked.conditions if "logit-scale" in c.regularizer}
    assert {model: (arms[model], rate[model]) for model in arms} == found
    assert tuple(asked.seeds) == tuple(held.SEEDS) and not set(held.SEEDS) & {s for of in PREREGISTERED.values() for s in of.seeds}
    assert {c.regularizer for c in asked.conditions} >= {"none", *held.SOFT}
