"""CIFAR-10 as torchvision leaves it on the disk, skipped where the data folder does not hold it; and folders of images
as people have them."""
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

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


# A folder of images

def png16(color, values):
    """A PNG of 3 by 2 pixels with 16 bits per value, as Pillow cannot write it."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    rows = b"".join(b"\0" + os.urandom(6 * values) for _ in range(2))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 2, 16, color, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.fixture
def folder(tmp_path):
    """Two classes, an image each for training and testing."""
    for part in ("train", "test"):
        for k, name in enumerate("ab"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (3, 2), (k, 100 + k, 200 + k)).save(tmp_path / part / name / "1.png")
    return tmp_path


def test_a_folder_is_what_torchvision_makes_of_it(folder):
    import torchvision
    (folder / "train" / "b" / "more").mkdir()
    for name, suffix in (("2", "PNG"), ("more/3", "bmp"), ("0", "tiff"), ("x", "webp")):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (2, 3, 3), np.uint8)).save(
            folder / "train" / "b" / f"{name}.{suffix}", lossless=True)
    ours, theirs = data.load(f"folder:{folder}"), torchvision.datasets.ImageFolder(folder / "train")
    assert ours.classes == tuple(theirs.classes) and ours.train.labels.tolist() == theirs.targets
    for image, (path, _) in zip(ours.train.images, theirs.samples):
        assert np.array_equal(image.permute(1, 2, 0), np.array(theirs.loader(path)))


def test_what_is_hidden_is_neither_a_class_nor_an_image(folder):
    before = data.load(f"folder:{folder}")
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    for place in (folder / "train", folder / "train" / "a", folder / "train" / ".ipynb_checkpoints"):
        (place / "._1.png").write_bytes(b"of a Mac")
        (place / ".DS_Store").write_bytes(b"of a Mac")
    (folder / "train" / "a" / ".old").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "train" / "a" / ".old" / "1.png")
    (folder / "train" / "a" / "Thumbs.db").write_bytes(b"of a PC")
    (folder / "train" / "README.md").write_text("what this is")
    after = data.load(f"folder:{folder}")
    assert torch.equal(before.train.images, after.train.images) and before.classes == after.classes


REFUSED = {
    "16 bits, grey": ("2.png", png16(0, 1), "more than 8 bits"),
    "16 bits, colour": ("2.png", png16(2, 3), "more than 8 bits"),
    "16 bits, alpha": ("2.png", png16(6, 4), "more than 8 bits"),
    "16 bits, PPM": ("2.ppm", b"P6 3 2 65535\n" + bytes(36), "more than 8 bits"),
    "floats": ("2.tif", Image.new("F", (3, 2), .5), "more than 8 bits"),
    "32 bits": ("2.tif", Image.new("I", (3, 2), 70000), "more than 8 bits"),
    "transparent": ("2.png", Image.new("RGBA", (3, 2), (1, 2, 3, 254)), "transparent in places"),
    "grey, transparent": ("2.png", Image.new("LA", (3, 2), (1, 0)), "transparent in places"),
    "printer's colours": ("2.jpg", Image.new("CMYK", (3, 2)), "its mode is CMYK"),
    "no image": ("2.png", b"text", "2.png is damaged or no image"),
    "empty": ("2.png", b"", "2.png is damaged or no image"),
    "cut off": ("2.png", png16(2, 3)[:40], "2.png"),
    "GIF": ("2.gif", b"GIF89a", "2.gif is of a format that is not read here"),
    "JPEG 2000": ("2.jp2", b"", "2.jp2 is of a format that is not read here"),
    "outside": ("../2.png", Image.new("RGB", (3, 2)), "outside of the classes' folders, as 2.png"),
    "another size": ("2.png", Image.new("RGB", (2, 3)), "resize them first"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_lose_values_is_refused_by_name(folder, kind):
    name, content, why = REFUSED[kind]
    path = folder / "train" / "a" / name
    path.write_bytes(content) if isinstance(content, bytes) else content.save(path)
    with pytest.raises(ValueError, match=why):
        data.load(f"folder:{folder}")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
def test_what_loses_nothing_is_read(folder, mode):
    grey = Image.fromarray(np.uint8([[0, 255, 0], [255, 0, 255]]))
    grey.convert(mode).save(folder / "train" / "a" / "2.png")
    image = data.load(f"folder:{folder}").train.images[1]
    assert np.array_equal(image, np.array(grey)[None].repeat(3, 0))


def test_several_pictures_in_a_file_are_refused_and_the_side_that_is_up_is_followed(folder):
    first = Image.fromarray(np.uint8([[0, 255, 0], [255, 0, 9]]))
    for name in ("2.png", "2.tif", "2.webp"):
        path = folder / "train" / "a" / name
        first.convert("RGB").save(path, save_all=True, append_images=[Image.new("RGB", (3, 2))])
        with pytest.raises(ValueError, match=f"{name}: it holds 2 pictures"):
            data.load(f"folder:{folder}")
        path.unlink()
    exif = Image.Exif()
    exif[0x0112] = 3                      # upside down
    first.save(folder / "train" / "a" / "2.png", exif=exif)
    assert np.array_equal(data.load(f"folder:{folder}").train.images[1, 0], np.array(first)[::-1, ::-1])


def test_classes_that_differ_or_are_empty_are_named(folder):
    (folder / "test" / "c").mkdir()
    with pytest.raises(ValueError, match="test/c has no images"):
        data.load(f"folder:{folder}")
    Image.new("RGB", (3, 2)).save(folder / "test" / "c" / "1.png")
    with pytest.raises(ValueError, match=r"\['c'\] only there"):
        data.load(f"folder:{folder}")
    for part in ("train", "test"):
        for name in "bc":
            for path in (folder / part / name).glob("*"): path.unlink()
            if (folder / part / name).is_dir(): (folder / part / name).rmdir()
    with pytest.raises(ValueError, match="two or more"):
        data.load(f"folder:{folder}")


def test_first_classes_are_those_of_the_whole_set(tmp_path):
    whole, few = data.load("digits", seed=3), data.load("digits:2", seed=3)
    for split, of_whole in zip((few.train, few.test), (whole.train, whole.test)):
        assert torch.equal(split.images, of_whole.images[of_whole.labels < 2])
        assert set(split.labels.tolist()) == {0, 1}
    assert few.mean == (few.train.images.double().mean().item(),) and few.classes == ("0", "1")
