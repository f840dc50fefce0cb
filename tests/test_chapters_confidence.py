"""The chapters on confidence and on others, run cell by cell: on published records, and with the studies that are still being made."""
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from repspace import claims, findings
from repspace.findings import comparisons, confidence, doses, others

CHAPTERS = Path(__file__).resolve().parent.parent / "nbs" / "findings"


@pytest.fixture(scope="module")
def published():
    return findings.judged("published")


def relabelled(recorded, texts, seeds=4):
    """Records whose runs are those of `recorded`, (source, share of label smoothing's numbers) under each of `texts`."""
    runs, samples = recorded.runs, recorded.samples
    runs = runs[runs["seed"].isin(sorted(set(runs["seed"]))[:seeds])]
    plain, smooth = (runs[runs["regularizer"] == text].sort_values(["model", "seed"]) for text in ("none", "label-smoothing:0.1"))
    numbers = [name for name in plain.columns[plain.dtypes == float] if name not in ("feature_dim", "threads")]
    made, rows = [], []
    for text, share in texts.items():
        of = (plain if share < 0.5 else smooth).assign(regularizer=text, **{
            name: (1 - share) * plain[name].to_numpy() + share * smooth[name].to_numpy() for name in numbers})
        renamed = of["condition"].str.rpartition(".")[0] + "." + text.replace(":", "-").replace("+", "-")
        of_samples = samples.merge(pd.DataFrame(dict(condition=of["condition"], seed=of["seed"], renamed=renamed)), on=["condition", "seed"])
        rows.append(of_samples.assign(condition=of_samples["renamed"]).drop(columns="renamed"))
        made.append(of.assign(condition=renamed))
    return recorded._replace(runs=pd.concat(made, ignore_index=True), samples=pd.concat(rows, ignore_index=True))


@pytest.fixture(scope="module")
def complete(published):
    """The published studies, and constructed ones in the place of digits-dose, -others and -cause."""
    confirm = published.recorded("digits-confirm")
    ladder = {f"{name}:{strength}": share for name in ("label-smoothing", "mixup") for strength, share in ((0.05, 0.2), (0.1, 0.6), (0.2, 1.0))}
    studies = {"digits-dose": relabelled(confirm, {"none": 0.0} | ladder),
               "digits-others": relabelled(confirm, {"none": 0.0, "label-smoothing:0.1": 1.0, "weight-decay:0.01": 0.8, "dropout:0.1": 0.3}),
               "digits-cause": relabelled(confirm, {"none": 0.0, "logit-scale:4.28": 1.1, "logit-scale:10": 0.5, "logit-scale:38": 0.1})}
    named = [findings.Judged(name, recorded._replace(runs=recorded.runs.assign(study=name))) for name, recorded in studies.items()]
    return findings.Studies([*published, *named], {}, published.others)


def chapter(name, studies, monkeypatch):
    """What the cells of a chapter leave, in text."""
    shown = []
    monkeypatch.setattr(findings, "judged", lambda *a, **k: studies)
    monkeypatch.setattr("IPython.display.display", lambda *values, **k: shown.extend(values))
    names = {}
    for cell in json.loads((CHAPTERS / f"{name}.ipynb").read_text())["cells"]:
        if cell["cell_type"] != "code": continue
        *first, last = "".join(cell["source"]).rstrip().splitlines()
        exec("\n".join(first), names)
        shown.append(eval(last, names))
    return "\n".join(getattr(value, "text", None) or getattr(value, "caption", None) or repr(value) for value in shown if value is not None)


@pytest.mark.parametrize("name", ["confidence", "others"])
def test_a_chapter_says_what_the_published_records_tell(name, published, monkeypatch):
    text = chapter(name, published, monkeypatch)
    assert "nan" not in text.lower().replace("nans", "") and "**Question**" in text
    if name == "confidence": assert "plain training with one temperature" in text and "ResNet-8 on CIFAR-10" in text


@pytest.mark.parametrize("name, words", [("confidence", ["closes it at", "Where the signed gap closes"]),
                                         ("others", ["compared with logits held at the same length", "compared with plain training", "Compared with logits held"])])
def test_a_chapter_says_more_with_all_studies(name, words, complete, monkeypatch):
    text = chapter(name, complete, monkeypatch)
    for each in words: assert each in text, each


def test_the_rival_is_what_the_columns_say(published):
    net = next(net for net in comparisons.nets(published, "calibration") if "ResNet-8" in net.where)
    by_seed = net.runs.pivot(index="seed", columns="regularizer", values=["nll", "nll_temperature"])
    rows = comparisons.paired(net.runs, confidence.rivals["as they are, less the plain net with one temperature"]).set_index("regularizer")
    for text, row in rows.iterrows():
        values = (by_seed["nll", text] - by_seed["nll_temperature", "none"]).astype(float)
        half = 2.7764451052 * values.std() / len(values) ** 0.5
        assert np.allclose([row.effect, row.low, row.high], [values.mean(), values.mean() - half, values.mean() + half]) or len(values) != 5


def test_questions_belong_to_their_chapters(published):
    asked = findings.questions(findings.Studies())
    chapters = asked.set_index("id")["chapter"].to_dict()
    assert {id: chapters.get(id) for id in ("q-overshoot", "q-scaling", "q-others", "q-corruptions")} == {
        "q-overshoot": "confidence", "q-scaling": "confidence", "q-others": "others", "q-corruptions": "others"}
    assert asked.set_index("id").loc["q-others", "answer"].startswith("No record here tells")


def test_each_claim_and_question_has_its_place():
    for name, places in {"confidence": ["calibration", "accuracy", "scaling", "q-overshoot", "q-scaling"], "others": ["q-others", "q-corruptions"]}.items():
        text = "\n".join("".join(cell["source"]) for cell in json.loads((CHAPTERS / f"{name}.ipynb").read_text())["cells"])
        for place in places: assert f"\n({place})=\n## " in f"\n{text}", place
    assert {claim.id for claim in claims.CLAIMS if claim.chapter == "confidence"} == {"calibration", "accuracy", "scaling"}
    assert doses.study == "digits-dose" and (others.study, others.ruler) == ("digits-others", "digits-cause")
