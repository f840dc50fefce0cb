"""Geometry: centers against general solvers and in their limits, cones, gradients, and the identity of three factors."""
import warnings
from pathlib import Path

import cvxpy as cp
import numpy as np
import pytest
import torch
from scipy.optimize import check_grad, minimize
from scipy.special import log_softmax, logsumexp, softmax

from repspace import geometry, records
from repspace.geometry import solvers
from repspace.study import Condition, definition, run_condition

RESULTS = Path(__file__).resolve().parents[1] / "results"
# Studies that keep no arrays, as `keep` in their YAML says, have none to check.
STUDIES = [study for study in records.studies("published", results=RESULTS) if (RESULTS / study / "logits.npz").exists()]


def head(K, d, seed=0, bias=1.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(K, d)), bias * rng.normal(size=K)


def cosine(u, v):
    return (u * v).sum(-1) / np.linalg.norm(u, axis=-1) / np.linalg.norm(v, axis=-1)


# Centers against general solvers

def by_clarabel(W, b, k, radius, nonnegative):
    z, others = cp.Variable(W.shape[1]), np.delete(np.arange(len(W)), k)
    conditions = [cp.norm(z) <= radius] + ([z >= 0] if nonnegative else [])
    logits = (W[others] - W[k]) @ z + (b[others] - b[k])
    cp.Problem(cp.Minimize(cp.log_sum_exp(logits)), conditions).solve(solver=cp.CLARABEL)
    return z.value


def by_scipy(method, W, b, k, radius, nonnegative):
    A, beta = np.delete(W - W[k], k, axis=0), np.delete(b - b[k], k)
    ball = dict(type="ineq", fun=lambda z: radius**2 - z @ z, jac=lambda z: -2 * z)
    options = dict(ftol=1e-14, maxiter=500) if method == "SLSQP" else dict(gtol=1e-9, xtol=1e-12, maxiter=2000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # trust-constr says that a quasi-Newton update was skipped
        return minimize(lambda z: logsumexp(A @ z + beta), np.full(W.shape[1], 0.1),
                        jac=lambda z: softmax(A @ z + beta) @ A, method=method, options=options, constraints=[ball],
                        bounds=[(0, None)] * W.shape[1] if nonnegative else None).x


def agrees(theirs, found, k):
    ours = found.centers[k]
    if found.interior[k] and np.linalg.norm(ours) < 1e-6:      # the origin has no direction
        return np.linalg.norm(theirs) < 1e-3
    return cosine(theirs, ours) > 1 - 1e-6


@pytest.mark.parametrize("nonnegative", [False, True], ids=["free", "nonnegative"])
@pytest.mark.parametrize("K, d, radius", [(2, 3, 2.0), (4, 6, 0.01), (5, 8, 3.0), (10, 30, 20.0), (12, 3, 50.0)])
def test_clarabel_finds_the_same_centers(K, d, radius, nonnegative):
    W, b = head(K, d, seed=K)
    found = geometry.class_centers(W, b, radius, nonnegative)
    assert all(agrees(by_clarabel(W, b, k, radius, nonnegative), found, k) for k in range(min(K, 6)))


@pytest.mark.parametrize("nonnegative", [False, True], ids=["free", "nonnegative"])
@pytest.mark.parametrize("method", ["SLSQP", "trust-constr"])
def test_scipy_finds_the_same_centers(method, nonnegative):
    for K, d, radius in ((3, 5, 1.0), (6, 4, 5.0)):
        W, b = head(K, d, seed=7)
        found = geometry.class_centers(W, b, radius, nonnegative)
        for k in range(3):
            assert agrees(by_scipy(method, W, b, k, radius, nonnegative), found, k), (K, d, k)


@pytest.mark.parametrize("nonnegative", [False, True], ids=["free", "nonnegative"])
def test_both_solvers_find_the_same_centers_of_many_classes(nonnegative):
    W, b = head(220, 150, seed=1)
    W[5] *= 0.01                                   # in the hull of the others: a finite minimum
    assert 220 * 150 > 3e4                         # where class_centers turns to Newton's method
    few = np.array([0, 5, 100])
    for radius in (0.3, 300.0):
        found = geometry.class_centers(W, b, radius, nonnegative)
        V = W - W.mean(0)
        rows = solvers.Rows(V / 40, b, np.arange(220))
        slow = solvers.interior_point(rows, few, radius * 40, nonnegative)
        np.testing.assert_allclose(found.centers[few] / radius, slow.points / 40 / radius, atol=1e-5)
        inside = np.linalg.norm(slow.points, axis=1) < radius * 40 * (1 - 1e-9)
        np.testing.assert_array_equal(found.interior[few], inside)


@pytest.mark.parametrize("rows, radius", [("gaussian", 100), ("correlated", 30)])
def test_a_head_for_imagenet_is_certified(rows, radius):
    """What it costs is in the benchmarks."""
    rng = np.random.default_rng(0)
    W = rng.normal(size=(1000, 2048)) / np.sqrt(2048)
    if rows == "correlated":  # fifty groups of classes, and a direction that all share
        W = 0.4 * W + (rng.normal(size=(50, 2048))[np.arange(1000) % 50] + rng.normal(size=2048)) / np.sqrt(2048)
    found = geometry.class_centers(W, 0.3 * rng.normal(size=1000), radius)
    assert found.certificate.max() < 1e-8 and not found.interior.any()
    np.testing.assert_allclose(np.linalg.norm(found.centers, axis=1), radius)


# Their limits

def test_a_vanishing_ball_leaves_the_gradient_at_the_origin():
    W, b = head(7, 9)
    found = geometry.class_centers(W, b, 1e-8).centers
    for k in range(7):
        rest = np.delete(np.arange(7), k)
        assert cosine(found[k], W[k] - softmax(b[rest]) @ W[rest]) > 1 - 1e-9


def test_a_huge_ball_leaves_the_support_vector_machine():
    W, b = head(6, 9)
    found = geometry.class_centers(W, b, 1e5).centers
    for k in range(6):
        u = cp.Variable(9)
        cp.Problem(cp.Minimize(cp.sum_squares(u)), [np.delete(W[k] - W, k, axis=0) @ u >= 1]).solve(solver=cp.CLARABEL)
        assert cosine(found[k], u.value) > 1 - 1e-6


@pytest.mark.parametrize("weight, nonnegative", [
    ([[0, 0], [1, 0], [-1, 0]], False), ([[0, 0], [1, 0], [-.5, .8], [-.5, -.8]], False), ([[-1, -1], [0, 0]], True)])
def test_a_center_at_the_origin_is_the_origin_and_has_no_direction(weight, nonnegative):
    found = geometry.class_centers(weight, np.zeros(len(weight)), 10.0, nonnegative)
    assert not found.centers[0].any() and found.interior[0] and not found.interior[1:].any()
    assert geometry.alignment([[1.0, 1.0]], found.centers, [0]) == 0


def test_what_is_not_finite_is_refused():
    nowhere = np.array([[1.0, 2.0], [np.nan, 1.0]])
    for ask in (geometry.ray_interval, geometry.cone_degree, lambda *head: geometry.first_misclassified_step(*head, 10)):
        with pytest.raises(ValueError, match="sample 1 are not"):
            ask(np.eye(2), np.zeros(2), nowhere)
        with pytest.raises(ValueError, match="weight and bias must be finite"):
            ask(np.eye(2), [0, np.nan], np.ones((3, 2)))
    for axes in ([[0, 0], [1, 0]], [[1, 0], [0, 0]], [[1, 0], [2, 0]]):
        with pytest.raises(ValueError, match="two directions"):
            geometry.plane_axes(*axes)


@pytest.mark.parametrize("radius", [1e-3, 1.0, 1e4])
def test_a_simplex_and_two_classes(radius):
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(9, 9)))[0]
    simplex = 2 * (np.eye(6) - 1 / 6) @ turn[:6]
    assert cosine(geometry.class_centers(simplex + 1, np.zeros(6), radius).centers, simplex).min() > 1 - 1e-9
    W, b = head(2, 5, bias=10)
    found = geometry.class_centers(W, b, radius)
    assert cosine(found.centers, np.stack([W[0] - W[1], W[1] - W[0]])).min() > 1 - 1e-9 and not found.interior.any()


def test_heads_that_are_hard_have_certificates_too():
    rng = np.random.default_rng(2)
    for trial in range(60):
        K, d = rng.choice([2, 3, 5, 10, 40]), rng.choice([1, 2, 5, 30])
        W, b = head(K, d, seed=trial, bias=10**rng.uniform(-2, 2))
        if trial % 4 == 1: W *= 10**rng.uniform(-3, 1, size=(K, 1))        # rows of very different norms
        if trial % 4 == 2: W = W + 100 * rng.normal(size=d)                # a large common part
        if trial % 4 == 3: W[rng.integers(K)] = W[rng.integers(K)]         # a row twice, sometimes
        if (W == W[0]).all(): continue
        radius = 10**rng.uniform(-3, 4) / np.linalg.norm(W, axis=1).max()
        for nonnegative in (False, True):
            assert geometry.class_centers(W, b, radius, nonnegative).certificate.max() < 1e-8


# Cones, gradients, planes

@pytest.mark.parametrize("seed", range(6))
def test_the_first_misclassified_step_agrees_with_the_apex_gap(seed):
    rng, steps = np.random.default_rng(seed), 64
    K, d = rng.integers(2, 30), rng.integers(2, 60)
    W, b = head(K, d, seed, bias=10**rng.uniform(-1, 1))
    torch.manual_seed(seed)
    untrained = torch.nn.Linear(int(d), int(K))
    for weight, bias in ((W, b), (untrained.weight.detach().numpy(), untrained.bias.detach().numpy()), (W, 0 * b)):
        radius = 10**rng.uniform(-1, 1)
        vectors = [np.maximum(rng.normal(size=(300, d)), 0),
                   geometry.random_directions(weight, 300, radius, seed),
                   geometry.random_directions(weight, 300, radius, seed, nonnegative=True)]
        for Z in vectors:
            first = geometry.first_misclassified_step(weight, bias, Z, steps)
            lo = np.asarray(geometry.ray_interval(weight, bias, Z).lo, float)
            step = np.where(first > steps, 0, 1 - first / steps)
            rounding = 1e-6 if weight.dtype == np.float32 else 1e-12
            assert (step <= lo + rounding).all() and (lo <= step + 1 / steps + rounding).all()
            whole = geometry.cone_degree(weight, bias, Z)
            assert abs(whole.degree - (1 - lo.mean())) < 1e-6
            predicted = (Z.astype(float) @ weight.T.astype(float) + bias).argmax(1)
            classes, sizes = np.unique(predicted, return_counts=True)
            each = [geometry.cone_degree(weight, bias, Z[predicted == k]).degree for k in classes]
            assert abs(np.average(each, weights=sizes) - whole.degree) < 1e-6


def test_gradients_agree_with_autograd_and_with_differences():
    W, b = head(6, 10)
    rng = np.random.default_rng(1)
    Z, y = 3 * rng.normal(size=(50, 10)), rng.integers(6, size=50)
    t = torch.tensor(Z, requires_grad=True)
    logits = t @ torch.tensor(W.T) + torch.tensor(b)
    torch.nn.functional.cross_entropy(logits, torch.tensor(y), reduction="sum").backward()
    np.testing.assert_allclose(geometry.loss_gradient(W, b, Z, y), t.grad.numpy(), atol=1e-12)
    loss = lambda z: -log_softmax(W @ z + b)[y[0]]
    assert check_grad(loss, lambda z: geometry.loss_gradient(W, b, z[None], y[:1])[0], Z[0]) < 1e-5


def test_a_plane_shows_what_the_head_says_there():
    W, b = head(5, 7)
    centers = geometry.class_centers(W, b, 4.0).centers
    grid, axes = geometry.plane(W, b, centers[0], centers[1], 6.0, 9), geometry.plane_axes(centers[0], centers[1])
    points = grid[["u", "v"]].to_numpy() @ axes
    p = softmax(points @ W.T + b, axis=1)
    np.testing.assert_array_equal(grid.predicted, p.argmax(1))
    np.testing.assert_allclose(grid.confidence, p.max(1))
    descent = -geometry.loss_gradient(W, b, points, grid.predicted.to_numpy())
    np.testing.assert_allclose(grid[["du", "dv"]], descent @ axes.T, atol=1e-12)


def test_alignment_with_every_kind_of_center_for_z_and_its_part_in_the_span():
    W, b = head(5, 12)
    rng = np.random.default_rng(1)
    Z, y = np.maximum(rng.normal(size=(80, 12)), 0), rng.integers(5, size=80)
    P = geometry.span_projector(W)
    kinds = geometry.center_kinds(W, b, 3.0, geometry.class_means(Z, y, 5))
    for name, centers in kinds.items():
        np.testing.assert_allclose(geometry.alignment(Z, centers, y), cosine(Z, centers[y]), err_msg=name)
        np.testing.assert_allclose(geometry.alignment(Z, centers, y, span_of=W), cosine(Z @ P, centers[y] @ P),
                                   err_msg=name, atol=1e-12)
    np.testing.assert_allclose(kinds["weight"] - W.mean(0), kinds["centered_weight"])
    np.testing.assert_allclose(kinds["minimal"] @ P, kinds["minimal"], atol=1e-9)
    assert kinds["reachable"].min() >= 0


# Soft targets

@pytest.mark.parametrize("K, d", [(4, 9), (8, 3)], ids=["within reach", "too few dimensions"])
def test_the_soft_minimum_is_what_a_general_solver_finds(K, d):
    W, b = head(K, d, seed=3)
    targets = geometry.smooth_targets(K, 0.1)
    ours = geometry.soft_minimum(W, b, targets)
    loss = lambda z, t: logsumexp(W @ z + b) - t @ (W @ z + b)
    for z, t in zip(ours, targets):
        theirs = minimize(loss, np.zeros(d), args=(t,), jac=lambda z, t: (softmax(W @ z + b) - t) @ W, tol=1e-10).x
        np.testing.assert_allclose(np.linalg.norm(theirs @ geometry.span_projector(W)), np.linalg.norm(z), rtol=1e-4)
        np.testing.assert_allclose(theirs, z, atol=1e-3)


def gradient(W, b, z, t):
    return (softmax(z @ W.T + b, axis=1) - t) @ (W - W.mean(0)) / np.abs(W - W.mean(0)).max()


def test_the_soft_minimum_of_a_head_of_pytorch():
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 100).double()
    t = geometry.smooth_targets(100, 0.05)
    z = geometry.soft_minimum(linear.weight, linear.bias, t).numpy()
    W, b = linear.weight.detach().numpy(), linear.bias.detach().numpy()
    assert np.abs(gradient(W, b, z, t)).max() < 1e-10
    single = geometry.soft_minimum(linear.weight.float(), linear.bias.float(), torch.tensor(t).float())
    assert single.dtype == torch.float32
    np.testing.assert_allclose(np.linalg.norm(single, axis=1), np.linalg.norm(z, axis=1), rtol=1e-4)


@pytest.mark.parametrize("strength", [1e-6, 1e-3, 0.1, 0.9])
@pytest.mark.parametrize("kind", ["plain", "large biases", "sizes", "twice", "thin", "whole numbers", "relu"])
def test_the_soft_minimum_of_heads_that_are_hard(kind, strength):
    """A certificate of its own: weights π near p with Uᵀπ = Uᵀt prove a lower bound of the loss."""
    rng = np.random.default_rng(5)
    for K, d in ((5, 2), (12, 3), (40, 30), (7, 1)):
        W, b = rng.normal(size=(K, d)), rng.normal(size=K)
        if kind == "large biases": b *= 1000
        if kind == "sizes": W *= 10**rng.uniform(-3, 1, size=(K, 1))
        if kind == "twice": W[rng.integers(K, size=K // 2)] = W[0]
        if kind == "thin": W = W * 10.0**-np.arange(d).clip(0, 6)
        if kind == "whole numbers": W, b = np.round(2 * W), np.round(5 * b)
        if kind == "relu": W = np.maximum(W, 0)
        t = geometry.smooth_targets(K, strength)[:3]
        z = geometry.soft_minimum(W, b, t)
        np.testing.assert_allclose(z @ geometry.span_projector(W), z, atol=1e-8 * np.abs(z).max())
        for point, target in zip(z, t):
            U, c = geometry.span_svd(W)[0], W @ point + b
            p, k = softmax(c), softmax(c).argmax()
            rows = U - U[k]
            A = np.cov(rows.T, aweights=p, ddof=0).reshape(U.shape[1], -1)
            v = (rows - p @ rows) @ np.linalg.lstsq(A, (target - p) @ rows, rcond=1e-15)[0]
            # what the minimum's probabilities still differ by; large biases leave fewer digits in W z + b
            assert (p * v * v).sum() < (1e-3 if kind == "large biases" else 1e-8) * target.min(), (K, d)


def test_the_soft_minimum_in_forty_digits():
    mp = pytest.importorskip("mpmath")
    W, b = head(5, 2, seed=4)
    for strength in (1e-6, 0.1):
        t = geometry.smooth_targets(5, strength)[0]
        z = geometry.soft_minimum(W, b, t)[0]
        with mp.workdps(40):
            V, beta, target = mp.matrix(W.tolist()), mp.matrix(b.tolist()), mp.matrix(t.tolist())

            def slope(x, y):
                s = [mp.exp(V[j, 0] * x + V[j, 1] * y + beta[j]) for j in range(5)]
                off = [e / mp.fsum(s) - target[j] / mp.fsum(target) for j, e in enumerate(s)]
                return [mp.fsum(off[j] * V[j, i] for j in range(5)) for i in (0, 1)]

            exact = mp.findroot(slope, tuple(z.tolist()), tol=1e-60)
        np.testing.assert_allclose(z, [float(exact[0]), float(exact[1])], rtol=1e-9)


def test_biases_that_weights_can_undo_cost_no_digits():
    W, b = head(4, 9)
    z = geometry.soft_minimum(W, b + 1e6 * W @ np.ones(9), geometry.smooth_targets(4, 0.1))
    plain = geometry.soft_minimum(W, b, geometry.smooth_targets(4, 0.1))
    np.testing.assert_allclose(z + 1e6 * geometry.span_projector(W) @ np.ones(9), plain, atol=1e-7)


def test_what_rounding_leaves_open_is_refused():
    W, b = head(5, 2)
    with pytest.raises(ValueError, match="no certified minimum for target 0"):
        geometry.soft_minimum(W, 1e200 * b, geometry.smooth_targets(5, 0.1))


def test_relu_features_reach_the_soft_minimum_exactly_where_it_says_so():
    found = []
    for seed in range(5):
        W, b = head(4, 5, seed)
        targets = geometry.smooth_targets(4, 0.2)
        minima = geometry.soft_minimum(W, b, targets)
        said = geometry.reachable(W, minima)
        for z, t, can in zip(minima, targets, said):
            x = cp.Variable(5, nonneg=True)
            loss = cp.log_sum_exp(W @ x + b) - t @ (W @ x + b)
            least = cp.Problem(cp.Minimize(loss)).solve(solver=cp.CLARABEL)
            free = logsumexp(W @ z + b) - t @ (W @ z + b)
            assert least >= free - 1e-7 and (least < free + 1e-6) == can
            found.append(can)
    assert 0 < sum(found) < len(found)              # both happen, so both were tested


# The identity of three factors

def leaves(factors):
    return (factors.displacement[:, None] * factors.laterality > factors.margin).any(1)


def check_identity(a, samples, where):
    """Of a run's arrays and rows, → (attacked samples, ties); what a record says of each must agree."""
    judged = ties = 0
    for name in sorted(key.removeprefix("moved.") for key in a if key.startswith("moved.") and "@" not in key):
        moved = a[f"moved.{name}"]
        n, rows = len(moved), samples[:len(moved)]
        labels, left, tied = a["labels"][:n], moved.argmax(1) != a["labels"][:n], geometry.tied(moved, a["labels"][:n])
        np.testing.assert_array_equal(rows["label"], labels, err_msg=where)
        np.testing.assert_array_equal(left, rows[f"label_{name}"] != labels, err_msg=f"{where}, {name}")
        for norm, rho in (("norm", f"rho_{name}"), ("span_norm", f"rho_span_{name}")):
            size = rows[norm].to_numpy(float)
            factors = geometry.three_factors_from_logits(a["head.weight"], a["head.bias"], a["clean"][:n], moved, labels,
                                                         size, rows[rho].to_numpy(float) * size)
            wrong = (leaves(factors) != left) & ~tied
            assert not wrong.any(), f"{where}, {rho}: the identity fails for samples {np.flatnonzero(wrong)}"
        judged, ties = judged + n, ties + tied.sum()
    return judged, ties


def test_a_study_without_arrays_is_one_that_keeps_none():
    for name in set(records.studies("published", results=RESULTS)) - set(STUDIES):
        assert definition.read(name).keep != "arrays", name


@pytest.mark.parametrize("study", STUDIES)
def test_the_identity_holds_for_every_sample_of_every_published_run(study, capsys):
    loaded, judged, ties = records.load(study, source="published", results=RESULTS), 0, 0
    for (condition, seed), samples in loaded.samples.groupby(["condition", "seed"], observed=True):
        a = records.arrays(study, condition, seed, source="published", results=RESULTS)
        found = check_identity(a, samples.sort_values("image"), f"{study}, {condition}, seed {seed}")
        judged, ties = judged + found[0], ties + found[1]
    assert judged >= 1000
    with capsys.disabled():
        print(f"\n{study}: {judged} attacked samples, {ties} ties, no exception to the identity")


def test_the_identity_holds_for_a_fresh_run_and_no_displacement_is_shorter_than_its_effect(place):
    recipe = {"epochs": 10, "batch_size": 50, "lr": 0.05}
    condition = Condition("digits", "tiny-cnn-bn", "mixup:1.0", recipe)
    assert run_condition(condition, [0], "fresh", place / "runs", progress=False)["status"].item() == "made"
    samples = records.load("fresh", runs=place / "runs").samples
    a = records.arrays("fresh", condition.slug, 0, runs=place / "runs")
    judged, ties = check_identity(a, samples, "fresh")
    assert judged == 4 * len(samples) and ties < 5
    for name in ("noise", "fgsm", "pgd"):
        for part, norm in (("", "norm"), ("_span", "span_norm")):
            length = a[f"displacement{part}.{name}"]
            found = geometry.three_factors_from_logits(a["head.weight"], a["head.bias"], a["clean"], a[f"moved.{name}"],
                                                       a["labels"], samples[norm], length)
            # within a few float32 units of nothing, a displacement's norm is rounding
            assert np.abs(found.laterality[length > 1e-3]).max() <= 1 + 1e-3, name
            assert (np.abs(a[f"radial{part}.{name}"]) <= length * (1 + 1e-5) + 1e-6).all(), name


def test_the_identity_holds_for_random_heads_displacements_and_edge_cases():
    rng, judged, ties = np.random.default_rng(0), 0, 0
    for trial in range(400):
        K, d = rng.integers(2, 15), rng.integers(1, 25)
        W, b = head(K, d, trial, bias=rng.choice([0, 1, 30]))
        if trial % 3 == 0: W[rng.integers(K)] = W[rng.integers(K)]                    # two equal rows
        if trial % 9 == 0: W[:] = W[0]                                               # all equal: biases decide
        Z = rng.normal(size=(200, d)) * 10**rng.uniform(-3, 3, size=(200, 1))
        moved = Z + rng.normal(size=(200, d)) * 10**rng.uniform(-4, 4, size=(200, 1))
        Z[:20] = 0                                                                   # from the origin
        moved[10:40] = Z[10:40]                                                      # not moved at all
        moved[40:50] = 0                                                             # onto the origin
        moved[50:60] = -Z[50:60]                                                     # to the other side
        y = rng.integers(K, size=200)
        y[::2] = (Z @ W.T + b).argmax(1)[::2]
        after = moved @ W.T + b
        tied = geometry.tied(after, y)
        P = geometry.span_projector(W)
        for before, now in ((Z, moved), (Z @ P, moved @ P)):
            factors = geometry.three_factors(W, b, before, now, y)
            assert np.isfinite(factors.displacement).all() and not np.isnan(factors.margin).any()
            wrong = (leaves(factors) != (after.argmax(1) != y)) & ~tied
            assert not wrong.any(), (trial, np.flatnonzero(wrong))
        judged, ties = judged + 2 * len(y), ties + 2 * tied.sum()
    assert judged == 160_000 and ties < 0.2 * judged          # ties are those with b = 0 at the origin, and equal rows


def test_a_displacement_is_its_parts():
    rng = np.random.default_rng(0)
    Z, moved = rng.normal(size=(2, 300, 8))
    P = geometry.span_projector(head(4, 8)[0])
    for before, after in ((Z, moved), (Z @ P, moved @ P)):
        found, delta = geometry.displacement(before, after), after - before
        np.testing.assert_allclose(found.norm**2, found.radial**2 + found.lateral**2)
        np.testing.assert_allclose(found.toward_origin, cosine(delta, -before))
        np.testing.assert_allclose(found.relative, np.linalg.norm(delta, axis=1) / np.linalg.norm(before, axis=1))
        np.testing.assert_allclose(found.radial, -found.toward_origin * found.norm, atol=1e-12)


# Neural collapse and stability

def test_collapse_and_stability_do_not_depend_on_coordinates():
    rng = np.random.default_rng(0)
    y, turn = np.arange(300) % 6, np.linalg.qr(rng.normal(size=(15, 15)))[0][:10]
    Z, W = rng.normal(size=(300, 10)) + 3 * rng.normal(size=(6, 10))[y], rng.normal(size=(6, 10))
    here, there = geometry.neural_collapse(Z, y, W), geometry.neural_collapse(5 * Z @ turn + 2, y, 0.1 * W @ turn - 1)
    np.testing.assert_allclose(here, there)
    runs = [rng.normal(size=(6, 10)) for _ in range(3)]
    one = geometry.center_stability(runs)
    other = geometry.center_stability([runs[0] @ turn, 3 * runs[1], runs[2] @ turn[:, ::-1]])
    np.testing.assert_allclose(one.correlation, other.correlation, atol=1e-12)
    np.testing.assert_allclose(one.difference, other.difference, atol=1e-12)


def test_free_features_under_weight_decay_collapse():
    """That they do is a theorem (Zhu et al. 2021): cross-entropy, features and head both decayed."""
    K, d, n, y = 4, 6, 40, np.arange(40) % 4
    split = lambda x: (x[:n * d].reshape(n, d), x[n * d:-K].reshape(K, d), x[-K:])

    def loss(x):
        (Z, W, b), decay = split(x), np.repeat([1e-4, 1e-3, 1e-3], [n * d, K * d, K])
        s = Z @ W.T + b
        p = softmax(s, axis=1)
        value = (logsumexp(s, axis=1) - s[np.arange(n), y]).mean() + decay @ x**2
        p[np.arange(n), y] -= 1
        p /= n
        return value, np.concatenate([(p @ W).ravel(), (p.T @ Z).ravel(), p.sum(0)]) + 2 * decay * x

    start = np.random.default_rng(0).normal(size=n * d + K * d + K)
    options = dict(maxiter=5000, maxfun=9000, ftol=0, gtol=1e-10)
    end = minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x
    (Z, W, _), (Z0, W0, _) = split(end), split(start)
    before, after = geometry.neural_collapse(Z0, y, W0), geometry.neural_collapse(Z, y, W)
    assert min(before) > 0.05 and max(after) < 1e-3, (before, after)


# What comes in

def test_a_head_without_bias_has_biases_of_zero():
    W, _ = head(5, 8)
    rng = np.random.default_rng(0)
    Z, zero = np.maximum(rng.normal(size=(50, 8)), 0), np.zeros(5)
    moved, y = Z + rng.normal(size=Z.shape), rng.integers(5, size=50)
    s, t = Z @ W.T, geometry.smooth_targets(5, 0.1)
    centers = geometry.class_centers(W, zero, 2.0).centers
    for ask in (lambda b: geometry.class_centers(W, b, 2.0), lambda b: geometry.soft_minimum(W, b, t),
                lambda b: geometry.ray_interval(W, b, Z), lambda b: geometry.cone_degree(W, b, Z),
                lambda b: geometry.first_misclassified_step(W, b, Z, 9), lambda b: geometry.loss_gradient(W, b, Z, y),
                lambda b: geometry.plane(W, b, *centers[:2], 3.0, 5), lambda b: geometry.three_factors(W, b, Z, moved, y),
                lambda b: geometry.center_correlation(W, b, Z, centers), lambda b: geometry.span_vectors(W, b, s),
                lambda b: geometry.span_norms(W, b, s), lambda b: geometry.span_cosines(W, b, s, centers),
                lambda b: geometry.three_factors_from_logits(W, b, s, moved @ W.T, y, *np.ones((2, 50))),
                lambda b: list(geometry.center_kinds(W, b, 2.0, geometry.class_means(Z, np.arange(50) % 5, 5)).values())):
        without, with_zeros = (result if isinstance(result, (tuple, list)) else [result] for result in (ask(None), ask(zero)))
        for part, other in zip(without, with_zeros): np.testing.assert_array_equal(part, other)


@pytest.mark.parametrize("labels", [np.zeros(6), np.eye(6), np.full(6, True), np.full(6, 9), np.zeros(5, int)],
                         ids=["floats", "one-hot", "booleans", "too large", "too few"])
def test_what_are_no_labels_is_said(labels):
    W, b = head(4, 3)
    Z = np.random.default_rng(0).normal(size=(6, 3))
    for ask in (lambda: geometry.class_means(Z, labels, 4), lambda: geometry.neural_collapse(Z, labels, W),
                lambda: geometry.alignment(Z, W, labels), lambda: geometry.loss_gradient(W, b, Z, labels),
                lambda: geometry.three_factors(W, b, Z, -Z, labels), lambda: geometry.tied(Z, labels)):
        for kind in (np.asarray, torch.as_tensor):
            labels = kind(labels)
            with pytest.raises(ValueError, match="labels must"): ask()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_precision_comes_back_as_itself(dtype):
    W, b = (torch.tensor(x).to(dtype) for x in head(4, 6))
    Z, y = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).to(dtype), torch.arange(40, dtype=torch.int32) % 4
    wide = [x.double().numpy() for x in (W, b, Z)]
    pairs = [(f(W, b, Z), f(*wide)) for f in (
        lambda W, b, Z: geometry.class_centers(W, b, 2.0).centers, lambda W, b, Z: geometry.ray_interval(W, b, Z).lo,
        lambda W, b, Z: geometry.rms(Z), lambda W, b, Z: geometry.alignment(Z, W, y),
        lambda W, b, Z: geometry.soft_minimum(W, b, geometry.smooth_targets(4, 0.1)),
        lambda W, b, Z: geometry.loss_gradient(W, b, Z, y), lambda W, b, Z: geometry.three_factors(W, b, Z, -Z, y).laterality,
        lambda W, b, Z: geometry.class_means(Z, y, 4), lambda W, b, Z: geometry.displacement(Z, 2 * Z).norm)]
    for narrow, exact in pairs:
        assert narrow.dtype == dtype
        np.testing.assert_allclose(narrow.double(), exact, rtol=2e-2, atol=2e-2)
    assert geometry.cone_degree(W, b, Z) == geometry.cone_degree(*wide)
