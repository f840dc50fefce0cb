"""FGSM, PGD, transfer, breaking points: against torchattacks and foolbox, and what must always hold."""
import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from repspace import data, regularize, train
from repspace.attacks import apgd, auto_attack_report, breaking_point, fgsm, pgd, searched_in, sign_noise, transfer
from repspace.attacks.steps import climb, distances, frozen, logits_of, random_point

with warnings.catch_warnings():  # theirs, about regular expressions and packaging
    warnings.simplefilter("ignore")
    eagerpy = pytest.importorskip("eagerpy")
    foolbox = pytest.importorskip("foolbox")
    torchattacks = pytest.importorskip("torchattacks")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def digits():
    """A net trained on 200 digits, and the 1,597 test images with their labels."""
    dataset = data.load("digits")
    recipe = train.Recipe(epochs=40, batch_size=50, lr=0.1)
    net = train.new_classifier("tiny-cnn", dataset, recipe, seed=0)
    train.fit(net, dataset, recipe, regularize.get("none"), seed=0)
    return net.eval(), *dataset.test


def robust(net, images, labels):
    return (logits_of(net, images).argmax(1) == labels).double().mean().item()


def of_foolbox(attack, net, x, y, eps):
    return attack(foolbox.PyTorchModel(net, bounds=(0, 1), device=x.device), x, y, epsilons=eps)[1]


# Peers

@pytest.mark.parametrize("eps", [1 / 255, 8 / 255, 64 / 255])
def test_fgsm_is_pixel_identical_where_cross_entropy_does_not_underflow(digits, eps):
    net, x, y = copy.deepcopy(digits[0]).double(), digits[1].double(), digits[2]
    ours = fgsm(net, x, y, eps)
    assert torch.equal(ours, torchattacks.FGSM(net, eps)(x, y))
    assert torch.equal(ours, of_foolbox(foolbox.attacks.FGSM(), net, x, y, eps))


def test_fgsm_goes_on_where_their_gradient_underflows(digits):
    """In float32 they leave the direction on images that the net is sure of; float64 is the judge."""
    net, x, y = digits
    eps = 16 / 255
    judge = fgsm(copy.deepcopy(net).double(), x.double(), y, eps).float()
    ours, theirs = fgsm(net, x, y, eps), torchattacks.FGSM(net, eps)(x, y)
    far = [((images - judge).abs() > 1e-5).flatten(1).sum(1) for images in (ours, theirs)]
    sure = logits_of(net, x).softmax(1).gather(1, y[:, None])[:, 0] > 1 - 1e-6  # a few roundings
    assert far[0].sum() <= 5, "but for pixels whose gradient is 0 up to rounding"
    assert far[1].sum() > 500 and far[1][sure].sum() > 0.98 * far[1].sum()

    loud = copy.deepcopy(net)  # the same decisions, so the same accuracy under the same attack
    with torch.no_grad():
        for parameter in loud.head.parameters():
            parameter *= 1e4
    right = logits_of(net, x).argmax(1) == y
    assert robust(loud, torchattacks.FGSM(loud, eps)(x, y), y) > right.double().mean() - 0.02
    assert robust(loud, of_foolbox(foolbox.attacks.FGSM(), loud, x, y, eps), y) > right.double().mean() - 0.02
    assert abs(robust(loud, fgsm(loud, x, y, eps), y) - robust(net, ours, y)) < 0.05


@pytest.mark.parametrize("eps", [8 / 255, 16 / 255, 32 / 255])
def test_pgd_agrees_with_torchattacks_and_foolbox(digits, eps):
    """Robust accuracy within 0.3 points of both: all three draw the same starting points from seed 0.

    Others would move each of the three by up to a point (at 32/255 by 16 of 1,597 images in five seeds)."""
    net, x, y = digits
    torch.manual_seed(0)
    theirs = [robust(net, torchattacks.PGD(net, eps, eps / 4, 20)(x, y), y)]
    torch.manual_seed(0)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=eps / 4, steps=20)
    theirs += [robust(net, of_foolbox(attack, net, x, y, eps), y)]
    ours = robust(net, pgd(net, x, y, eps), y)
    assert max(abs(ours - other) for other in theirs) <= 0.003, (ours, theirs)


def test_pgd_l2_agrees_with_torchattacks(digits):
    """Their starting points are not uniform in the ball but denser in the middle: means of three seeds."""
    (net, x, y), eps, ours, theirs = digits, 0.5, [], []
    for seed in range(3):
        torch.manual_seed(seed)
        theirs.append(robust(net, torchattacks.PGDL2(net, eps, eps / 4, 20)(x, y), y))
        generator = torch.Generator().manual_seed(seed)
        ours.append(robust(net, pgd(net, x, y, eps, norm="l2", generator=generator), y))
    assert abs(sum(ours) - sum(theirs)) / 3 <= 0.003, (ours, theirs)


@pytest.mark.parametrize("norm, eps, peer", [("linf", 16 / 255, foolbox.attacks.LinfPGD),
                                             ("l2", 0.5, foolbox.attacks.L2PGD)])
def test_pgd_walks_where_foolbox_walks(digits, norm, eps, peer):
    """From the same starting points, in float64: where no iterate is wrong, the last ones are the same."""
    net, x, y = copy.deepcopy(digits[0]).double(), digits[1].double(), digits[2]

    class FromOurStart(peer):
        def get_random_start(self, x0, epsilon):
            return eagerpy.astensor(random_point(x0.raw, epsilon, norm))

    theirs = of_foolbox(FromOurStart(abs_stepsize=eps / 4, steps=20), net, x, y, eps)
    ours = pgd(net, x, y, eps, norm=norm)
    standing = logits_of(net, ours).argmax(1) == y
    assert standing.double().mean() > 0.2
    assert torch.allclose(ours[standing], theirs[standing], atol=1e-6)
    assert abs(robust(net, ours, y) - robust(net, theirs, y)) <= 0.003


def test_pgd_keeps_what_peers_pass_by(digits):
    """Both peers judge the last iterate alone, and call an image robust that was broken on the way.

    A wrong image inside the ball is proof that it is not, so the lower number is right: every image
    that only we break comes with such a proof, and none that they break is missed but by rounding."""
    (net, x, y), eps, seed = digits, 32 / 255, 3
    torch.manual_seed(seed)
    theirs = torchattacks.PGD(net, eps, eps / 4, 20)(x, y)
    ours = pgd(net, x, y, eps, generator=torch.Generator().manual_seed(seed))
    broken, broken_of_theirs = (logits_of(net, moved).argmax(1) != y for moved in (ours, theirs))
    extra, missed = broken & ~broken_of_theirs, broken_of_theirs & ~broken
    assert extra.sum() >= 2 and missed.sum() <= 1
    assert distances(ours, x).max() <= eps + 1e-6 and 0 <= ours.min() and ours.max() <= 1


# What must always hold

@pytest.fixture
def small():
    """A net with batch norm and dropout in float64, in training mode but for one part, and images."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(128, 5))
    net[1].running_mean.normal_(), net[1].eval()
    net[6].bias.requires_grad_(False)
    return net.double(), torch.rand(20, 3, 8, 8, dtype=torch.float64), torch.randint(5, (20,))


def seeded(attack, seed=0, **options):
    return partial(attack, generator=torch.Generator().manual_seed(seed), **options)


ATTACKS = {"fgsm": lambda: fgsm, "fgsm margin": lambda: partial(fgsm, loss="margin"),
           "pgd": lambda: seeded(pgd), "pgd margin": lambda: seeded(pgd, loss="margin", steps=5),
           "pgd l2": lambda: seeded(pgd, norm="l2"), "noise": lambda: seeded(sign_noise),
           "pgd short": lambda: seeded(pgd, until_broken=True),
           "pgd l2 short": lambda: seeded(pgd, until_broken=True, norm="l2"),
           "transfer": lambda: transfer(SURROGATE, seeded(pgd))}
SURROGATE = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).double()


@pytest.fixture(params=ATTACKS)
def attack(request):
    """A function that makes the attack, its generator new, and its norm."""
    return ATTACKS[request.param], "l2" if "l2" in request.param else "linf"


def test_inside_the_ball_and_the_box(small, attack):
    (net, x, y), (make, norm) = small, attack
    x[:10] = x[:10].round()  # at the borders
    for eps in (0.01, 0.1, 1):
        moved = make()(net, x, y, eps)
        assert moved.shape == x.shape and moved.dtype == x.dtype and not moved.requires_grad
        assert distances(moved, x, norm).max() <= eps * (1 + 1e-9)
        assert 0 <= moved.min() and moved.max() <= 1
        assert distances(moved, x, norm).max() > 0.4 * eps


def test_without_a_limit_nothing_moves(small, attack):
    (net, x, y), (make, _) = small, attack
    assert torch.equal(make()(net, x, y, 0), x)
    with frozen(net):
        clean = logits_of(net, x).argmax(1) == y
    assert torch.equal(breaking_point(net, x, y, [1e-12], make()) > 0, clean)


def test_the_model_is_left_as_it_was(small, attack):
    (net, x, y), (make, _) = small, attack
    nn.functional.cross_entropy(net(x), y).backward()

    def state():
        return ([m.training for m in net.modules()], [p.requires_grad for p in net.parameters()],
                [None if p.grad is None else p.grad.clone() for p in net.parameters()],
                [v.clone() for v in net.state_dict().values()], [p.data_ptr() for p in net.parameters()])

    def same(a, b):
        return torch.equal(a, b) if torch.is_tensor(a) else a == b

    before, images, labels, draws = state(), x.clone(), y.clone(), torch.get_rng_state()
    make()(net, x, y, 0.1)
    breaking_point(net, x, y, [0.05, 0.1], make())
    with pytest.raises(ValueError, match="labels must lie in"):
        breaking_point(net, x, y + 5, [0.1], make())
    for was, now in zip(before, state()):
        assert all(same(a, b) for a, b in zip(was, now)) and len(was) == len(now)
    assert torch.equal(x, images) and torch.equal(y, labels)
    assert torch.equal(torch.get_rng_state(), draws), "the global random state is not touched"


def test_same_seed_same_result_in_batches_of_any_size_and_any_memory_format(small, attack):
    (net, x, y), (make, _) = small, attack
    whole = make()(net, x, y, 0.1)
    assert torch.equal(make()(net, x, y, 0.1), whole)
    for size in (1, 7):
        one = make()
        parts = [one(net, a, b, 0.1) for a, b in zip(x.split(size), y.split(size))]
        assert torch.allclose(torch.cat(parts), whole, atol=1e-9)
    last = torch.channels_last
    for model in (net, copy.deepcopy(net).to(memory_format=last)):
        for images in (x, x.contiguous(memory_format=last)):
            assert torch.allclose(make()(model, images, y, 0.1), whole, atol=1e-9)


def test_one_image_and_none(small, attack):
    (net, x, y), (make, _) = small, attack
    assert make()(net, x[:1], y[:1], 0.1).shape == (1, 3, 8, 8)
    assert make()(net, x[:0], y[:0], 0.1).shape == (0, 3, 8, 8)
    assert breaking_point(net, x[:0], y[:0], [0.1], make()).shape == (0,)


@pytest.mark.parametrize("change, message", [
    (dict(x=torch.zeros(2, 3, 8, 8, dtype=torch.uint8)), "torch.uint8"),
    (dict(x=torch.full((2, 3, 8, 8), -1.0)), r"must lie in \[0, 1\]"),
    (dict(x=torch.full((2, 3, 8, 8), torch.nan)), r"must lie in \[0, 1\]"),
    (dict(y=torch.zeros(3, dtype=int)), "2 integers"), (dict(y=torch.zeros(2)), "integers"),
    (dict(y=torch.zeros(2, 5)), "2 integers.*one-hot"),
    (dict(eps=8), "8 / 255"), (dict(eps=-0.1), r"\[0, 1\]"), (dict(eps=float("nan")), r"\[0, 1\]")])
@pytest.mark.parametrize("one", [fgsm, pgd, sign_noise])
def test_wrong_inputs_are_refused(small, one, change, message):
    given = dict(x=torch.rand(2, 3, 8, 8), y=torch.tensor([0, 1]), eps=0.1) | change
    with pytest.raises(ValueError, match=message):
        one(small[0].float(), **given)


def test_labels_and_logits_that_do_not_fit_are_refused(small):
    net, x, y = small
    for one in (fgsm, pgd):
        with pytest.raises(ValueError, match="labels must lie in 0..4"):
            one(net, x, y + 5, 0.1)
        with pytest.raises(ValueError, match="not finite"):
            one(nn.Sequential(net, nn.Threshold(1e9, float("inf"))), x, y, 0.1)


def test_until_broken_breaks_the_same_images(digits):
    net, x, y = copy.deepcopy(digits[0]).double(), digits[1][:400].double(), digits[2][:400]
    for norm, eps in (("linf", 16 / 255), ("l2", 0.4)):
        full, short = (pgd(net, x, y, eps, norm=norm, until_broken=stop) for stop in (False, True))
        broken = logits_of(net, full).argmax(1) != y
        assert 0.2 < broken.double().mean() < 0.8
        assert torch.equal(logits_of(net, short).argmax(1) != y, broken)


class Counted(nn.Module):
    """`net`, counting the images that go through it."""
    def __init__(self, net):
        super().__init__()
        self.net, self.images = net, 0

    def forward(self, x):
        self.images += len(x)
        return self.net(x)


def test_only_what_stands_is_attacked(digits):
    net, (x, y), eps, steps = Counted(digits[0]), (v[:400] for v in digits[1:]), 32 / 255, 20
    pgd(net, x, y, eps, steps)
    assert net.images == (steps + 1) * len(x), "one pass for each iterate"
    net.images = 0
    shares = [(breaking_point(net, x, y, [eps], one) > eps).double().mean() for one in (
        pgd, partial(pgd, until_broken=True), partial(pgd, until_broken=False))]
    short = net.images - (steps + 3) * len(x)
    assert shares[0] == shares[1] and abs(shares[0] - shares[2]) < 0.01
    assert short < (steps + 3) * len(x), "two short walks cost less than one whole"


def test_breaking_points_of_transfer(digits):
    """A net's own images break it sooner than those made on another; both are judged on the target."""
    net, x, y = digits[0], digits[1][:300], digits[2][:300]
    dataset = data.load("digits")
    recipe = train.Recipe(epochs=20, batch_size=50, lr=0.1)
    other = train.new_classifier("tiny-cnn", dataset, recipe, seed=5)
    train.fit(other, dataset, recipe, regularize.get("none"), seed=5)
    grid = [16 / 255, 32 / 255, 64 / 255]
    own, foreign = (breaking_point(net, x, y, grid, one) for one in (pgd, transfer(other)))
    for eps in grid:
        assert (foreign <= eps).sum() < (own <= eps).sum()
    assert torch.equal(own == 0, foreign == 0) and (foreign < torch.inf).any()
    moved = transfer(other)(net, x, y, grid[1])
    assert torch.equal(moved, pgd(other, x, y, grid[1]))


def test_gradients_do_not_depend_on_the_rest_of_the_batch(small):
    net, x, y = small
    with frozen(net):
        whole = climb(net, x, y)
        for i in (0, 17):
            one = climb(net, x[i:i + 1], y[i:i + 1])
            for a, b in zip(whole, one):
                assert torch.allclose(a[i:i + 1], b, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_on_a_gpu_as_on_the_cpu(digits, memory_format):
    net, x, y = copy.deepcopy(digits[0]).double(), digits[1][:300].double(), digits[2][:300]
    here = breaking_point(net, x, y, [8 / 255, 16 / 255], seeded(pgd))
    there = breaking_point(net.cuda().to(memory_format=memory_format), x.cuda(), y.cuda(),
                           [8 / 255, 16 / 255], seeded(pgd))
    assert there.is_cuda and (there.cpu() != here).double().mean() <= 0.01
    for norm, eps in (("linf", 0.1), ("l2", 0.5)):
        moved = pgd(net, x.cuda(), y.cuda(), eps, norm=norm)
        assert moved.is_cuda and distances(moved, x.cuda(), norm).max() <= eps * (1 + 1e-9)
    assert torch.equal(fgsm(net, x.cuda(), y.cuda(), 0), x.cuda())


# Searching in bfloat16

SEARCHES = {"pgd": partial(pgd, steps=7), "pgd, until broken": partial(pgd, steps=7, until_broken=True),
            "margin": partial(pgd, steps=7, loss="margin"), "l2": partial(pgd, steps=7, norm="l2"),
            "apgd": partial(apgd, steps=10), "targeted": partial(apgd, steps=5, loss="dlr-targeted", n_targets=3)}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_in_bfloat16_stays_in_the_ball_and_finds_about_as_much(digits, name):
    net, x, y = digits[0], digits[1][:300], digits[2][:300]
    eps = 1.0 if name == "l2" else 16 / 255
    exact = SEARCHES[name](net, x, y, eps)
    with searched_in(torch.bfloat16): moved = SEARCHES[name](net, x, y, eps)
    assert moved.dtype == x.dtype and not torch.equal(moved, exact)
    assert distances(moved, x, "l2" if name == "l2" else "linf").max() <= eps and 0 <= moved.min() and moved.max() <= 1
    assert abs(robust(net, moved, y) - robust(net, exact, y)) <= 0.02
    assert torch.equal(SEARCHES[name](net, x, y, eps), exact), "what was switched on is off again"


class TwoFaced(nn.Module):
    """A net that is wrong about every image as soon as it is asked under autocast."""
    def __init__(self, net):
        super().__init__()
        self.net, self.asked = net, [0, 0]

    def forward(self, x):
        rough = torch.is_autocast_enabled("cpu")
        self.asked[rough] += len(x)
        return -self.net(x) if rough else self.net(x)


@pytest.mark.parametrize("name", SEARCHES)
def test_only_what_the_net_itself_gets_wrong_is_counted(digits, name):
    net, x, y = TwoFaced(digits[0]), digits[1][:100], digits[2][:100]
    eps = 0.1 if name == "l2" else 1 / 255
    with searched_in(torch.bfloat16):
        moved = SEARCHES[name](net, x, y, eps)
        breaks = breaking_point(net, x, y, [eps], SEARCHES[name] if name != "l2" else fgsm)
    assert net.asked[True] > 0
    assert torch.equal(breaks == 0, logits_of(digits[0], x).argmax(1) != y)
    assert (breaks.isinf() | (breaks == 0)).double().mean() > 0.9, "it had been misled about all of them"
    assert robust(digits[0], moved, y) > robust(digits[0], x, y) - 0.1


def test_auto_attack_reports_in_bfloat16_what_the_net_gets_wrong(digits):
    net, x, y = digits[0], digits[1][:150], digits[2][:150]
    few = dict(steps=5, n_targets=2, n_queries=30)
    exact = auto_attack_report(net, x, y, 16 / 255, **few)
    with searched_in(torch.bfloat16): report = auto_attack_report(net, x, y, 16 / 255, **few)
    assert torch.equal(report.broken, logits_of(net, report.images).argmax(1) != y)
    assert distances(report.images, x).max() <= 16 / 255 and not report.flags
    assert abs(report.broken.double().mean() - exact.broken.double().mean()) <= 0.02


def test_no_search_in_bfloat16_unless_it_is_asked_for(digits):
    net = TwoFaced(digits[0])
    pgd(net, digits[1][:20], digits[2][:20], 1 / 255, steps=2)
    with searched_in(torch.bfloat16), searched_in(None): apgd(net, digits[1][:20], digits[2][:20], 1 / 255, steps=2)
    assert net.asked[True] == 0 and net.asked[False] > 0


def test_halving_finds_what_the_walk_finds_where_an_attack_is_not_fickle(digits):
    """FGSM without a random start on a linear net, and PGD on a net up to what chance does."""
    net, x, y = digits[0], digits[1][:300], digits[2][:300]
    grid = [n / 255 for n in (4, 8, 11, 16, 23, 32, 45, 64)]
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert torch.equal(breaking_point(linear, x, y, grid, order="halving"), breaking_point(linear, x, y, grid))
    attack = partial(pgd, steps=7)
    walked, halved = (breaking_point(net, x, y, grid, attack, order=order) for order in ("up", "halving"))
    assert torch.equal(walked == 0, halved == 0) and (walked != halved).double().mean() < 0.2
    assert abs((walked <= grid[3]).double().mean() - (halved <= grid[3]).double().mean()) < 0.03
