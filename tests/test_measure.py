"""Measures against NumPy and SciPy from the vectors themselves, and against what a record has kept of them."""
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.spatial.distance
import scipy.special
import scipy.stats
import torch
from sklearn.metrics import roc_auc_score

from repspace import attacks, corruptions, measure, records, regularize, train, vocabulary
from repspace.data import load
from repspace.measure import Context, Values, gather, groups
from repspace.vocabulary import Recipe

FEW = measure.settings("digits")._replace(attack_images=60)
RECIPE = Recipe(epochs=6, batch_size=50, lr=0.05)


@pytest.fixture(scope="module")
def digits():
    return load("digits", seed=0)


def net_of(digits, model="tiny-cnn-bn", regularizer="label-smoothing:0.1"):
    net = train.new_classifier(model, digits, RECIPE, 0)
    train.fit(net, digits, RECIPE, regularize.get(regularizer), 0)
    return net


@pytest.fixture(scope="module")
def pair(digits):
    return net_of(digits), train.new_classifier("tiny-cnn-bn", digits, RECIPE, 0)


@pytest.fixture(scope="module")
def measured(pair, digits):
    return measure.run(*pair, digits, regularize.get("label-smoothing:0.1"), 0, FEW)


@pytest.fixture(scope="module")
def arrays(pair, digits):
    """Features and logits of the test and training images, head: as plain float64 arrays, by plain PyTorch."""
    net = pair[0].eval()
    with torch.no_grad():
        z, train_z = (net.features(split.images.float()).double().numpy() for split in (digits.test, digits.train))
        s, train_s = (net(split.images.float()).double().numpy() for split in (digits.test, digits.train))
    return dict(z=z, s=s, train_z=train_z, train_s=train_s, y=digits.test.labels.numpy(),
                train_y=digits.train.labels.numpy(), W=net.head.weight.detach().double().numpy(),
                b=net.head.bias.detach().double().numpy())


def span_of(W, z):
    """Pz by SciPy's orthonormal basis of the weights' differences."""
    basis = scipy.linalg.orth((W[1:] - W[0]).T)
    return z @ basis @ basis.T


def ece(confidence, hit, n_bins=15):
    total = 0
    for i in range(n_bins):
        low, high = i / n_bins, (i + 1) / n_bins
        inside = (confidence > low) & (confidence <= high)
        if inside.any(): total += abs(hit[inside].mean() - confidence[inside].mean()) * inside.sum()
    return total / len(hit)


def test_scalars_are_those_of_numpy_and_scipy(measured, arrays):
    z, s, y, W, b = (arrays[name] for name in ("z", "s", "y", "W", "b"))
    rows, p, Pz = np.arange(len(y)), scipy.special.softmax(s, 1), span_of(W, z)
    log_p = s - scipy.special.logsumexp(s, 1, keepdims=True)
    train_log_p = arrays["train_s"] - scipy.special.logsumexp(arrays["train_s"], 1, keepdims=True)
    expected = {
        "accuracy": (s.argmax(1) == y).mean(), "confidence": p.max(1).mean(),
        "no_bias_accuracy": ((z @ W.T).argmax(1) == y).mean(),
        "train_accuracy": (arrays["train_s"].argmax(1) == arrays["train_y"]).mean(),
        "train_loss": -train_log_p[np.arange(len(train_log_p)), arrays["train_y"]].mean(),
        "nll": -log_p[rows, y].mean(), "ece": ece(p.max(1), p.argmax(1) == y),
        "brier": ((p - np.eye(10)[y]) ** 2).sum(1).mean(), "confidence_gap": p.max(1).mean() - (p.argmax(1) == y).mean(),
        "rms": np.sqrt((z ** 2).mean(1)).mean(), "span_norm": np.sqrt((Pz ** 2).sum(1)).mean(),
        "logit_scale": np.sqrt((Pz ** 2).sum(1)).mean() * np.median(scipy.spatial.distance.pdist(W)),
        "radius": np.median(np.sqrt((span_of(W, arrays["train_z"]) ** 2).sum(1))),
        "radius_whole": np.median(np.sqrt((arrays["train_z"] ** 2).sum(1))),
        "span_share": (np.sqrt((Pz ** 2).sum(1)) / np.sqrt((z ** 2).sum(1))).mean(),
        "centered_logit_norm": np.median(np.linalg.norm((np.eye(10) - 0.1) @ W @ z.T, axis=0)),
        "train_span_norm": np.sqrt((span_of(W, arrays["train_z"]) ** 2).sum(1)).mean()}
    for name, value in expected.items():
        assert measured.scalars[name] == pytest.approx(value, rel=1e-6), name


def test_the_degree_of_cone_is_that_of_a_bisection_on_the_ray(measured, arrays):
    """Where the prediction at αz becomes that at z, for α between 0 and 1: the region is convex, so once."""
    z, W, b = arrays["z"][:200], arrays["W"], arrays["b"]
    wanted = (z @ W.T + b).argmax(1)
    low, high = np.zeros(len(z)), np.ones(len(z))
    at_origin = b.argmax() == wanted
    for _ in range(50):
        middle = (low + high) / 2
        same = ((middle[:, None] * z) @ W.T + b).argmax(1) == wanted
        low, high = np.where(same, low, middle), np.where(same, middle, high)
    gaps = measured.samples["apex_gap"].to_numpy()[:200]
    assert np.abs(np.where(at_origin, 0, high) - gaps).max() < 1e-6


def entry(W, b, z):
    """How far along the ray to each of `z` its region begins, by its definition: the last crossing before 1."""
    out = np.zeros(len(z))
    for i, s in enumerate(z @ W.T):
        k = (s + b).argmax()
        out[i] = max([0] + [-(b[k] - b[j]) / (s[k] - s[j]) for j in range(len(b)) if s[k] > s[j]])
    return out


def test_cones_are_judged_on_correct_vectors_that_are_not_of_the_largest_bias(pair, digits, measured, arrays):
    z, y, W, b = (arrays[name] for name in ("z", "y", "W", "b"))
    predicted, lo = (z @ W.T + b).argmax(1), entry(W, b, z)
    chosen = (predicted == y) & (predicted != b.argmax())
    assert 1000 < chosen.sum() < (predicted == y).sum() and (lo[predicted == b.argmax()] == 0).all()
    distance = lo * np.sqrt((span_of(W, z) ** 2).sum(1))
    with torch.no_grad():
        before = pair[1].eval().features(digits.test.images.float()).double().numpy()
    W0, b0 = (p.detach().double().numpy() for p in (pair[1].head.weight, pair[1].head.bias))
    also = chosen & ((before @ W0.T + b0).argmax(1) != b0.argmax())
    degree = 1 - entry(W0, b0, before[also]).mean() if also.any() else None
    for name, value in {"cone_degree_right": 1 - lo[chosen].mean(), "cone_entry_right": distance[chosen].mean(),
                        "cone_share_beyond_tenth": (lo[chosen] > 0.1).mean(),
                        "untrained_cone_degree_right": degree}.items():
        assert measured.scalars[name] == (None if value is None else pytest.approx(value, rel=1e-6)), name
    for k in (0, 3, 10, 30):
        assert measured.scalars[f"cone_degree_bias_{k}"] == pytest.approx(1 - entry(W, k * b, z).mean(), rel=1e-6)
        if k: assert measured.scalars[f"bias_agreement_{k}"] == ((z @ W.T + k * b).argmax(1) == predicted).mean()


def test_the_projection_on_the_finite_norm_and_what_is_left_of_the_loss(measured, arrays):
    z, s, y, W, b = (arrays[name] for name in ("train_z", "train_s", "train_y", "W", "b"))
    t, basis = np.full((10, 10), 0.01) + 0.9 * np.eye(10), scipy.linalg.orth((W[1:] - W[0]).T)
    loss = lambda u, k: -t[k] @ scipy.special.log_softmax(W @ (basis @ u) + b)
    minima = [basis @ scipy.optimize.minimize(loss, np.zeros(9), args=(k,), method="BFGS", options={"gtol": 1e-8}).x
              for k in range(10)]
    along = [(z[i] @ minima[y[i]]) / (minima[y[i]] @ minima[y[i]]) for i in range(len(y)) if s[i].argmax() == y[i]]
    assert measured.scalars["norm_projection"] == pytest.approx(np.mean(along), rel=1e-4)
    mean = np.mean([-t[k] @ scipy.special.log_softmax(row) for k, row in zip(y, s)])
    assert measured.scalars["soft_loss_excess"] == pytest.approx(mean - scipy.stats.entropy(t[0]), rel=1e-6)


def test_centers_against_their_best_rival_in_the_span(measured, arrays):
    z, W, b = (arrays[name] for name in ("z", "W", "b"))
    Pz, p = span_of(W, z), scipy.special.softmax(arrays["s"], 1)
    means = np.array([arrays["train_z"][arrays["train_y"] == k].mean(0) for k in range(10)])

    def r(points, within):
        of_class = []
        for k, c in enumerate(span_of(W, points)):
            rows = p.argmax(1) == k if within else slice(None)
            cosine = Pz[rows] @ c / np.linalg.norm(Pz[rows], axis=1) / np.linalg.norm(c)
            of_class.append(scipy.stats.pearsonr(cosine, p[rows, k]).statistic)
        return np.mean(of_class)
    rivals = {"mean": means, "centered_mean": means - means.mean(0), "weight": W, "centered_weight": W - W.mean(0)}
    for own in ("", "predicted_"):
        values = {kind: r(points, own != "") for kind, points in rivals.items()}
        for kind, value in values.items():
            assert measured.scalars[f"center_r_span_{own}{kind}"] == pytest.approx(value, abs=1e-5), kind
        assert measured.scalars[f"center_r_span_{own}rival"] == pytest.approx(max(values.values()), abs=1e-5)
    basis = scipy.linalg.orth((W[1:] - W[0]).T)
    for name, factor in (("minimal", 1), ("minimal_tenth", 0.1), ("minimal_tenfold", 10)):
        limit, centers = factor * measured.scalars["radius"], []
        for k in range(10):
            margin = lambda v: scipy.special.logsumexp(np.delete((W - W[k]) @ basis @ v * limit + b - b[k], k))
            ball = {"type": "ineq", "fun": lambda v: 1 - v @ v}
            centers.append(basis @ scipy.optimize.minimize(margin, basis.T @ W[k] / np.linalg.norm(W[k]) / 2,
                                                           constraints=ball, tol=1e-12).x)
        assert measured.scalars[f"center_r_span_{name}"] == pytest.approx(r(np.array(centers), False), abs=2e-3), name


def test_collapse_by_pairs_and_by_the_nearest_mean(measured, arrays):
    z, y, s = (arrays[f"train_{name}"] for name in ("z", "y", "s"))
    means = np.array([z[y == k].mean(0) for k in range(10)])
    nearest = scipy.spatial.distance.cdist(z, means).argmin(1)
    assert measured.scalars["nc_4"] == (nearest != s.argmax(1)).mean()
    wide = [((z[y == k] - means[k]) ** 2).sum(1).mean() for k in range(10)]
    pairs = [(wide[i] + wide[j]) / 2 / ((means[i] - means[j]) ** 2).sum() for i in range(10) for j in range(i)]
    assert measured.scalars["nc_cdnv"] == pytest.approx(np.mean(pairs), rel=1e-6)


def test_errors_of_calibration_and_of_their_detection(measured, arrays):
    s, y = arrays["s"], arrays["y"]
    p, scalars = scipy.special.softmax(s, 1), measured.scalars
    confidence, hit = p.max(1), (p.argmax(1) == y).astype(float)
    bins = np.minimum(np.ceil(confidence * 15).astype(int) - 1, 14)
    gaps = np.array([hit[bins == i].mean() - confidence[bins == i].mean() for i in np.unique(bins)])
    share = np.array([(bins == i).mean() for i in np.unique(bins)])
    assert scalars["mce"] == pytest.approx(np.abs(gaps).max(), rel=1e-5)
    assert scalars["ece_rms"] == pytest.approx(np.sqrt(share @ gaps ** 2), rel=1e-5)
    assert scalars["abs_gap"] == abs(scalars["confidence_gap"]) > 0
    assert scalars["nll_calibration"] + scalars["nll_refinement"] == pytest.approx(scalars["nll"], abs=1e-12)
    assert scalars["nll_refinement"] == scalars["nll_temperature"]
    assert scalars["auroc_error"] == pytest.approx(roc_auc_score(hit, confidence), abs=1e-6)
    order = np.argsort(-confidence, kind="stable")
    assert scalars["aurc"] == pytest.approx(np.mean((1 - hit[order]).cumsum() / np.arange(1, len(y) + 1)), abs=1e-6)


def test_corruptions_are_measured_on_the_fixed_subset(pair, digits, measured):
    x, y = digits.test.images[:FEW.subset].float(), digits.test.labels[:FEW.subset]
    accurate = []
    for kind in corruptions.CORRUPTIONS:
        for severity in range(1, 6):
            with torch.no_grad(): logits = pair[0].eval()(corruptions.corrupt(x, kind, severity, seed=0))
            accurate.append((logits.argmax(1) == y).double().mean().item())
    assert measured.scalars["accuracy_corrupted"] == pytest.approx(np.mean(accurate), abs=1e-9)
    kept = measured.curves["corruptions"]
    assert [a for kind in kept.values() for a in kind["accuracy"][1:]] == pytest.approx(accurate, abs=1e-4)
    assert 0 < measured.scalars["ece_corrupted"] < 1


def small(K):
    """Seen and Context of K classes in three dimensions, drawn at random."""
    rng = np.random.default_rng(K)
    weight, bias = rng.normal(size=(K, 3)), rng.normal(size=K)

    def drawn(n):
        labels = np.arange(n) % K
        z = np.abs(weight[labels] + rng.normal(size=(n, 3)))
        return measure.Vectors(z, z @ weight.T + bias, labels)
    seen = measure.Seen(weight, bias, drawn(90), drawn(60))
    return seen, Context("label-smoothing:0.1", 0, FEW, untrained=seen)


WITHOUT_NET = [group for group in measure.GROUPS if group.__name__ != "corrupted"]


def changed(seen, labels=None, logits=None, train_logits=None, bias=None):
    """`seen` with other labels or logits of its test images, or another bias."""
    test, inner = seen.test, seen.train
    if bias is not None:
        seen = replace(seen, bias=bias)
        logits, train_logits = (v.features @ seen.weight.T + bias for v in (test, inner))
    if labels is not None: test = test._replace(labels=labels)
    if logits is not None: test = test._replace(logits=logits)
    if train_logits is not None: inner = inner._replace(logits=train_logits)
    return replace(seen, test=test, train=inner)


@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("case", ["as it is", "no right image", "a class is missing", "no bias", "constant logits"])
def test_every_group_has_an_answer_at_its_ends(K, case):
    """None where nothing can be said; never an error, for the run would be lost."""
    seen, context = small(K)
    wrong = (seen.predictions + 1) % K
    seen = {"as it is": lambda: seen, "no right image": lambda: changed(seen, labels=wrong),
            "a class is missing": lambda: changed(seen, labels=np.zeros(90, int)),
            "no bias": lambda: changed(seen, bias=np.zeros(K)),
            "constant logits": lambda: changed(seen, logits=np.zeros((90, K)), train_logits=np.zeros((60, K)))}[case]()
    scalars = measure.plain(measure.measured(seen, replace(context, untrained=seen), WITHOUT_NET).scalars)
    assert scalars["accuracy"] == (seen.predictions == seen.labels).mean()
    rarely = {"rms_clean_bn", "span_norm_clean_bn", "alignment_clean_bn", "alignment_span_clean_bn", "accuracy_clean_bn",
              "toward_partial", "toward_head_r", "toward_random_class"}   # no attack here
    missing = {name for name, value in scalars.items() if value is None} - rarely
    if case == "no right image":
        assert {"cone_degree_right", "cone_entry_right", "cone_share_beyond_tenth", "untrained_cone_degree_right",
                "auroc_error"} <= missing
    if case == "as it is": assert not missing
    if case == "no bias":
        assert scalars["cone_degree_right"] == scalars["bias_agreement_30"] == scalars["cone_degree_bias_30"] == 1
        assert (scalars["cone_entry_right"], scalars["cone_share_beyond_tenth"]) == (0, 0)
        assert scalars["nll_feature_scale"] == pytest.approx(scalars["nll_temperature"])
    if case == "constant logits":
        assert (scalars["mce"], scalars["nll_calibration"]) == pytest.approx(
            (abs(scalars["accuracy"] - 1 / K), 0), abs=1e-9)
        assert scalars["auroc_error"] == pytest.approx(0.5)


def test_alignment_is_with_the_point_of_least_loss_that_scipy_comes_to(pair, digits, measured, arrays):
    W, b, radius = arrays["W"], arrays["b"], measured.scalars["radius"]
    basis = scipy.linalg.orth((W[1:] - W[0]).T)
    for k in range(3):
        loss = lambda u: scipy.special.logsumexp(W @ (basis @ u) + b) - (W @ (basis @ u) + b)[k]
        inside = {"type": "ineq", "fun": lambda u: radius ** 2 - u @ u}
        center = basis @ scipy.optimize.minimize(loss, basis.T @ W[k], constraints=inside, tol=1e-14,
                                                 options={"maxiter": 2000}).x
        own = arrays["y"] == k
        z = arrays["z"][own]
        cosine = z @ center / np.linalg.norm(z, axis=1) / np.linalg.norm(center)
        assert np.abs(cosine - measured.samples["cos_label"].to_numpy()[own]).max() < 2e-3


def test_temperature_and_soft_norm_are_minima_that_scipy_finds_too(measured, arrays):
    s, y, W, b = (arrays[name] for name in ("s", "y", "W", "b"))
    nll = lambda t, rows: -scipy.special.log_softmax(s[rows] / t, 1)[np.arange(len(rows)), y[rows]].mean()
    order = np.random.default_rng(0).permutation(len(y))
    halves = np.sort(order[:len(y) // 2]), np.sort(order[len(y) // 2:])
    best = [scipy.optimize.minimize_scalar(nll, (0.05, 5), args=(rows,), bounds=(0.05, 5), method="bounded",
                                           options={"xatol": 1e-10}).x for rows in halves]
    assert measured.scalars["temperature"] == pytest.approx(np.mean(best), rel=1e-5)

    t, basis = np.full((10, 10), 0.01) + 0.9 * np.eye(10), scipy.linalg.orth((W[1:] - W[0]).T)
    loss = lambda u, k: -t[k] @ scipy.special.log_softmax(W @ (basis @ u) + b)
    norms = [np.linalg.norm(scipy.optimize.minimize(loss, np.zeros(9), args=(k,), method="BFGS",
                                                    options={"gtol": 1e-8}).x) for k in range(10)]
    assert measured.scalars["soft_norm"] == pytest.approx(np.mean(norms), rel=1e-4)


def test_attack_scalars_are_those_of_the_attacked_images(pair, digits, measured, arrays):
    net, x, y = pair[0], digits.test.images[:60].float(), digits.test.labels[:60]
    eps = FEW.reference / 255
    inputs = x.clone().requires_grad_()
    torch.nn.functional.cross_entropy(net(inputs), y, reduction="sum").backward()
    with torch.no_grad():
        moved = (x + eps * inputs.grad.sign()).clamp(0, 1)
        after, predicted = net.features(moved).double().numpy(), net(moved).argmax(1).numpy()
    z = arrays["z"][:60]
    delta = after - z
    toward = -(delta * z).sum(1) / np.linalg.norm(delta, axis=1) / np.linalg.norm(z, axis=1)
    assert (measured.samples["label_fgsm"][:60] == predicted).all()
    assert measured.scalars["rho_fgsm"] == pytest.approx(
        (np.linalg.norm(delta, axis=1) / np.linalg.norm(z, axis=1)).mean(), rel=1e-4)
    assert measured.scalars["toward_fgsm"] == pytest.approx(toward.mean(), abs=1e-4)
    r = scipy.stats.pearsonr(measured.samples["cos_label"][:60].astype(float), toward).statistic
    assert measured.scalars["toward_r_fgsm"] == pytest.approx(r, abs=1e-4)
    crossed = (span_of(arrays["W"], z) * span_of(arrays["W"], after)).sum(1) <= 0
    assert measured.scalars["crossed_fgsm"] == crossed.mean()


def test_published_records_can_be_read_and_were_judged_at_the_same_limit():
    for study in ("digits", "cifar10-cpu"):
        for run in records.load(study, "published").runs.itertuples():
            then, now = measure.Settings.from_record(run.settings), measure.settings(run.data)
            for name in ("reference", "steps", "step_fraction", "attack_images", "subset", "directions", "floor_draws"):
                assert getattr(then, name) == getattr(now, name), name
            assert then.reference in then.grid and (then.race is None or then.race in then.grid)


def test_old_settings_lack_what_came_later_and_nothing_else():
    old = {name: value for name, value in FEW._asdict().items() if name not in ("race", "attack_first", "strong")}
    assert measure.Settings.from_record(old) == FEW._replace(race=None)
    for wrong in (old | {"eps": 3}, {name: value for name, value in old.items() if name != "grid"}):
        with pytest.raises(ValueError, match="must be"): measure.Settings.from_record(wrong)


def test_the_images_attacked_are_those_that_the_settings_say(pair, digits, measured):
    """Rows are in another order, their numbers say which; what does not ask for an order stays as it was."""
    later = measure.run(*pair, digits, regularize.get("label-smoothing:0.1"), 0, FEW._replace(attack_first=1000))
    rows = later.samples
    assert list(rows["image"]) == [*range(1000, 1597), *range(1000)]
    assert (rows["label"] == digits.test.labels.numpy()[rows["image"]]).all()
    assert rows["subset"].sum() == FEW.subset and set(rows["image"][rows["subset"]]) == set(range(1000, 1000 + FEW.subset))
    assert rows["breaks_pgd"].notna().sum() == 60 and rows["breaks_pgd"][:60].notna().all()
    back = rows.sort_values("image", ignore_index=True)
    for name in ("label", "prediction"): assert (back[name] == measured.samples[name]).all()
    for name in ("confidence", "norm", "apex_gap"): np.testing.assert_allclose(back[name], measured.samples[name], rtol=1e-3, atol=1e-5)
    for name in ("accuracy", "nll", "rms"): assert later.scalars[name] == pytest.approx(measured.scalars[name], rel=1e-5)
    assert later.scalars["success_pgd"] != measured.scalars["success_pgd"]
    assert np.array_equal(later.logits["labels"], rows["label"])


def test_the_least_limit_of_either_loss_is_that_of_the_rows(measured, tmp_path):
    rows = measured.samples[:60]
    least = np.minimum(rows.breaks_pgd, rows.breaks_margin).to_numpy()
    limits = np.where(np.isinf(least), 2 * FEW.grid[-1], least)
    assert measured.scalars["log2_break"] == pytest.approx(np.log2(limits[least > 0]).mean())
    assert measured.scalars["success_any"] == (least[least > 0] <= FEW.reference).mean()
    pgd = rows.breaks_pgd[rows.breaks_pgd > 0]
    assert measured.scalars["success_pgd_race"] == (pgd <= 23).mean()
    np.testing.assert_allclose(rows["log2_break"][least > 0], np.log2(limits[least > 0]), rtol=1e-6)
    assert rows["log2_break"][least == 0].isna().all() and measured.samples["log2_break"][60:].isna().all()
    _, context = as_recorded(measured, tmp_path)
    assert sorted(context.attacks["pgd"].along) == [limit for limit in FEW.grid if limit != FEW.reference]
    for limit, logits in context.attacks["pgd"].along.items():
        assert np.array_equal(logits, measured.logits[f"moved.pgd@{limit:g}"].astype(float)) and logits.shape == (60, 10)
        broken = logits.argmax(1) != measured.logits["labels"][:60]
        assert (rows.breaks_pgd[broken] <= limit).all()   # and what is not broken here may be at a lower limit


def test_a_record_without_the_margin_loss_has_no_least_limit(measured, tmp_path):
    seen, context = as_recorded(measured, tmp_path)
    del context.attacks["margin"]
    assert not groups.least_limits(seen, context).scalars and not groups.least_limits(seen, context).columns


def test_strong_attacks_are_of_the_first_images_alone(pair, digits, measured):
    budget = measure.Budget(images=40, steps=5, targets=2, queries=20)
    one = measure.run(*pair, digits, regularize.get("label-smoothing:0.1"), 0, FEW._replace(strong=budget))
    new = {f"{kind}_{name}" for kind in ("success", "robust_accuracy") for name in ("apgd", "apgdt", "square")}
    assert set(one.scalars) - set(measured.scalars) == new | {"success_union"}
    rows, strong = one.samples[:40], ["breaks_apgd", "breaks_apgdt", "breaks_square"]
    assert (one.samples[strong].notna().sum() == 40).all()
    broken = (rows[[*strong, "breaks_fgsm", "breaks_pgd", "breaks_margin"]] <= FEW.reference).any(axis=1)
    right = rows.label == rows.prediction
    assert one.scalars["success_union"] == pytest.approx(broken[right].mean())
    assert {name: one.scalars[name] for name in measured.scalars} == measured.scalars


def as_recorded(measured, folder, regularizer="label-smoothing:0.1"):
    """(Recorded, Context) of what was measured, by way of a record in `folder`."""
    run = {"study": "s", "condition": "c", "seed": 0, "identity": "i", "data": "digits", "regularizer": regularizer,
           "model": "tiny-cnn-bn", "feature_dim": None, "settings": FEW._asdict(), "scalars": measured.scalars,
           "curves": measured.curves}
    records.write(folder / "s" / "c" / "0", run, measured.samples, measured.logits, measured.head)
    loaded = records.load("s", "fresh", runs=folder)
    arrays = records.arrays("s", "c", 0, "fresh", runs=folder)
    return measure.from_record(loaded.runs.iloc[0], loaded.samples, arrays)


def test_a_record_gives_its_scalars_again(measured, tmp_path):
    again = measure.measured(*as_recorded(measured, tmp_path), measure.RECORDED)
    from_logits = [*groups.predicted(*as_recorded(measured, tmp_path / "b")).scalars, "nll", "brier", "ece", "ece_floor",
                   "ece_mass", "ece_classwise", "temperature", "nll_temperature", "robust_accuracy_pgd", "success_fgsm"]
    for name in from_logits: assert again.scalars[name] == measured.scalars[name], name
    for name, value in again.scalars.items():
        assert value == pytest.approx(measured.scalars[name], rel=1e-4, abs=1e-5), name
    assert len(again.scalars) > 45 and again.curves["pgd"] == measured.curves["pgd"]
    assert set(again.columns) == set(measured.samples)
    for name, column in again.columns.items():
        kept = measured.samples[name].to_numpy()[:len(column)]
        np.testing.assert_allclose(column.astype(float), kept.astype(float), rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("study", ["digits", "digits-2d", "cifar10-cpu"])
def test_published_records_give_what_their_rows_say(study):
    """To the precision of publication: predictions exactly, probabilities to a thousandth."""
    recorded = records.load(study, "published")
    for run in recorded.runs.iloc[::11].to_dict("records"):
        mine = (recorded.samples.condition == run["condition"]) & (recorded.samples.seed == run["seed"])
        samples = recorded.samples[mine].reset_index(drop=True)
        arrays = records.arrays(study, run["condition"], run["seed"], "published")
        again = measure.measured(*measure.from_record(run, samples, arrays), measure.RECORDED)
        hits = samples.label == samples.prediction
        assert again.scalars["accuracy"] == hits.mean()
        assert again.scalars["robust_accuracy_pgd"] == (samples.breaks_pgd > run["settings"]["reference"]).mean()
        assert again.scalars["confidence_gap"] == pytest.approx(samples.confidence.mean() - hits.mean(), abs=2e-3)
        assert again.scalars["ece"] == pytest.approx(ece(samples.confidence.to_numpy(), hits.to_numpy()), abs=0.01)
        likely = np.maximum(samples.label_probability.to_numpy(float), 1e-6) > 0.01
        np.testing.assert_allclose(again.columns["label_probability"][likely], samples.label_probability[likely],
                                   atol=5e-3)
        assert abs(again.scalars["alignment_span"] - samples.cos_label_span.mean()) < 1e-4


WITHOUT_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision"): raise ImportError(name)
sys.meta_path.insert(0, NoTorch())
from repspace import measure, records
recorded = records.load("digits", "published")
run = recorded.runs.iloc[0]
mine = (recorded.samples.condition == run.condition) & (recorded.samples.seed == run.seed)
arrays = records.arrays("digits", run.condition, run.seed, "published")
seen = measure.from_record(run, recorded.samples[mine].reset_index(drop=True), arrays)
print(len(measure.measured(*seen, measure.RECORDED).scalars), measure.settings("digits", "thorough").steps)
"""


def test_a_record_is_measured_again_without_torch():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, steps = map(int, done.stdout.split())
    assert count > 45 and steps == 20


def test_a_head_without_bias_is_one_with_a_bias_of_zero(digits):
    results = []
    for bare in (True, False):
        net, before = (net_of(digits, "tiny-cnn") if trained else train.new_classifier("tiny-cnn", digits, RECIPE, 0)
                       for trained in (True, False))
        for one in (net, before):
            one.head.bias.data.zero_()
            if bare: one.head.bias = None
        results.append(measure.run(net, before, digits, regularize.get("label-smoothing:0.1"), 0, FEW))
    bare, zero = results
    assert bare.scalars == zero.scalars and bare.samples.equals(zero.samples)
    assert bare.scalars["no_bias_agreement"] == bare.scalars["cone_degree_test"] == 1
    assert (bare.head["bias"] == 0).all() and (bare.head["untrained.bias"] == 0).all()


@pytest.mark.parametrize("dtype, off", [(torch.float64, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 3e-2)])
def test_nets_of_any_precision_are_measured(pair, digits, measured, dtype, off):
    import copy
    nets = (copy.deepcopy(net).to(dtype) for net in pair)
    other = measure.run(*nets, digits, regularize.get("label-smoothing:0.1"), 0, FEW)
    for name in ("accuracy", "ece", "rms", "span_norm", "alignment_span"):
        assert other.scalars[name] == pytest.approx(measured.scalars[name], abs=off, rel=off), name
    assert other.logits["clean"].dtype == np.float32 and set(other.scalars) == set(measured.scalars)


@pytest.fixture
def registry(monkeypatch):
    """Tables of one's own for the length of a test."""
    monkeypatch.setattr(measure, "REGISTERED", {})
    monkeypatch.setattr(attacks, "REGISTERED", {})
    monkeypatch.setattr(vocabulary, "ATTACKS", vocabulary.Table("attack", vocabulary.ATTACKS.values()))


def longest(seen, context):
    return Values({"longest": seen.norms.max()}, {"entropy": -(seen.probs * np.log(seen.probs)).sum(1)},
                  {"seeds": [context.seed]})


def accuracy(seen, context): return Values({"accuracy": 1})
def a_dict(seen, context): return {"x": 1}
def a_vector(seen, context): return Values({"x": np.ones(3)})
def too_long(seen, context): return Values(columns={"x": np.ones(len(seen.labels) + 1)})
def not_a_number(seen, context): return Values({"x": math.nan, "y": None, "z": np.inf})


def test_a_registered_group_stands_in_the_records(pair, digits, registry, measured):
    assert measure.register(longest) is longest
    measure.register(longest)
    measure.register(not_a_number)
    one = measure.run(*pair, digits, regularize.get("label-smoothing:0.1"), 0, FEW)
    assert one.scalars["longest"] == pytest.approx(one.samples["norm"].max(), rel=1e-6)
    assert one.samples["entropy"].dtype == np.float32 and one.curves["seeds"] == [0]
    assert [one.scalars[name] for name in "xyz"] == [None] * 3
    assert {name: one.scalars[name] for name in measured.scalars} == measured.scalars


@pytest.mark.parametrize("group, message", [
    (accuracy, "'accuracy' of .*test_measure:accuracy is given by repspace.measure.groups:predicted already"),
    (a_dict, "test_measure:a_dict gave dict: a group of measures gives Values"),
    (a_vector, r"test_measure:a_vector: scalar 'x' has shape \(3,\)"),
    (too_long, r"test_measure:too_long: column 'x' has shape \(1598,\)")])
def test_a_group_that_gives_what_it_may_not_is_named(pair, digits, registry, group, message):
    seen = gather.look(pair[0], digits)
    with pytest.raises(ValueError, match=message):
        measure.measured(seen, Context("none", 0, FEW), (groups.predicted, measure.register(group)))


@pytest.mark.parametrize("group", [lambda seen, context: Values(), "predicted", None, 3])
def test_only_a_function_that_can_be_found_is_registered(registry, group):
    with pytest.raises(ValueError, match="function|no name that it could be found by"):
        measure.register(group)


def brighter(model, x, y, eps): return (x + eps).clamp(0, 1)
def darker(model, x, y, eps): return (x - eps).clamp(0, 1)
def by_chance(model, x, y, eps, generator=None):
    return (x + eps * (2 * torch.rand(x.shape, generator=generator) - 1)).clamp(0, 1)
def farther(model, x, y, eps): return (x + 2 * eps).clamp(0, 1)
def out_of_range(model, x, y, eps): return x - eps
def nothing(model, x, y, eps): return None


def test_a_registered_attack_is_run_beside_the_others_and_changes_none(pair, digits, registry, measured):
    attacks.register("brighter", brighter)
    attacks.register("by_chance", by_chance)
    attacks.register("darker", darker, role="control")
    one, two = (measure.run(*pair, digits, regularize.get("label-smoothing:0.1"), 0, FEW) for _ in range(2))
    assert one.scalars == two.scalars and one.samples.equals(two.samples)
    assert 0 <= one.scalars["success_brighter"] < one.scalars["success_pgd"] and "by_chance" in one.curves
    assert "success_darker" not in one.scalars and "breaks_darker" not in one.samples and one.scalars["rho_darker"] > 0
    assert set(one.samples["breaks_brighter"][:60]) <= {0, *FEW.grid, math.inf}
    assert {name: one.scalars[name] for name in measured.scalars} == measured.scalars
    assert one.samples[list(measured.samples)].equals(measured.samples)


@pytest.mark.parametrize("attack, message", [
    (farther, "attack mine at eps .* moved a pixel by 0.125"), (out_of_range, "gave images in -0.06"),
    (nothing, "must give images of shape .*NoneType")])
def test_an_attack_that_leaves_the_ball_is_named(pair, digits, registry, attack, message):
    attacks.register("mine", attack)
    with pytest.raises(ValueError, match=message):
        measure.run(*pair, digits, regularize.get("none"), 0, FEW)


def test_what_is_not_of_one_run_is_refused(measured, tmp_path):
    as_recorded(measured, tmp_path)
    loaded, arrays = records.load("s", "fresh", runs=tmp_path), records.arrays("s", "c", 0, "fresh", runs=tmp_path)
    with pytest.raises(ValueError, match="not of one run"):
        measure.from_record(loaded.runs.iloc[0], loaded.samples.iloc[::-1], arrays)
    with pytest.raises(AttributeError, match="does not hold 'train'"):
        groups.fitted(*measure.from_record(loaded.runs.iloc[0], loaded.samples, arrays))


def test_nothing_is_asked_where_every_image_is_broken(pair, digits, registry):
    """A grid whose later limits have no survivors, and images that were all wrong at first."""
    attacks.register("brighter", brighter)
    wide = FEW._replace(grid=(16, 128, 200, 255), attack_images=20)
    one = measure.run(*pair, digits, regularize.get("none"), 0, wide)
    assert one.curves["pgd"]["robust_accuracy"][-2:] == [0, 0]
    wrong = digits._replace(test=digits.test._replace(labels=(digits.test.labels + 1) % 10))
    seen = gather.look(pair[1], wrong)
    hopeless = torch.as_tensor(seen.predictions != seen.labels)
    wrong = wrong._replace(test=type(wrong.test)(wrong.test.images[hopeless], wrong.test.labels[hopeless]))
    none = measure.run(pair[1], pair[1], wrong, regularize.get("none"), 0, FEW)
    assert none.scalars["accuracy"] == 0 and none.scalars["success_pgd"] is None
