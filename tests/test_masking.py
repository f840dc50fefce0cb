"""The diagnosis of masking: silent on plain nets, loud on nets built to mask, by the checks meant for each."""
import copy

import pytest
import torch
from torch import nn

from repspace import data, regularize, train
from repspace.attacks import masking

CHECKS = ["square", "transfer", "weak loss", "more steps", "zero gradients", "logit scale",
          "same answer"]
EPS = 24 / 255
QUICK = dict(images=200, n_queries=100, steps=(20, 50))


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def nets(digits):
    """Plain nets of three seeds, the last with batch norm."""
    recipe = train.Recipe(epochs=40, batch_size=50, lr=0.1)
    made = []
    for seed, name in enumerate(["tiny-cnn", "tiny-cnn", "tiny-cnn-bn"]):
        net = train.new_classifier(name, digits, recipe, seed)
        train.fit(net, digits, recipe, regularize.get("none"), seed)
        made.append(net.eval())
    return made


def loud(net):
    """The same decisions, with logits 10,000 times as large."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.head.parameters():
            parameter *= 1e4
    return net


class Quantized(nn.Module):
    """`net` on images rounded to 8 gray levels: its gradient is 0 everywhere."""
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(torch.round(x * 7) / 7)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_silent_on_plain_nets(digits, nets, seed):
    table = masking.diagnose(nets[seed], *digits.test, EPS, nets[seed - 1], seed=seed, **QUICK)
    assert list(table.index) == CHECKS and table.raised.dtype == bool
    assert not table.raised.any(), table
    assert 0.3 < table.pgd["square"] < 0.98, "a limit at which all differences can show"
    assert set(table.reason) <= {"no sign", "more, but within chance"}


@pytest.mark.parametrize("seed", [0, 2])
def test_loud_on_a_head_times_ten_thousand(digits, nets, seed):
    table = masking.diagnose(loud(nets[seed]), *digits.test, EPS, nets[seed - 1], **QUICK)
    for check in ("square", "transfer", "weak loss", "zero gradients", "logit scale"):
        assert table.raised[check], table
        assert table.reason[check] == masking.REASONS[check]
    assert not table.raised["more steps"], "no number of steps helps where the gradient is 0"
    assert table.value["zero gradients"] > 0.9 and table.pgd["square"] < 0.1


def test_the_loss_of_this_package_is_not_stopped_by_that_head(digits, nets):
    plain = masking.diagnose(nets[0], *digits.test, EPS, loss="ce", **QUICK)
    table = masking.diagnose(loud(nets[0]), *digits.test, EPS, loss="ce", **QUICK)
    assert not table.raised.any() and not plain.raised.any()
    assert abs(table.pgd["square"] - plain.pgd["square"]) < 0.05


@pytest.mark.parametrize("loss", [masking.cross_entropy, "ce"])
def test_loud_on_a_quantized_input_whatever_the_loss(digits, nets, loss):
    table = masking.diagnose(Quantized(nets[0]), *digits.test, EPS, nets[1], loss, **QUICK)
    assert table.raised[["square", "transfer", "zero gradients"]].all(), table
    assert not table.raised[["weak loss", "more steps", "logit scale"]].any(), table
    assert table.value["zero gradients"] == 1


def test_more_steps_is_raised_where_the_attack_stops_early(digits, nets):
    table = masking.diagnose(nets[0], *digits.test, EPS, **QUICK | dict(steps=(1, 20)))
    assert table.raised["more steps"] and table.reason["more steps"] == "the attack had not arrived"
    assert not table.raised[["transfer", "weak loss", "zero gradients"]].any()


def test_a_surrogate_alone_or_in_a_list(digits, nets):
    small = QUICK | dict(images=60, n_queries=10, steps=(2, 4))
    one, listed, two = (masking.diagnose(nets[0], *digits.test, EPS, surrogates, **small)
                        for surrogates in (nets[1], [nets[1]], [nets[1], nets[2]]))
    without = masking.diagnose(nets[0], *digits.test, EPS, **small)
    assert one.equals(listed) and two.other["transfer"] >= one.other["transfer"]
    assert without.reason["transfer"] == "not checked" and not without.raised["transfer"]
    assert without.drop("transfer").equals(one.drop("transfer"))
    whole = masking.diagnose(nets[0], *digits.test, EPS, nn.Sequential(nets[1]), **small)
    assert whole.equals(one), "a Sequential is one net, not a list of its parts"


def test_same_seed_same_table_and_the_model_left_as_it_was(digits, nets):
    net = copy.deepcopy(nets[2]).train()
    net.body[1].eval()
    modes, state = [m.training for m in net.modules()], copy.deepcopy(net.state_dict())
    small = dict(images=60, n_queries=10, steps=(2, 4))
    tables = [masking.diagnose(net, *digits.test, EPS, batch_size=size, **small) for size in (None, None, 60)]
    assert tables[0].equals(tables[1]) and tables[0].equals(tables[2])
    assert [m.training for m in net.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())


def test_sorted_test_sets_are_sampled_across_classes(digits, nets):
    order = digits.test.labels.argsort()
    x, y = digits.test.images[order], digits.test.labels[order]
    drawn = masking._right_ones(nets[0], x, y, 100, 50, 0)[1]
    assert len(drawn.unique()) == 10


def test_rule_of_two_points_and_two_standard_errors():
    first = torch.zeros(1000, dtype=torch.bool)

    def second(gained):
        return torch.arange(1000) < gained

    for gained, counts in ((0, False), (20, False), (21, True), (400, True)):
        value, threshold = masking.excess(first, second(gained))
        assert value == gained / 1000 and (value > threshold) == counts
    swapped = torch.arange(1000) >= 400                     # 600 gained, 400 lost: ± 6.3 points
    value, threshold = masking.excess(second(400), swapped)
    assert value == 0.2 and threshold == pytest.approx(2 * 1000**0.5 / 1000)
    small = torch.arange(50) < 3                            # 6 points of 50 images, but by 3 images
    value, threshold = masking.excess(first[:50], small)
    assert value == 0.06 < threshold


def test_a_net_without_gradients_or_right_images_is_refused(digits, nets):
    class Detached(Quantized):
        def forward(self, x): return self.net(x).detach()

    x, y = digits.test
    with pytest.raises(ValueError, match="square"):
        masking.diagnose(Detached(nets[0]), x, y, EPS, images=10)
    with pytest.raises(ValueError, match="none right"):
        masking.diagnose(nets[0], x, (nets[0](x).argmax(1) + 1) % 10, EPS)
    with pytest.raises(ValueError, match="8 / 255"):
        masking.diagnose(nets[0], x, y, 8)
    with pytest.raises(ValueError, match="torch.uint8"):
        masking.diagnose(nets[0], (x * 255).byte(), y, EPS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_on_a_gpu(digits, nets):
    x, y = (v.cuda() for v in digits.test)
    plain = copy.deepcopy(nets[0]).cuda()
    assert not masking.diagnose(plain, x, y, EPS, **QUICK).raised.any()
    assert masking.diagnose(loud(plain), x, y, EPS, **QUICK).raised[["square", "weak loss"]].all()
