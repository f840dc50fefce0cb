"""Images per second in training, against the loop that a user would write."""
import copy
import os
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

from repspace import data, regularize, train

from .batches import PLAIN
from .race import race, row, torch_profile
from .sample import Samples, images

MIXED = v2.MixUp, "mixup:1.0"


def loader_of(split, recipe, workers, device):
    """The DataLoader that a user would write; its workers stay, so that only the warm-up pays for starting them."""
    return DataLoader(Samples(split, PLAIN), recipe.batch_size, shuffle=True, num_workers=workers,
                      pin_memory=device == "cuda", persistent_workers=workers > 0)


def plain(net, loader, classes, recipe, autocast=False):
    """Train `net` with a DataLoader, torchvision's transforms and v2.MixUp; returns the last epoch's mean loss."""
    device, mix = net.mean.device, MIXED[0](num_classes=classes, alpha=1.0)
    optimizer = torch.optim.SGD(net.parameters(), recipe.lr, recipe.momentum)
    steps = recipe.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, steps, cycle_momentum=False)
    net.train()
    for _ in range(recipe.epochs):
        total = 0
        for x, y in loader:
            x, y = mix(x.to(device, non_blocking=True), y.to(device, non_blocking=True))
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(y)
    return float(total / len(loader.dataset))


def flops_per_image(net, x):
    """Floating-point operations of one image, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        net(x).sum().backward()
    net.zero_grad()
    return counter.get_total_flops() / len(x)


def matmul_rate(device, dtype, n, repeats=5):
    """FLOP/s of an n×n matrix product: the ceiling that this machine has just now."""
    a, times = torch.randn(n, n, device=device).to(dtype), 20 if device == "cuda" else 1
    seconds, _, _ = race({"ours": lambda: [a @ a for _ in range(times)] and None}, repeats)
    return times * 2 * n**3 / min(seconds["ours"])


@contextmanager
def threads(n):
    """`n` threads, and afterwards as many as before; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def sides_of(model, recipe, peers, device, dataset):
    """name → function that trains a copy of one untrained net on, and returns the last epoch's loss."""
    start = train.new_classifier(model, dataset, recipe, seed=0).to(device)
    split, classes = data.first(dataset.train, recipe.train_images), len(dataset.classes)
    on_device = dataset.to(device)
    mine = regularize.get(MIXED[1])
    sides = {"ours": lambda: train.fit(start, on_device, recipe, mine, seed=0)["loss"][-1]}
    for name, (workers, autocast) in peers.items():
        net = copy.deepcopy(start).to(memory_format=torch.contiguous_format)
        sides[name] = partial(plain, net, loader_of(split, recipe, workers, device), classes, recipe, autocast)
    return sides, flops_per_image(copy.deepcopy(start), data.as_float(split.images[:8]).to(device))


def training(model, recipe, peers, target, repeats, device="cpu", thread_counts=(None,), n=2048):
    """Rows for `peers`: name → (workers of the DataLoader, whether under autocast)."""
    dataset, name = images()
    for count in thread_counts:
        with threads(count):
            sides, flops = sides_of(model, recipe, peers, device, dataset)
            seconds, losses, memory = race(sides, repeats)
            amount = recipe.epochs * recipe.train_images
            achieved = flops * amount / min(seconds["ours"])
            ceiling = matmul_rate(device, torch.bfloat16, n)
            what = f"training {model}" + f", threads: {torch.get_num_threads()}" * (device == "cpu")
            for peer in peers:
                agree = abs(losses["ours"] / losses[peer] - 1) < 0.1
                yield row(what, seconds, peer, amount, agree, f"loss {losses['ours']:.2f} and {losses[peer]:.2f}", target,
                          memory, partial(torch_profile, sides["ours"]), data=name, device=device,
                          recipe=recipe.to_dict(), flops_per_image=flops, flops_per_s=achieved, bf16_ceiling=ceiling,
                          ceiling_share=achieved / ceiling)


def on_cpu(train_images=1024, epochs=3, repeats=2, thread_counts=(None, 1), n=2048):
    """resnet8 in bf16 and channels_last, against float32."""
    recipe = train.Recipe(epochs, 128, lr=0.1, augment="crop-flip", train_images=train_images, precision="bf16")
    peers = {f"DataLoader ({n} workers), v2, float32": (n, False) for n in (0, 2)}
    yield from training("resnet8", recipe, peers, 1.5, repeats, "cpu", thread_counts, n)


def on_gpu(train_images=25_600, epochs=2, repeats=2):
    """ResNet-18 in bf16, against float32 and autocast; not compiled, as the study cifar10 trains it."""
    recipe = train.Recipe(epochs, 512, lr=0.1, augment="crop-flip", train_images=train_images, precision="bf16")
    workers = min(8, os.cpu_count())
    peers = {f"DataLoader ({workers} workers), v2, {precision}": (workers, precision != "float32")
             for precision in ("float32", "bf16 autocast")}
    yield from training("resnet18", recipe, peers, 3, repeats, "cuda", n=8192)
