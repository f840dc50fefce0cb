"""Minimal-loss points of all classes, against general convex solvers, which take one class at a time."""
from functools import partial
from importlib.metadata import version

import cvxpy as cp
import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from repspace import geometry

from .race import python_profile, race, row

RADIUS = 5.0


def head(classes, d):
    """A random head: weight (K, d) with rows of about length 1, and bias (K,)."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(classes, d)) / np.sqrt(d), 0.1 * rng.normal(size=classes)


def others(weight, bias, k):
    """Rows w_j - w_k and b_j - b_k of all j ≠ k."""
    rest = np.arange(len(bias)) != k
    return weight[rest] - weight[k], bias[rest] - bias[k]


def by_cvxpy(weight, bias, k):
    """The center (d,) of class `k` by cvxpy's own choice of a solver."""
    A, b = others(weight, bias, k)
    z = cp.Variable(A.shape[1])
    cp.Problem(cp.Minimize(cp.log_sum_exp(A @ z + b)), [cp.norm(z) <= RADIUS]).solve()
    return z.value


def by_scipy(weight, bias, k):
    """The center (d,) of class `k` by SLSQP, with gradients."""
    A, b = others(weight, bias, k)
    inside = {"type": "ineq", "fun": lambda z: RADIUS**2 - z @ z, "jac": lambda z: -2 * z}
    found = minimize(lambda z: logsumexp(A @ z + b), -A.mean(0), jac=lambda z: softmax(A @ z + b) @ A, method="SLSQP",
                     constraints=[inside], options={"maxiter": 1000, "ftol": 1e-14})
    return found.x


def cosines(a, b):
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def centers(sizes=((10, 64), (100, 512)), sample=3, repeats=2, alone=(1000, 2048)):
    """Of more than 10 classes the solvers get `sample`, and their time is scaled up."""
    for classes, d in sizes:
        weight, bias = head(classes, d)
        ks = range(classes) if classes <= 10 else np.linspace(0, classes - 1, sample).astype(int)
        sides = {"ours": lambda: geometry.class_centers(weight, bias, RADIUS).centers,
                 f"cvxpy {version('cvxpy')}": lambda: np.array([by_cvxpy(weight, bias, k) for k in ks]),
                 f"SciPy {version('scipy')}": lambda: np.array([by_scipy(weight, bias, k) for k in ks])}
        seconds, points, memory = race(sides, repeats)
        for peer in list(sides)[1:]:
            scaled = seconds | {peer: [s * classes / len(ks) for s in seconds[peer]]}
            least = cosines(points["ours"][list(ks)], points[peer]).min()
            yield row(f"class centers, K={classes}, d={d}", scaled, peer, None, bool(least > 1 - 1e-6),
                      f"1 - cosine at most {1 - least:.0e}", 1, memory, partial(python_profile, sides["ours"]),
                      device="cpu", solved=f"{len(ks)} of {classes}")
    if alone:
        yield by_ourselves(*alone)


def by_ourselves(classes, d, limit_s=10, limit_mb=1000):
    """A head of ImageNet's size: within 10 s and 1 GB, and certified."""
    weight, bias = head(classes, d)
    side = lambda: geometry.class_centers(weight, bias, RADIUS)
    seconds, found, memory = race({"ours": side}, 1)
    worst, best = found["ours"].certificate.max(), min(seconds["ours"])
    reached = bool(best <= limit_s and (memory["ours"] or 0) <= limit_mb)
    return {"what": f"class centers, K={classes}, d={d}", "peer": None, "unit": "s", "ours": best, "theirs": None,
            "ratio": None, "target": f"≤ {limit_s} s, {limit_mb / 1000:g} GB", "reached": reached, "same": None,
            "answer": f"relative duality gap at most {worst:.0e}", "seconds": seconds, "memory_mb": memory,
            "profile": [] if reached else python_profile(side), "device": "cpu", "threads": torch.get_num_threads()}
