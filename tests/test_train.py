"""Training of nets and regularizers that came from outside, in every precision."""
import numpy as np
import pytest
import torch
from torch import nn

from repspace import data, models, regularize, train, vocabulary
from repspace.study.checkpoint import Checkpoint, contents

DIGITS = data.load("digits")
RECIPE = train.Recipe(epochs=2, batch_size=50, lr=0.05)


def tied(num_classes, in_channels, small_images):
    """The same Linear twice, a head that shares its weight with another layer, and a log-softmax at the end."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, num_classes, bias=False),
                        nn.Linear(num_classes, 32), nn.ReLU(), nn.Linear(32, num_classes), nn.LogSoftmax(1))
    net[6].weight = net[3].weight
    return net


def with_norm(num_classes, in_channels, small_images):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16, track_running_stats=False), nn.ReLU(),
                         nn.Linear(16, num_classes))


def other_classes(num_classes, in_channels, small_images):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


@pytest.fixture
def added():
    tables = ((vocabulary.MODELS, models._ADDED), (vocabulary.REGULARIZERS, regularize._KINDS), (vocabulary.DATA, data._ADDED))
    before = [(dict(table), dict(functions)) for table, functions in tables]
    yield
    for pair, kept in zip(tables, before):
        for there, was in zip(pair, kept):
            there.clear()
            there.update(was)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", ["none", "mixup:1.0+label-smoothing:0.1+feature-norm:0.01"])
def test_nets_of_any_precision_train(dtype, text):
    net = models.split(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10, bias=False)).to(dtype),
                       DIGITS.train.images)
    history = train.fit(net, DIGITS, RECIPE, regularize.get(text), seed=0)
    assert history["loss"][1] < history["loss"][0] and net.head.weight.dtype == dtype


def test_a_net_from_outside_trains_and_is_kept(added, tmp_path):
    models.register("tied", tied)
    def begin():
        net = train.new_classifier("tied", DIGITS, RECIPE, seed=0)
        assert net.body.checked and net.head.in_features == 32
        return net
    whole = begin()
    history = train.fit(whole, DIGITS, RECIPE, regularize.get("cutmix:1.0"), seed=0)
    file = tmp_path / "kept"
    train.fit(begin(), DIGITS, RECIPE, regularize.get("cutmix:1.0"), seed=0, checkpoint=Checkpoint(file, every=0))
    again = begin()
    assert train.fit(again, DIGITS, RECIPE, regularize.get("cutmix:1.0"), 0, checkpoint=Checkpoint(file)) == history
    assert all(torch.equal(v, contents(whole)[k]) for k, v in contents(again).items())
    flat = train.new_classifier("tied", DIGITS, RECIPE, seed=0, feature_dim=2)
    assert flat.features(DIGITS.test.images[:5]).shape == (5, 2)


def test_what_was_registered_wrongly_is_said(added):
    models.register("with-norm", with_norm)
    with pytest.raises(ValueError, match="registered with batch_norm=False, but has 1 batch norm"):
        models.build("with-norm", 10, 1)
    models.register("other", other_classes)
    with pytest.raises(ValueError, match="gives 3 logits for 10 classes"):
        models.build("other", 10, 1)
    with pytest.raises(ValueError, match="letters, digits"):
        models.register("my net", with_norm)
    for wrong in (lambda *settings: None, nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="no name that it could be found by"):
            models.register("mine", wrong)


def test_a_last_batch_of_one(added):
    models.register("with-norm", with_norm, batch_norm=True)
    for n, size in ((151, 50), (101, 100), (3, 2)):
        changed = train.Recipe(epochs=2, batch_size=size, lr=0.01, train_images=n)
        net = train.new_classifier("with-norm", DIGITS, changed, seed=0)
        assert np.isfinite(train.fit(net, DIGITS, changed, regularize.get("none"), 0)["loss"]).all()
        vocabulary.check_batches(n, size, batch_norm=True)
    for changes in (dict(batch_size=1), dict(train_images=1)):
        changed = train.Recipe(**(dict(epochs=1, batch_size=50, lr=0.1) | changes))
        with pytest.raises(ValueError, match="is 1, and must be 2 or more"):
            train.fit(net, DIGITS, changed, regularize.get("none"), 0)
    plain = train.new_classifier("tiny-cnn", DIGITS, changed, seed=0)
    train.fit(plain, DIGITS, changed, regularize.get("none"), 0)


def test_labels_of_any_integer_kind_train_alike():
    def losses(labels):
        dataset = DIGITS._replace(train=data.Split(DIGITS.train.images, labels))
        net = train.new_classifier("tiny-cnn", dataset, RECIPE, 0)
        return train.fit(net, dataset, RECIPE, regularize.get("mixup:1.0"), 0)["loss"]
    y = DIGITS.train.labels
    assert losses(y) == losses(y.int()) == losses(y.byte()) == losses(y.numpy())
    for wrong in (y.float(), y + 1, nn.functional.one_hot(y, 10), y[:-1], y.bool()):
        with pytest.raises(ValueError, match="labels must"):
            losses(wrong)


@pytest.mark.parametrize("images", [DIGITS.train.images * 255, DIGITS.train.images - .1, DIGITS.train.images * float("nan"),
                                    (DIGITS.train.images * 255).int(), DIGITS.train.images[:, 0]])
def test_images_that_are_none_are_refused(images):
    dataset = DIGITS._replace(train=data.Split(images, DIGITS.train.labels))
    with pytest.raises(ValueError, match="images of the training split must"):
        train.fit(models.build("tiny-cnn", 10, 1), dataset, RECIPE, regularize.get("none"), 0)


@pytest.mark.parametrize("text", ["label-smoothing:0.1", "mixup:1.0", "cutmix:0.5", "mixup:1+label-smoothing:0.2"])
def test_what_is_soft_already_is_softened_further(text):
    x, y = DIGITS.train.images[:20], DIGITS.train.labels[:20]
    def mix(labels): return regularize.get(text).mix(x, labels, 10, torch.Generator().manual_seed(0))
    hard = mix(y)
    for labels in (y.short(), nn.functional.one_hot(y, 10).float(), nn.functional.one_hot(y, 10).double()):
        images, targets = mix(labels)
        assert torch.equal(images, hard[0]) and torch.allclose(targets.float(), hard[1], atol=1e-7)
    soft = torch.rand(20, 10).softmax(1)
    assert torch.allclose(mix(soft)[1].sum(1), torch.ones(20), atol=1e-5)
    for wrong in (y.float(), soft * 2, soft - .2, soft[:, :9], nn.functional.one_hot(y, 10), soft * float("nan"), y + 5, y > 3):
        with pytest.raises(ValueError, match="abels must"):
            mix(wrong)


def own_data(root=None, download=True, seed=0):
    return DIGITS


def not_data(root=None, download=True, seed=0):
    return DIGITS.train


def bright(root=None, download=True, seed=0):
    return DIGITS._replace(test=data.Split(DIGITS.test.images * 255, DIGITS.test.labels))


class Pulls(regularize.Regularizer):
    recipe = {"weight_decay": 0.1}


class NoMix:
    def __init__(self, strength): pass


def test_data_and_regularizers_from_outside(added):
    natural = dict(reference=16, grid=(8, 16))
    data.register("own", own_data, words="my digits", **natural)
    assert data.load("own").classes == DIGITS.classes and vocabulary.data_words("own") == "my digits"
    assert vocabulary.DATA["own"].source == f"{__name__}:own_data"
    for name, load, why in (("none", not_data, "must be loaded as a data.Dataset"), ("bright", bright, "must lie in")):
        data.register(name, load, **natural)
        with pytest.raises(ValueError, match=why):
            data.load(name)
    for wrong in (dict(reference=4, grid=[]), dict(reference=4, grid=[8, 4]), dict(reference=3, grid=[4]), dict(grid=[4])):
        with pytest.raises(ValueError, match="grid|reference"):
            data.register("wrong", own_data, **wrong)
    with pytest.raises(ValueError, match="unknown"):
        data.load("own:path")
    regularize.register("pulls", Pulls)
    assert regularize.get("pulls+mixup:1").recipe == {"weight_decay": 0.1} and regularize.get("pulls").slug == "pulls"
    with pytest.raises(ValueError, match="override the same"):
        regularize.get("pulls+weight-decay:0.2")
    regularize.register("no-mix", NoMix)
    with pytest.raises(ValueError, match="without mix and penalty"):
        regularize.get("no-mix")


@pytest.mark.parametrize("generator", [0, "0", np.random.default_rng(0)])
def test_a_generator_that_is_none_is_refused(generator):
    x, y = DIGITS.train
    for call in (lambda: regularize.get("mixup:1.0").mix(x, y, 10, generator),
                 lambda: regularize.get("cutmix:1.0").mix(x, y, 10, generator),
                 lambda: data.augmented(x, "flip", generator), lambda: next(data.batches(DIGITS.train, 9, order=generator)),
                 lambda: next(data.batches(DIGITS.train, 9, "flip", augmentation=generator))):
        with pytest.raises(ValueError, match="must be a torch.Generator on the CPU"):
            call()


ARMS = ["none", "no-bias", "logit-scale:6", "logit-norm:6", "label-smoothing:0.1+logit-scale:6+learning-rate:0.2", "dropout:0.5+logit-norm:6"]


@pytest.mark.parametrize("name, dim", [("tiny-cnn", None), ("tiny-cnn-bn", 3), ("resnet8", None), ("mobilenet_v2", None)])
def test_arms_of_one_seed_start_from_the_same_weights(name, dim):
    states = []
    for text in ARMS:
        recipe = train.overridden(RECIPE, regularize.get(text))
        states.append(train.new_classifier(name, DIGITS, recipe, 3, dim).state_dict())
        assert ("head.bias" in states[-1]) == (text == "none")
    for state in states:
        shared = {key for key in state if not key.startswith("hold.")}
        assert shared >= set(states[0]) - {"head.bias"}
        assert all(torch.equal(state[key], states[0][key]) for key in shared)


def test_a_held_net_from_outside_loses_its_bias(added):
    models.register("with-norm", with_norm, batch_norm=True)
    recipe = train.overridden(RECIPE, regularize.get("logit-norm:6"))
    net = train.new_classifier("with-norm", DIGITS, recipe, 0)
    train.fit(net, DIGITS, RECIPE, regularize.get("logit-norm:6"), 0)
    assert net.head.bias is None
    with torch.no_grad(): logits = net(DIGITS.test.images)
    assert torch.allclose((logits - logits.mean(1, keepdim=True)).norm(dim=1), torch.tensor(6.), atol=1e-4)


def test_the_mean_scale_is_held_by_batch_statistics_as_a_peer_computes_them():
    """One step by hand: the factor of the batch, and its gradient, by autograd on a formula written out."""
    recipe = train.overridden(RECIPE, regularize.get("logit-scale:5"))
    net, peer = (train.new_classifier("tiny-cnn", DIGITS, recipe, 1) for _ in range(2))
    images, labels = DIGITS.train.images[:20], DIGITS.train.labels[:20]
    torch.nn.functional.cross_entropy(net.train()(images), labels).backward()
    z = peer.body((images - peer.mean) / peer.std)
    logits = z @ peer.head.weight.T
    mean = (logits - logits.mean(1, keepdim=True)).square().sum(1).sqrt().mean()
    torch.nn.functional.cross_entropy(logits * 5 / mean, labels).backward()
    for ours, theirs in zip(net.parameters(), peer.parameters()):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)
    assert net.hold.mean.item() == pytest.approx(mean.item(), rel=1e-5) and net.hold.batches.item() == 1
    assert torch.allclose(net.eval()(images), logits * 5 / mean, atol=1e-5)


def test_a_held_training_goes_on_from_its_checkpoint_to_the_same_net(tmp_path):
    regularizer = regularize.get("mixup:1.0+logit-scale:6")
    recipe = train.overridden(RECIPE, regularizer)
    whole, part = (train.new_classifier("tiny-cnn-bn", DIGITS, recipe, 0) for _ in range(2))
    history = train.fit(whole, DIGITS, RECIPE, regularizer, 0)

    class Stop(Checkpoint):
        def keep(self, *args):
            super().keep(*args)
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        train.fit(part, DIGITS, RECIPE, regularizer, 0, checkpoint=Stop(tmp_path / "kept", every=0))
    again = train.new_classifier("tiny-cnn-bn", DIGITS, recipe, 0)
    assert train.fit(again, DIGITS, RECIPE, regularizer, 0, checkpoint=Checkpoint(tmp_path / "kept")) == history
    assert {k: v.tolist() for k, v in contents(again).items()} == {k: v.tolist() for k, v in contents(whole).items()}
    assert again.hold.batches.item() == 8


def test_held_nets_train_in_bf16_and_hold_in_float32():
    recipe = train.overridden(RECIPE, regularize.get("logit-norm:6"))
    net = train.new_classifier("tiny-cnn-bn", DIGITS, recipe, 0)
    with torch.autocast("cpu", torch.bfloat16):
        z = net.features(DIGITS.train.images)
    assert z.dtype == torch.float32
    assert torch.allclose(models.centered_norms(z, net.head.weight), torch.tensor(6.), atol=1e-4)


def test_own_subsets_are_of_the_seed_alone_and_disturb_no_other_draw():
    labels = torch.arange(1000) % 10
    split = data.Split(torch.arange(1000.)[:, None, None, None] / 1000, labels)
    own = train.Recipe(1, 50, .1, train_images=105, subset="own")
    drawn = [train.training_split(split, own, seed) for seed in (5, 5, 6)]
    assert torch.equal(drawn[0].images, drawn[1].images) and not torch.equal(drawn[0].images, drawn[2].images)
    counts = drawn[0].labels.bincount()
    assert len(drawn[0].labels) == 105 and set(counts.tolist()) == {10, 11}
    assert torch.equal(train.training_split(drawn[0], own, 5).images, drawn[0].images), "a subset already drawn stays"
    first = train.training_split(split, train.Recipe(1, 50, .1, train_images=105), 5)
    assert torch.equal(first.images.flatten(), torch.arange(105.) / 1000)
    words = {name: torch.rand((), generator=train.stream(0, name)).item() for name in train.STREAMS}
    assert train.STREAMS[:6] == ("init", "order", "augmentation", "mixing", "dropout", "attack") and len(set(words.values())) == 7
