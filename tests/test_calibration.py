"""Calibration against its definition, SciPy, scikit-learn, and against peers where they are right."""
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from repspace import calibration
from repspace.calibration import (FeatureScaling, TemperatureScaling, brier, calibration_floor,
                                  classwise_calibration_error, confidence_gap, cross_fit,
                                  expected_calibration_error, nll, reliability, softmax)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from netcal.metrics import ECE
    from netcal.scaling import TemperatureScaling as NetcalTemperature
    from torchmetrics.functional.classification import multiclass_calibration_error

pytestmark = [pytest.mark.filterwarnings("ignore:::netcal"),
              pytest.mark.filterwarnings("ignore:::torch")]


def predictions(n, classes, seed=0, sharpness=2.0):
    """Probabilities (n, K) and labels that they know something of, but less than they say."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes))
    drawn = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    return softmax(sharpness * logits), drawn


def two_classes(confidence, right):
    """Probabilities (N, 2) of class 0 with this confidence, and labels that make it right or wrong."""
    confidence = np.asarray(confidence)
    return np.stack([confidence, 1 - confidence], axis=1), 1 - np.asarray(right, int)


def three_classes(confidence, right):
    """The same with a third class of probability 0, and misses of both other labels.

    netcal takes labels of which only two occur for a binary problem, and refuses three columns there.
    """
    p, y = two_classes(confidence, right)
    misses = np.flatnonzero(y)
    y[misses[::2]] = 2
    return np.c_[p, np.zeros(len(p))], y


def by_definition(confidence, right, n_bins=15):
    """ECE, sample by sample and bin by bin: (i/n, (i+1)/n], 0 in the first, 1 in the last."""
    error, confidence = 0.0, [float(c) for c in confidence]
    for i in range(n_bins):
        low, high = i / n_bins, (i + 1) / n_bins
        inside = [(c, h) for c, h in zip(confidence, right)
                  if low < c <= high or (i == 0 and c <= 0) or (i == n_bins - 1 and c > 1)]
        if inside:
            gap = sum(float(h) - c for c, h in inside) / len(inside)
            error += len(inside) / len(confidence) * abs(gap)
    return error


def torchmetrics_ece(probs, labels, n_bins=15):
    probs, labels = torch.as_tensor(probs), torch.as_tensor(labels)
    return multiclass_calibration_error(probs, labels, probs.shape[1], n_bins=n_bins).item()


def netcal_ece(probs, labels, n_bins=15):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ECE(n_bins).measure(np.asarray(probs), np.asarray(labels))


# --- the calibration error ------------------------------------------------------------------------

@pytest.mark.parametrize("classes", [2, 3, 10, 33, 100])
@pytest.mark.parametrize("n_bins", [1, 10, 15])
def test_definition_torchmetrics_and_netcal_agree_away_from_edges(classes, n_bins):
    p, y = predictions(3000, classes, seed=classes)
    ours = expected_calibration_error(p, y, n_bins)
    assert ours == pytest.approx(by_definition(p.max(1), p.argmax(1) == y, n_bins), abs=1e-12)
    assert ours == pytest.approx(torchmetrics_ece(p, y, n_bins), abs=2e-6)
    if classes > 2: assert ours == pytest.approx(netcal_ece(p, y, n_bins), abs=1e-12)


def test_with_two_classes_netcal_asks_another_question():
    """netcal judges the probability of class 1 against "the label is 1": our one column, not our ECE."""
    p, y = predictions(3000, 2)
    of_class_1 = by_definition(p[:, 1], y == 1)
    assert netcal_ece(p, y) == pytest.approx(of_class_1, abs=1e-12)
    assert expected_calibration_error(p, y) == pytest.approx(by_definition(p.max(1), p.argmax(1) == y))
    assert abs(expected_calibration_error(p, y) - of_class_1) > 1e-4
    both = (of_class_1 + by_definition(p[:, 0], y == 0)) / 2
    assert classwise_calibration_error(p, y) == pytest.approx(both, abs=1e-12)


def test_confidence_one_belongs_to_the_last_bin():
    """50 at 1.0 with 45 hits, 50 at .95, all hits: one bin, whose gaps of .1 and -.05 partly cancel.

    torchmetrics buckets by lower edges, finds 1.0 beyond the 15th, and gives it a 16th bin that no
    definition has; so it reports three times the error. netcal closes its last bin and agrees with us.
    """
    p, y = three_classes(np.repeat([1.0, 0.95], 50), np.r_[np.ones(45), np.zeros(5), np.ones(50)])
    assert expected_calibration_error(p, y) == pytest.approx(0.025)
    assert netcal_ece(p, y) == pytest.approx(0.025)
    assert torchmetrics_ece(p, y) == pytest.approx((0.1 + 0.05) / 2, abs=1e-6)
    assert torchmetrics_ece(p, y, n_bins=1) == pytest.approx(0.075, abs=1e-6)   # two bins, of one asked
    assert expected_calibration_error(p, y, n_bins=1) == pytest.approx(0.025)


def test_a_bin_is_closed_on_the_right():
    """12/15 belongs to (11/15, 12/15]. Both peers bin by [low, high) and put it with what is above.

    100 samples at 11.5/15, all hits; 100 at 12/15, none; 100 at 12.5/15, all hits.
    """
    below, edge, above = 11.5 / 15, 12 / 15, 12.5 / 15
    p, y = three_classes(np.repeat([below, edge, above], 100), np.repeat([1, 0, 1], 100))
    guo = (abs(1 - below - edge) + (1 - above)) / 3          # the edge and what is below it
    theirs = ((1 - below) + abs(1 - edge - above)) / 3       # the edge and what is above it
    assert expected_calibration_error(p, y) == pytest.approx(guo, abs=1e-12)
    assert by_definition(p.max(1), y == 0) == pytest.approx(guo, abs=1e-12)
    assert netcal_ece(p, y) == pytest.approx(theirs, abs=1e-12)
    assert torchmetrics_ece(p, y) == pytest.approx(theirs, abs=1e-6)
    assert abs(guo - theirs) > 0.02


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("n_bins", [3, 10, 15, 20, 49])
def test_on_every_edge_and_its_neighbours_the_value_decides(dtype, n_bins):
    """k/n in a dtype, and the next number of it on either side, each against what its value says."""
    on = (np.arange(n_bins + 1) / n_bins).astype(dtype)
    near = np.r_[on, np.nextafter(on, dtype(2)), np.nextafter(on, dtype(-1))].clip(0, 1)
    near = np.repeat(near[near >= 0.5], 3)                    # with two classes no confidence is lower
    right = np.arange(len(near)) % 3 > np.arange(len(near)) % 2
    p, y = two_classes(near, right)
    expected = by_definition(near, p.argmax(1) == y, n_bins)
    assert expected_calibration_error(p, y, n_bins) == pytest.approx(expected, abs=1e-12)
    wide = p.astype(float)
    assert expected_calibration_error(wide, y, n_bins) == expected_calibration_error(p, y, n_bins)


def test_edges_of_float64_are_as_divided():
    confidence = np.arange(16) / 15
    assert calibration.errors.in_bins(confidence, 15, "width")[1].tolist() == [0, *range(15)]
    assert calibration.errors.in_bins(np.array([0.3]), 10, "width")[1] == 2
    assert 0.3 < 3 * (1 / 10)                                 # multiples of a rounded 1/10 would miss it


def test_confidence_zero_is_in_the_first_bin():
    """Of class k the probability may be 0: class-wise it counts in the first bin, and only there."""
    p = np.array([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]])
    y = np.array([0, 1, 1, 2])
    columns = [by_definition(p[:, k], y == k) for k in range(3)]
    assert classwise_calibration_error(p, y) == pytest.approx(np.mean(columns), abs=1e-15)
    assert columns == [0.25, 0.5, 0.25]
    assert calibration.errors.in_bins(np.zeros(1), 15, "width")[1].tolist() == [0]


def test_rounding_above_one_is_still_a_probability():
    """float32 rows may sum to 1.0000005. torchmetrics then takes all rows for logits, in silence."""
    p = np.array([[1 + 5e-7, 0], [0.7, 0.3]] * 50, dtype=np.float32)
    y = np.zeros(100, int)
    assert expected_calibration_error(p, y) == pytest.approx(0.15, abs=1e-6)
    as_logits = softmax(p.astype(float))
    assert torchmetrics_ece(p, y) == pytest.approx(by_definition(as_logits.max(1), y == 0), abs=1e-6)
    assert torchmetrics_ece(p, y) > 0.3


@pytest.mark.parametrize("confidence", [1.0, 0.7, 0.5])
@pytest.mark.parametrize("right", [True, False])
def test_one_sample(confidence, right):
    p, y = two_classes([confidence], [right])
    for binning in ("width", "mass"):
        error = expected_calibration_error(p, y, binning=binning)
        assert error == pytest.approx(abs(right - confidence), abs=1e-15)
    assert torchmetrics_ece(p, y) == pytest.approx(abs(right - confidence), abs=1e-6)
    assert confidence_gap(p, y) == pytest.approx(confidence - right)
    assert reliability(p, y)["count"].sum() == 1
    assert 0 <= calibration_floor(p) <= 0.5


def test_a_class_never_predicted_and_never_there():
    p, y = predictions(2000, 4)
    p = np.c_[p * 0.97, np.full((2000, 2), 0.015)]            # class 4 is a label now and then, 5 never
    y[::40] = 4
    assert set(p.argmax(1)) == {0, 1, 2, 3}
    ours = expected_calibration_error(p, y)
    assert ours == pytest.approx(by_definition(p.max(1), p.argmax(1) == y), abs=1e-12)
    assert ours == pytest.approx(torchmetrics_ece(p, y), abs=2e-6)
    columns = [by_definition(p[:, k], y == k) for k in range(6)]
    assert columns[5] == pytest.approx(0.015)
    assert classwise_calibration_error(p, y) == pytest.approx(np.mean(columns), abs=1e-12)


def test_of_equal_probabilities_the_first_is_the_prediction():
    for classes in (2, 10, 32, 33, 50):
        p = np.full((3 * classes, classes), 1 / classes)
        y = np.arange(3 * classes) % classes
        assert confidence_gap(p, y) == pytest.approx(0, abs=1e-12)      # the label is 0 in 1 of K
        rng = np.random.default_rng(classes)
        counts = rng.multinomial(4, np.full(classes, 1 / classes), size=500)      # many ties
        coarse = counts / 4
        labels = np.arange(500) % classes
        top, hits = calibration.errors.judged(coarse, labels)
        assert (top == coarse.max(1)).all() and (hits == (coarse.argmax(1) == labels)).all()


def test_kinds_of_arrays_agree():
    p, y = predictions(3000, 7)
    half = p.astype(np.float16)
    for measure in (expected_calibration_error, classwise_calibration_error, brier, nll, confidence_gap):
        for narrow in (half, half.astype(np.float32)):
            same = measure(narrow.astype(float), y)
            assert measure(narrow, y) == pytest.approx(same, abs=1e-12)
            tensor = torch.tensor(narrow, requires_grad=True)
            assert measure(tensor, torch.tensor(y)) == measure(narrow, y)
            turned = measure(np.asfortranarray(narrow), y.astype(np.uint8))
            assert turned == pytest.approx(same, abs=1e-12)
        bf16 = torch.tensor(p).bfloat16()
        assert measure(bf16, torch.tensor(y)) == measure(bf16.float().numpy(), y)
        assert measure(p.tolist(), y.tolist()) == pytest.approx(measure(p, y), abs=1e-15)


def test_blocks_do_not_show(monkeypatch):
    p, y = predictions(1000, 5)
    measures = expected_calibration_error, brier, nll, confidence_gap, classwise_calibration_error
    before = [measure(p, y) for measure in measures]
    monkeypatch.setattr(calibration.errors, "_BLOCK", 35)
    assert [measure(p, y) for measure in measures] == pytest.approx(before, abs=1e-14)
    p[-1] = 2
    for measure in measures:                                  # also a fault in the last block is found
        with pytest.raises(ValueError, match="sum to 1"): measure(p, y)


def test_equal_mass_by_definition_and_against_netcal():
    p, y = predictions(3000, 5)
    order = np.argsort(p.max(1))
    confidence, right = p.max(1)[order], (p.argmax(1) == y)[order]
    parts = zip(np.split(confidence, 15), np.split(right, 15))
    expected = np.mean([abs(c.mean() - h.mean()) for c, h in parts])       # 200 samples each
    assert expected_calibration_error(p, y, binning="mass") == pytest.approx(expected, abs=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ECE(15, equal_intervals=False).measure(p, y) == pytest.approx(expected, abs=1e-3)


def test_equal_confidences_stay_together_in_bins_of_equal_mass():
    p, y = two_classes([0.9] * 10 + [0.6] * 2, [1] * 9 + [0] + [1, 0])
    assert expected_calibration_error(p, y, 4, "mass") == pytest.approx((10 * 0 + 2 * 0.1) / 12)
    assert len(reliability(p, y, 4, "mass")) <= 4


# --- scores, table, floor -------------------------------------------------------------------------

@pytest.mark.parametrize("classes", [2, 3, 40])
def test_scores_agree_with_scikit_learn(classes):
    p, y = predictions(2000, classes)
    assert nll(p, y) == pytest.approx(log_loss(y, p, labels=range(classes)), rel=1e-12)
    one_hot = np.eye(classes)[y]
    assert brier(p, y) == pytest.approx(((p - one_hot) ** 2).sum(1).mean(), rel=1e-12)
    columns = sum(brier_score_loss(y == k, p[:, k]) for k in range(classes))
    assert brier(p, y) == pytest.approx(columns, rel=1e-12)


def test_scores_at_their_ends():
    """A label of probability 0 makes NLL infinite; scikit-learn clips it to a number instead."""
    certain, wrong = np.eye(3), np.array([1, 2, 0])
    assert nll(certain, np.arange(3)) == 0 and nll(certain, wrong) == np.inf
    assert np.isfinite(log_loss(wrong, certain, labels=range(3)))
    assert brier(certain, np.arange(3)) == 0 and brier(certain, wrong) == 2
    nearly = np.array([[1 - 1e-12, 1e-12]])                   # no digits lost to 1 - 1
    assert brier(nearly, np.array([0])) == pytest.approx(2e-24, rel=1e-3)


def test_the_table_has_the_intervals_of_scipy_and_the_sum_of_ece():
    p, y = predictions(400, 10)
    for binning in ("width", "mass"):
        table = reliability(p, y, 12, binning)
        full = table[table["count"] > 0]
        gap = (full["count"] * (full["accuracy"] - full["confidence"]).abs()).sum() / 400
        assert gap == pytest.approx(expected_calibration_error(p, y, 12, binning), abs=1e-12)
        signed = (full["count"] * (full["confidence"] - full["accuracy"])).sum() / 400
        assert signed == pytest.approx(confidence_gap(p, y), abs=1e-12)
        for row in full.itertuples():
            n = int(full.loc[row.Index, "count"])
            hits = round(row.accuracy * n)
            wilson = binomtest(hits, n).proportion_ci(0.95, method="wilson")
            assert (row.accuracy_low, row.accuracy_high) == pytest.approx(tuple(wilson), abs=1e-12)


def test_perfectly_calibrated_labels_have_the_error_that_the_floor_says():
    """Over 200 draws of labels from the model: mean ECE equals the floor, and what theory says of it."""
    p, _ = predictions(800, 10)
    rng = np.random.default_rng(3)
    draws = [(rng.random((800, 1)) > p.cumsum(1)[:, :-1]).sum(1) for _ in range(200)]
    errors = [expected_calibration_error(p, y) for y in draws]
    standard_error = np.std(errors) / np.sqrt(200)
    floor = calibration_floor(p, n_draws=2000)
    assert abs(np.mean(errors) - floor) < 3 * standard_error
    assert 0.01 < floor < 0.06
    confidence = p.max(1)
    bins = np.minimum((confidence * 15).astype(int), 14)
    variance = np.bincount(bins, weights=confidence * (1 - confidence))
    assert floor == pytest.approx(np.sqrt(2 / np.pi) * np.sqrt(variance).sum() / 800, rel=0.05)
    assert abs(np.mean([confidence_gap(p, y) for y in draws])) < 3 * 0.45 / np.sqrt(800 * 200)


def test_the_floor_falls_with_the_root_of_the_sample():
    p, _ = predictions(80_000, 10)
    assert calibration_floor(p, 50) == pytest.approx(calibration_floor(p[:800], 2000) / 10, rel=0.1)


# --- scaling --------------------------------------------------------------------------------------

@pytest.mark.parametrize("classes, factor", [(2, 3.0), (5, 0.2), (10, 2.0)])
def test_temperature_agrees_with_scipy_and_netcal(classes, factor):
    rng = np.random.default_rng(classes)
    logits = rng.normal(size=(1500, classes))
    y = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    ours = TemperatureScaling().fit(factor * logits, y)

    def loss(t): return nll(softmax(factor * logits / t), y)
    peer = minimize_scalar(loss, bounds=(0.5 * ours.temperature, 2 * ours.temperature),
                           method="bounded", options={"xatol": 1e-10})
    assert ours.temperature == pytest.approx(peer.x, rel=1e-6) and not ours.at_bound
    assert loss(ours.temperature) <= peer.fun + 1e-13
    netcal = NetcalTemperature()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        netcal.fit(softmax(factor * logits), y, random_state=0)
        theirs = netcal.transform(softmax(factor * logits))
    theirs = theirs if theirs.ndim == 2 else np.c_[1 - theirs, theirs]
    assert ours.temperature == pytest.approx(float(1 / netcal.temperature[0]), rel=1e-4)
    assert np.abs(ours.apply(factor * logits) - theirs).max() < 1e-4
    assert nll(ours.apply(factor * logits), y) <= nll(theirs, y) + 1e-12


def test_from_probabilities_netcal_has_lost_the_small_ones():
    """netcal takes logits back from probabilities, cut off at 2.2e-16: an overconfident net wants a
    higher temperature than it finds. Given what is left, ours finds the same as netcal."""
    rng = np.random.default_rng(10)
    logits = rng.normal(size=(1500, 10))
    y = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    p, smallest = softmax(8 * logits), np.finfo(float).eps
    assert p.min() < smallest
    netcal = NetcalTemperature()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        netcal.fit(p, y, random_state=0)
    theirs = float(1 / netcal.temperature[0])
    cut = TemperatureScaling().fit(np.log(p.clip(smallest, 1 - smallest)), y).temperature
    whole = TemperatureScaling().fit(8 * logits, y).temperature
    assert cut == pytest.approx(theirs, rel=1e-5)
    assert whole > theirs * (1 + 1e-4)
    assert nll(softmax(8 * logits / whole), y) < nll(softmax(8 * logits / theirs), y)


def test_the_slope_at_the_minimum_is_zero():
    """Solved to convergence: mean over p of the logits equals the mean logit of the label."""
    rng = np.random.default_rng(0)
    logits, bias = rng.normal(size=(2000, 6)), rng.normal(size=6)
    y = (logits + bias + rng.gumbel(size=logits.shape)).argmax(1)
    for s, b in ((5 * logits, np.zeros(6)), (5 * logits + bias, bias), (0.05 * logits + bias, bias)):
        fit = FeatureScaling().fit(s, b, y)
        u, p = s - b, fit.apply(s, b)
        slope = ((p * u).sum(1) - u[np.arange(2000), y]).mean()
        assert abs(slope) < 1e-10 * np.abs(u).mean() + 1e-12


def test_without_bias_feature_scaling_is_temperature_scaling():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        logits = rng.exponential(4) * rng.normal(size=(200, 4))
        y = (logits + 2 * rng.gumbel(size=logits.shape)).argmax(1)
        features = FeatureScaling().fit(logits, np.zeros(4), y)
        temperature = TemperatureScaling().fit(logits, y)
        assert temperature.temperature == 1 / features.scale                 # to the last digit
        assert temperature.at_bound == features.at_bound
        apart = temperature.apply(logits) - features.apply(logits, np.zeros(4))
        assert np.abs(apart).max() < 1e-13


def test_scaling_the_features_of_a_head_is_what_feature_scaling_does():
    rng = np.random.default_rng(0)
    weight, bias, z = rng.normal(size=(5, 8)), rng.normal(size=5), rng.normal(size=(500, 8))
    y = (0.3 * z @ weight.T + bias + rng.gumbel(size=(500, 5))).argmax(1)
    fit = FeatureScaling().fit(z @ weight.T + bias, bias, y)
    assert fit.scale == pytest.approx(0.3, abs=0.05)
    moved = softmax((fit.scale * z) @ weight.T + bias)
    assert np.abs(moved - fit.apply(z @ weight.T + bias, bias)).max() < 1e-13


def test_at_the_bound_it_says_so():
    certain, labels = 10 * np.eye(4), np.arange(4)
    sharp = TemperatureScaling().fit(certain, labels)
    assert (sharp.temperature, sharp.at_bound) == (1 / calibration.HIGHEST, True)
    wrong = TemperatureScaling().fit(certain, (labels + 1) % 4)
    assert (wrong.temperature, wrong.at_bound) == (1 / calibration.LOWEST, True)
    rng = np.random.default_rng(0)
    far = rng.normal(size=(3000, 4))
    y = (far + rng.gumbel(size=far.shape)).argmax(1)
    for factor in (1e4, 1e-4):                                # the minimum is there, beyond a bound
        fit = TemperatureScaling().fit(factor * far, y)
        assert fit.at_bound and fit.temperature in (1 / calibration.LOWEST, 1 / calibration.HIGHEST)


def test_kinds_come_back_as_they_were():
    rng = np.random.default_rng(0)
    logits = torch.tensor(4 * rng.normal(size=(300, 5)))
    y = torch.tensor((logits.numpy() + 3 * rng.gumbel(size=(300, 5))).argmax(1))
    exact = TemperatureScaling().fit(logits, y).temperature
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        fit = TemperatureScaling().fit(logits.to(dtype), y)
        assert fit.apply(logits.to(dtype)).dtype == dtype
        assert fit.temperature == pytest.approx(exact, rel=2e-2)
        assert cross_fit(TemperatureScaling, logits.to(dtype), y).probs.dtype == dtype


def test_cross_fitting_judges_no_sample_by_itself():
    """Changing a label changes the scaling of the other half, and not of its own."""
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(101, 4))
    y = (logits + 2 * rng.gumbel(size=logits.shape)).argmax(1)
    before = cross_fit(TemperatureScaling, logits, y, seed=5)
    one, two = calibration.halves(101, seed=5)
    assert sorted([*one, *two]) == list(range(101)) and len(one) == 50
    y[one[0]] = (y[one[0]] + 1) % 4
    after = cross_fit(TemperatureScaling, logits, y, seed=5)
    assert (before.probs[one] == after.probs[one]).all()
    assert (before.probs[two] != after.probs[two]).all()


# --- logits or probabilities ----------------------------------------------------------------------

MEASURES = (expected_calibration_error, classwise_calibration_error, brier, nll, confidence_gap)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n, classes", [(2, 2), (3, 10), (500, 2), (500, 100)])
def test_probabilities_are_not_taken_for_logits(dtype, n, classes):
    logits = 3 * torch.randn(n, classes, generator=torch.Generator().manual_seed(classes))
    y = torch.arange(n) % classes
    probs = logits.softmax(1).to(dtype)
    if n >= 8 or dtype in (torch.float64, torch.float32):
        with pytest.raises(ValueError, match="look like probabilities"): TemperatureScaling().fit(probs, y)
        with pytest.raises(ValueError, match="look like probabilities"): FeatureScaling().fit(probs, None, y)
    if n >= 8:
        with pytest.raises(ValueError, match="look like probabilities"): cross_fit(TemperatureScaling, probs, y)
        with pytest.raises(ValueError, match="look like probabilities"): TemperatureScaling().fit(1000 * logits, y).apply(probs)
        for measure in MEASURES:
            with pytest.raises(ValueError, match="look like probabilities"): measure(probs, y, from_logits=True)
        certain = (1e6 * logits).softmax(1).to(dtype)                # one-hot, to the last row
        with pytest.raises(ValueError, match="look like probabilities"): TemperatureScaling().fit(certain, y)


def test_logits_are_not_taken_for_probabilities():
    """Among them: rows that sum to 1, none below 0, and log-probabilities; and one image at a time."""
    rng = np.random.default_rng(0)
    y = np.arange(400) % 3
    s = rng.normal(size=(400, 3))
    for logits in (s, np.log(softmax(s)), s - s.mean(1, keepdims=True) + 1 / 3, np.maximum(s, 0), np.abs(s),
                   softmax(s) * 1.1, softmax(s) - 0.01, np.r_[softmax(s[:399]), [[2.0, 1, 0]]], np.eye(3)[y] * 2):
        TemperatureScaling().fit(logits, y)
        nll(logits, y, from_logits=True)
    scaler = TemperatureScaling().fit(3 * s, y)
    for row in np.r_[softmax(s[:50]), np.eye(3)]: scaler.apply(row[None])


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_measures_from_logits_are_those_of_their_softmax(dtype):
    rng = np.random.default_rng(1)
    for classes in (2, 7, 50):
        s = (4 * rng.normal(size=(300, classes)) + 20).astype(dtype)
        y, p = np.arange(300, dtype=np.uint8) % classes, softmax(s.astype(float))
        for measure in MEASURES:
            assert measure(s, y, from_logits=True) == pytest.approx(measure(p, y), abs=1e-12)
            assert measure(torch.tensor(s), torch.tensor(y), from_logits=True) == pytest.approx(measure(p, y), abs=1e-12)
        assert calibration_floor(s, from_logits=True) == pytest.approx(calibration_floor(p))
        pd_equal = reliability(s, y, from_logits=True).fillna(0) - reliability(p, y).fillna(0)
        assert np.abs(pd_equal.to_numpy()).max() < 1e-12


def test_from_logits_nothing_over_or_underflows():
    far = np.array([[0.0, 800.0, 0.0]] * 8)
    for logits in (far, far.astype(np.float16), torch.tensor(far).bfloat16(), far * 1e300):
        exact = float(np.asarray(logits.double() if torch.is_tensor(logits) else logits, float)[0, 1])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert nll(logits, np.zeros(8, int), from_logits=True) == pytest.approx(exact, rel=1e-6)
            assert brier(logits, np.zeros(8, int), from_logits=True) == 2
    sure = np.array([[0, 50.0]] * 8, np.float32)
    assert nll(sure, np.ones(8, int), from_logits=True) == pytest.approx(np.log1p(np.exp(-50.0)), rel=1e-6)
    assert brier(sure, np.ones(8, int), from_logits=True) == pytest.approx(2 * np.exp(-100.0), rel=1e-6)
    assert nll(softmax(sure), np.ones(8, int)) == 0                      # which float32's own softmax cannot say


def test_without_bias_none_will_do():
    rng = np.random.default_rng(0)
    s, y = 3 * rng.normal(size=(200, 4)), np.arange(200) % 4
    fits = [FeatureScaling().fit(s, b, y) for b in (None, np.zeros(4))]
    assert fits[0].scale == fits[1].scale
    assert (fits[0].apply(s, None) == fits[1].apply(s, np.zeros(4))).all()
    assert (cross_fit(FeatureScaling, s, y).probs == cross_fit(FeatureScaling, s, y, np.zeros(4)).probs).all()


def test_the_binned_error_of_a_bootstrap_is_that_of_its_rows():
    p, y = predictions(300, 5)
    confidence, hits = p.max(1), p.argmax(1) == y
    counts = np.random.default_rng(0).multinomial(300, np.full(300, 1 / 300), 20)
    for weights, error in zip(counts, calibration.binned_error(confidence, hits, weights=counts)):
        rows = np.repeat(np.arange(300), weights)
        assert error == pytest.approx(expected_calibration_error(p[rows], y[rows]), abs=1e-12)


# --- cost -----------------------------------------------------------------------------------------

def test_no_copy_of_the_probabilities():
    """float32 tensors are judged where they lie: memory beyond them is a few numbers a row, not K."""
    p = torch.rand(50_000, 100, generator=torch.Generator().manual_seed(0))
    p, y = p / p.sum(1, keepdim=True), torch.arange(50_000) % 100
    size = p.numel() * 4
    for measure in (expected_calibration_error, nll, brier, confidence_gap, classwise_calibration_error):
        tracemalloc.start()
        measure(p, y)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 0.4 * size, f"{measure.__name__}: {peak / size:.2f} of the probabilities"


def test_a_million_predictions_lose_no_digits():
    """torchmetrics adds up in float32; at a million it is 1e-6 off. Ours is the float64 sum."""
    g = torch.Generator().manual_seed(0)
    p = torch.softmax(2 * torch.randn(1_000_000, 10, generator=g), 1)
    y = torch.randint(10, (1_000_000,), generator=g)
    confidence, predicted = (part.numpy() for part in p.max(1))
    bins = np.digitize(confidence.astype(float), np.arange(16) / 15, right=True) - 1
    gap = (predicted == y.numpy()) - confidence.astype(float)
    exact = np.abs(np.bincount(bins.clip(0, 14), weights=gap)).sum() / 1e6
    assert expected_calibration_error(p, y) == pytest.approx(exact, abs=1e-13)
    assert torchmetrics_ece(p, y) == pytest.approx(exact, abs=1e-4)


# --- other errors ---------------------------------------------------------------------------------

# Made once with relplot 1.0.3 and uncertainty-calibration 0.1.4, which are not installed here, by
#     p, y = predictions(n, classes, 0, sharpness); c, h = p.max(1), (p.argmax(1) == y).astype(float)
#     bins = [b for b in calibration.utils.fast_bin(list(zip(c, h)), [i / 15 for i in range(1, 16)]) if len(b) > 1]
#     numpy.random.seed(0); calibration.utils.normal_debiased_ce(bins, power=1, resamples=200_000)
#     relplot.smECE(c, h), relplot.smECE_sigma(c, h, 0.05)
# The first draws bins' accuracies 200,000 times; the second looks for its width in steps of 1/1024.
PEERS = [((800, 10, 2.0), 0.214437, 0.214734, 0.214786), ((3000, 5, 2.0), 0.192561, 0.192905, 0.192813),
         ((2000, 3, 1.0), 0.031141, 0.025109, 0.014480), ((4000, 10, 0.5), 0.121400, 0.121623, 0.121765)]


@pytest.mark.parametrize("made, debiased, smooth, at_width", PEERS)
def test_debiased_and_smooth_errors_agree_with_their_authors_code(made, debiased, smooth, at_width):
    p, y = predictions(*made[:2], 0, made[2])
    assert calibration.debiased_calibration_error(p, y) == pytest.approx(debiased, abs=1e-4)
    assert calibration.smooth_calibration_error(p, y) == pytest.approx(smooth, abs=6e-4)
    confidence, hits = calibration.errors.judged(p, y)
    on_grid = calibration.estimators._on_grid(confidence, confidence - hits)
    assert calibration.estimators._smoothed(on_grid, 0.05) == pytest.approx(at_width, abs=3e-4)


def test_the_debiased_error_by_drawing():
    p, y = predictions(500, 6)
    count, confidence, accuracy = calibration.estimators.binned(*calibration.errors.judged(p, y))
    rng = np.random.default_rng(0)
    redrawn = rng.normal(accuracy, np.sqrt(accuracy * (1 - accuracy) / count), (200_000, len(count)))
    mean = (np.abs(redrawn - confidence) @ count / count.sum()).mean()
    expected = 2 * expected_calibration_error(p, y) - mean
    assert calibration.debiased_calibration_error(p, y) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("classes", [2, 3, 10, 40])
def test_largest_and_mean_square_errors_agree_with_torchmetrics_and_netcal(classes):
    p, y = predictions(2500, classes, seed=1)
    largest, square = calibration.maximum_calibration_error(p, y), calibration.rms_calibration_error(p, y)
    theirs = {norm: multiclass_calibration_error(torch.as_tensor(p), torch.as_tensor(y), classes, n_bins=15,
                                                 norm=norm).item() for norm in ("max", "l2")}
    assert largest == pytest.approx(theirs["max"], abs=1e-6) and square == pytest.approx(theirs["l2"], abs=1e-6)
    if classes > 2:   # of two classes netcal takes the second one's probability, not the top one's
        from netcal.metrics import MCE
        assert largest == pytest.approx(MCE(15).measure(p, y), abs=1e-6)
    assert expected_calibration_error(p, y) <= square <= largest


@pytest.mark.parametrize("digits", [3, 1])
@pytest.mark.parametrize("classes", [2, 5])
def test_error_detection_agrees_with_scikit_learn_and_with_its_definition(classes, digits):
    """To one digit, many confidences are the same: AURC is then the mean over orders, of which 300 are drawn."""
    p, y = predictions(120, classes, seed=2)
    p = p.round(digits) / p.round(digits).sum(1, keepdims=True)
    p = p.round(6) / p.round(6).sum(1, keepdims=True)
    confidence, right = p.max(1), p.argmax(1) == y
    found = calibration.error_detection(p, y)
    assert found.auroc == pytest.approx(roc_auc_score(right, confidence), abs=1e-12)
    rng, areas = np.random.default_rng(0), []
    for _ in range(300):
        order = np.lexsort((rng.random(len(y)), -confidence))
        areas.append(np.mean([(~right[order[:n]]).mean() for n in range(1, len(y) + 1)]))
    assert found.aurc == pytest.approx(np.mean(areas), abs=4 * np.std(areas) / 300 ** 0.5 + 1e-12)
    assert (np.std(areas) > 1e-6) == (len(set(confidence)) < len(y))


def test_other_errors_at_their_ends():
    """All right, all wrong, constant logits, a class that never occurs, one sample; tensors and logits."""
    certain, wrong = np.eye(3), np.array([1, 2, 0])
    flat, two = np.full((40, 4), 0.25), np.arange(40) % 2
    for error in (calibration.debiased_calibration_error, calibration.smooth_calibration_error,
                  calibration.maximum_calibration_error, calibration.rms_calibration_error):
        assert error(certain, np.arange(3)) == pytest.approx(0, abs=1e-12)
        assert error(certain, wrong) == pytest.approx(1, abs=1e-6)
        assert error(flat, two) == pytest.approx(0.25, abs=0.02)          # accuracy .5, confidence .25
        p, y = predictions(300, 7)
        logits = torch.tensor(np.log(p))
        assert error(logits, torch.tensor(y), from_logits=True) == pytest.approx(error(p, y), abs=1e-9)
        with pytest.raises(ValueError, match="sum to 1"): error(2 * p, y)
    assert np.isnan(calibration.error_detection(certain, np.arange(3)).auroc)
    assert np.isnan(calibration.error_detection(certain, wrong).auroc)
    assert calibration.error_detection(certain, np.arange(3)).aurc == 0
    assert calibration.error_detection(flat, two) == pytest.approx((0.5, 0.5))
    assert calibration.error_detection(certain[:1], [0]).aurc == 0
