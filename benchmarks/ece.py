"""ECE on a million predictions, against torchmetrics."""
from functools import partial
from importlib.metadata import version

import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from repspace import calibration

from .race import python_profile, race, row

PEER = f"torchmetrics {version('torchmetrics')}"


def predictions(count, classes):
    """Overconfident probabilities (N, K) in float32 and labels (N,)."""
    draws = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(count, classes, generator=draws)
    labels = torch.distributions.Gumbel(0, 1).icdf(torch.rand(logits.shape, generator=draws).clamp_(1e-6, 1 - 1e-6))
    return (1.5 * logits).softmax(1), labels.add_(logits).argmax(1)


def ece(count=1_000_000, classes=(10, 100), repeats=5):
    """15 bins of equal width."""
    for k in classes:
        probs, labels = predictions(count, k)
        sides = {"ours": lambda: calibration.expected_calibration_error(probs, labels),
                 PEER: lambda: multiclass_calibration_error(probs, labels, k, n_bins=15, norm="l1").item()}
        seconds, errors, memory = race(sides, repeats)
        agree = abs(errors["ours"] - errors[PEER]) < 1e-4  # they add up a million terms in float32
        yield row(f"ECE, {count:,} predictions, K={k}", seconds, PEER, None, agree,
                  f"ECE {errors['ours']:.6f} and {errors[PEER]:.6f}", 1, memory,
                  partial(python_profile, sides["ours"]), device="cpu")
