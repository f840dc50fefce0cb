"""Robust accuracy, against torchattacks: only what still stands is attacked on."""
import functools
from functools import partial

import torch
import torchattacks

from repspace import attacks, data, regularize, train
from repspace.autoattack import auto_attack

from .race import race, row, torch_profile
from .sample import images

PEER = f"torchattacks {torchattacks.__version__}"


@functools.cache
def victim(count, train_images, device):
    """A resnet8 after four epochs, `count` test images with labels, and an ε that about half of the right ones survive."""
    dataset, name = images()
    recipe = train.Recipe(epochs=4, batch_size=64, lr=0.1, augment="flip", train_images=train_images, precision="bf16")
    net = train.new_classifier("resnet8", dataset, recipe, seed=0).to(device)
    train.fit(net, dataset, recipe, regularize.get("none"), seed=0)
    x, y = data.as_float(dataset.test.images[:count]).to(device), dataset.test.labels[:count].to(device)
    grid = [2 ** (n / 2) / 255 for n in range(-4, 9)]
    breaks = attacks.breaking_point(net, x[:100], y[:100], grid, partial(attacks.pgd, steps=5))
    left = [(breaks[breaks > 0] > eps).double().mean() for eps in grid]
    return net, x, y, grid[min(range(len(grid)), key=lambda i: abs(left[i] - 0.5))], name


def standing(net, x, y):
    with torch.no_grad():
        return net(x).argmax(1) == y


def counted(net, side, passes):
    """`side`, which now also puts into `passes` how many images went through `net`: forward, and with a gradient."""
    def count(_, inputs):
        passes[0] += len(inputs[0])
        passes[1] += len(inputs[0]) * inputs[0].requires_grad

    def run():
        passes[:] = 0, 0
        hook = net.register_forward_pre_hook(count)
        try:
            return side()
        finally:
            hook.remove()
    return run


def compared(what, sides, repeats, victim, **more):
    """Rows for `sides`, functions that return which images (N,) still stand."""
    net, x, y, eps, name = victim
    passes = {side: [0, 0] for side in sides}
    seconds, stands, memory = race({side: counted(net, run, passes[side]) for side, run in sides.items()}, repeats)
    share = {side: kept.double().mean().item() for side, kept in stands.items()}
    clean = standing(net, x, y).double().mean().item()
    for peer in [side for side in sides if side != "ours"]:
        agree = abs(share["ours"] - share[peer]) <= 0.01 + 1e-9
        yield row(f"{what}, {len(y)} images", seconds, peer, None, agree,
                  f"robust accuracy {share['ours']:.1%} and {share[peer]:.1%}, clean {clean:.1%}", 2 if peer == PEER else 1, memory,
                  partial(torch_profile, sides["ours"]), data=name, eps_255=eps * 255, device=x.device.type,
                  passes={"ours": list(passes["ours"]), "theirs": list(passes[peer])}, **more)


def pgd(device="cpu", count=400, steps=20, train_images=8000, repeats=3):
    """Robust accuracy by PGD with a random start and steps of ε/4, the same start on both sides."""
    net, x, y, eps, _ = found = victim(count, train_images, device)

    def ours():
        attack = partial(attacks.pgd, steps=steps, step_size=eps / 4, generator=torch.Generator().manual_seed(0))
        return attacks.breaking_point(net, x, y, [eps], attack, batch_size=count).isinf()

    def theirs(x=x, y=y):
        torch.manual_seed(0)
        return standing(net, torchattacks.PGD(net, eps, eps / 4, steps)(x, y), y)

    def theirs_on_the_right_ones():
        right = standing(net, x, y)
        return right.index_put((right,), theirs(x[right], y[right]))

    sides = {"ours": ours, PEER: theirs, f"{PEER}, given only what is right": theirs_on_the_right_ones}
    yield from compared(f"robust accuracy, PGD-{steps}", sides, repeats, found, steps=steps)


def auto(device="cpu", count=200, steps=10, queries=300, train_images=8000, repeats=2):
    """APGD by cross-entropy, APGD by the targeted DLR, Square, each on what the one before it left."""
    net, x, y, eps, _ = found = victim(count, train_images, device)

    def ours():
        moved = auto_attack(net, x, y, eps, steps, n_targets=net.head.out_features - 1, n_queries=queries)
        return standing(net, moved, y)

    def theirs():
        stages = [torchattacks.APGD(net, eps=eps, steps=steps, loss="ce", seed=0),
                  torchattacks.APGDT(net, eps=eps, steps=steps, n_classes=net.head.out_features, seed=0),
                  torchattacks.Square(net, eps=eps, n_queries=queries, seed=0)]
        return standing(net, torchattacks.MultiAttack(stages)(x, y), y)

    yield from compared("robust accuracy, auto_attack", {"ours": ours, PEER: theirs}, repeats, found, steps=steps,
                        queries=queries)
