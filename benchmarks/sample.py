"""Images of CIFAR's size for those benchmarks that need some: CIFAR-10 where it lies here, else digits enlarged."""
import functools

import torch
import torch.nn.functional as F

from repspace import data


@functools.cache
def images():
    """A Dataset of uint8 images (N, 3, 32, 32), and its name."""
    try:
        return data.load("cifar10", download=False), "CIFAR-10"
    except ValueError:
        digits = data.load("digits")
    def enlarged(split, times):
        x = F.interpolate(split.images, 32).mul(255).byte()
        return data.Split(x.repeat(times, 3, 1, 1), split.labels.repeat(times))
    train, test = enlarged(digits.test, 8), enlarged(digits.train, 5)  # the larger part is for training here
    return data.Dataset(train, test, digits.classes, *data.channel_statistics(train.images)), "digits, enlarged"


class Samples(torch.utils.data.Dataset):
    """A Split as a Dataset of PyTorch, with a transform for each image."""

    def __init__(self, split, transform):
        self.split, self.transform = split, transform

    def __len__(self):
        return len(self.split.labels)

    def __getitem__(self, i):
        return self.transform(self.split.images[i]), self.split.labels[i]
