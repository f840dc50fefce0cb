"""Faults that a record must survive: killed writers, damaged files, and results of mixed origin."""
import copy
import errno
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file
from scipy.special import softmax

from repspace import records
from repspace.records.published import ROWS
from repspace.records import compact, files

CONDITION = "digits.tiny-cnn.none"


def made_up(seed, condition=CONDITION, n=40, **settings):
    """The four parts of a record that nobody measured."""
    rng = np.random.default_rng(seed)
    labels, clean = rng.integers(3, size=n), rng.normal(size=(n, 3)).astype(np.float32)
    run = dict(study="s", condition=condition, seed=seed, data="digits", model="tiny-cnn", feature_dim=None,
               regularizer="none", recipe={"epochs": 5}, measures="standard", data_digest="d" * 64) | settings
    run |= dict(identity=records.identity(run), scalars={"accuracy": rng.random(), "undefined": float("nan")},
                curves={"fgsm": {"eps": [8, 16], "success": [0.1, 0.2]}}, history={"loss": [2.0, 1.0]},
                seconds={"train": 1.0, "measure": 2.0}, provenance={"version": "0.1.0", "code": "c", "commit": None})
    samples = pd.DataFrame(dict(image=np.arange(n), label=labels, norm=rng.gamma(5, size=n) * 1e6,
                                cos_label=rng.uniform(-1, 1, n), breaks_fgsm=rng.choice([0.4, 1, np.inf], n),
                                open=rng.random(n) < .5, subset=np.arange(n) < 10))
    logits = {"labels": labels, "clean": clean, "moved.pgd": clean[:20] + 1}
    return run, samples, logits, {"weight": rng.normal(size=(3, 5)), "bias": np.zeros(3)}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with records of three seeds in runs/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REPSPACE_RUNS", raising=False)
    (tmp_path / "results").mkdir()
    for seed in range(3):
        records.write(folder(tmp_path, seed), *made_up(seed))
    return tmp_path


def as_schema_2(root):
    """Make what is published in `root` such as it was before there were checksums."""
    (root / "manifest.json").unlink()
    lines = [json.loads(line) for line in (root / "runs.jsonl").read_text().splitlines()]
    new = ("parts", "data_digest")
    (root / "runs.jsonl").write_text("".join(
        json.dumps({k: v for k, v in line.items() if k not in new} | {"schema": 2}, sort_keys=True) + "\n" for line in lines))


def folder(place, seed, condition=CONDITION):
    return records.run_folder("s", condition, seed, place / "runs")


def test_what_is_written_is_what_is_read(place):
    run, samples, logits, head = made_up(1)
    got = records.load("s")
    row = got.runs[got.runs.seed == 1].iloc[0]
    assert row.accuracy == run["scalars"]["accuracy"] and np.isnan(row.undefined)
    assert (row.source, row.version, row.seconds) == ("fresh", "0.1.0", 3.0)
    assert row.history == run["history"] and row.curves == run["curves"]
    pd.testing.assert_frame_equal(got.samples[got.samples.seed == 1].drop(columns=["condition", "seed"])
                                  .reset_index(drop=True), samples)
    arrays = records.arrays("s", CONDITION, 1)
    for name, array in (logits | {f"head.{k}": a for k, a in head.items()}).items():
        np.testing.assert_array_equal(arrays[name], array)


@pytest.mark.parametrize("step", ["samples.parquet", "head.safetensors", "rename"])
def test_a_writer_killed_at_any_step_leaves_no_record(place, step):
    script = textwrap.dedent(f"""
        import os, pathlib, signal, sys
        sys.path.insert(0, {str(__file__).rsplit('/', 1)[0]!r})
        from repspace import records
        from repspace.records import files
        from test_records import made_up
        die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        sync, files._sync = files._sync, lambda path: die() if {step!r} in path.name else sync(path)
        if {step!r} == "rename": pathlib.Path.rename = die
        records.write(records.run_folder("s", {CONDITION!r}, 7, "runs"), *made_up(7))
    """)
    assert subprocess.run([sys.executable, "-c", script], cwd=place).returncode == -signal.SIGKILL
    assert not folder(place, 7).exists()
    assert records.load("s").runs.seed.tolist() == [0, 1, 2]
    records.remove_unfinished(folder(place, 7).parent)
    assert sorted(p.name for p in folder(place, 7).parent.iterdir()) == ["0", "1", "2"]
    records.write(folder(place, 7), *made_up(7))
    assert records.load("s").runs.seed.tolist() == [0, 1, 2, 7]


@pytest.mark.parametrize("name", records.FILES)
@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b"\0" * len(b)])
def test_a_damaged_file_is_named_and_the_others_are_read(place, name, damage, caplog):
    file = folder(place, 1) / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=f"1/{name} is damaged or missing"):
        records.check(folder(place, 1))
    with caplog.at_level(logging.WARNING):
        assert records.load("s").runs.seed.tolist() == [0, 2]
    assert str(file) in caplog.text
    with pytest.raises(ValueError, match=name):
        records.publish("s")
    assert not (place / "results" / "s").exists()


def test_a_missing_file_is_named(place):
    (folder(place, 0) / "head.safetensors").unlink()
    with pytest.raises(ValueError, match="0/head.safetensors"):
        records.check(folder(place, 0))


def alike(published, fresh):
    """Predictions are the same, and probabilities to a thousandth."""
    assert published.dtype == np.float32 and (published.argmax(1) == fresh.argmax(1)).all()
    assert np.abs(softmax(published, axis=1) - softmax(fresh.astype(float), axis=1)).max() <= 1e-3


def test_published_results_come_back(place):
    records.publish("s")
    fresh, published = records.load("s", "fresh"), records.load("s", "published")
    assert published.runs.source.tolist() == ["published"] * 3
    assert np.allclose(published.runs.accuracy, fresh.runs.accuracy, rtol=1e-6)
    thin = fresh.samples[fresh.samples.subset].reset_index(drop=True)
    for name in ("image", "label", "breaks_fgsm", "open", "seed", "condition"):
        assert (published.samples[name] == thin[name]).all(), name
    assert np.allclose(published.samples.norm, thin.norm, rtol=1e-6), "half precision would overflow"
    assert np.abs(published.samples.cos_label - thin.cos_label).max() < 1e-3
    assert not any(dtype == np.float16 for dtype in published.samples.dtypes)
    whole, part = (records.arrays("s", CONDITION, 2, source) for source in ("fresh", "published"))
    assert set(whole) == set(part)
    for name in ("clean", "moved.pgd"):
        alike(part[name], whole[name][:10])
    np.testing.assert_allclose(part["head.weight"], whole["head.weight"], rtol=1e-3)
    with pytest.raises(ValueError, match="published record of .* seed 9"):
        records.arrays("s", CONDITION, 9, "published")


def test_publishing_again_changes_no_byte(place):
    first = {p.name: p.read_bytes() for p in records.publish("s").iterdir()}
    assert {p.name: p.read_bytes() for p in records.publish("s").iterdir()} == first
    for line in first["runs.jsonl"].decode().splitlines():
        assert json.loads(line)["study"] == "s"


def test_fresh_before_published_run_by_run(place):
    records.publish("s")
    records.set_aside(folder(place, 0))
    records.set_aside(folder(place, 1))
    records.write(folder(place, 1), *made_up(1, recipe={"epochs": 6}))
    runs = records.load("s").runs
    assert runs.source.tolist() == ["published", "fresh", "fresh"]
    assert runs.recipe[1] == {"epochs": 6}
    assert records.load("s").samples.groupby("seed").size().tolist() == [10, 40, 40]
    assert len(records.load("s", "published").runs) == 3


def test_a_damaged_fresh_record_gives_way_to_its_published_one(place):
    records.publish("s")
    (folder(place, 1) / "samples.parquet").write_bytes(b"")
    assert records.load("s").runs.source.tolist() == ["fresh", "published", "fresh"]


def test_publishing_an_extension_keeps_what_was_published(place):
    records.publish("s")
    for seed in range(3):
        records.set_aside(folder(place, seed))
    records.write(folder(place, 3), *made_up(3))
    records.publish("s")
    assert records.load("s", "published").runs.seed.tolist() == [0, 1, 2, 3]
    alike(records.arrays("s", CONDITION, 0, "published")["clean"], made_up(0)[2]["clean"][:10])


def test_publishing_in_rounds_rounds_nothing_twice(place):
    records.publish("s")
    first = {seed: records.arrays("s", CONDITION, seed, "published") for seed in range(3)}
    for seed in range(3):
        records.set_aside(folder(place, seed))
    records.write(folder(place, 3), *made_up(3))
    records.publish("s")
    for seed, arrays in first.items():
        again = records.arrays("s", CONDITION, seed, "published")
        for name, array in arrays.items():
            np.testing.assert_array_equal(again[name], array)


def test_results_published_uncompressed_are_read_and_then_compressed(place):
    root = records.publish("s")
    as_schema_2(root)
    for name, head in (("logits", False), ("heads", True)):
        (root / f"{name}.npz").unlink()
        save_file({f"{CONDITION}/{seed}/{k}": np.ascontiguousarray(a) for seed in range(3)
                   for k, a in made_up(seed)[3 if head else 2].items()}, root / f"{name}.safetensors")
    old = records.arrays("s", CONDITION, 1, "published")
    np.testing.assert_array_equal(old["clean"], made_up(1)[2]["clean"])
    for seed in range(3):
        records.set_aside(folder(place, seed))
    records.publish("s")
    assert sorted(p.name for p in root.iterdir()) == [".lock", "heads.npz", "logits.npz", "manifest.json", "runs.jsonl",
                                                      "samples.parquet"]
    alike(records.arrays("s", CONDITION, 1, "published")["clean"], old["clean"])


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b"\0" * len(b)])
def test_damaged_published_arrays_are_named(place, damage):
    path = records.publish("s") / "logits.npz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="logits.npz is damaged or missing"):
        records.arrays("s", CONDITION, 0, "published")


def test_what_it_was_made_by_is_published(place):
    run = made_up(5)[0] | {"device": "NVIDIA H200", "threads": 8, "versions": {"torch": "2.15.0"},
                           "settings": {"reference": 0.4},
                           "provenance": {"version": "0.2.0", "code": "m", "commit": "c1",
                                          "training": {"version": "0.1.0", "code": "t", "commit": "c0"}}}
    records.write(folder(place, 5), run, *made_up(5)[1:])
    records.publish("s")
    row = records.load("s", "published").runs.iloc[-1]
    assert (row.made["device"], row.made["threads"], row.made["versions"]) == ("NVIDIA H200", 8, {"torch": "2.15.0"})
    assert row.made["provenance"] == run["provenance"] and row.test_images == 40
    assert records.reference(records.load("s", "published").runs.iloc[-1:]) == 0.4


# ---- the size of what is published ----

ATTACKS = {"noise": .02, "fgsm": .2, "pgd": .3, "apgd": .3}


def as_large(seed, classes, features, n=1000):
    """A record as large as a GPU study's: the shapes of the real ones, values that nobody measured."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(classes, features)) / np.sqrt(features)
    bias, labels = rng.uniform(-1, 1, classes) / np.sqrt(features), rng.integers(classes, size=n)
    vectors = np.abs(rng.normal(size=(n, features))) * .6 + weight[labels] * 6
    clean = vectors @ weight.T + bias
    logits = {"labels": labels, "clean": clean.astype(np.float32)}
    positive = ["norm", "span_norm", "apex_gap", *(f"rho{s}_{a}" for s in ("", "_span") for a in ATTACKS)]
    signed = ["margin", "cos_label", "cos_label_span", "cos_predicted", "cos_predicted_span",
              *(f"toward{s}_{a}" for s in ("", "_span") for a in ATTACKS)]
    samples = pd.DataFrame({"image": np.arange(n), "label": labels, "prediction": clean.argmax(1)}
                           | {name: rng.beta(5, 1, n) for name in ("confidence", "label_probability")}
                           | {name: rng.gamma(5, size=n) for name in positive}
                           | {name: rng.normal(.4, .2, size=n) for name in signed}).astype(
                               {name: np.float32 for name in positive + signed})
    for attack, size in ATTACKS.items():
        moved = clean + size * rng.normal(size=vectors.shape) @ weight.T
        logits[f"moved.{attack}"] = moved.astype(np.float32)
        for part in ("displacement", "radial", "displacement_span", "radial_span"):
            logits[f"{part}.{attack}"] = rng.normal(size=n).astype(np.float32)
        samples[f"breaks_{attack}"] = rng.choice([.1, .2, .4, 1, 2, 4, 8], n)
        samples[f"label_{attack}"] = moved.argmax(1)
    head = {f"{when}{name}": a.astype(np.float32) for when in ("", "untrained.")
            for name, a in (("weight", weight), ("bias", bias), ("class_means", weight))}
    run = made_up(seed, study="large")[0] | {"scalars": {f"a_long_name_{i}": rng.random() for i in range(150)},
                              "curves": {"classes": rng.random(classes).tolist()}
                              | {a: {k: rng.random(7).tolist() for k in ("eps", "success", "robust")} for a in ATTACKS},
                              "history": {f"curve_{i}": rng.random(60).tolist() for i in range(6)}}
    return run, samples.assign(subset=True), logits, head


def published_megabytes(place, classes, features, runs, tried=3):
    """What a study of so many runs takes, from the size of a few."""
    for seed in range(tried):
        records.write(records.run_folder("large", CONDITION, seed, place / "runs"), *as_large(seed, classes, features))
    root = records.publish("large", place / "runs", place / "results")
    return sum(path.stat().st_size for path in root.iterdir()) * runs / tried / 1e6


def test_the_gpu_studies_will_fit(tmp_path):
    """20 runs of CIFAR-100 and 80 of the families beside CIFAR-10's, digits and digits-2d: 25 MB."""
    sizes = {"cifar100": published_megabytes(tmp_path / "a", 100, 512, 20),
             "families": published_megabytes(tmp_path / "b", 10, 900, 80),
             "cifar10": published_megabytes(tmp_path / "c", 10, 512, 20)}
    sizes |= {"cifar10-cpu": sizes["cifar10"], "digits": 3, "digits-2d": .6}
    assert sum(sizes.values()) < 25.4, sizes
    logits = as_large(0, 100, 512)[2]
    back = compact.unpacked(compact.published_logits(logits))
    assert len(back["clean"]) == 1000 and len(back["moved.pgd"]) == 250
    for name in ("clean", *(f"moved.{attack}" for attack in ATTACKS)):
        alike(back[name], logits[name][:len(back[name])])


def test_everything_that_is_published_fits():
    root = records.results_root()
    assert sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) < 40e6


def test_only_the_wanted_identities_are_published(place):
    records.set_aside(folder(place, 1))
    records.write(folder(place, 1), *made_up(1, recipe={"epochs": 6}))
    wanted = {made_up(seed)[0]["identity"] for seed in range(3)}
    records.publish("s", only=wanted)
    assert records.load("s", "published").runs.seed.tolist() == [0, 2]


def test_a_damaged_published_file_is_named(place):
    root = records.publish("s")
    (root / "runs.jsonl").write_text('{"study": "s"}\n')
    with pytest.raises(ValueError, match="runs.jsonl is damaged"):
        records.load("s", "published")


def test_records_set_aside_are_ignored_and_kept(place):
    first, second = records.set_aside(folder(place, 2)), None
    records.write(folder(place, 2), *made_up(2))
    second = records.set_aside(folder(place, 2))
    assert first != second and records.read_run(first) == records.read_run(second)
    assert records.load("s").runs.seed.tolist() == [0, 1]


def test_no_records_says_where_it_looked_and_what_to_do(place):
    with pytest.raises(ValueError) as error:
        records.load("other")
    for part in (str(place / "runs" / "other"), str(place / "results" / "other"), "make study STUDY=other"):
        assert part in str(error.value)


def test_records_are_found_from_a_folder_below(place, monkeypatch):
    (place / "nbs" / "findings").mkdir(parents=True)
    monkeypatch.chdir(place / "nbs" / "findings")
    assert len(records.load("s").runs) == 3
    monkeypatch.setenv("REPSPACE_RUNS", str(place / "elsewhere"))
    with pytest.raises(ValueError, match="elsewhere"):
        records.load("s")


@pytest.mark.parametrize("name", ["../s", "a/b", "", ".hidden", "a b"])
def test_names_cannot_lead_out_of_the_folder(name):
    with pytest.raises(ValueError, match="no name for a folder"):
        records.run_folder(name, CONDITION, 0)


# ---- what was loaded knows where from ----

def test_what_was_loaded_reads_arrays_from_its_own_folders(place, tmp_path_factory, monkeypatch):
    records.publish("s")
    for seed in range(3):
        records.set_aside(folder(place, seed)) if seed == 2 else None
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    recorded = records.load("s", runs="runs", results="results")
    monkeypatch.chdir(elsewhere)
    assert recorded.runs.source.tolist() == ["fresh", "fresh", "published"]
    for same in (recorded, recorded._replace(samples=recorded.samples[:3]), copy.copy(recorded),
                 pickle.loads(pickle.dumps(recorded))):
        for seed, source in enumerate(recorded.runs.source):
            expected = records.arrays("s", CONDITION, seed, source, place / "runs", place / "results")
            got = same.arrays(CONDITION, seed)
            assert list(got) == list(expected)
            for name in got:
                np.testing.assert_array_equal(got[name], expected[name])
    with pytest.raises(ValueError, match="no published record|no records of study"):
        records.arrays("s", CONDITION, 2)


def test_a_run_that_was_loaded_fresh_is_never_answered_by_the_published_one(place):
    records.publish("s")
    recorded = records.load("s")
    (folder(place, 1) / "logits.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="1/logits.safetensors is damaged"):
        recorded.arrays(CONDITION, 1)
    assert len(records.arrays("s", CONDITION, 1)["clean"]) == 10, "asked for whichever is there"


def test_records_made_by_hand_know_no_folder(place):
    recorded = records.load("s")
    by_hand = records.Records(recorded.runs, recorded.samples)
    assert by_hand.folders is None and tuple(by_hand) == tuple(recorded)
    with pytest.raises(ValueError, match="know no folder"):
        by_hand.arrays(CONDITION, 0)
    with pytest.raises(ValueError, match="0 runs of .* seed 7"):
        recorded.arrays(CONDITION, 7)
    twice = recorded._replace(runs=pd.concat([recorded.runs, recorded.runs]))
    with pytest.raises(ValueError, match="2 runs of"):
        twice.arrays(CONDITION, 0)


def test_a_published_file_is_read_once_and_stays_as_it_was_loaded(place, monkeypatch):
    root, opened = records.publish("s"), []
    read = files.read_file
    monkeypatch.setattr(files, "read_file", lambda path, *how: (opened.append(path.name), read(path, *how))[1])
    recorded = records.load("s", "published")
    first = [recorded.arrays(CONDITION, seed) for seed in range(3)]
    shutil.rmtree(root)
    again = [recorded.arrays(CONDITION, seed) for seed in range(3)]
    assert sorted(opened) == ["heads.npz", "logits.npz", "manifest.json", "manifest.json", "runs.jsonl", "samples.parquet"]
    for one, other in zip(first, again):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


# ---- whose folder ----

def test_a_folder_of_somebody_else_hides_nothing(place, tmp_path_factory, monkeypatch):
    package = [root for root in records.places.results_places() if root != place / "results"]
    deep = place / "nbs" / "deep"
    (deep / "results" / "figures").mkdir(parents=True)
    (deep / "results" / "mine.csv").write_text("a,b")
    (deep / "runs" / "Nov25_10-00-00").mkdir(parents=True)
    (deep / "runs" / "Nov25_10-00-00" / "events.out.tfevents").write_bytes(b"")
    monkeypatch.chdir(deep)
    assert records.runs_root() == place / "runs"
    assert records.places.results_places() == [place / "results", *package]
    assert len(records.load("s").runs) == 3
    if package:
        assert "digits" in records.studies("published") and len(records.load("digits", "published").runs)
    assert records.publish("s") == place / "results" / "s"
    assert records.studies() == sorted({"s", *records.studies("published", results=package)})


def test_an_empty_folder_hides_no_records_above_it(place, monkeypatch):
    for name in ("runs", "results"):
        (place / "deep" / name).mkdir(parents=True)
    monkeypatch.chdir(place / "deep")
    assert records.runs_root() == place / "runs" and len(records.load("s").runs) == 3


def test_a_study_is_that_of_the_first_place_that_has_it(place, monkeypatch):
    records.publish("s")
    for seed in range(1, 3):
        records.set_aside(folder(place, seed))
    near = records.publish("s", results=place / "deep" / "results")
    assert len(records.Folders(results=[place / "results", place / "deep" / "results"]).published("s").runs) == 3
    monkeypatch.chdir(near.parents[1])
    assert len(records.load("s", "published").runs) == 1


# ---- one bad record stops no other ----

BAD = [{"scalars": [1]}, {"scalars": {"accuracy": "high"}}, {"scalars": {"accuracy": [0.9]}}, {"feature_dim": "two"},
       {"test_images": 1.5}, {"seconds": 3}, {"seconds": {"train": "long"}}, {"provenance": "git"}, {"settings": [1]},
       {"identity": None}, {"identity": 5}, {"condition": ["a"]}, {"seed": "0"}, {"study": None}, {"recipe": "fast"}]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_record_that_no_table_can_hold_is_named_and_left_out(place, bad, caplog):
    records.publish("s")
    file, lines = folder(place, 1) / "run.json", place / "results" / "s" / "runs.jsonl"
    file.write_text(json.dumps(json.loads(file.read_text()) | bad))
    text = lines.read_text().splitlines()
    lines.write_text("\n".join([text[0], json.dumps(json.loads(text[1]) | bad), text[2]]))
    for source, where in (("fresh", file), ("published", f"{lines} is damaged or missing: line 2")):
        caplog.clear()
        assert records.load("s", source).runs.seed.tolist() == [0, 2]
        assert str(where) in caplog.text and caplog.text.count("left out") == 1
    assert records.studies() == sorted({"s", *records.studies("published")})
    assert len(records.published_identities("s")) == 2
    before = {p: p.read_bytes() for p in lines.parent.iterdir()}
    with pytest.raises(ValueError, match="damaged"):
        records.publish("s", place / "none")
    assert {p: p.read_bytes() for p in lines.parent.iterdir()} == before
    with pytest.raises(ValueError):
        records.write(folder(place, 9), made_up(9)[0] | bad, *made_up(9)[1:])
    assert not folder(place, 9).exists()


def test_a_run_of_what_was_added_from_outside_is_loaded_like_any_other(place):
    added = dict(data="my-data", model="my-net", regularizer="my-own:3+mixup:1.0", recipe={"my": {"deep": [1]}},
                 measures="mine", feature_dim=7)
    condition = "my-data.my-net.my-own-3"
    records.write(folder(place, 0, condition), *made_up(0, condition, **added))
    records.publish("s")
    for source in ("fresh", "published"):
        recorded = records.load("s", source)
        row = recorded.runs.set_index("condition").loc[condition]
        assert (row.data, row.model, row.regularizer) == ("my-data", "my-net", added["regularizer"])
        assert row.feature_dim == 7 and row.recipe == added["recipe"]
        assert len(recorded.arrays(condition, 0)["labels"])


@pytest.mark.parametrize("name", ["runs.jsonl", "samples.parquet"])
def test_damaged_published_files_are_said_and_stop_no_fresh_record(place, name, caplog):
    root = records.publish("s")
    records.set_aside(folder(place, 2))
    (root / name).write_bytes(b"{")
    assert records.load("s").runs.seed.tolist() == [0, 1] and f"{root / name} is damaged" in caplog.text
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        records.load("s", "published")
    (root / name).unlink()
    assert "s" in records.studies("published")
    with pytest.raises(ValueError, match=f"{name} is damaged or missing"):
        records.load("s", "published")


def test_a_published_run_without_rows_or_said_twice_is_named(place, caplog):
    root = records.publish("s")
    lines = (root / "runs.jsonl").read_text().splitlines()
    extra = json.dumps(json.loads(lines[0]) | {"seed": 5})
    (root / "runs.jsonl").write_text("\n".join([*lines, lines[1], extra]))
    assert records.load("s", "published").runs.seed.tolist() == [0, 1, 2]
    assert "line 4" in caplog.text and "stands twice" in caplog.text
    assert f"line 5: manifest.json knows no run of {CONDITION}, seed 5" in caplog.text
    as_schema_2(root)   # where nothing else says which runs there are
    assert records.load("s", "published").runs.seed.tolist() == [0, 1, 2] and "3 of 3 runs of s are of schema 2" in caplog.text
    assert "line 4" in caplog.text and f"no rows of ('{CONDITION}', 5)" in caplog.text
    with pytest.raises(ValueError, match="logits.npz .* no arrays of .* seed 5"):
        records.arrays("s", CONDITION, 5, "published")


def test_a_record_in_the_place_of_another_is_named_and_left_out(place, caplog):
    shutil.copytree(folder(place, 0), folder(place, 4))
    shutil.copytree(folder(place, 0), folder(place, 0, "another.condition"))
    assert records.load("s").runs.seed.tolist() == [0, 1, 2]
    assert str(folder(place, 4)) in caplog.text and "another.condition" in caplog.text
    with pytest.raises(ValueError, match="it is the record of"):
        records.publish("s")


def test_a_run_copied_into_another_study_is_named_and_left_out(place):
    shutil.copytree(folder(place, 0), records.run_folder("t", CONDITION, 0, place / "runs"))
    with pytest.raises(ValueError, match=f"t/{CONDITION}/0: it is the record of study s"):
        records.load("t")


def test_an_unreadable_failure_mark_does_not_hide_the_others(place):
    records.mark_failed(folder(place, 7), "the loss became nan")
    folder(place, 8).with_name("8.failed.json").write_text("{")
    reasons = records.failed("s").reason.tolist()
    assert reasons[0] == "the loss became nan" and "8.failed.json is damaged" in reasons[1]


# ---- what is no damage ----

@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES, errno.EIO, errno.ENOMEM])
def test_an_error_that_says_nothing_about_the_file_is_not_damage(place, code, monkeypatch):
    def fail(path, *_, **__):
        raise OSError(code, os.strerror(code), str(path))
    for target in ("open", "pq.read_table"):
        with monkeypatch.context() as patch:
            if target == "open": patch.setattr(files, "open", fail, raising=False)
            else: patch.setattr(files.pq, "read_table", fail)
            with pytest.raises(OSError) as error:
                records.check(folder(place, 0))
            assert error.value.errno == code and not isinstance(error.value, ValueError)
    with monkeypatch.context() as patch:
        patch.setattr(files, "open", fail, raising=False)
        with pytest.raises(OSError):
            records.set_aside(folder(place, 0))
    assert len(records.load("s").runs) == 3


def test_no_memory_is_not_damage(place, monkeypatch):
    def fail(*_, **__):
        raise files.pa.ArrowMemoryError("malloc of size 64 failed")
    with monkeypatch.context() as patch:
        patch.setattr(files.pq, "read_table", fail)
        with pytest.raises(records.Unreadable, match="samples.parquet") as error:
            records.load("s")
        assert error.value.errno == errno.ENOMEM


@pytest.mark.parametrize("keep", ["samples", "scalars"])
def test_less_is_kept_and_the_rest_is_named(place, keep):
    records.publish("s")
    whole = records.load("s", "published")
    records.publish("s", keep=keep)
    assert not any((place / "results" / "s" / name).exists() for name in ("runs.jsonl", "logits.npz", "heads.npz"))
    less = records.load("s", "published")
    assert less.runs["accuracy"].tolist() == whole.runs["accuracy"].tolist()
    assert less.runs["history"].tolist() == [{"loss": [1.0]}] * 3
    kept = [name for name in ("condition", "seed", *ROWS) if name in whole.samples]
    if keep == "samples": pd.testing.assert_frame_equal(less.samples, whole.samples[kept])
    else: assert len(less.samples) == 0 and less.samples[less.samples["subset"]].empty
    with pytest.raises(records.NotKept, match=f"results/s has no logits.npz: .* only {keep} are kept"):
        less.arrays(CONDITION, 1)
    assert "s" in records.studies("published") and len(records.published_identities("s")) == 3
    fresh = records.load("s")
    assert len(fresh.samples) == 120 and len(fresh.arrays(CONDITION, 1)["clean"]) == 40


def test_what_was_not_kept_comes_from_fresh_records_only(place):
    root = records.publish("s", keep="scalars")
    before = {p.name: p.read_bytes() for p in root.iterdir()}
    assert {p.name: p.read_bytes() for p in records.publish("s", keep="scalars").iterdir()} == before
    shutil.rmtree(folder(place, 0))
    with pytest.raises(records.NotKept, match="of 1 runs .* only scalars are kept, and keep is arrays"):
        records.publish("s")
    assert {p.name: p.read_bytes() for p in root.iterdir()} == before
    records.publish("s", keep="arrays", drop=[f"{CONDITION}/0"], only=set(records.load("s", "fresh").runs["identity"]))
    assert len(records.load("s", "published").arrays(CONDITION, 1)["clean"]) == 10
    with pytest.raises(ValueError, match="keep 'all' is unknown: allowed are arrays, samples, scalars"):
        records.publish("s", keep="all")


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"", lambda b: b[::-1], lambda b: b + b"\0"])
def test_damaged_compressed_lines_are_named_and_published_over_by_nobody(place, damage, caplog):
    root = records.publish("s", keep="samples")
    file = root / "runs.jsonl.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="runs.jsonl.gz is damaged or missing"):
        records.load("s", "published")
    with pytest.raises(ValueError, match="runs.jsonl.gz"):
        records.publish("s", keep="samples")


def test_a_bomb_of_compressed_lines_is_not_believed(place, monkeypatch):
    root = records.publish("s", keep="scalars")
    monkeypatch.setattr(files, "LARGE", 1000)
    with pytest.raises(ValueError, match="holds more than is believed"):
        records.load("s", "published")


def test_a_publisher_killed_between_two_kinds_of_keeping_leaves_one_of_them(place, monkeypatch):
    from repspace.records import transaction
    root = records.publish("s")
    with monkeypatch.context() as patch:
        patch.setattr(transaction, "_settle", lambda root: None)
        records.publish("s", keep="scalars")
    assert records.load("s", "published").runs["history"].tolist() == [{"loss": [1.0]}] * 3
    records.publish("s", keep="scalars")
    assert sorted(p.name for p in root.iterdir()) == [".lock", "manifest.json", "runs.jsonl.gz"]
