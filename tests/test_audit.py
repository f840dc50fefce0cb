"""An audit's numbers are those of the instruments, whatever form model and data have; what cannot be audited is refused in words."""
import html.parser
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import repspace
from repspace import calibration, data, geometry
from repspace.__main__ import main
from repspace.auditing import gathering, published
from repspace.auditing.advising import advice

QUIET = {"progress": False, "draws": 50}


def two_layers():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10))


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", seed=0)


@pytest.fixture(scope="module")
def net(digits):
    torch.manual_seed(0)
    net = two_layers()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(digits.train.images), digits.train.labels).backward()
        optimizer.step()
    return net


@pytest.fixture(scope="module")
def found(net, digits):
    return repspace.audit(net, digits.test, name="two layers", **QUIET)


def values(audit):
    return audit.table["value"].to_dict()


# ---- the same numbers as the instruments ----

def test_numbers_are_those_of_the_instruments(found, net, digits):
    x, y = digits.test
    split = gathering.apart(net, x)
    with torch.no_grad():
        z, s = split.features(x), split(x)
    W, b = split.head.weight.double(), split.head.bias.double()
    centers = geometry.class_centers(W, b, found.facts["radius"]).centers
    cone, collapse = geometry.cone_degree(W, b, z), geometry.neural_collapse(z, y, W)
    fitted = calibration.cross_fit(calibration.TemperatureScaling, s.double(), y)
    expected = {
        "accuracy": (s.argmax(1) == y).double().mean().item(), "confidence": calibration.softmax(s.double()).amax(1).mean().item(),
        "confidence_gap": calibration.confidence_gap(s, y, from_logits=True), "ece": calibration.expected_calibration_error(s, y, from_logits=True),
        "ece_floor": calibration.calibration_floor(s, from_logits=True), "nll": calibration.nll(s, y, from_logits=True),
        "auroc_error": calibration.error_detection(s, y, from_logits=True).auroc,
        "rms": geometry.rms(z).mean().item(), "logit_scale": geometry.logit_scale(W, z).mean().item(),
        "cone_degree_test": cone.degree, "cone_open_test": cone.open_share,
        "alignment": geometry.alignment(z, centers, y).mean().item(), "alignment_span": geometry.alignment(z, centers, y, span_of=W).mean().item(),
        "no_bias_accuracy": ((s - b).argmax(1) == y).double().mean().item(),
        "nc_within": collapse.within, "nc_angle_excess": collapse.angle_excess, "nc_duality": collapse.duality}
    for name, wanted in expected.items():
        assert found.value(name).mean == pytest.approx(wanted, rel=1e-5, abs=1e-7), name
    assert found.value("temperature").mean == pytest.approx(np.mean([t.temperature for t in fitted.scalers]), rel=2e-3)   # of logits in half precision
    assert found.value("nll_refinement").mean == pytest.approx(calibration.nll(fitted.probs, y), abs=1e-3)
    assert found.value("ece_temperature").mean == pytest.approx(calibration.expected_calibration_error(fitted.probs, y), abs=5e-3)


def test_every_number_with_an_interval_lies_in_it_and_says_on_how_many_images_it_rests(found, digits):
    table = found.table.dropna(subset=["low"])
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()
    assert set(found.table.loc[found.table["low"].isna(), "part"]) == {"collapse"}
    assert (found.table["n"] == len(digits.test.labels)).all()


def test_it_lies_among_the_published_nets(found):
    nets = published()
    on_digits = nets.loc[nets["data"] == "digits", "accuracy"]
    assert f"above {(on_digits < found.value('accuracy').mean).sum()} of {len(on_digits)} on" in found.table.loc["accuracy", "among"]


def test_without_records_the_column_is_empty_and_says_why(net, digits, tmp_path):
    alone = repspace.audit(net, digits.test, results=tmp_path, **QUIET)
    assert set(alone.table["among"]) == {""} and any("no published records" in line for line in alone.unknown)


# ---- any form of data and of model ----

def stream(x, y):
    for at in range(0, len(y), 100):
        yield {"pixel_values": x[at:at + 100], "labels": y[at:at + 100]}


class Streamed(IterableDataset):
    def __init__(self, x, y): self.pairs = x, y
    def __iter__(self): return zip(*self.pairs)


@pytest.mark.parametrize("form", ["arrays", "bytes", "dataset", "loader", "stream", "iterable", "dictionary"])
def test_data_in_any_form_give_the_same_numbers(form, found, net, digits):
    x, y = digits.test
    forms = {"arrays": lambda: (x.numpy(), y.numpy()), "bytes": lambda: ((x * 255).round().byte(), y), "dataset": lambda: TensorDataset(x, y),
             "loader": lambda: DataLoader(TensorDataset(x, y), 77), "stream": lambda: stream(x, y), "iterable": lambda: Streamed(x, y),
             "dictionary": lambda: {"image": x, "label": y}}
    again = repspace.audit(net, forms[form](), **QUIET)
    tolerance = 1e-2 if form == "bytes" else 1e-6
    assert values(again) == pytest.approx(values(found), rel=tolerance, abs=tolerance / 10)


class HuggingFace(nn.Module):
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, pixel_values): return SimpleNamespace(logits=self.net(pixel_values), hidden_states=None)


class LogSoftmax(nn.Module):
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return self.net(x).log_softmax(1)


@pytest.mark.parametrize("wrap", [HuggingFace, LogSoftmax, nn.DataParallel], ids=lambda w: w.__name__)
def test_wrapped_models_give_the_same_numbers(wrap, found, net, digits):
    assert values(repspace.audit(wrap(net), digits.test, **QUIET)) == pytest.approx(values(found), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-4), (torch.float16, 3e-2), (torch.bfloat16, 1e-1)], ids=str)
def test_other_precisions(dtype, tolerance, found, net, digits):
    other = two_layers().to(dtype)
    other.load_state_dict(net.state_dict())
    again = repspace.audit(other, digits.test, **QUIET)
    for name in ("accuracy", "confidence", "nll", "span_norm", "alignment_span"):
        assert again.value(name).mean == pytest.approx(found.value(name).mean, rel=tolerance), name


def test_images_are_normalized_inside(found, net, digits):
    x, y = digits.test

    class Wants(nn.Module):   # images with mean 0.5 and deviation 0.5 taken out
        def __init__(self): super().__init__(); self.net = net
        def forward(self, x): return self.net(x * 0.5 + 0.5)
    assert values(repspace.audit(Wants(), (x, y), mean=[0.5], std=[0.5], **QUIET)) == pytest.approx(values(found), rel=1e-4, abs=1e-5)


def test_one_pass_and_the_model_is_left_as_it_was(net, digits):
    seen, before = [], {name: t.clone() for name, t in net.state_dict().items()}

    class Counted(nn.Module):
        def __init__(self): super().__init__(); self.net = net
        def forward(self, x):
            seen.append(len(x))
            return self.net(x)
    model = Counted().train()
    model.net[1].eval()   # modes may differ
    repspace.audit(model, digits.test, **QUIET)
    n = len(digits.test.labels)
    assert n <= sum(seen) <= n + 2 * 64   # twice 64, to find the head and to check it
    assert model.training and model.net[3].training and not model.net[1].training
    net.train()
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items()) and not net[4]._forward_hooks


def test_logits_in_a_file_are_the_same(found, net, digits, monkeypatch):
    kinds = []
    array = gathering.HalfLogits.array

    def noted(self):
        kinds.append(type(array(self)))
        return array(self)
    monkeypatch.setattr(gathering.HalfLogits, "array", noted)
    again = repspace.audit(net, digits.test, memory=1000, batch_size=100, **QUIET)
    assert kinds and set(kinds) == {np.memmap} and values(again) == pytest.approx(values(found), rel=1e-6, abs=1e-7)


def test_a_sample_of_vectors_says_its_size(found, net, digits):
    some = repspace.audit(net, digits.test, features=300, **QUIET)
    assert some.table.loc["alignment_span", "n"] == 300 and some.table.loc["ece", "n"] == len(digits.test.labels)
    assert some.value("span_norm").mean == pytest.approx(found.value("span_norm").mean)   # of all
    assert some.value("alignment_span").low <= found.value("alignment_span").mean <= some.value("alignment_span").high
    assert any("300 of the" in line for line in some.unknown)


def test_a_reservoir_is_uniform():
    often = np.zeros(30)
    for seed in range(3000):
        sample = gathering.Reservoir(10, seed)
        for part in np.array_split(np.arange(30), [1, 9, 12, 25]):
            sample.offer(value=part)
        often[sample.rows["value"]] += 1
    assert often.sum() == 30000 and ((often - 1000) ** 2 / (1000 * 2 / 3)).sum() < 52.3   # χ², 29 degrees of freedom, 99.5 %


# ---- what is refused ----

class Twice(nn.Module):
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return self.net(x) + torch.rand(len(x), 10)


class Functional(nn.Module):
    """Dropout that does not ask for the mode."""
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return self.net[4](nn.functional.dropout(self.net[:3](x), 0.5, True))


class Cosine(nn.Module):
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return nn.functional.linear(nn.functional.normalize(self.net[:3](x)), nn.functional.normalize(self.net[4].weight))


class NaN(nn.Module):
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return self.net(x) * torch.nan


class LaterNaN(nn.Module):
    """Not finite for images with a bright first pixel."""
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return self.net(torch.where(x[:, :, :1, :1] > 0.99, torch.nan, x))


@pytest.mark.parametrize("model, words", [
    (Twice, "two answers to the same images"), (Functional, "two answers to the same images"), (Cosine, "differs from the logits|no head to split off"),
    (NaN, "not finite"), (lambda net: nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()), "no Linear inside"), (lambda net: (lambda x: net(x)), "torch.nn.Module"),
    (lambda net: nn.Sequential(net, nn.Softmax(1)), "probabilities"), (lambda net: nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), "none of them logits")],
    ids=["twice", "dropout", "cosine", "nan", "convolution", "lambda", "softmax", "one logit"])
def test_models_that_are_refused(model, words, net, digits):
    with pytest.raises(ValueError, match=words):
        repspace.audit(model(net), digits.test, **QUIET)


def test_logits_that_are_not_finite_later_on(net, digits):
    x, y = digits.test.images.clone(), digits.test.labels
    x[:, :, 0, 0] = 0
    x[500, 0, 0, 0] = 1
    with pytest.raises(ValueError, match="1 images are not, the first of them number 500"):
        repspace.audit(LaterNaN(net), (x, y), **QUIET)


@pytest.mark.parametrize("change, words", [
    (lambda x, y: (x * 2 - 1, y), r"must lie in \[0, 1\], but they lie in \[-1, 1\]; they look normalized already"), (lambda x, y: (x * 255, y), "divide them by 255"),
    (lambda x, y: (x * torch.nan, y), "images must be finite"), (lambda x, y: (x.permute(0, 2, 3, 1).repeat(1, 1, 1, 3), y), "channels first"),
    (lambda x, y: (x.flatten(1), y), r"\(N, C, H, W\)"), (lambda x, y: ((x * 255).int(), y), "torch.int32"),
    (lambda x, y: (x, y + 1), r"labels must lie in 0..9, but they lie in 1..10"), (lambda x, y: (x, y - 1), "lie in -1..8"),
    (lambda x, y: (x, nn.functional.one_hot(y)), "one-hot"), (lambda x, y: (x, y.float()), "integers"), (lambda x, y: (x, y[:-1]), "a label for each image"),
    (lambda x, y: (x[y == 7], y[y == 7]), "have the label 7: an audit needs two classes"), (lambda x, y: (x[:1], y[:1]), "at least 2 images"),
    (lambda x, y: (x[:0], y[:0]), "the data are empty"), (lambda x, y: [], "the data are empty"), (lambda x, y: DataLoader(TensorDataset(x[:0], y[:0])), "the data are empty"),
    (lambda x, y: [x], "each batch must be"), (lambda x, y: [{"picture": x, "label": y}], "allowed are pixel_values"), (lambda x, y: 3, "a DataLoader or another iterable"),
    (lambda x, y: "folder", "a DataLoader or another iterable")])
def test_data_that_are_refused(change, words, net, digits):
    with pytest.raises(ValueError, match=words):
        repspace.audit(net, change(*digits.test), **QUIET)


def test_a_head_of_zeros_says_why_it_has_no_angles(digits):
    empty = two_layers()
    nn.init.zeros_(empty[4].weight)
    found = repspace.audit(empty, digits.test, **QUIET)
    assert any("all rows of the head's weight are equal" in line for line in found.unknown) and "ece" in found.table.index and found.to_html()


@pytest.mark.parametrize("eps", [8, 0, -0.1, "8/255", True, math.nan])
def test_limits_that_are_refused(eps, net, digits):
    with pytest.raises(ValueError, match="as 8/255"):
        repspace.audit(net, digits.test, attack=eps, **QUIET)


# ---- under attack ----

class Stairs(torch.autograd.Function):
    """Rounds to steps, with a gradient that is not its own: 0."""
    @staticmethod
    def forward(ctx, x): return (x * 8).round() / 8
    @staticmethod
    def backward(ctx, gradient): return gradient * 0


class Masked(nn.Module):
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return self.net(Stairs.apply(x))


def test_an_attack_has_its_race_and_masking_its_advice(net, digits):
    options = dict(attack=24 / 255, attack_images=40, **QUIET)
    plain, masked = (repspace.audit(model, digits.test, **options) for model in (net, Masked(net)))
    some = plain.samples[plain.samples["breaks_pgd"] > 0]
    assert ((some["rho_span_pgd"] > some["needed_pgd"]) == (some["breaks_pgd"] <= 24 / 255 + 1e-9)).all()
    assert plain.table.loc["robust_accuracy_pgd", "n"] == 40 and plain.value("success_pgd").mean > 0.3
    assert masked.value("success_pgd").mean < 0.2 and masked.masking.loc["square", "raised"] and masked.masking.loc["zero gradients", "raised"]
    assert any("random search" in a.what and "masked gradients" in a.what for a in masked.advice)
    assert "Signs of masking" in masked.to_html() and repspace.Audit.from_json(masked.to_json()).advice == masked.advice


def test_an_attack_where_nothing_is_right(digits):
    torch.manual_seed(0)
    x, y = digits.test
    wrong = two_layers().eval()
    with torch.no_grad():
        y = (wrong(x).argmax(1) + 1) % 10
    found = repspace.audit(wrong, (x, y), attack=0.1, attack_images=20, **QUIET)
    assert found.masking is None and any("masking" in line for line in found.unknown) and math.isnan(found.value("success_pgd").mean)
    assert "same order" in found.advice[0].what and found.to_html()


# ---- what it is ----

class Text(html.parser.HTMLParser):
    """The elements and attributes of a page, and its text."""
    def __init__(self): super().__init__(); self.elements, self.attributes, self.text = set(), set(), ""
    def handle_starttag(self, tag, attributes): self.elements.add(tag); self.attributes |= {name for name, _ in attributes}
    def handle_data(self, data): self.text += data


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;\x00​"


def test_a_page_shows_names_as_text_and_loads_nothing(net, digits, tmp_path):
    one = repspace.audit(net, digits.test, name=HOSTILE, **QUIET)
    one.to_html(tmp_path / "a.html")
    for page in ((tmp_path / "a.html").read_text(), repspace.compare(one, one).to_html(), one._repr_html_()):
        read = Text()
        read.feed(page)
        assert not read.elements & {"script", "img", "link", "iframe", "object", "a"}
        assert not {a for a in read.attributes if a.startswith("on")} | read.attributes & {"src", "href"}
        assert "<script>alert(1)</script>" in read.text and "@import" not in page and "url(" not in page
        assert "prefers-color-scheme" in page and len(page.encode()) < 10 ** 6


def test_json_is_strict_and_comes_back(found, tmp_path):
    found.to_json(tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert set(content) == {"schema", "repspace", "name", "facts", "notes", "table", "samples", "masking", "advice", "unknown"}
    assert content["table"]["low"][content["table"]["measure"].index("nc_within")] is None
    again = repspace.Audit.from_json(tmp_path / "a.json")
    assert again.to_json() == found.to_json() and again.advice == found.advice and again.samples["label"].dtype == np.int64
    for broken in ("{}", '{"schema": 7}', "{", json.dumps(content | {"table": 3})):
        with pytest.raises(ValueError, match="no audit"):
            repspace.Audit.from_json(broken)


def test_an_audit_is_frozen_and_prints_what_it_found(found):
    with pytest.raises(AttributeError):
        found.name = "other"
    assert "accuracy" in repr(found) and advice(found)[0].what in repr(found)
    assert list(found.part("regions").index) == ["cone_degree_test", "cone_open_test", "no_bias_agreement", "no_bias_accuracy"]
    with pytest.raises(ValueError, match="allowed are prediction"):
        found.part("cones")


# ---- two of them, and one in a loop ----

def scaled(net, factor):
    other = two_layers()
    other.load_state_dict(net.state_dict())
    with torch.no_grad():
        other[4].weight *= factor
        other[4].bias *= factor
    return other


def test_two_nets_that_differ_by_a_temperature_are_alike_after_one(found, net, digits):
    both = repspace.compare(found, repspace.audit(scaled(net, 4), digits.test, name="hot", **QUIET))
    assert both.value("nll").low > 0 and both.value("confidence").low > 0 and both.value("accuracy") == (0, 0, 0)
    for name in ("ece_temperature", "nll_refinement"):
        assert abs(both.value(name).mean) < 2e-3, name
    assert both.table.loc["alignment_span", "n"] == len(digits.test.labels)


def test_other_images_are_no_pair(found, net, digits):
    x, y = digits.test
    with pytest.raises(ValueError, match="labels differ"):
        repspace.compare(found, repspace.audit(net, (x, y.flip(0)), **QUIET))
    with pytest.raises(ValueError, match="the same images"):
        repspace.compare(found, repspace.audit(net, (x[:100], y[:100]), **QUIET))


def test_a_probe_computes_what_an_audit_does(found, net, digits):
    probe = repspace.Probe(net, features=10_000)
    for x, y in data.batches(digits.test, 100):
        probe.update(x, y)
    assert probe.compute() == pytest.approx(values(found), rel=1e-6, abs=1e-7)
    assert values(probe.audit(draws=50)) == pytest.approx(values(found), rel=1e-6, abs=1e-7)
    probe.reset()
    with pytest.raises(ValueError, match="seen no images"):
        probe.compute()
    with torch.no_grad():
        z = net[:3](digits.test.images)
        taken = repspace.Probe(head=(net[4].weight, net[4].bias), features=10_000).update_from(z, net[4](z), digits.test.labels)
    assert taken.compute() == pytest.approx(values(found), rel=1e-5, abs=1e-6)


def test_the_names_are_there_and_importing_stays_light():
    code = ("import sys, repspace; assert 'torch' not in sys.modules and 'audit' in dir(repspace); from repspace import Audit, Probe, audit, compare; "
            "assert callable(repspace.audit) and repspace.audit is audit and callable(repspace.compare)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- the shell ----

NETS = """
import torch
from torch import nn
def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 2))
class Text:
    pass
"""


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with images of two classes, a module with nets, and weights."""
    from PIL import Image
    from safetensors.torch import save_file
    place, rng = tmp_path_factory.mktemp("shell"), np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 180)):
        (place / "images" / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray((level + rng.integers(-50, 50, (40, 40, 3))).astype(np.uint8)).save(place / "images" / name / f"{i}.png")
    (place / "nets.py").write_text(NETS)
    names = {}
    exec(NETS, names)
    save_file(names["small"]().state_dict(), place / "small.safetensors")
    torch.save({"x": names["small"]()}, place / "pickled.pt")
    return place


def repspace_command(place, *words):
    env = os.environ | {"PYTHONPATH": str(Path(repspace.__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "repspace", *words], cwd=place, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_a_model_is_audited_and_compared_from_the_shell(room):
    code, out, err = repspace_command(room, "audit", "nets:small", "--images", "images", "--size", "32", "--weights", "small.safetensors",
                                      "--json", "a.json", "--html", "a.html")
    assert code == 0 and "Audit of nets:small: 24 images, 2 classes" in out and "<html" in (room / "a.html").read_text(), err
    code, out, err = repspace_command(room, "compare", "a.json", "a.json", "--html", "both.html")
    assert code == 0 and "these images do not tell" in out and "<html" in (room / "both.html").read_text(), err


@pytest.mark.parametrize("words, code, said", [
    (("audit", "nets:small", "--images", "images", "--weights", "pickled.pt"), 2, "nothing else is read"),
    (("audit", "nets:small", "--images", "images", "--weights", "none.pt"), 2, "none.pt"),
    (("audit", "nets:small", "--images", "nowhere"), 2, "nowhere"),
    (("audit", "nets:Text", "--images", "images"), 2, "must be a Module"),
    (("audit", "timm:no_such_net", "--images", "images"), 2, "timm"),
    (("audit", "nets:small", "--images", "images/dark"), 2, "a folder of images for each class"),
    (("audit", "nets:small", "--images", "images", "--attack", "8"), 1, "as 8/255"),
    (("audit", "torchvision:squeezenet1_0", "--images", "images", "--size", "64", "--classes", "2"), 1, "no Linear inside"),
    (("compare", "nets.py", "nets.py"), 2, "no audit"),
    (("nothing",), 2, "COMMAND")])
def test_exit_codes(room, words, code, said, monkeypatch, capsys):
    monkeypatch.chdir(room)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(words) == code and said in capsys.readouterr().err


# ---- architectures of torchvision ----

ARCHITECTURES = ["alexnet", "convnext_tiny", "convnext_small", "densenet121", "densenet161", "efficientnet_b0", "efficientnet_b1", "efficientnet_v2_s", "googlenet",
                 "maxvit_t", "mnasnet0_5", "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "regnet_x_400mf", "regnet_x_800mf", "regnet_y_400mf",
                 "regnet_y_800mf", "resnet18", "resnet34", "resnet50", "resnext50_32x4d", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "swin_t",
                 "swin_v2_t", "vgg11", "vgg11_bn", "vgg16", "vit_b_16", "vit_b_32", "wide_resnet50_2"]


@pytest.mark.deep
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_with_random_weights(name):
    import torchvision
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **({"init_weights": False} if name == "googlenet" else {}))
    if name.startswith("vit"): nn.init.normal_(model.heads.head.weight, std=0.02)   # torchvision's are all 0
    x, y = torch.rand(12, 3, 224, 224), torch.arange(12) % 10
    found = repspace.audit(model, (x, y), batch_size=6, **QUIET)
    assert found.facts["images"] == 12 and {"ece", "alignment_span", "cone_degree_test"} <= set(found.table.index), found.notes
    assert np.isfinite(found.table.loc[["nll", "span_norm", "alignment_span"], "value"]).all()


@pytest.mark.deep
@pytest.mark.parametrize("name", ["squeezenet1_0", "squeezenet1_1"])
def test_architectures_without_a_linear_end(name):
    import torchvision
    with pytest.raises(ValueError, match="no Linear inside"):
        repspace.audit(torchvision.models.get_model(name, weights=None, num_classes=10), (torch.rand(4, 3, 224, 224), torch.arange(4)), **QUIET)
