"""The chapters on attacks, cause and the race, on records that are made up from published ones: with arms, in part, and without."""
import numpy as np
import pandas as pd
import pytest

from repspace import findings, records
from repspace.findings import attacks, breakdown, cause, parts, race
from repspace.findings.comparisons import nets

SMOOTHED = "label-smoothing:0.1"
# what each arm of a made-up study is measured as: a published condition
ARMS = {"none": "none", SMOOTHED: SMOOTHED, "mixup:1.0": "mixup:1.0",
        "logit-scale:4.28+learning-rate:0.4": SMOOTHED, f"{SMOOTHED}+logit-scale:4.28": "cutmix:1.0", "logit-scale:38.0": "none",
        "logit-norm:4.28": "cutmix:1.0", f"{SMOOTHED}+logit-norm:4.28+learning-rate:0.025": "mixup:1.0", "no-bias": "none"}


class Samples(records.Records):
    """Records of which no arrays are kept."""
    def arrays(self, condition, seed): raise records.NotKept("samples only")


def slug(text): return text.replace(":", "-").replace("+", "-")


@pytest.fixture(scope="module")
def confirmed(): return records.load("digits-confirm", "published")


def study(recorded, arms, seeds, name="digits-cause", **changes):
    """Made-up records of `arms`, {text: published text}, at some seeds, as `Judged`."""
    runs, samples = [], []
    chosen = recorded.runs[recorded.runs["seed"].isin(seeds) & (recorded.runs["model"] == "tiny-cnn")]
    for text, source in arms.items():
        of, condition = chosen[chosen["regularizer"] == source], f"digits.tiny-cnn.{slug(text)}"
        runs.append(of.assign(study=name, condition=condition, regularizer=text, identity=of["identity"] + (text if text != source else ""), **changes))
        samples.append(recorded.samples[(recorded.samples["condition"] == of["condition"].iloc[0]) & recorded.samples["seed"].isin(seeds)].assign(condition=condition))
    return findings.Judged(name, Samples(pd.concat(runs, ignore_index=True), pd.concat(samples, ignore_index=True), recorded.folders))


@pytest.fixture(scope="module")
def caused(confirmed): return findings.Studies([study(confirmed, ARMS, range(100, 108))])


def test_arms_answer_what_is_asked_of_length(caused):
    answer = cause.cause(caused)
    text = " ".join(answer.details)
    assert "hard targets with the mean scale of logits held at 4.28 (trained at a rate of 0.4): accuracy" in text and "(8 seeds)." in text
    assert "with the mean scale of logits held at 4.28, soft targets instead of hard ones: accuracy is" in text
    assert "on records" not in text and answer.unit == "%" and answer.net == "tiny CNN on 8×8 digits"
    assert answer.number == pytest.approx(1)   # the held arm is label smoothing's runs
    assert "of the rise of accuracy on tiny CNN" in answer.sentences[0] and answer.sentences[0] in cause.in_short(caused).text.replace("&#91;", "[").replace("&#93;", "]")


def test_a_curve_over_scales_has_its_levels_and_says_where_arms_do_better(caused):
    held = cause.arms(caused)
    assert set(held["line"]) == {"none+logit-scale", f"{SMOOTHED}+logit-scale", "none+logit-norm", f"{SMOOTHED}+logit-norm"}
    levels = cause.free(caused, held)
    assert set(levels["target"]) == {"none", SMOOTHED} and len(levels) == 16
    figure = cause.scale_figure(caused)
    assert figure.caption.startswith("Hard targets with logits held, on average, about as short as") and "plain, left free" in figure.svg
    assert "higher at 4.28 and not decidedly different at 38" in cause.scale_list(caused).text
    assert cause.arms_table(caused).text.count("\n") == 6
    assert cause.scale_figure(caused, ("cutmix:1.0",)).text.startswith("No record here")


def test_an_arm_that_does_not_learn_has_no_share(confirmed):
    lazy = study(confirmed, ARMS, range(100, 108), train_accuracy=0.9)
    answer = cause.cause(findings.Studies([lazy]))
    text = " ".join(answer.details)
    assert "No held net here tells" in answer.sentences[0]
    assert "no share: training accuracy below 0.99" in text and "a share of" not in text


def test_arms_of_one_study_pair_with_label_smoothing_of_another(confirmed):
    arms = {"none": "none", "logit-scale:5.3": SMOOTHED, "logit-norm:5.3": SMOOTHED}
    others = findings.Studies([study(confirmed, arms, range(103, 110), "cifar10-cause"), study(confirmed, {"none": "none", SMOOTHED: SMOOTHED}, range(100, 108), "cifar10-confirm")])
    text = " ".join(cause.cause(others).details)
    assert "held at 5.3: accuracy" in text and "(5 seeds)" in text and "soft targets instead" not in text


@pytest.mark.parametrize("seeds", [[100], [100, 101]])
def test_few_seeds_say_little_and_break_nothing(confirmed, seeds):
    few = findings.Studies([study(confirmed, ARMS, seeds)])
    for say in (cause.cause, cause.in_short, cause.arms_table, parts.records_table, cause.scale_figure, attacks.strength, breakdown.breakdown, attacks.table,
                attacks.in_short, breakdown.breakdown_figure, race.head, race.race, race.explains, race.table, race.in_short, race.head_figure): say(few)
    assert race.explains(few).text.startswith("No record here")


def test_the_same_net_in_two_studies_is_one_point(caused, confirmed):
    alone = race.points(caused)
    both = race.points(findings.Studies([*caused, findings.Judged("digits-confirm", confirmed)]))
    assert len(alone) == 8 * len(ARMS) and both["identity"].is_unique
    assert len(both) == 240 + 8 * (len(ARMS) - 3)


def test_what_is_needed_and_what_is_moved_is_a_race(confirmed):
    few = confirmed._replace(runs=confirmed.runs[confirmed.runs["seed"] < 106])
    judged = findings.Studies([findings.Judged("digits-confirm", few)])
    for net in nets(judged):
        of = race.parts(net).set_index(["regularizer", "column"])["mean"]
        for text in net.texts:
            assert sum(of[text, name] for name in race.FOUR) == pytest.approx(of[text, "part_effect"])
            assert sum(of[text, name] for name in race.TWO) == pytest.approx(of[text, "part_effect"])
    assert "with all three success falls: more is needed to leave a class" in race.race(judged).text
    assert "two plain seeds differ by" in race.race_figure(judged).caption


def test_vectors_of_published_nets_cross_the_origin_late_if_at_all(confirmed):
    few = confirmed._replace(runs=confirmed.runs[confirmed.runs["seed"] < 103])
    for net in nets(findings.Studies([findings.Judged("digits-confirm", few)])):
        table = breakdown.crossings(net)
        assert sorted(set(table["x"])) == attacks.grid_of(net)
        at_reference = table[table["x"] == net.reference].groupby("line")["success"].mean()
        scalars = net.runs.groupby("regularizer")["success_pgd"].mean()
        assert np.abs(at_reference - scalars).max() < 0.05   # 200 of the images
        assert (table["crossed"].between(0, 1) & table["direction"].between(-1, 1)).all()
