"""What models do that nobody foresaw: every attack, the diagnosis and the corruptions meet it, or say clearly what is wrong."""
import copy
import logging
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from repspace import attacks, corruptions, data, vocabulary
from repspace.attacks import (REGISTERED, apgd, auto_attack, auto_attack_report, breaking_point, fgsm, masking, pgd, register,
                              sign_noise, square, transfer)
from repspace.attacks.steps import distances, unit_point
from repspace.attacks.target import logits_of

EPS = 8 / 255
CHEAP = dict(steps=3, n_targets=2, n_queries=10)
ATTACKS = {"fgsm": fgsm, "fgsm margin": partial(fgsm, loss="margin"), "pgd": partial(pgd, steps=3),
           "pgd l2": partial(pgd, steps=3, norm="l2"), "pgd short": partial(pgd, steps=3, until_broken=True),
           **{f"apgd {loss}": partial(apgd, steps=6, loss=loss, n_targets=2)
              for loss in ("ce", "margin", "dlr", "dlr-targeted")},
           "apgd l2": partial(apgd, steps=6, norm="l2"), "square": partial(square, n_queries=20),
           "auto": partial(auto_attack, **CHEAP), "noise": sign_noise}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MASKING = dict(images=30, n_queries=10, steps=(2, 4))


class Wrap(nn.Module):
    """A module whose forward is the function `f`, so that the net behind it is not its own."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def net(digits):
    """A small net of the digits with dropout and batch norm, in training mode."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Dropout(0.2), nn.Linear(48, 10))
    x, y = digits.train
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.train()


@pytest.fixture
def xy(digits):
    return digits.test.images[:24].clone(), digits.test.labels[:24].clone()


def everything(model, x, y):
    """All that takes a model, asked once, quickly; what each gave, by name."""
    made = {name: attack(model, x, y, EPS) for name, attack in ATTACKS.items()}
    made["report"] = auto_attack_report(model, x, y, EPS, **CHEAP).images
    made["breaking point"] = breaking_point(model, x, y, [EPS / 2, EPS], partial(pgd, steps=2))
    made["transfer"] = transfer(model, fgsm)(None, x, y, EPS)
    made["masking"] = torch.tensor(masking.diagnose(model, x, y, EPS, [model], **MASKING).value.to_numpy(float))
    table = corruptions.over_severities(model, x, y, ["noise", "blur"], [0, 3])
    return made | {"corruptions": torch.tensor(table[["accuracy", "ece"]].to_numpy(float))}


# B. Any function of images that gives logits

class Service:
    def __init__(self, net):
        self.net = net

    def predict(self, x):
        return self.net(x)

    __call__ = predict


CALLABLES = {
    "lambda": lambda net: lambda x: net(x), "partial": lambda net: partial(net), "method": lambda net: net.forward,
    "object": Service, "its method": lambda net: Service(net).predict,
    "function of functions": lambda net: partial(lambda f, x: f(x), lambda x: [n(x) for n in (net,)][0]),
    "script": lambda net: torch.jit.script(net), "tuple": lambda net: lambda x: (net(x), x),
    "dict": lambda net: lambda x: {"loss": 1, "logits": net(x)}, "object with logits": lambda net: (
        lambda x: SimpleNamespace(logits=net(x))), "module": lambda net: Wrap(net)}


@pytest.fixture(scope="module")
def expected(net, digits):
    return everything(net, digits.test.images[:24].clone(), digits.test.labels[:24].clone())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", CALLABLES)
def test_any_callable_is_a_model_and_is_left_as_it_was(net, xy, expected, kind):
    state = {name: value.clone() for name, value in net.state_dict().items()}
    made = everything(CALLABLES[kind](net), *xy)
    for name, value in expected.items():
        assert torch.allclose(made[name].nan_to_num(), value.nan_to_num(), atol=1e-5), name
    assert all(module.training for module in net.modules()) and all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items()), "batch norm learnt nothing"


def test_a_net_behind_a_forward_or_a_global_is_found(net, xy, expected):
    class Inside(nn.Module):
        def forward(self, x):
            return net(x)

    GLOBAL["net"] = net
    for model in (Inside(), nn.Sequential(Inside()), by_name, Wrap(by_name), Wrap(partial(by_name))):
        assert torch.equal(pgd(model, *xy, EPS, steps=3), expected["pgd"])


GLOBAL = {}


def by_name(x):
    return GLOBAL["net"](x)


@pytest.mark.filterwarnings("ignore")
def test_graphs_that_have_no_modes(net, xy):
    x, y = xy
    net = nn.Sequential(*net).eval()
    size = torch.export.Dim("size", min=1, max=1000)
    exported = torch.export.export(net, (x,), dynamic_shapes=({0: size},)).module()
    for graph in (exported, torch.jit.freeze(torch.jit.script(net)), torch.jit.trace(net, x)):
        assert torch.allclose(pgd(graph, x, y, EPS), pgd(net, x, y, EPS), atol=1e-6)
    net.train()


NO_MODELS = {"text": ("resnet18", "'resnet18', of type str"), "class": (nn.Linear, "class Linear itself"), "None": (None, "NoneType"),
             "array": (np.zeros(3), "ndarray"), "probabilities": (lambda f: lambda x: f(x).softmax(1), "probabilities"),
             "half probabilities": (lambda f: lambda x: f(x).softmax(1).half(), "probabilities"),
             "NumPy": (lambda f: lambda x: f(x).detach().numpy(), "gives ndarray"),
             "labels": (lambda f: lambda x: f(x).argmax(1), "torch.int64"),
             "nothing": (lambda f: lambda x: (), "gives tuple"), "a dict without": (lambda f: lambda x: {"y": f(x)}, "gives dict"),
             "one number": (lambda f: lambda x: f(x)[:, 0], "K at least 2"),
             "fewer": (lambda f: lambda x: f(x)[:1], "logits"), "infinite": (lambda f: lambda x: f(x) / 0, "not finite for 24 of 24")}


@pytest.mark.parametrize("kind", NO_MODELS)
def test_what_is_no_model_is_told_so(net, xy, kind):
    made, message = NO_MODELS[kind]
    model = made(net) if getattr(made, "__name__", "") == "<lambda>" else made
    for attack in (v for name, v in ATTACKS.items() if name != "noise"):
        with pytest.raises(ValueError, match=message):
            attack(model, *xy, EPS)
    for call in (lambda: breaking_point(model, *xy, [EPS]), lambda: corruptions.over_severities(model, *xy)):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError):
        masking.diagnose(model, *xy, EPS)


# C, D. Any dtype of images, logits and weights; never outside the ball

def test_autocast(net, xy):
    def autocast(x):
        with torch.autocast("cpu", torch.bfloat16):
            return net(x)
    for model in (autocast, Wrap(autocast)):
        everything(model, *xy)
    assert auto_attack_report(autocast, *xy, EPS, **CHEAP).flags == (), "rounding is no second answer"


@pytest.mark.parametrize("logits", FLOATS, ids=str)
@pytest.mark.parametrize("images", FLOATS, ids=str)
def test_images_and_logits_of_any_dtype(net, xy, images, logits):
    x, y = xy[0].to(images), xy[1]
    made = everything(lambda x: net(x.float()).to(logits), x, y)
    assert all(made[name].dtype == images for name in ATTACKS)


@pytest.mark.parametrize("weights", FLOATS, ids=str)
@pytest.mark.parametrize("images", FLOATS, ids=str)
def test_images_meet_the_dtype_of_the_weights(net, xy, images, weights):
    x, y = xy[0].to(images), xy[1]
    model = copy.deepcopy(net).to(weights)
    everything(model, x, y)
    with attacks.frozen(model):
        broken = (logits_of(model, pgd(model, x, y, 24 / 255)).argmax(1) != y).double().mean()
    assert broken > 0.3, "it is an attack, not only no error"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ATTACKS)
def test_never_outside_the_ball_measured_in_float64(net, digits, name, dtype):
    norm = "l2" if "l2" in name else "linf"
    x = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[0], x[1], x[2] = 0, 1, x[2].round()
    x, y = x.to(dtype), digits.test.labels[:12]
    for eps in (0, 1e-4, 0.1 / 255, 1 / 255, 8 / 255, 0.1, 1):
        moved = ATTACKS[name](net, x, y, eps)
        assert distances(moved, x, norm).max() <= eps and 0 <= moved.min() and moved.max() <= 1
        if eps >= 8 / 255 and "short" not in name and name not in ("apgd ce", "auto"):
            assert distances(moved, x, norm).max() > 0.3 * eps or norm == "l2"


def test_small_steps_add_up_in_bfloat16(net, xy):
    """A step of ε/4 is less than a level of bfloat16; rounded each time the attack would not move."""
    x, y = (0.5 + xy[0] / 2).bfloat16(), xy[1]
    moved = pgd(net, x, y, 2 / 255, steps=20)
    assert ((moved - x).abs() >= 1 / 256).double().mean() > 0.5


# E. Copies are handed out; what is no function is noticed

def test_a_model_that_writes_into_its_images(net, xy, expected):
    given = [v.clone() for v in xy]
    def in_place(x): return net(x.mul_(2).div_(2))
    made = everything(in_place, *xy)
    apart = {name: (made[name].nan_to_num() - expected[name].nan_to_num()).abs().max().item() for name in expected if name != "masking"}
    assert all(value < 1e-4 for value in apart.values()), {k: v for k, v in apart.items() if v}
    assert torch.equal(xy[0], given[0]) and torch.equal(xy[1], given[1])


def test_a_model_that_gives_out_one_buffer_again_and_again(net, xy):
    buffer = torch.empty(6, 10)
    def same_memory(x): return buffer[:len(x)].copy_(net(x))
    with attacks.frozen(net), torch.no_grad():
        assert torch.allclose(logits_of(same_memory, xy[0], 6), net(xy[0]), atol=1e-5)


def test_no_attack_gives_back_the_callers_memory(net, xy):
    for attack in ATTACKS.values():
        for x, y, eps in ((*xy, 0), (xy[0][:0], xy[1][:0], EPS)):
            moved = attack(net, x, y, eps)
            assert torch.equal(moved, x) and (not len(x) or moved.data_ptr() != x.data_ptr())


UNSTEADY = {"dice": lambda net: lambda x: net(x + 0.02 * torch.randn(x.shape)),
            "dice in logits": lambda net: lambda x: net(x) + 0.01 * torch.randn(len(x), 10),
            "dropout": lambda net: lambda x: nn.functional.dropout(net(x), 0.3, training=True),
            "counter": lambda net: Counter(net), "mean of the batch": lambda net: lambda x: net(x - x.mean(0) / 4),
            "batch statistics": lambda net: lambda x: net((x - x.mean()) / x.std()),
            "seeded by place": lambda net: lambda x: net(x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))}


class Counter:
    """Every second answer is another one."""

    def __init__(self, net):
        self.net, self.calls = net, 0

    def __call__(self, x):
        self.calls += 1
        return self.net(x) * (1 + self.calls % 2)


@pytest.mark.parametrize("kind", UNSTEADY)
def test_two_answers_are_noticed(net, xy, kind, caplog):
    made = UNSTEADY[kind](net)
    words = "rest of the batch" if kind in ("mean of the batch", "batch statistics", "seeded by place") else "two answers"
    table = masking.diagnose(made, *xy, 1 / 255, **MASKING)
    assert table.raised["same answer"] and words in table.reason["same answer"]
    flags = auto_attack_report(made, *xy, 1 / 255, **CHEAP).flags
    assert words in flags[0] and flags[0] in caplog.text


def test_one_answer_is_no_flag(net, xy):
    table = masking.diagnose(net, *xy, 1 / 255, **MASKING)
    assert not table.raised["same answer"] and table.value["same answer"] == 0
    assert auto_attack_report(net, *xy, 1 / 255, **CHEAP).flags == ()


# F. Gradients that are not finite

@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_gradients_that_are_not_finite_count_as_vanished(net, xy, norm, caplog):
    x, y = xy
    x[6:] = x[6:].clamp(min=0.2)
    def gamma(x): return net(x ** (1 / 2.2))
    with caplog.at_level(logging.WARNING):
        moved = pgd(gamma, x, y, 0.1, norm=norm)
    assert "gradients (one for each image and step) were not finite" in caplog.text and len(caplog.records) == 1
    assert distances(moved, x, norm).max() <= 0.1 and moved.isfinite().all()
    alone = pgd(gamma, x[6:], y[6:], 0.1, norm=norm, generator=skipped(x[:6], norm))
    assert torch.allclose(moved[6:], alone, atol=1e-5), "the others are attacked as ever"
    assert torch.equal(fgsm(gamma, x, y, 0.1)[:6], x[:6])


def skipped(x, norm):
    """The generator of seed 0 after it has drawn for `x`."""
    generator = torch.Generator().manual_seed(0)
    unit_point(x, norm, generator)
    return generator


def test_every_attack_goes_on_and_the_diagnosis_raises_its_flag(net, xy, caplog):
    def gamma(x): return net(x ** (1 / 2.2))
    everything(gamma, *xy)
    table = masking.diagnose(gamma, *xy, EPS, **MASKING)
    assert table.raised["zero gradients"] and table.value["zero gradients"] > 0.9
    assert any("not finite" in flag for flag in auto_attack_report(gamma, *xy, EPS, **CHEAP).flags)
    caplog.clear()
    breaking_point(gamma, *xy, [EPS / 2, EPS], batch_size=4)
    assert sum("not finite" in record.message for record in caplog.records) == 1, "said once for the whole search"


def test_nan_gradients_of_a_loss(net, xy):
    def broken(logits, y): return (logits.amax(1) - logits.amax(1)).sqrt() - logits.gather(1, y[:, None])[:, 0]
    assert torch.equal(fgsm(net, *xy, EPS, loss=broken), xy[0])


# G. A message says what was seen

def silent(net):
    def no_grad(x):
        with torch.no_grad():
            return net(x)
    return no_grad


STOPPED = {"no_grad": (silent, "under no_grad"), "detach": (lambda net: lambda x: net(x.detach()), "it ends at torch.Tensor.detach"),
           "bytes": (lambda net: lambda x: net((x * 255).byte() / 255), r"torch.Tensor.byte \(to torch.uint8\)"),
           "long": (lambda net: lambda x: net((x * 255).to(torch.int64) / 255), r"to torch.int64"),
           "data": (lambda net: lambda x: net(x.data), "torch.Tensor.data"),
           "numpy": (lambda net: lambda x: net(torch.from_numpy(x.numpy())), r"numpy\(\)"),
           "other images": (lambda net: lambda x: net(torch.ones(len(x), 64)), "the images have no part")}


@pytest.mark.parametrize("kind", STOPPED)
def test_where_a_gradient_ends_is_said(net, xy, kind):
    made, message = STOPPED[kind]
    for name in ("fgsm", "pgd", "apgd ce", "auto"):
        with pytest.raises(ValueError, match=f"no gradient leads.*{message}.*square"):
            ATTACKS[name](made(net), *xy, EPS)
    square(made(net), *xy, EPS, n_queries=5)


def test_inference_mode(net, xy):
    with torch.inference_mode():
        x, y = (v.clone() for v in xy)
        for name in ("fgsm", "pgd", "apgd ce", "auto"):
            with pytest.raises(ValueError, match="torch.inference_mode"):
                ATTACKS[name](net, *xy, EPS)
        square(net, *xy, EPS, n_queries=5)
        made_there = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert torch.equal(pgd(net, x, y, EPS), pgd(net, *xy, EPS)), "images made there are images"
    with torch.no_grad():
        assert torch.equal(pgd(net, x, y, EPS), pgd(net, *xy, EPS))
    with pytest.raises(ValueError, match="[Ii]nference"):
        pgd(made_there, *xy, EPS)
    assert all(p.requires_grad for p in made_there.parameters())


# I, R. Labels, numbers, generators

@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, np.int32, list])
def test_labels_of_any_integer_type(net, xy, dtype):
    x, y = xy
    given = y.tolist() if dtype is list else y.numpy().astype(dtype) if dtype is np.int32 else y.to(dtype)
    assert torch.equal(fgsm(net, x, given, EPS), fgsm(net, x, y, EPS))
    assert torch.equal(breaking_point(net, x, given, [EPS]), breaking_point(net, x, y, [EPS]))
    one, two = (corruptions.over_severities(net, x, labels, ["blur"], [1]) for labels in (given, y))
    assert one.equals(two)


def test_soft_and_float_labels_are_refused(net, xy):
    for labels in (nn.functional.one_hot(xy[1], 10), xy[1].float(), xy[1].bool(), xy[1][:3], xy[1] + 10, xy[1] - 5):
        for call in (lambda: fgsm(net, xy[0], labels, EPS), lambda: breaking_point(net, xy[0], labels, [EPS]),
                     lambda: masking.diagnose(net, xy[0], labels, EPS), lambda: corruptions.over_severities(net, xy[0], labels)):
            with pytest.raises(ValueError, match="labels must"):
                call()


@pytest.mark.parametrize("eps", [torch.tensor(EPS, dtype=torch.float64), np.float64(EPS), np.array(EPS)])
def test_eps_is_a_number_however_it_is_kept(net, xy, eps):
    for attack in ATTACKS.values():
        assert torch.equal(attack(net, *xy, eps), attack(net, *xy, EPS))
    assert torch.equal(breaking_point(net, *xy, [eps]), breaking_point(net, *xy, torch.tensor([EPS], dtype=torch.float64)))


@pytest.mark.parametrize("eps", ["8/255", None, torch.tensor([0.1, 0.2]), True, [0.1], 1j])
def test_eps_is_one_number(net, xy, eps):
    for attack in ATTACKS.values():
        with pytest.raises(ValueError, match="eps must be one number"):
            attack(net, *xy, eps)
    with pytest.raises(ValueError, match="one number"):
        breaking_point(net, *xy, [eps])


def test_a_generator_or_a_seed(net, xy):
    for name in ("pgd", "pgd l2", "apgd ce", "square", "auto", "noise"):
        by_seed, by_generator, other, none = (ATTACKS[name](net, *xy, EPS, generator=g) for g in (
            0, torch.Generator().manual_seed(0), 1, None))
        assert torch.equal(by_seed, by_generator) and torch.equal(by_seed, none) and not torch.equal(by_seed, other)
        for wrong in ("0", 0.5, np.random.default_rng(0), 2 ** 70):
            with pytest.raises(ValueError, match="a seed"):
                ATTACKS[name](net, *xy, EPS, generator=wrong)


def test_counts_are_whole_numbers(net, xy):
    assert torch.equal(pgd(net, *xy, EPS, steps=torch.tensor(3)), pgd(net, *xy, EPS, steps=np.int64(3)))
    for wrong in (0, -1, 2.5, "3", None, True):
        for call in (partial(pgd, steps=wrong), partial(apgd, steps=wrong), partial(square, n_queries=wrong)):
            with pytest.raises(ValueError, match="whole number"):
                call(net, *xy, EPS)
    for wrong in (0, -1, 2.5, "3"):
        for call in (partial(apgd, batch_size=wrong), partial(square, batch_size=wrong), partial(auto_attack, batch_size=wrong)):
            with pytest.raises(ValueError, match="batch_size"):
                call(net, *xy, EPS)
        with pytest.raises(ValueError, match="batch_size"):
            breaking_point(net, *xy, [EPS], batch_size=wrong)
        with pytest.raises(ValueError, match="batch_size"):
            masking.diagnose(net, *xy, EPS, batch_size=wrong)
        with pytest.raises(ValueError, match="batch_size"):
            corruptions.over_severities(net, *xy, batch_size=wrong)
    for wrong in (float("nan"), -1, float("inf"), "1"):
        with pytest.raises(ValueError, match="step_size"):
            pgd(net, *xy, EPS, step_size=wrong)


def test_defaults_of_the_process_have_no_part(net, xy):
    before = {name: attack(net, *xy, EPS) for name, attack in ATTACKS.items()}
    torch.set_default_dtype(torch.float64)
    try:
        for name, attack in ATTACKS.items():
            assert torch.equal(attack(net, *xy, EPS), before[name])
    finally:
        torch.set_default_dtype(torch.float32)


def test_corruptions_refuse_before_anything_runs(net, xy):
    calls = []
    def counted(x): return calls.append(len(x)) or net(x)
    for wrong in (dict(names=["fog"]), dict(severities=[1, 6]), dict(severities=[True]), dict(seed="one"), dict(seed=None),
                  dict(seed=torch.Generator()), dict(n_bins=0), dict(batch_size=0), dict(names=[])):
        with pytest.raises(ValueError):
            corruptions.over_severities(counted, *xy, **wrong)
    assert not calls
    assert len(corruptions.over_severities(counted, *xy, "blur", 3)) == 1


# Registered from outside

def toward_gray(model, x, y, eps):
    """Every pixel `eps` nearer to one half."""
    return x + (0.5 - x).clamp(-eps, eps)


def test_an_attack_of_ones_own_is_measured_like_any(net, xy):
    register("gray", toward_gray, words="toward gray", role="control")
    try:
        assert REGISTERED["gray"] is toward_gray and vocabulary.attack_words("gray") == "toward gray"
        assert vocabulary.ATTACKS["gray"].source == f"{__name__}:toward_gray"
        assert breaking_point(net, *xy, [0.5], REGISTERED["gray"]).isfinite().any()
    finally:
        del REGISTERED["gray"], vocabulary.ATTACKS["gray"]


@pytest.mark.parametrize("gives", [lambda x: x[:2], lambda x: None, lambda x: x + 2, lambda x: x / 0, lambda x: x.numpy()])
def test_an_attack_that_gives_no_images_is_told_so(net, xy, gives):
    with pytest.raises(ValueError, match="an attack must give images"):
        breaking_point(net, *xy, [0.1], lambda model, x, y, eps: gives(x))
