"""Corruptions against SciPy, Pillow and their formulas; the same by image, batch, dtype and model."""
import io
import warnings

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
import torchvision
from scipy.ndimage import gaussian_filter
from torchvision.transforms.v2.functional import jpeg_image

from repspace import corruptions
from repspace.calibration import expected_calibration_error, softmax
from repspace.corruptions import CORRUPTIONS, SEVERITIES, STRENGTHS, corrupt, over_severities

SHAPES = [(1, 8, 8), (3, 8, 8), (3, 32, 32), (1, 28, 28), (3, 13, 9), (1, 2, 5)]


def images(shape, n=12, seed=0):
    """Smooth random images (n, C, H, W) that use all of [0, 1]."""
    noise = np.random.default_rng(seed).normal(size=(n, *shape))
    smooth = gaussian_filter(noise, (0, 0, 1.5, 1.5))
    low, high = smooth.min((1, 2, 3), keepdims=True), smooth.max((1, 2, 3), keepdims=True)
    return torch.tensor((smooth - low) / (high - low), dtype=torch.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_shape_range_and_more_damage_with_more_severity(name, shape):
    x = images(shape)
    before, damage = x.clone(), []
    for severity in SEVERITIES:
        worse = corrupt(x, name, severity, seed=3)
        assert worse.shape == x.shape and worse.dtype == x.dtype
        assert 0 <= worse.min() and worse.max() <= 1
        damage.append((worse - x).square().mean().item())
    assert torch.equal(x, before)
    assert damage[0] == 0 and (np.diff(damage) >= 0).all() and damage[5] > 2 * damage[1] > 0


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_does_not_depend_on_those_that_come_after_it(name):
    x = images((3, 16, 16), n=150)
    whole = corrupt(x, name, 4, seed=7)
    for n in (1, 63, 64, 65, 128):
        assert torch.equal(corrupt(x[:n], name, 4, seed=7), whole[:n])
    assert torch.equal(corrupt(x, name, 4, seed=7), whole)
    assert torch.equal(corrupt(x, name, 4, seed=8), whole) == (name != "noise")


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_and_memory_formats(name, dtype):
    x = images((3, 16, 16))
    expected, precise = corrupt(x, name, 3), torch.finfo(dtype).eps
    worse = corrupt(x.to(dtype), name, 3)
    assert worse.dtype == dtype
    apart = (worse.float() - expected).abs()
    assert apart.median() <= max(4 * precise, 1e-6)
    last = corrupt(x.to(memory_format=torch.channels_last), name, 3)
    assert torch.allclose(last, expected, atol=1e-6)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    corrupt(images((1, 8, 8)), "noise", 5)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("severity", SEVERITIES[1:])
def test_noise_is_normal_with_its_deviation(severity):
    sigma = STRENGTHS["noise"][1][severity - 1]
    gray = torch.full((200, 3, 16, 16), 0.5, dtype=torch.float64)
    added = (corrupt(gray, "noise", severity) - 0.5).flatten()
    inside = added.abs() < 0.45                               # what is not clipped
    assert abs(added.mean()) < 4 * sigma / len(added) ** 0.5
    quantile = torch.quantile(added[inside].abs()[:100_000], 0.5).item()
    assert quantile == pytest.approx(0.6745 * sigma, rel=0.1 if sigma > 0.2 else 0.02)


@pytest.mark.parametrize("severity", SEVERITIES[1:])
def test_blur_agrees_with_scipy(severity):
    x, sigma = images((3, 24, 20)).double(), STRENGTHS["blur"][1][severity - 1]
    radius = int(np.ceil(3 * sigma))
    expected = gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="mirror",
                               radius=(0, 0, radius, radius))
    assert np.abs(corrupt(x, "blur", severity).numpy() - expected).max() < 1e-6


@pytest.mark.parametrize("severity", SEVERITIES[1:])
def test_contrast_and_brightness_agree_with_their_formulas(severity):
    x = images((3, 10, 10)).double()
    factor = STRENGTHS["contrast"][1][severity - 1]
    gray = (x * torch.tensor([0.2989, 0.587, 0.114], dtype=torch.float64).view(3, 1, 1)).sum(1)
    mean = gray.mean((1, 2)).view(-1, 1, 1, 1)
    expected = (factor * x + (1 - factor) * mean).clamp(0, 1)
    assert (corrupt(x, "contrast", severity) - expected).abs().max() < 1e-6
    factor = STRENGTHS["brightness"][1][severity - 1]
    assert (corrupt(x, "brightness", severity) - (factor * x).clamp(0, 1)).abs().max() < 1e-12


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (3, 32, 32), (1, 13, 9)], ids=str)
@pytest.mark.parametrize("severity", SEVERITIES[1:])
def test_jpeg_agrees_with_a_file_of_pillow_and_with_torchvision(severity, shape):
    """A JPEG file of that quality, written and read; and torchvision's codec for tensors."""
    x, quality = images(shape), STRENGTHS["jpeg"][1][severity - 1]
    back = (corrupt(x, "jpeg", severity) * 255).round()
    for image, ours in zip((x * 255).round().byte(), back):
        file = io.BytesIO()
        pixels = image.permute(1, 2, 0).squeeze(-1).numpy()
        PIL.Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        theirs = torch.tensor(np.array(PIL.Image.open(file))).float().reshape(*shape[1:], shape[0])
        assert torch.equal(ours, theirs.permute(2, 0, 1))
    if hasattr(torchvision.io, "encode_jpeg"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = jpeg_image((x * 255).round().byte(), quality)
        assert (back - theirs).abs().quantile(0.95) <= 2


class Net(torch.nn.Module):
    """A linear net with dropout and batch norm, both of which would show in training mode."""

    def __init__(self, generator):
        super().__init__()
        self.norm, self.drop = torch.nn.BatchNorm2d(3), torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(192, 4)
        torch.nn.init.normal_(self.head.weight, generator=generator)

    def forward(self, x):
        return self.head(self.drop(self.norm(x)).flatten(1))


def test_the_table_is_what_one_would_work_out_by_hand():
    net = Net(torch.Generator().manual_seed(0))
    x = images((3, 8, 8), n=90)
    y = net.eval()(x).argmax(1)
    y[::5] = (y[::5] + 1) % 4
    net.train()
    net.norm.eval()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    table = over_severities(net, x, y, batch_size=32, seed=2)
    assert net.training and not net.norm.training and net.drop.training
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())

    assert list(table) == ["corruption", "severity", "accuracy", "ece"]
    rows = [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
    assert list(zip(table["corruption"], table["severity"])) == rows
    assert (table.loc[table["severity"] == 0, "accuracy"] == 72 / 90).all()
    net.eval()
    for row in table.itertuples():
        with torch.no_grad(): logits = net(corrupt(x, row.corruption, row.severity, seed=2))
        assert row.accuracy == pytest.approx((logits.argmax(1) == y).double().mean().item(), abs=1e-12)
        ece = expected_calibration_error(softmax(logits.double()), y)
        assert row.ece == pytest.approx(ece, abs=1e-5)
    small = over_severities(net, x, y, batch_size=7, seed=2)
    pd.testing.assert_frame_equal(table, small, rtol=1e-4)


def test_mistakes_are_named():
    x, y = images((3, 8, 8), n=4), torch.zeros(4, dtype=torch.long)
    def model(batch): return batch.flatten(1)[:, :3]
    for call in (lambda: corrupt(x, "fog", 1), lambda: over_severities(model, x, y, names=["fog"])):
        with pytest.raises(ValueError, match="'fog'.*noise, blur, contrast, brightness, jpeg"): call()
    for severity in (-1, 6, 2.5, "3", None):
        with pytest.raises(ValueError, match="0, 1, 2, 3, 4, 5"): corrupt(x, "blur", severity)
    with pytest.raises(ValueError, match="torch.uint8"): corrupt((x * 255).byte(), "blur", 1)
    with pytest.raises(ValueError, match="ndarray"): corrupt(x.numpy(), "blur", 1)
    with pytest.raises(ValueError, match="1 or 3 channels"): corrupt(x[:, :2], "jpeg", 1)
    with pytest.raises(ValueError, match=r"\[0, 1\]"): corrupt(x * float("nan"), "noise", 1)
    with pytest.raises(ValueError, match="0\\.\\.2"): over_severities(model, x, y + 3)
    with pytest.raises(ValueError, match="not finite"): over_severities(lambda b: model(b) / 0, x, y)


def test_every_kind_has_five_strengths():
    assert all(len(strengths) == 5 for _, strengths in corruptions.STRENGTHS.values())
    assert CORRUPTIONS == ("noise", "blur", "contrast", "brightness", "jpeg")
