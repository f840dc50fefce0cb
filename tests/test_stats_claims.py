"""Statistics, claims and figures: error rates by simulation, every verdict of every claim, SVG on a page."""
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from repspace import claims, figures, findings, records, stats
from repspace.claims import sampling
from repspace.findings import front

BELOW = stats.region(-1, 1, "below")
REGULARIZERS = ("none", "label-smoothing:0.1", "mixup:1.0", "cutmix:1.0")
# Where a wrong decision is easiest: on the edges, just beside them, and among rows decided with ease.
FAMILIES = {"edge": [1.0] * 12,
            "both edges": [-1.0, 1.0] * 6,
            "beside": [-1.02, -0.98, 0.98, 1.02] * 3,
            "mixed": [-9, -9, -9, 9, 9, 9, 0, 0, -1, 1, -1.1, 1.1]}


def familywise_error(means, zone, n_seeds=10, shared=0.5, n_draws=2000, alpha=0.05, seed=0):
    """Share of simulated families in which any row with true mean `means` (m,) is decided wrongly.

    Noise has unit variance per seed, of which the part `shared` is common to all rows of a seed.
    """
    draw, wrong = np.random.default_rng(seed), 0
    true = [stats.verdict(m, m, zone) if m not in (zone.low, zone.high) else "open" for m in means]
    for _ in range(n_draws):
        common = draw.normal(size=n_seeds) * np.sqrt(shared)
        noise = common + draw.normal(size=(len(means), n_seeds)) * np.sqrt(1 - shared)
        decisions = stats.decide([(m + e, zone) for m, e in zip(means, noise)], alpha=alpha)
        wrong += any(d.verdict not in ("open", t) for d, t in zip(decisions, true))
    return wrong / n_draws


@pytest.mark.parametrize("shared", [0, 0.5, 0.95])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_a_wrong_verdict_in_at_most_five_percent(family, shared):
    n_draws = 1000
    error = familywise_error(FAMILIES[family], BELOW, shared=shared, n_draws=n_draws)
    assert error <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / n_draws)


def test_narrow_noise_where_equivalence_can_be_shown():
    zone = stats.region(-4, 4, "inside")
    error = familywise_error([4.0, -4.0, 3.9, -4.1, 0, 0, 2, -2], zone, n_draws=1000)
    assert error <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 1000)


def test_without_correction_the_error_is_far_higher():
    draw, wrong = np.random.default_rng(0), 0
    for _ in range(300):
        p = [stats.decision_p(1 + draw.normal(size=10), BELOW) for _ in range(12)]
        wrong += min(p) <= 0.05
    assert wrong / 300 > 0.3


def test_intervals_cover_the_true_mean():
    draw = np.random.default_rng(0)
    intervals = [stats.mean_interval(draw.normal(size=5)) for _ in range(4000)]
    covered = np.mean([i.low <= 0 <= i.high for i in intervals])
    assert abs(covered - 0.95) < 0.012


def test_decision_and_interval_agree_at_every_level():
    draw = np.random.default_rng(1)
    for _ in range(500):
        low = draw.normal()
        zone = stats.region(low, low + draw.exponential(), draw.choice(["above", "below", "inside"]))
        x = draw.normal(draw.normal(), draw.exponential(0.3), draw.integers(2, 12))
        p = stats.decision_p(x, zone)
        for alpha in draw.uniform(0.001, 0.5, 5):
            _, left, right = stats.mean_interval(x, 1 - alpha)
            assert (stats.verdict(left, right, zone) != "open") == (p <= alpha)


def test_a_constant_row_beside_others_changes_nothing_but_the_count():
    x = np.linspace(-3, -2, 10)
    alone, = stats.decide([(x, BELOW)])
    constant, other = stats.decide([([-5.0] * 10, BELOW), (x, BELOW)])
    assert constant.verdict == other.verdict == alone.verdict == "supported"
    assert (constant.low, constant.high) == (-5, -5) and other.level == alone.level == 0.95


def test_one_correlation_for_rows_counts_and_edges():
    from scipy.stats import pearsonr
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(2, 6, 50))
    assert np.allclose(stats.correlation(x, y), [pearsonr(a, b)[0] for a, b in zip(x, y)], atol=1e-14)
    counts = stats.bootstrap_counts(50, 30)
    for r, n in zip(stats.correlation(x[0], y[0], counts), counts.astype(int)):
        assert np.isclose(r, pearsonr(np.repeat(x[0], n), np.repeat(y[0], n))[0], atol=1e-12)
    assert stats.correlation(1e8 + x[0], x[0]) == pytest.approx(1, abs=1e-12)
    assert np.isnan(stats.correlation(np.ones(50), y[0])) and np.isnan(stats.correlation(x[0], y[0], np.eye(50)[0]))
    assert stats.correlation(1e-9 * x[0] + 1, x[0]) == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="at least 0"): stats.correlation(x[0], y[0], -counts)


def constructed(targets, n_seeds=10, data="digits"):
    """Made-up records of one net in which each Measure of `targets` has the effect that stands there."""
    draw, rows, images = np.random.default_rng(0), [], []
    for text in REGULARIZERS:
        condition = f"{data}.net.{text.replace(':', '-')}"
        for seed in range(n_seeds):
            noise = draw.normal(0, 1e-4)
            row = dict(study="constructed", condition=condition, data=data, model="net", feature_dim=pd.NA,
                       regularizer=text, seed=seed, untrained_bias_norm=1.0, **{c: 0.0 for m in targets for c in m.reads})
            regularized = text != "none"
            for measure, effect in targets.items():
                if measure.kind == "images":
                    images += [{"condition": condition, "seed": seed, "image": i, "label": 0, "prediction": 0,
                                "subset": True, measure.column: regularized * effect + noise} for i in range(3)]
                else:
                    row[measure.column] = {"difference": 1 + regularized * effect,
                                           "change": 2 * (1 + regularized * effect), "level": effect,
                                           "gap": 1 + effect, "quotient": 2 * effect}[measure.kind] + noise
                    if measure.other: row[measure.other] = {"gap": 1.0, "quotient": 2.0}[measure.kind]
            rows.append(row)
    columns = ["condition", "seed", "image", "label", "prediction", "subset"]
    samples = pd.DataFrame(images) if images else pd.DataFrame(columns=columns)
    return SimpleNamespace(runs=pd.DataFrame(rows), samples=samples)


def reachable(zone):
    """A value well inside each zone, and the verdict that it must get."""
    width = zone.high - zone.low
    for where, value in {"above": zone.high + width, "below": zone.low - width,
                         "inside": (zone.low + zone.high) / 2}.items():
        yield value, stats.verdict(value, value, zone)


CLAIMS = [pytest.param(claim, id=claim.id) for claim in claims.CLAIMS]
SECONDARY = [pytest.param(claim, measure, id=f"{claim.id}-{measure.name}")
             for claim in claims.CLAIMS for measure in claim.secondary if measure.kind != "pair"]


def judged(claim, value, n_seeds=10):
    """The rows of a claim's primary measure where its effect is `value`."""
    if claim.primary.kind != "pair":
        ledger = claims.ledger(constructed({claim.primary: value}, n_seeds), claim_ids=[claim.id])
    else:   # what is computed from arrays is put into the pairs, and what it stands on is made true
        first = claims.get(claim.after).primary
        paired = list(claims.pairs(constructed({first: first.region.high + 0.2}, n_seeds)))
        for _, pair, _, _ in paired:
            parts = [m.name.removeprefix("part_") for m in claim.measures]
            pair.kept["reasons"] = pd.DataFrame({"direction": value, "toward": 0.1}, pair.runs.index).reindex(columns=parts)
        ledger = claims.ledger(None, claim_ids=[claim.id], paired=paired)
    return ledger[ledger["measure"] == claim.primary.name]


@pytest.mark.parametrize("claim", CLAIMS)
def test_every_claim_reaches_its_verdicts(claim):
    reached = set()
    for value, expected in reachable(claim.primary.region):
        rows = judged(claim, value)
        assert len(rows) and set(rows["verdict"]) == {expected} and set(rows["role"]) == {"primary"}
        assert np.allclose(rows["effect"], value, atol=1e-3)
        assert len(rows) <= 3 + (claim.primary.kind not in claims.paired_kinds)
        reached.add(expected)
    assert set(judged(claim, value, n_seeds=9)["verdict"]) <= {"open", "not applicable"}
    zone = claim.primary.region
    inside = "supported" if zone.claimed == "inside" else "none" if zone.low <= 0 <= zone.high else "in between"
    assert reached == {"supported", "contradicted", inside}


@pytest.mark.parametrize("claim, measure", SECONDARY)
def test_every_secondary_measure_has_a_plain_interval_and_no_verdict(claim, measure):
    ledger = claims.ledger(constructed({measure: 0.3}), claim_ids=[claim.id])
    rows = ledger[ledger["measure"] == measure.name]
    assert len(rows) and set(rows["role"]) == {"secondary"} and set(rows["verdict"]) == {""}
    for row in rows.itertuples():
        assert (row.effect, row.low, row.high) == pytest.approx(stats.mean_interval(row.per_seed)) and row.level == 0.95
        assert row.effect == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize("data, n_seeds, decided", [("digits", 9, False), ("digits", 10, True),
                                                   ("cifar10", 4, False), ("cifar10", 5, True)])
def test_each_data_set_asks_for_its_number_of_seeds(data, n_seeds, decided):
    measure = claims.get("accuracy").primary
    ledger = claims.ledger(constructed({measure: 0.1}, n_seeds, data), claim_ids=["accuracy"])
    assert set(ledger["verdict"]) == ({"supported"} if decided else {"open"})


def test_data_sets_are_families_of_their_own():
    measure = claims.get("accuracy").primary
    one, two = (constructed({measure: 0.1}, data=data) for data in ("digits", "cifar10"))
    both = SimpleNamespace(runs=pd.concat([one.runs, two.runs]), samples=one.samples)
    alone, together = claims.ledger(one), claims.ledger(both)
    same = together[together["data"] == "digits"].drop(columns="per_seed").reset_index(drop=True)
    pd.testing.assert_frame_equal(alone.drop(columns="per_seed"), same)


def test_feature_dimensions_do_not_pair():
    measure = claims.get("accuracy").primary
    flat = constructed({measure: 0.1})
    flat.runs.loc[flat.runs["regularizer"] != "none", "feature_dim"] = 2
    assert claims.ledger(flat).empty


def test_an_empty_ledger_has_its_columns_and_can_be_compared():
    nothing = constructed({})
    empty = claims.ledger(SimpleNamespace(runs=nothing.runs.iloc[:0], samples=nothing.samples))
    assert list(empty.columns) == claims.ledger_columns and claims.compare(empty, empty).empty
    assert claims.evidence(empty).empty


@pytest.fixture
def small_study(tmp_path, monkeypatch):
    """Two written records of one made-up net with d = 2, whose untrained biases are all zero."""
    monkeypatch.setenv("REPSPACE_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    head = {"weight": draw.normal(size=(3, 2)).astype("f4"), "bias": np.ones(3, "f4"),
            "untrained.weight": draw.normal(size=(3, 2)).astype("f4"), "untrained.bias": np.zeros(3, "f4")}
    z, labels = draw.normal(size=(30, 2)).astype("f4"), np.arange(30) % 3
    logits = {"labels": labels, "features": z, "untrained.features": z, "clean": z @ head["weight"].T + 1}
    samples = pd.DataFrame(dict(image=range(30), label=labels, prediction=labels, subset=True,
                                cos_label=0.5, cos_label_span=0.5))
    for text in ("none", "mixup:1.0"):
        condition = f"digits.net-2d.{text.replace(':', '-')}"
        run = dict(study="small", condition=condition, data="digits", model="net", feature_dim=2, seed=0,
                   regularizer=text, identity=condition, scalars=dict.fromkeys(claims.columns()[0], 1.0))
        records.write(records.run_folder("small", condition, 0), run, samples, logits, head)
    return records.load("small")


def test_heads_that_start_without_bias_say_nothing_of_cones_before_training(small_study):
    ledger = claims.ledger(small_study)
    before = ledger["measure"].isin(["untrained_cone_degree_test", "over_untrained"])
    assert before.any() and set(ledger[before]["why"]) == {"biases start at zero"}
    assert set(ledger[~before & (ledger["role"] == "primary")]["verdict"]) <= {"open", "not applicable"}


def test_figures_are_drawn_from_records(small_study):
    assert "Before training 3 regions" in figures.planes(small_study).alt
    assert "Mixup 1.0 " in figures.reliability_by_condition(small_study).alt
    assert "net: plain " in figures.distributions(small_study, "image").alt


@pytest.fixture(scope="module")
def ledger():
    below = {c.primary: c.primary.region.low - 0.01 for c in map(claims.get, ("magnitude", "accuracy", "calibration", "robustness"))}
    return claims.ledger(constructed(below | {m: 0.3 for m in claims.get("magnitude").secondary}))


def test_inline_svg_is_well_formed_and_shares_no_ids(ledger):
    drawn = [figures.effects(ledger, "magnitude"), figures.effects(ledger, "robustness"),
             figures.scorecard(ledger)]
    ids = []
    for figure in drawn:
        root = ElementTree.fromstring(figure.svg)
        assert root.get("role") == "img" and root.get("aria-label") == figure.alt
        ids += [element.get("id") for element in root.iter() if element.get("id")]
        assert "#000000" not in figure.svg and "<style" not in figure.svg
    assert len(ids) == len(set(ids))


def test_figures_are_the_same_bytes_in_another_process(ledger, tmp_path):
    ledger.to_pickle(tmp_path / "ledger.pkl")
    code = ("import sys, pandas, hashlib; from repspace import figures; "
            "ledger = pandas.read_pickle(sys.argv[1]); "
            "print(hashlib.sha256(figures.effects(ledger, 'magnitude').svg.encode()).hexdigest())")
    run = [subprocess.run([sys.executable, "-c", code, str(tmp_path / "ledger.pkl")], capture_output=True,
                          text=True, check=True).stdout for _ in range(2)]
    assert run[0] == run[1]


def test_reading_imports_no_torch():
    code = ("import sys; from repspace import claims, figures, findings, stats; from repspace.claims import sampling; findings.studies.provenance(); "
            "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- other test images ----

@pytest.fixture(scope="module")
def digits():
    return records.load("digits", "published")


def test_bootstrap_of_a_pair_is_that_of_the_rows(digits):
    """The interval of alignment's effect, over published images, drawn row by row and with counts as weights."""
    rows = claims.ledger(digits).query("claim == 'alignment' and measure == 'cos_label_span' and regularizer == 'mixup:1.0'")
    table = sampling.with_image_intervals(rows, sampling.Draws(digits, n_draws=400))
    for row in table.itertuples():
        plain = row.condition.rsplit(".mixup", 1)[0] + ".none"
        of = dict(list(digits.samples.groupby(["condition", "seed"])))
        def difference(seed):
            a, b = (of[name, seed] for name in (row.condition, plain))
            right = ((a["label"] == a["prediction"]).to_numpy() & (b["label"] == b["prediction"]).to_numpy())
            return (a["cos_label_span"].to_numpy() - b["cos_label_span"].to_numpy())[right]
        values = [difference(seed) for seed in row.per_seed.index]
        assert abs(np.mean([v.mean() for v in values]) - row.effect) < 1e-4
        draw = np.random.default_rng(0)
        drawn = [[v[draw.integers(0, len(v), len(v))].mean() for _ in range(400)] for v in values]
        widths = [np.subtract(*np.quantile(d, [0.975, 0.025])) / 2 for d in drawn]
        half = np.sqrt(np.sum(np.square(widths))) / len(widths)
        assert 0.8 < (row.images_high - row.images_low) / 2 / half < 1.25


def test_recorded_scalars_follow_from_the_rows(digits, tmp_path):
    """Over all test images, what `sampling.statistic` makes of a fresh record's rows is the record's own scalar."""
    run = digits.runs.iloc[0].to_dict()
    rows = sampling._rows_of(sampling.Draws(digits), "no_bias_accuracy", run["condition"], run["seed"])
    once = np.ones((1, len(rows)), np.float32)
    known = ("accuracy", "confidence_gap", "nll", "rms", "span_norm", "cone_degree_test", "success_pgd", "success_fgsm",
             "toward_r_pgd", "toward_r_span_noise", "no_bias_accuracy", "no_bias_agreement", "ece_excess")
    for column in known:
        from_rows = sampling.statistic(column, run, rows, once, 16)[0]
        # 200 published images of about 1,600: the two agree as two samples do. The floor is not in the rows.
        slack = {"toward_r_pgd": .3, "toward_r_span_noise": .3, "success_pgd": .15, "success_fgsm": .15,
                 "span_norm": .1 * run["span_norm"], "nll": .1}.get(column, .06)
        assert abs(from_rows - run[column]) < slack, (column, from_rows, run[column])


# ---- several studies ----

def test_studies_are_shown_where_there_are_records(tmp_path):
    """No CIFAR, two seeds of it, five seeds of it; the digits are published all along."""
    results = tmp_path / "results"
    shutil.copytree(records.results_root() / "digits", results / "digits")
    def write(seed, text):
        effect = 1.0 if text == "none" else 0.5
        run = dict(study="cifar10-cpu", condition=f"cifar10.resnet8.{text.replace(':', '-')}", seed=seed, data="cifar10",
                   model="resnet8", feature_dim=None, regularizer=text, recipe={}, measures="standard", data_digest="d" * 64,
                   scalars={"rms": effect + seed / 1000}, settings={"reference": 0.4},
                   provenance={"version": "0.0.9", "code": "other", "commit": "abcdef123"})
        run["identity"] = records.identity(run)
        samples = pd.DataFrame({"image": range(4), "label": 0, "prediction": 0, "subset": True})
        records.write(records.run_folder("cifar10-cpu", run["condition"], seed, tmp_path), run, samples, {}, {})
    assert [study.name for study in findings.judged(runs=tmp_path, results=results)] == ["digits"]
    for seeds, verdict in ((range(2), "open"), (range(2, 5), "supported")):
        for seed in seeds:
            for text in ("none", "mixup:1.0"):
                write(seed, text)
        studies = findings.judged(runs=tmp_path, results=results)
        assert [study.name for study in studies] == ["digits", "cifar10-cpu"]
        ledger = findings.rows(studies)
        assert set(ledger.query("study == 'cifar10-cpu' and measure == 'rms'")["verdict"]) == {verdict}
        said = " ".join(line for line in claims.opening("magnitude", ledger).text.splitlines() if "CIFAR-10" in line)
        few = front.too_few(studies).text   # nets on too few seeds are listed, and do not speak
        if verdict == "open": assert not said and "ResNet-8 on CIFAR-10** (cifar10-cpu): 50,000 training images, 2 seeds." in few
        else: assert "with Mixup, vectors are 49.9 %" in said and not few
        assert "cifar10-cpu\nresnet8" not in figures.scorecard(ledger).alt  # alt texts have no line breaks
    assert "Made by version 0.0.9, commit abcdef1 (not today's code)." in studies[1].heading.text
    alone = claims.ledger(records.load("digits", runs=tmp_path, results=results))
    together = ledger[ledger["study"] == "digits"].reset_index(drop=True)
    assert (alone["level"] == together["level"]).all(), "another study changes no study's verdicts"


def test_a_study_of_the_plane_is_not_judged():
    assert "digits-2d" in records.studies("published") and all(s.name != "digits-2d" for s in findings.judged("published"))


def test_runs_of_another_recipe_are_not_paired_with_the_rest(caplog):
    published = records.load("digits", "published")
    runs = published.runs.copy()
    changed = runs.index[(runs["model"] == "tiny-cnn") & (runs["regularizer"] == "none") & (runs["seed"] < 3)]
    for index in changed:
        runs.at[index, "recipe"] = runs.at[index, "recipe"] | {"epochs": 15}
        runs.loc[index, "accuracy"] = 0.1
    ledger = claims.ledger(records.Records(runs, published.samples))
    row = ledger[(ledger["claim"] == "accuracy") & (ledger["model"] == "tiny-cnn")].iloc[0]
    assert row["seeds"] == 7 and row["missing"] == 3 and row["verdict"] == "open" and abs(row["effect"]) < 0.1
    assert "3 runs with the recipe" in caplog.text and '"epochs": 15' in caplog.text
    images = ledger[(ledger["measure"] == "cos_label") & (ledger["model"] == "tiny-cnn")]
    assert len(images) and (images["seeds"] == 7).all()


# ---- claims and figures from outside, records of what is not known here ----

@pytest.fixture
def kurtosis():
    """A claim registered from outside, on a column that old records lack; taken away again."""
    claim = claims.Claim("kurtosis", "Vectors have few large entries.", "nowhere", "length", claims.Measure(
        "kurtosis", "change of kurtosis", "difference", "kurtosis", stats.region(-0.1, 0.1, "above"), "A guess."))
    yield claims.register(claim)
    claims.CLAIMS.remove(claim)
    figures.FIGURES.clear()


def test_a_registered_claim_is_judged_where_records_have_its_column(kurtosis, digits, caplog):
    before = claims.ledger(digits, claim_ids=["magnitude"])
    old, new = claims.ledger(digits), claims.ledger(digits._replace(runs=digits.runs.copy().assign(
        kurtosis=digits.runs["regularizer"].eq("mixup:1.0") + digits.runs["seed"] / 1e3)))
    assert "digits: kurtosis of claim kurtosis is left out in 6 rows: no 'kurtosis'" in caplog.text
    assert "kurtosis" not in set(old["claim"])
    assert set(new.query("claim == 'kurtosis' and regularizer == 'mixup:1.0'")["verdict"]) == {"supported"}
    for ledger in (old, new):
        same = ledger[ledger["claim"] == "magnitude"].reset_index(drop=True)
        pd.testing.assert_frame_equal(before.drop(columns="per_seed"), same.drop(columns="per_seed"), check_dtype=False)
    assert f"[kurtosis](findings/length.ipynb#kurtosis): {kurtosis.sentence}" in claims.overview(new).text


def test_what_is_registered_is_shown_in_its_chapter(kurtosis, digits, monkeypatch):
    figures.register("norms by net", lambda recorded: figures.paired_lines(recorded.runs, "rms"), "kurtosis")
    figures.register("all verdicts", figures.scorecard, of="ledger")
    displayed = []
    monkeypatch.setattr("IPython.display.display", lambda *things: displayed.extend(things))
    def shown(chapter):
        displayed.clear()
        findings.added([findings.Judged("digits", digits)], chapter)
        return [getattr(thing, "text", None) or thing.alt for thing in displayed]
    heading, nothing, name, study, figure = shown("length")
    assert (heading, name) == (f"**kurtosis.** {kurtosis.sentence}", "**norms by net**")
    assert nothing.startswith("No record here") and figure.startswith("Rms, plain → regularized")
    assert shown("verdicts")[0] == "**all verdicts**" and not shown("regions")


def foreign(text="sam:0.05+my_reg", data="folder:/pictures|<b>", model="my$net_2"):
    """Made-up records whose regularizer, data set and model nobody has registered here."""
    made = constructed({claims.get("magnitude").primary: -0.06}, n_seeds=5, data="x")
    known = {"none": "none", "label-smoothing:0.1": text, "mixup:1.0": "mixup:1.0", "cutmix:1.0": "cutmix:1.0"}
    runs = made.runs.assign(data=data, model=model, regularizer=made.runs["regularizer"].map(known), source="fresh",
                            settings=[{}] * len(made.runs), made=[{"device": "cpu<script>"}] * len(made.runs), seconds=1.0)
    samples = pd.DataFrame([dict(condition=run.condition, seed=run.seed, image=i, label=0, prediction=0, subset=True,
                                 norm=i + run.seed / 10) for run in runs.itertuples() for i in range(9)])
    return findings.Judged("foreign", records.Records(runs, samples))


def test_records_of_what_is_not_registered_are_shown_with_plain_names():
    study = foreign()
    assert set(claims.headline(study.rows("magnitude"))["verdict"]) == {"supported"}, "five seeds, as for any other data"
    pages = [findings.opening([study], "magnitude").text, claims.scorecard(study.ledger, "my$net_2").text,
             claims.overview(study.ledger).text, findings.overview([study]).text, findings.scope([study]).text,
             claims.table(study.rows("magnitude"), "magnitude")._repr_html_(), study.heading.text]
    assert "sam 0.05 + my_reg" in pages[0] and "my&#36;net_2 on folder:/pictures&#124;&lt;b&gt;" in pages[4]
    assert not [page for page in pages if "<script>" in page or "<b>" in page]
    drawn = [figures.effects(study.rows("magnitude"), "magnitude"), figures.scorecard(study.ledger),
             figures.paired_lines(study.runs, "rms"), figures.distributions(study.recorded, "norm")]
    for figure in drawn:
        ElementTree.fromstring(figure.svg)
    assert all("sam 0.05 + my_reg" in figure.alt for figure in drawn[2:])
    assert all("#767676" in figure.svg for figure in drawn[:1] + drawn[2:])


def test_arrays_are_read_from_where_the_records_were_loaded(small_study, monkeypatch, tmp_path):
    """The untrained head tells that biases start at zero, wherever the default folders are."""
    with_column = small_study.runs.drop(columns="untrained_bias_norm", errors="ignore")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("REPSPACE_RUNS", str(elsewhere))
    monkeypatch.chdir(elsewhere)
    ledger = claims.ledger(small_study._replace(runs=with_column))
    before = ledger["measure"] == "untrained_cone_degree_test"
    assert before.any() and set(ledger[before]["why"]) == {"biases start at zero"}
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(ValueError):
        claims.ledger(small_study._replace(runs=with_column))


def test_a_ledger_is_the_same_whether_its_rows_are_drawn_alone_or_together(digits):
    ledger = claims.ledger(digits, claim_ids=["calibration", "robustness"])
    draws = sampling.Draws(digits, n_draws=50)
    together = sampling.with_image_intervals(ledger, draws)
    alone = sampling.with_image_intervals(ledger[ledger["claim"] == "robustness"], sampling.Draws(digits, n_draws=50))
    both = together.loc[alone.index, ["images_low", "images_high"]]
    assert both[alone["role"] == "primary"].notna().all().all() and np.array_equal(both, alone[["images_low", "images_high"]], equal_nan=True)


def test_a_study_that_cannot_be_read_is_named(tmp_path, caplog):
    results = tmp_path / "results"
    for name in ("digits", "old"):
        shutil.copytree(records.results_root() / "digits", results / name)
    (results / "old" / "samples.parquet").write_bytes(b"PAR1 and no more")
    studies = findings.judged(runs=tmp_path / "runs", results=results)
    assert [study.name for study in studies] == ["digits"] and "study old is left out" in caplog.text
    assert "**Left out**: old, whose records cannot be read" in findings.overview(studies).text


def test_tables_need_no_jinja2():
    code = ("import sys; sys.modules['jinja2'] = None; from repspace import claims, findings; study = findings.judged('published')[0]; "
            "print(claims.table(study.rows('accuracy'), 'accuracy')._repr_html_()[:6])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "<table", done.stderr
