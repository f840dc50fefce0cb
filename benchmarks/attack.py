"""Robust accuracy, against torchattacks: only what still stands is attacked on."""
import functools
from functools import partial

import torch
import torchattacks

from repspace import attacks, data, regularize, train
from repspace.attacks.auto import auto_attack
from repspace.attacks.steps import ascent

from .race import race, row, torch_profile
from .sample import images

PEER = f"torchattacks {torchattacks.__version__}"
SURVIVE = 0.5, 0.1


@functools.cache
def victim(train_images, device):
    """A resnet8 after four epochs, and for each of `SURVIVE` an ε that such a share of the right images survives."""
    dataset, _ = images()
    recipe = train.Recipe(epochs=4, batch_size=64, lr=0.1, augment="flip", train_images=train_images)
    net = train.new_classifier("resnet8", dataset, recipe, seed=0).to(device)
    train.fit(net, dataset, recipe, regularize.get("none"), seed=0)
    x, y = targets(100, device)
    grid = [2 ** (n / 2) / 255 for n in range(-4, 9)]
    breaks = attacks.breaking_point(net, x, y, grid, partial(attacks.pgd, steps=5))
    left = [(breaks[breaks > 0] > eps).double().mean() for eps in grid]
    return net, {share: grid[min(range(len(grid)), key=lambda i: abs(left[i] - share))] for share in SURVIVE}


def targets(count, device):
    """The first `count` test images and their labels."""
    test = images()[0].test
    return data.as_float(test.images[:count]).to(device), test.labels[:count].to(device)


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


def gradient_cost(net, x, y):
    """How many forward passes of the images `x` a pass with a gradient takes as long as."""
    with attacks.frozen(net):
        seconds, _, _ = race({"forward": lambda: attacks.logits_of(net, x, len(x)),
                              "gradient": lambda: ascent(net, x, y)}, repeats=5)
    return min(seconds["gradient"]) / min(seconds["forward"])


def irreducible(passes, survivors, least, cost):
    """What share of each side's work is passes of images that survive: whoever runs the stages must do these.

    `least`: (forward, gradient) passes of a survivor, `cost`: of a gradient, in forward passes. With it, how many
    times faster than the peer any code could be that gives the same answer in the same passes."""
    work = {side: (forward - gradient) + gradient * cost for side, (forward, gradient) in passes.items()}
    floor = survivors * (least[0] + least[1] * cost)
    return {"shares": {side: floor / done for side, done in work.items()}, "gradient_cost": cost,
            "most": work["theirs"] / floor if floor else None}


def compared(what, sides, repeats, net, x, y, least=None, **more):
    """Rows for `sides`, functions that return which images (N,) still stand; `least`: as in `irreducible`."""
    passes = {side: [0, 0] for side in sides}
    seconds, stands, memory = race({side: counted(net, run, passes[side]) for side, run in sides.items()}, repeats)
    share = {side: kept.double().mean().item() for side, kept in stands.items()}
    clean = standing(net, x, y).double().mean().item()
    for peer in [side for side in sides if side != "ours"]:
        agree = abs(share["ours"] - share[peer]) <= 0.01 + 1e-9
        of_peer = {"ours": list(passes["ours"]), "theirs": list(passes[peer])}
        if least:
            cost = gradient_cost(net, x[:64], y[:64])
            more["irreducible"] = irreducible(of_peer, int(stands["ours"].sum()), least, cost)
        yield row(f"{what}, {len(y)} images", seconds, peer, None, agree,
                  f"robust accuracy {share['ours']:.1%} and {share[peer]:.1%}, clean {clean:.1%}",
                  2 if peer == PEER else 1, memory,
                  partial(torch_profile, sides["ours"]), data=images()[1], device=x.device.type,
                  passes=of_peer, **more)


def pgd(device="cpu", count=300, steps=20, train_images=8000, repeats=2):
    """Robust accuracy by PGD from a random start, with steps of ε/4."""
    (net, radii), (x, y) = victim(train_images, device), targets(count, device)
    for survive, eps in radii.items():
        def ours():
            attack = partial(attacks.pgd, steps=steps, step_size=eps / 4)
            return attacks.breaking_point(net, x, y, [eps], attack, batch_size=count).isinf()

        def theirs(x=x, y=y):
            torch.manual_seed(0)
            return standing(net, torchattacks.PGD(net, eps, eps / 4, steps)(x, y), y)

        def theirs_on_the_right_ones():
            right = standing(net, x, y)
            return right.index_put((right,), theirs(x[right], y[right]))

        sides = {"ours": ours, PEER: theirs, f"{PEER}, given only what is right": theirs_on_the_right_ones}
        yield from compared(f"PGD-{steps}, about {survive:.0%} survive", sides, repeats, net, x, y, steps=steps,
                            eps_255=eps * 255)


def auto(device="cpu", count=500, steps=10, queries=300, train_images=8000, repeats=2):
    """APGD by cross-entropy, APGD by the targeted DLR, Square, each on what the one before it left."""
    (net, radii), (x, y) = victim(train_images, device), targets(count, device)
    classes = net.head.out_features
    for survive, eps in radii.items():
        def ours():
            return standing(net, auto_attack(net, x, y, eps, steps, n_targets=classes - 1, n_queries=queries), y)

        def theirs():
            stages = [torchattacks.APGD(net, eps=eps, steps=steps, loss="ce", seed=0),
                      torchattacks.APGDT(net, eps=eps, steps=steps, n_classes=classes, seed=0),
                      torchattacks.Square(net, eps=eps, n_queries=queries, seed=0)]
            return standing(net, torchattacks.MultiAttack(stages)(x, y), y)

        yield from compared(f"auto_attack, about {survive:.0%} survive", {"ours": ours, PEER: theirs}, repeats, net, x, y,
                            least=(queries, steps * classes), steps=steps, queries=queries, eps_255=eps * 255)
