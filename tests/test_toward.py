"""Toward the origin, against autograd and an inverted correlation matrix, and on the published records."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from repspace import measure, records, stats, vocabulary
from repspace.measure import toward


def runs(study, condition):
    published = records.load(study, "published")
    for run in published.runs[published.runs["condition"] == condition].to_dict("records"):
        samples = published.samples
        samples = samples[(samples["condition"] == condition) & (samples["seed"] == run["seed"])].reset_index(drop=True)
        yield measure.from_record(run, samples, published.arrays(condition, run["seed"]))


def ascent_by_autograd(seen, z, y, length, steps):
    """t of an ascent from z, by PyTorch's own cross-entropy and gradient, image after image."""
    weight, bias, out = torch.tensor(seen.weight), torch.tensor(seen.bias), []
    for start, label, far in zip(torch.tensor(z), torch.tensor(y), length):
        now = start.clone()
        for _ in range(steps):
            now.requires_grad_(True)
            loss = torch.nn.functional.cross_entropy((weight @ now + bias)[None], label[None])
            slope = torch.autograd.grad(loss, now)[0]
            now = now.detach() + slope / slope.norm() * far / steps
        out.append(float(torch.nn.functional.cosine_similarity(now - start, -start, dim=0)))
    return np.array(out)


@pytest.mark.parametrize("regularizer", ["none", "label-smoothing-0.1"])
def test_against_autograd_and_the_inverse_of_the_correlation_matrix(regularizer):
    seen, context = next(runs("digits", f"digits.tiny-cnn.{regularizer}"))
    values, pgd = toward.toward_origin(seen, context), context.attacks["pgd"]
    right = seen.predictions == seen.labels
    head = ascent_by_autograd(seen, seen.span, seen.labels, pgd.span.norm, context.settings.steps)
    assert np.allclose(values.columns["toward_head"], head, atol=1e-6)
    three = np.stack([seen.cosines["cos_label_span"], pgd.span.toward_origin, head])[:, right]
    inverse = np.linalg.inv(np.corrcoef(three))
    assert values.scalars["toward_partial"] == pytest.approx(-inverse[0, 1] / np.sqrt(inverse[0, 0] * inverse[1, 1]), abs=1e-5)
    a, D = three[0], []
    for z, y in zip(seen.span[right], seen.labels[right]):
        D.append([z @ (seen.weight[y] - w) / np.linalg.norm(z) / np.linalg.norm(seen.weight[y] - w)
                  for j, w in enumerate(seen.weight) if j != y])
    assert values.scalars["toward_random_class"] == pytest.approx(np.corrcoef(np.repeat(a, 9), np.ravel(D))[0, 1], abs=1e-9)


@pytest.mark.parametrize("regularizer, expected", [("none", .09), ("label-smoothing-0.1", .26), ("mixup-1.0", .17),
                                                   ("cutmix-1.0", .26)])
def test_the_published_values_are_those_of_the_preregistered_analysis(regularizer, expected):
    """Of the 500 images of each run whose moved logits are kept, of which the analysis was made; and of all attacked."""
    values = {"kept": [], "all": []}
    for seen, context in runs("cifar10-cpu", f"cifar10.resnet8.{regularizer}"):
        pgd = context.attacks["pgd"]
        span = pgd.span._replace(**{name: part[:len(pgd.logits)] for name, part in pgd.span._asdict().items()})
        for name, attack in (("kept", pgd._replace(span=span)), ("all", pgd)):
            found = toward.toward_origin(seen, replace(context, attacks={"pgd": attack}))
            values[name].append(found.scalars["toward_partial"])
    assert np.mean(values["kept"]) == pytest.approx(expected, abs=0.01)
    assert np.mean(values["all"]) == pytest.approx(expected, abs=0.05)


def test_partial_correlations_are_those_of_residuals_whatever_the_scale():
    rng = np.random.default_rng(0)
    for n in (4, 5, 50):
        x, y, z = rng.normal(size=(3, n))
        design = np.stack([np.ones(n), z], 1)
        left = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (x, y)]
        found = stats.partial_correlation(x, y, z)
        assert found == pytest.approx(np.corrcoef(left)[0, 1], abs=1e-9)
        assert stats.partial_correlation(3 * x + 1, -y / 7, 100 * z) == pytest.approx(-found, abs=1e-9)
    assert np.isnan(stats.partial_correlation(np.arange(9.0), rng.normal(size=9), np.arange(9.0) * 2))


def test_it_is_measured_with_every_net_and_again_on_records():
    assert toward.toward_origin in measure.GROUPS and toward.toward_origin in measure.RECORDED
    assert vocabulary.source_of(toward.toward_origin) == "repspace.measure.toward:toward_origin"
