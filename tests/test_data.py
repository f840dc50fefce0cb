"""CIFAR-10 as torchvision leaves it on the disk; skipped where the data folder does not hold it."""

import numpy as np
import pytest
import torch

from repspace import data, models, regularize, train

FOLDER = data.data_root() / "cifar-10-batches-py"


@pytest.fixture(scope="module")
def cifar():
    if not FOLDER.is_dir():
        pytest.skip(f"CIFAR-10 is not in {FOLDER.parent} (REPSPACE_DATA names another folder)")
    return data.load("cifar10", download=False)


def test_cifar10_is_whole(cifar):
    assert cifar.train.images.shape == (50_000, 3, 32, 32) and cifar.test.images.shape == (10_000, 3, 32, 32)
    assert cifar.train.images.dtype == torch.uint8 and len(cifar.classes) == 10
    assert (np.bincount(cifar.test.labels) == 1000).all()
    assert np.allclose(cifar.mean, [0.4914, 0.4822, 0.4465], atol=1e-3)


def test_a_net_learns_from_a_corner_of_cifar10(cifar):
    recipe = train.Recipe(epochs=3, batch_size=50, lr=0.05, augment="crop-flip", train_images=500)
    net = train.new_classifier("resnet8", cifar, recipe, seed=0)
    history = train.fit(net, cifar, recipe, regularize.get("cutmix:1.0"), seed=0)
    assert history["loss"][-1] < history["loss"][0]
    with torch.no_grad():
        assert net(data.as_float(cifar.test.images[:8])).shape == (8, 10)
    assert models.has_batchnorm(net)


def test_missing_cifar_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="download"):
        data.load("cifar10", root=tmp_path, download=False)
