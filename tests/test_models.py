"""Nets of every make against `models.split`: one function in two parts, or a reason."""
import copy
import threading
from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models as tv

from repspace import models

X = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
K, D = 5, 16


def flat(width=D):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, width), nn.Tanh())


class Net(nn.Module):
    """`forward(self, z)` of a subclass turns the vectors (N, D) into what it gives."""

    def __init__(self):
        super().__init__()
        self.body, self.fc = flat(), nn.Linear(D, K)
        self.more()

    def more(self): pass

    def last(self, z): return self.fc(z)

    def forward(self, x): return self.last(self.body(x))


def net(last, more=lambda self: None, name="Mine"):
    torch.manual_seed(1)
    return type(name, (Net,), {"last": last, "more": more})()


Output = namedtuple("Output", "logits aux")


class ModelOutput(OrderedDict):
    """As transformers have it: a mapping, and attributes."""
    __getattr__ = OrderedDict.__getitem__


def two(self): self.dist, self.norm = nn.Linear(D, K), nn.LayerNorm(D)


def crossvit(self): self.heads = nn.ModuleList([nn.Linear(D, K), nn.Linear(D // 2, K), nn.Linear(D, K)])


def lora(self): self.down, self.up = nn.Linear(D, 2, bias=False), nn.Linear(2, K, bias=False)


def unlucky(self): self.late, self.attention = nn.Linear(D, D), nn.MultiheadAttention(D, 2, batch_first=True)


GOOD = {  # name: (net, whether what it gives are the logits themselves; else up to a constant)
    "plain": net(lambda s, z: s.fc(z)),
    "log-softmax": net(lambda s, z: s.fc(z).log_softmax(1)),
    "scaled": net(lambda s, z: s.fc(z) * s.scale, lambda s: s.register_parameter("scale", nn.Parameter(torch.tensor(7.3)))),
    "scaled in place": net(lambda s, z: s.fc(z).mul_(3)),
    "vectors changed afterwards": net(lambda s, z: (s.fc(z), z.mul_(0))[0]),
    "tuple": net(lambda s, z: (s.fc(z), z)),
    "features first": net(lambda s, z: (z, s.fc(z))),
    "namedtuple": net(lambda s, z: Output(s.fc(z), s.aux(z)), lambda s: setattr(s, "aux", nn.Linear(D, K))),
    "dict": net(lambda s, z: {"features": z, "logits": s.fc(z)}),
    "dict without the word": net(lambda s, z: {"out": s.fc(z)}),
    "hugging face": net(lambda s, z: ModelOutput(loss=z.sum(), logits=s.fc(z), hidden_states=(z, z))),
    "object": net(lambda s, z: SimpleNamespace(logits=s.fc(z))),
    "DeiT distilled": net(lambda s, z: (s.fc(z), s.dist(s.norm(z))) if s.training else (s.fc(z) + s.dist(s.norm(z))) / 2, two),
    "sum of heads": net(lambda s, z: s.fc(z) + s.dist(z * z), two),
    "weighted heads": net(lambda s, z: .3 * s.fc(z) + .7 * s.dist(z * z), two),
    "CrossViT": net(lambda s, z: torch.stack([s.heads[0](z), s.heads[1](z[:, ::2]), s.heads[2](z * z)]).mean(0), crossvit),
    "LoRA": net(lambda s, z: s.fc(z) + 2 * s.up(s.down(z)), lora),
    "head twice": net(lambda s, z: (s.fc(z) + s.fc(z * z)) / 2),
    "head twice, last counts": net(lambda s, z: (s.fc(z * z), s.fc(z))[1]),
    "head twice, first counts": net(lambda s, z: (s.fc(z), s.fc(z * z))[0]),
    "bias later": net(lambda s, z: s.fc(z) + s.prior, lambda s: s.register_buffer("prior", torch.arange(5.))),
    "one token": net(lambda s, z: s.fc(z[:, None])[:, 0]),
    "by keyword": net(lambda s, z: s.fc(input=z)),
    "unlucky order": net(lambda s, z: s.fc(s.attention(*[s.late(z)[:, None]] * 3)[0][:, 0]), unlucky),
    "asks its head": net(lambda s, z: s.fc(z.to(s.fc.weight.dtype))[:, :s.fc.out_features]),
    "dropout after": net(lambda s, z: nn.functional.dropout(s.fc(z), .5, s.training)),
    "no bias": net(lambda s, z: s.fc(z), lambda s: setattr(s, "fc", nn.Linear(D, K, bias=False))),
    "zero head": net(lambda s, z: s.fc(z), lambda s: (nn.init.zeros_(s.fc.weight), nn.init.zeros_(s.fc.bias))),
    "under two names": net(lambda s, z: s.again(z), lambda s: setattr(s, "again", s.fc)),
    "parametrized": net(lambda s, z: s.fc(z), lambda s: nn.utils.parametrizations.weight_norm(s.fc)),
    "weight norm of old": net(lambda s, z: s.fc(z), lambda s: nn.utils.weight_norm(s.fc)),
    "spectral": net(lambda s, z: s.fc(z), lambda s: nn.utils.parametrizations.spectral_norm(s.fc)),
    "remembers": net(lambda s, z: s.fc(s.memory.setdefault("z", z) * 0 + z), lambda s: setattr(s, "memory", {})),
    "a Linear alone": nn.Sequential(nn.Flatten(), nn.Linear(192, K)),
    "data parallel": nn.DataParallel(net(lambda s, z: s.fc(z))),
    "data parallel inside": nn.Sequential(nn.Identity(), nn.DataParallel(net(lambda s, z: s.fc(z)))),
    "average of weights": torch.optim.swa_utils.AveragedModel(net(lambda s, z: s.fc(z))),
    "a Classifier": models.build("tiny-cnn", K, mean=(.4, .5, .6), std=(.2, .2, .3)),
    "normalizes in place": nn.Sequential(type("N", (nn.Module,), {"forward": lambda s, x: x.sub_(.5).div_(.2)})(), flat(K)[:-1]),
}


def logits_of(output):
    for part in (getattr(output, "logits", None), output):
        if torch.is_tensor(part): return part
    if isinstance(output, dict): return output.get("logits", output.get("out"))
    return next(t for t in output if t.shape[1] == K)


@pytest.mark.parametrize("name", GOOD)
def test_the_function_stays_the_same(name):
    module, before = GOOD[name].eval(), copy.deepcopy(X)
    module(X.clone())                     # some remember
    classifier = models.split(module, images=X).eval()
    with torch.no_grad():
        wanted, ours = logits_of(module(X.clone())), classifier(X)
        z = classifier.features(X)
    assert torch.equal(X, before)
    assert torch.equal(ours, classifier.head(z)) and z.shape == (12, classifier.head.in_features)
    assert torch.allclose(ours.softmax(1), wanted.softmax(1), atol=1e-6)
    assert torch.allclose(ours, wanted, atol=1e-4) or name == "log-softmax"
    # it trains, and is saved and loaded
    if name != "vectors changed afterwards":   # which PyTorch cannot differentiate
        classifier.train()(X).logsumexp(1).sum().backward()
    assert classifier.head.weight.requires_grad
    state = classifier.state_dict()
    copied = copy.deepcopy(classifier.requires_grad_(True)) if name not in ("weight norm of old", "remembers") else classifier
    copied.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(copied.eval()(X), ours) or name == "spectral"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["plain", "DeiT distilled", "no bias", "log-softmax", "bias later"])
def test_nets_of_any_precision(name, dtype):
    module = copy.deepcopy(GOOD[name]).eval().to(dtype)
    for classifier in (models.split(module, X, mean=np.array([.5, .5, .5]), std=(.2, .2, .2)).eval(),
                       models.split(GOOD[name].eval(), X, torch.full((3,), .5), [.2] * 3).eval().to(dtype)):
        with torch.no_grad():
            wanted = module(((X - .5) / .2).to(dtype))
            for images in (X, X.double(), X.to(torch.bfloat16) if dtype == torch.bfloat16 else X):
                ours = classifier(images)
                assert ours.dtype == dtype
                assert torch.allclose(ours.double().softmax(1), wanted.double().softmax(1), atol=.03)


BAD = {
    "softmax": (net(lambda s, z: s.fc(z).softmax(1)), "'fc' gives.*leave the softmax out"),
    "not linear": (net(lambda s, z: s.fc(z).tanh()), "'fc' gives.*differs from the logits by up to"),
    "scale of its own": (net(lambda s, z: s.fc(z) * z.norm(dim=1, keepdim=True)), "'fc' gives.*differs"),
    "cosine": (net(lambda s, z: nn.functional.linear(z / z.norm(dim=1, keepdim=True), s.fc.weight)), "differs"),
    "no logits": (net(lambda s, z: {"z": s.fc(z)[:, :, None]}), "none of them logits"),
    "text": (net(lambda s, z: str(s.fc(z))), "gives a str"),
    "one output": (net(lambda s, z: s.fc(z)[:, :1]), "none of them logits"),
    "1x1 convolution": (nn.Sequential(nn.Conv2d(3, K, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "no Linear inside.*convolution 0"),
    "convolution after": (nn.Sequential(flat(), nn.Unflatten(1, (D, 1, 1)), nn.Conv2d(D, K, 1), nn.Flatten()), "'0.1' gives.*in shape"),
    "random": (net(lambda s, z: s.fc(nn.functional.dropout(z, .5))), "two answers to the same images"),
    "lazy": (nn.Sequential(nn.Flatten(), nn.LazyLinear(K)), "let it run once"),
    "nan": (net(lambda s, z: s.fc(z) * float("nan")), "not finite"),
    "lock": (net(lambda s, z: s.fc(z), lambda s: setattr(s, "lock", threading.Lock())), "cannot be copied"),
    "a function": (lambda x: x.flatten(1), "only a torch.nn.Module can be split, not a function"),
    "script": (torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(192, K))), "TorchScript"),
    "per patch": (net(lambda s, z: s.fc(torch.stack([z, z * z], 1)).amax(1)), "differs|no head"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_linear_is_refused_with_the_reason(name):
    module, reason = BAD[name]
    if isinstance(module, nn.Module): module.eval()
    with pytest.raises(ValueError, match=reason):
        models.split(module, images=X)


@pytest.mark.parametrize("name", [n for n in GOOD if n not in ("normalizes in place",)])
def test_without_images_it_is_right_or_refused_at_the_first_forward(name):
    module = GOOD[name].eval()
    classifier = models.split(module).train()
    try:
        classifier(X)
    except ValueError as error:
        assert "head" in str(error) and "'" in str(error) or "head:" in str(error)
        return
    with torch.no_grad():
        ours, wanted = classifier.eval()(X), logits_of(module(X.clone()))
    assert torch.allclose(ours.softmax(1), wanted.softmax(1), atol=1e-6)


def test_the_module_that_is_split_is_left_alone():
    module = GOOD["plain"].train()
    modes, weights = [p.training for p in module.modules()], copy.deepcopy(module.state_dict())
    for images in (None, X):
        classifier = models.split(module, images)
        classifier.head.weight.data.zero_()
        assert classifier.training and not any(p._forward_hooks for p in module.modules())
    assert modes == [p.training for p in module.modules()]
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in weights.items())


def test_googlenet_in_training_mode():
    module = tv.googlenet(weights=None, num_classes=K, init_weights=False)
    images = torch.rand(2, 3, 64, 64)
    classifier = models.split(module, images)
    with torch.no_grad():
        assert torch.allclose(classifier.eval()(images), module.eval()(images), atol=1e-5)
    assert classifier.train()(images).shape == (2, K)


@pytest.mark.parametrize("name", ["tiny-cnn", "tiny-cnn-bn"])
def test_a_built_in_net_split_again_is_itself(name):
    module = models.build(name, 10, mean=(.4, .5, .6), std=(.2, .2, .3)).eval()
    with torch.no_grad():
        assert torch.equal(models.split(module, X).eval()(X), module(X))


def test_a_compiled_net_and_a_net_to_be_compiled():
    module = GOOD["plain"].eval()
    compiled = torch.compile(module, backend="eager")
    classifier = models.split(compiled, X).eval()
    with torch.no_grad():
        assert torch.equal(classifier(X), module(X))
        features = torch.compile(classifier.features, backend="eager")
        assert torch.equal(features(X), module.body(X)) and torch.equal(features(X), module.body(X))


def test_bytes_and_wrong_images_are_refused():
    classifier = models.split(GOOD["plain"], X)
    with pytest.raises(ValueError, match="data.as_float"):
        classifier((X * 255).byte())
    with pytest.raises(ValueError, match="std positive"):
        models.split(GOOD["plain"], X, mean=(0, 0, 0), std=(1, 0, 1))
    assert models.split(GOOD["plain"], (X * 255).byte()).head.out_features == K
    assert not models.has_batchnorm(lambda x: x)
    with pytest.raises(ValueError, match="no batch normalization"):
        models.reestimate_batchnorm(classifier, X)
