"""The chapters on length, direction and regions, where their notebooks are the wrong place: made-up studies, and the exercises."""
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from repspace import findings
from repspace.findings import direction, regions
from repspace.findings.questions import get
from repspace.records import Records

CHAPTERS = Path(__file__).resolve().parent.parent / "nbs/findings"


def study_of_classes(seeds=4, smoothed=True, degree=lambda K, d: 1 - K / d / 10):
    """Records like those of digits-classes: degree, length and cosine fall or rise with K/d, robustness has no order."""
    runs, samples = [], []
    rng = np.random.default_rng(0)
    for data, K in (("digits:2", 2), ("digits:5", 5), ("digits", 10)):
        for d in (2, 8, 64):
            for text in ("none", "label-smoothing:0.1")[:1 + smoothed]:
                for seed in range(100, 100 + seeds):
                    soft, name = text != "none", f"{data}-{d}-{text}"
                    runs.append(dict(study="digits-classes", data=data, model="tiny-cnn", feature_dim=d, regularizer=text, condition=name, seed=seed,
                                     recipe={}, rms=1 - soft * K / d / 10, cone_degree_right=degree(K, d) + seed / 1e6, made={}, settings={}))
                    samples += [dict(condition=name, seed=seed, image=i, label=1, prediction=1, subset=True, cos_label=0.5 + soft * K / d / 50,
                                     log2_break=rng.normal(), span_share=0.5, cos_label_span=0.5) for i in range(5)]
    return Records(pd.DataFrame(runs).astype({"feature_dim": "Int64"}), pd.DataFrame(samples))


def studies_with(**others): return findings.Studies([], {}, {name.replace("_", "-"): recorded for name, recorded in others.items()})


def test_many_classes_in_few_dimensions():
    answer = get("q-classes").answer(studies_with(digits_classes=study_of_classes()))
    assert answer.number == pytest.approx(-1, abs=0.01) and "plain net's degree" in answer.net
    said = " ".join(answer.sentences)
    assert "Degree of cone with plain training falls with K/d" in said
    assert "Change of RMS with label smoothing falls with K/d" in said and "−50.0 % at K/d = 5" in said
    assert "Change of the cosine with label smoothing rises with K/d" in said and "log₂ of the limit" in said


@pytest.mark.parametrize("smoothed, seeds, sentences", [(False, 4, 1), (True, 1, 5)])
def test_part_of_the_study_is_enough(smoothed, seeds, sentences):
    recorded = study_of_classes(seeds, smoothed)
    answer = get("q-classes").answer(studies_with(digits_classes=recorded))
    assert len(answer.sentences) == sentences
    assert regions.classes_figure(regions.classes_table(recorded)).svg


def test_without_order_none_is_claimed():
    recorded = study_of_classes(smoothed=False)
    runs = recorded.runs
    shuffled = recorded._replace(runs=runs.assign(cone_degree_right=runs["cone_degree_right"].where(runs["seed"] % 2 == 0, -runs["cone_degree_right"])))
    assert "has no order along K/d" in get("q-classes").answer(studies_with(digits_classes=shuffled)).sentences[0]


def test_questions_without_studies_say_what_would_tell():
    rows = findings.questions(studies_with()).set_index("id")
    for name, needs in (("q-degree", "digits-confirm"), ("q-bias", "digits-confirm"), ("q-classes", "digits-classes"), ("q-stability", "digits-confirm")):
        assert rows.loc[name, "answer"].startswith("No record here tells") and needs in rows.loc[name, "answer"]


def test_centers_of_published_heads():
    """Plain heads of the digits agree across seeds beyond chance, on the first net, whatever else does."""
    studies = findings.judged("published")
    (net, of), *_ = direction.across_seeds([study for study in studies if study.name == "digits-confirm"])
    assert of["none"].runs == direction._most and of["none"].correlation.low > of["none"].chance
    assert all(0.9 < each.turned <= 1 + 1e-9 for each in of.values())


def blocks(chapter):
    """The Python blocks of a chapter's exercises."""
    cells = json.loads((CHAPTERS / f"{chapter}.ipynb").read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.findall(r"```python\n(.*?)```", text.partition("## Exercises")[2], re.S)


@pytest.mark.parametrize("chapter", ["length", "direction", "regions"])
def test_exercises_run(chapter):
    found = blocks(chapter)
    assert len(found) >= 2
    for block in found: exec("\n".join(line.removeprefix("   ") for line in block.splitlines()), {})
