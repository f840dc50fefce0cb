"""Images per second, cropped, flipped and mixed: whole batches, against DataLoader and torchvision's transforms."""
from functools import partial
from importlib.metadata import version

import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from repspace import data, regularize

from .race import race, row, torch_profile
from .sample import Samples, images

PEER = f"torchvision {version('torchvision')}"
PLAIN = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)])


def crops_agree(x, y):
    """Whether our crops and flips are those of torchvision's functions at the same offsets."""
    draws = torch.Generator().manual_seed(0)
    offsets, mirrored = torch.randint(9, (len(x), 2), generator=draws), torch.rand(len(x), generator=draws) < 0.5
    ours = data.flip(data.crop(x, offsets, pad=4), mirrored)
    padded = v2.functional.pad(x, [4])
    theirs = [v2.functional.crop(image, *offset, 32, 32) for image, offset in zip(padded, offsets.tolist())]
    theirs = [v2.functional.hflip(image) if flipped else image for image, flipped in zip(theirs, mirrored)]
    return torch.equal(ours, torch.stack(theirs))


def through(batches):
    """How many images `batches` are."""
    return sum(len(labels) for _, labels in batches)


def augmented(count=8192, sizes=(128, 512), workers=(0, 2), repeats=3):
    """uint8 images, cropped at random after padding by 4 and flipped, to float batches."""
    dataset, name = images()
    split = data.Split(*(part[:count] for part in dataset.train))
    for size in sizes:
        draws = torch.Generator().manual_seed(0)
        sides = {"ours": lambda: through(data.batches(split, size, "crop-flip", draws, draws))}
        for n in workers:
            loader = DataLoader(Samples(split, PLAIN), size, shuffle=True, num_workers=n, persistent_workers=n > 0)
            sides[f"DataLoader, {n} workers"] = partial(through, loader)
        seconds, _, memory = race(sides, repeats)
        for peer in list(sides)[1:]:
            yield row(f"crop and flip, batches of {size}", seconds, peer, count, crops_agree(*(t[:64] for t in split)),
                      "same crops and flips from the same offsets", 1, memory, partial(torch_profile, sides["ours"]),
                      data=name, device="cpu")


def mixes_agree(kind, x, y, classes):
    """Whether both sides mix alike when they draw alike."""
    peer = kind(num_classes=classes)
    if kind is v2.MixUp:
        peer.make_params = lambda _: {"lam": 0.3}
        mixed, share = regularize.mixup(x, 0.3), 0.3
    else:
        peer.make_params = lambda _: {"box": (4, 8, 20, 24), "lam_adjusted": 1 - 16 * 16 / 1024}
        mixed, share = regularize.cutmix(x, 0.75, row=16, column=12)
    theirs = peer(x, y)
    return torch.allclose(mixed, theirs[0], atol=1e-6) and \
        torch.allclose(regularize.mix_targets(y, classes, share), theirs[1], atol=1e-6)


def mixed(batches=64, sizes=(128, 512), repeats=5):
    """Mixup and CutMix of float batches, with the soft targets."""
    dataset, name = images()
    classes = len(dataset.classes)
    for size in sizes:
        x, y = data.as_float(dataset.train.images[:size]), dataset.train.labels[:size]
        for kind, text in ((v2.MixUp, "mixup:1.0"), (v2.CutMix, "cutmix:1.0")):
            draws, ours, theirs = torch.Generator().manual_seed(0), regularize.get(text), kind(num_classes=classes)
            sides = {"ours": lambda: [ours.mix(x, y, classes, draws) for _ in range(batches)] and None,
                     f"v2.{kind.__name__}": lambda: [theirs(x, y) for _ in range(batches)] and None}
            seconds, _, memory = race(sides, repeats)
            yield row(f"{kind.__name__}, batches of {size}", seconds, f"v2.{kind.__name__}", batches * size,
                      mixes_agree(kind, x, y, classes), "same images and targets from the same draws", 1, memory,
                      partial(torch_profile, sides["ours"]), data=name, device="cpu", torchvision=PEER)
