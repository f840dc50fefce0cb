"""One toy of each kind, added to the package from outside: what a user's own module looks like."""
import numpy as np
import torch
from torch import nn

from repspace import attacks, claims, data, figures, measure, models, regularize, stats, vocabulary


class Blur(regularize.Regularizer):
    """Images mixed with their mean; the strength is the share of it."""
    def mix(self, images, labels, num_classes, generator):
        return torch.lerp(images, images.mean((2, 3), keepdim=True), self.strength), labels


def two_blobs(root=None, download=True, seed=0):
    """Bright and dark 8×8 images with noise, 60 to train and 60 to test."""
    draw = torch.Generator().manual_seed(seed)
    def split():
        labels = torch.arange(60) % 3
        images = (labels[:, None, None, None] / 3 + 0.3 * torch.rand(60, 1, 8, 8, generator=draw)).clamp(0, 1)
        return data.Split(images, labels)
    train = split()
    return data.Dataset(train, split(), ("dark", "grey", "bright"), *data.channel_statistics(train.images))


def pooled(num_classes, in_channels, small_images):
    """A hidden layer on the pixels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, 16), nn.ReLU(), nn.Linear(16, num_classes))


def darken(model, x, y, eps):
    """All pixels darker by `eps`."""
    return (x - eps).clamp(0, 1)


def longest(seen, context):
    """The norm of the longest vector."""
    return measure.Values({"longest": float(np.linalg.norm(seen.test.features, axis=1).max())})


shorter = claims.Claim(
    "longest-shorter", "The longest vector is shorter with regularization.", "a user's own idea", "length",
    claims.Measure("longest", "relative change of the longest vector", "change", "longest",
                    stats.region(-0.05, 0.05, "below"), "As for all vectors.", unit="%"))


def drawn(recorded):
    """A bar for each run: its longest vector."""
    fig, axes = figures.canvas.subplots(1, 1)
    runs = recorded.runs
    axes[0, 0].bar(range(len(runs)), runs["longest"], color=[vocabulary.regularizer_style(r)["color"] for r in runs["regularizer"]])
    return figures.Figure(fig, "The longest vector of each run.", "A bar for each run.")


def register():
    regularize.register("blur", Blur, words="blurring", color="#999933", strength=vocabulary.Strength(0, 1))
    data.register("two-blobs", two_blobs, words="two blobs", reference=16, grid=(8, 16, 32), min_seeds=2,
                  published=20, attack_images=None, split_by_seed=True)
    models.register("pooled", pooled, words="pooled pixels")
    attacks.register("darken", darken, words="darkening")
    measure.register(longest)
    claims.register(shorter)
    figures.register("longest", drawn, claim="longest-shorter")


register()
