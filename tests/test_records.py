"""Faults that a record must survive: killed writers, damaged files, and results of mixed origin."""
import json
import logging
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest

from repspace import records

CONDITION = "digits.tiny-cnn.none"


def made_up(seed, condition=CONDITION, n=40, **settings):
    """The four parts of a record that nobody measured."""
    rng = np.random.default_rng(seed)
    labels, clean = rng.integers(3, size=n), rng.normal(size=(n, 3)).astype(np.float32)
    run = dict(study="s", condition=condition, seed=seed, data="digits", model="tiny-cnn", feature_dim=None,
               regularizer="none", recipe={"epochs": 5}, measures="standard") | settings
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
        from test_records import made_up
        die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        sync, records._sync = records._sync, lambda path: die() if path.name == {step!r} else sync(path)
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
    np.testing.assert_array_equal(part["clean"], whole["clean"][:10])
    np.testing.assert_array_equal(part["moved.pgd"], whole["moved.pgd"][:10])
    np.testing.assert_allclose(part["head.weight"], whole["head.weight"], rtol=1e-6)
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
    np.testing.assert_array_equal(records.arrays("s", CONDITION, 0, "published")["clean"], made_up(0)[2]["clean"][:10])


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
