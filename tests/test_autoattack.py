"""APGD, Square and AutoAttack against torchattacks, against brute force, and their invariants."""
import copy
import itertools

import pytest
import torch
import torchattacks

from repspace import data, regularize, train
from repspace.attacks import auto
from repspace.attacks import pgd
from repspace.attacks.auto import STAGES, apgd, auto_attack, auto_attack_report, dlr, square

EPS = 16 / 255
CHEAP = dict(steps=15, n_targets=3, n_queries=100)
ATTACKS = {"apgd-ce": lambda *a, **k: apgd(*a, steps=15, **k),
           "apgd-t": lambda *a, **k: apgd(*a, steps=15, loss="dlr-targeted", n_targets=2, **k),
           "square": lambda *a, **k: square(*a, n_queries=100, **k),
           "auto": lambda *a, **k: auto_attack(*a, **CHEAP, **k)}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits():
    """A network on the digits trained until it is sure of itself, and 200 test images."""
    dataset = data.load("digits")
    recipe = train.Recipe(epochs=80, batch_size=50, lr=0.1)
    net = train.new_classifier("tiny-cnn", dataset, recipe, seed=0)
    train.fit(net, dataset, recipe, regularize.get("none"), seed=0)
    return net, data.as_float(dataset.test.images[:200]), dataset.test.labels[:200]


def right(net, x, y):
    with torch.no_grad():
        return net(x).argmax(1) == y


def accuracy(net, x, y):
    return right(net, x, y).double().mean().item()


def seen(K, seed=0):
    """A small untrained network for `K` classes, and 24 images that it is right about."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 6, 3, padding=1), torch.nn.BatchNorm2d(6), torch.nn.ReLU(),
                              torch.nn.Flatten(), torch.nn.Linear(6 * 5 * 7, K)).eval()
    x = torch.rand(24, 2, 5, 7)
    with torch.no_grad():
        return net, x, net(x).argmax(1)


# The loss

@pytest.mark.parametrize("K", [3, 4, 5, 12])
def test_dlr_is_the_formula(K):
    generator = seeded(K)
    logits = torch.randn(50, K, generator=generator).double()
    logits[0] = 0
    y = torch.randint(K, (50,), generator=generator)
    for i, s in enumerate(logits.tolist()):
        order, label = sorted(s, reverse=True), y[i].item()
        best = max(v for j, v in enumerate(s) if j != label)
        expected = (best - s[label]) / (order[0] - order[2] + 1e-12)
        assert dlr(logits, y)[i].item() == pytest.approx(expected)
        for t in range(K) if K >= 4 else []:
            expected = (s[t] - s[label]) / (order[0] - (order[2] + order[3]) / 2 + 1e-12)
            target = torch.full_like(y, t)
            assert dlr(logits, y, target)[i].item() == pytest.approx(expected)


@pytest.mark.parametrize("target", [None, 3])
def test_dlr_has_the_gradient_of_differences(target):
    logits, y = torch.randn(8, 6, generator=seeded()).double().requires_grad_(), torch.arange(8) % 3
    goal = None if target is None else torch.full_like(y, target)
    assert torch.autograd.gradcheck(lambda s: dlr(s, y, goal), logits)


# Against torchattacks

PEERS = {
    "apgd-ce": (lambda net, x, y: apgd(net, x, y, EPS, steps=30),
                lambda net: torchattacks.APGD(net, eps=EPS, steps=30, loss="ce")),
    "apgd-dlr": (lambda net, x, y: apgd(net, x, y, EPS, steps=30, loss="dlr"),
                 lambda net: torchattacks.APGD(net, eps=EPS, steps=30, loss="dlr")),
    "apgd-t": (lambda net, x, y: apgd(net, x, y, EPS, steps=20, loss="dlr-targeted"),
               lambda net: torchattacks.APGDT(net, eps=EPS, steps=20, n_classes=10)),
    "apgd-l2": (lambda net, x, y: apgd(net, x, y, 0.35, steps=30, norm="l2"),
                lambda net: torchattacks.APGD(net, eps=0.35, steps=30, loss="ce", norm="L2"))}


def windows_of_torchattacks(u, side, height, width):
    """As `auto._windows`, but the first row and column are drawn below size − side: windows never
    reach the last row and column. In images of 8×8 pixels that leaves a quarter of them alone."""
    def inside(u, size):
        first, places = (u * (size - side)).long()[:, None], torch.arange(size)
        return (first <= places) & (places < first + side)
    return inside(u[:, 0], height)[:, None, :, None] & inside(u[:, 1], width)[:, None, None, :]


@pytest.mark.parametrize("name", PEERS)
def test_robust_accuracy_is_that_of_torchattacks(digits, name):
    net, x, y = digits
    ours, peer = PEERS[name]
    expected = accuracy(net, peer(net)(x, y), y)
    assert 0.2 < expected < accuracy(net, x, y) - 0.1
    assert accuracy(net, ours(net, x, y), y) == pytest.approx(expected, abs=0.02)


def test_square_is_that_of_torchattacks_but_for_the_last_row_and_column(digits, monkeypatch):
    """A random attack on 200 images moves by 2 points from seed to seed: means of two are compared."""
    net, x, y = digits

    def mean(attacked):
        return sum(accuracy(net, attacked(seed), y) for seed in range(2)) / 2

    def ours(seed):
        return square(net, x, y, EPS, n_queries=300, generator=seeded(seed))

    expected = mean(lambda seed: torchattacks.Square(net, eps=EPS, n_queries=300, seed=seed)(x, y))
    reaching = mean(ours)
    monkeypatch.setattr(auto, "_windows", windows_of_torchattacks)
    theirs = mean(ours)
    assert theirs == pytest.approx(expected, abs=0.035)
    assert reaching < theirs - 0.02


def test_stage_by_stage_it_is_torchattacks(digits):
    net, x, y = digits
    report = auto_attack_report(net, x, y, EPS, steps=20, n_targets=9, n_queries=300)
    left, expected = right(net, x, y).nonzero()[:, 0], {"clean": accuracy(net, x, y)}
    for name, attack in zip(STAGES[1:], [torchattacks.APGD(net, eps=EPS, steps=20, loss="ce"),
                                         torchattacks.APGDT(net, eps=EPS, steps=20, n_classes=10),
                                         torchattacks.Square(net, eps=EPS, n_queries=300)]):
        left = left[right(net, attack(x[left], y[left]), y[left])]
        expected[name] = len(left) / len(y)
    assert report.accuracy() == pytest.approx(expected, abs=0.02)
    assert report.accuracy()["clean"] == expected["clean"]


def test_a_scaled_head_fools_their_cross_entropy_and_not_ours(digits):
    """With logits 10,000 times as large, logsumexp is the maximum: cross-entropy is the margin loss."""
    net, x, y = digits
    scaled = copy.deepcopy(net)
    for values in scaled.head.parameters():
        values.data *= 1e4
    plain = accuracy(net, apgd(net, x, y, EPS, steps=30, loss="margin"), y)
    assert accuracy(scaled, apgd(scaled, x, y, EPS, steps=30), y) == pytest.approx(plain, abs=0.01)
    theirs = torchattacks.APGD(scaled, eps=EPS, steps=30, loss="ce")(x, y)
    assert accuracy(scaled, theirs, y) > plain + 0.05


@pytest.mark.parametrize("eps", [8 / 255, 16 / 255, 24 / 255])
def test_auto_attack_breaks_what_pgd_breaks(digits, eps):
    net, x, y = digits
    report = auto_attack_report(net, x, y, eps, steps=30, n_targets=3, n_queries=50)
    assert report.accuracy()["square"] <= accuracy(net, pgd(net, x, y, eps), y)


# Stages, and what each of them runs on

def test_the_report_says_which_stage_broke_what(digits):
    net, x, y = digits
    report = auto_attack_report(net, x, y, EPS, **CHEAP)
    assert torch.equal(report.broken, ~right(net, report.images, y))
    assert torch.equal(report.broken, report.stage < len(STAGES))
    assert torch.equal(report.stage == 0, ~right(net, x, y))
    assert torch.equal(report.images[report.stage == 0], x[report.stage == 0])
    assert torch.equal(report.images, auto_attack(net, x, y, EPS, **CHEAP))
    first = apgd(net, x, y, EPS, steps=CHEAP["steps"])
    assert torch.equal(report.stage <= 1, ~right(net, first, y))
    assert list(report.accuracy().values()) == sorted(report.accuracy().values(), reverse=True)


class Counting(torch.nn.Module):
    """A model that counts the images that it is asked for."""

    def __init__(self, model):
        super().__init__()
        self.model, self.asked = model, []

    def forward(self, x):
        self.asked.append(len(x))
        return self.model(x)


def fixed(x):
    """Four logits that hardly move with the image: class 3 wins by far."""
    return torch.tensor([0.0, 1, 2, 9]) + 1e-3 * x.flatten(1)[:, :4]


class Fixed(torch.nn.Module):
    def forward(self, x):
        return fixed(x)


def test_what_is_wrong_already_is_asked_for_once_and_the_rest_is_asked_for_every_point():
    x, y = torch.full((10, 1, 4, 4), 0.5), torch.tensor([3] * 6 + [0] * 4)
    counts = {"ce": 10 + 6 * (7 + 1), "dlr": 10 + 6 * (7 + 1), "dlr-targeted": 10 + 6 * 3 * (7 + 1)}
    for loss, count in counts.items():
        model = Counting(Fixed())
        apgd(model, x, y, 0.1, steps=7, loss=loss)
        assert sum(model.asked) == count
    model = Counting(Fixed())
    square(model, x, y, 0.1, n_queries=50)
    assert 10 + 6 * 1 < sum(model.asked) < 10 + 6 * 50
    model = Counting(Fixed())
    report = auto_attack_report(model, x, y, 0, steps=7)
    assert model.asked == [10] and report.accuracy() == dict.fromkeys(STAGES, 0.6)


class Edge(torch.nn.Module):
    """Class 0 as long as the mean of the image is exactly one half, else class 1."""

    def forward(self, x):
        away = (x.flatten(1).mean(1) - 0.5).abs()
        return torch.stack([1e-4 - away, away], 1)


@pytest.mark.parametrize("name", ATTACKS)
def test_what_breaks_at_the_first_point_is_never_asked_for_again(name):
    model, x = Counting(Edge()), torch.full((10, 1, 5, 5), 0.5)
    moved = ATTACKS[name](model, x, torch.zeros(10, dtype=int), 0.2)
    assert (model(moved).argmax(1) == 1).all()
    assert model.asked[:2] == [10, 10] and sum(model.asked[1:-1]) < 10 + 3


# What holds for every attack

@pytest.mark.parametrize("name,eps", list(itertools.product(ATTACKS, [1 / 255, 0.1, 1])))
def test_inside_the_ball_and_the_pixels_range(digits, name, eps):
    net, x, y = digits
    moved = ATTACKS[name](net, x[:30], y[:30], eps)
    assert moved.shape == x[:30].shape and moved.dtype == x.dtype and not moved.requires_grad
    assert (moved - x[:30]).abs().max() <= eps + 1e-6 and 0 <= moved.min() and moved.max() <= 1


def test_inside_the_l2_ball(digits):
    net, x, y = digits
    for eps in (0.1, 1, 8):
        moved = apgd(net, x[:30], y[:30], eps, steps=15, norm="l2")
        assert (moved - x[:30]).flatten(1).norm(dim=1).max() <= eps + 1e-5
        assert 0 <= moved.min() and moved.max() <= 1


@pytest.mark.parametrize("name", ATTACKS)
def test_the_same_seed_in_batches_of_any_size(name):
    net, x, y = seen(K=5)
    net = net.double()
    x = x.double()
    whole = ATTACKS[name](net, x, y, 0.02, generator=seeded(3))
    assert torch.equal(ATTACKS[name](net, x, y, 0.02, generator=seeded(3)), whole)
    assert not torch.equal(ATTACKS[name](net, x, y, 0.02, generator=seeded(4)), whole)
    torch.testing.assert_close(ATTACKS[name](net, x, y, 0.02, generator=seeded(3), batch_size=5), whole)
    generator = seeded(3)
    parts = [ATTACKS[name](net, a, b, 0.02, generator=generator) for a, b in zip(x.split(7), y.split(7))]
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize("name", ATTACKS)
def test_model_and_randomness_are_left_as_they_were(name):
    net, x, y = seen(K=4)
    net.train()
    net[1].eval()
    net[0].bias.requires_grad_(False)
    net(x).sum().backward()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    ATTACKS[name](net, x, y, 0.05)
    with pytest.raises(ValueError):
        ATTACKS[name](net, x, y + 4, 0.05)
    assert [m.training for m in net.modules()] == [True, True, False, True, True, True]
    assert [p.requires_grad for p in net.parameters()] == [True, False, True, True, True, True]
    assert all(torch.equal(values, before[key]) for key, values in net.state_dict().items())
    for parameter, grad in zip(net.parameters(), grads):
        assert parameter.grad is None if grad is None else torch.equal(parameter.grad, grad)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name,K", list(itertools.product(ATTACKS, [2, 3, 4])))
def test_few_classes(name, K):
    net, x, y = seen(K)
    moved = ATTACKS[name](net, x, y, 0.1)
    assert (moved - x).abs().max() <= 0.1 + 1e-6
    assert accuracy(net, moved, y) < 1
    assert torch.equal(ATTACKS[name](net, x, y, 0), x)


@pytest.mark.parametrize("name", ATTACKS)
def test_memory_format_makes_no_difference(name):
    net, x, y = seen(K=4)
    net, x = net.double(), x.double()
    expected = ATTACKS[name](net, x, y, 0.05)
    last = torch.channels_last
    moved = ATTACKS[name](net.to(memory_format=last), x.contiguous(memory_format=last), y, 0.05)
    torch.testing.assert_close(moved, expected)


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr", "dlr-targeted"])
def test_on_two_linear_classes_apgd_finds_the_best_corner(loss):
    weight = torch.randn(2, 30, generator=seeded()).double()
    net = torch.nn.Linear(30, 2, bias=False).double()
    net.weight.data = weight
    x = 0.3 + 0.4 * torch.rand(50, 30, generator=seeded(1)).double()
    with torch.no_grad():
        logits = net(x)
    y, eps = logits.argmax(1), 0.05
    furthest = logits.diff(dim=1).abs()[:, 0] - eps * weight.diff(dim=0).abs().sum()
    moved = apgd(net, x, y, eps, loss=loss)
    assert torch.equal(right(net, moved, y), furthest > 0) and 0 < (furthest > 0).sum() < 50
    stands = furthest > 0
    with torch.no_grad():
        margin = net(moved[stands]).diff(dim=1).abs()[:, 0]
    torch.testing.assert_close(margin, furthest[stands], atol=1e-3, rtol=0)


# Square

class Steps(torch.nn.Module):
    """A model that sees images through 8 grey levels: its gradient is 0 or not there at all."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model((x * 7).round().div(7))


def test_square_needs_no_gradient(digits):
    net, x, y = digits
    net = Steps(net)
    clean, eps = accuracy(net, x, y), 24 / 255
    assert accuracy(net, square(net, x, y, eps, n_queries=300), y) < clean - 0.2
    blind = accuracy(net, apgd(net, x, y, eps, steps=15), y)
    report = auto_attack_report(net, x, y, eps, **CHEAP)
    assert (report.stage == 3).any() and report.accuracy()["square"] < blind


def test_square_reaches_every_pixel_and_takes_images_that_are_not_square():
    x, y = torch.full((60, 1, 6, 9), 0.5), torch.full((60,), 3)
    net = Fixed()
    few, many = (square(net, x, y, 0.25, n_queries=n) for n in (1, 200))
    assert ((few == 0.25) | (few == 0.75)).all() and (few == few[:, :, :1]).all()
    assert (many != few).any(0).all()


def test_more_queries_break_more(digits):
    net, x, y = digits
    assert accuracy(net, square(net, x, y, EPS, n_queries=400), y) < accuracy(
        net, square(net, x, y, EPS, n_queries=5), y)
