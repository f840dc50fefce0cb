"""Nothing is trusted that is not bound: records to their place and parts, published files to each other."""
import errno
import io
import itertools
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import time
import tracemalloc
import zipfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from repspace import records
from repspace.records import files, transaction
from repspace.vocabulary import Recipe
from test_records import CONDITION, as_schema_2, folder, made_up, place  # noqa: F401: the fixture

PARTS = records.FILES[1:]
PUBLISHED = ("manifest.json", *transaction.PUBLISHED)
HERE = Path(__file__).resolve().parent


def content(root):
    """{relative name: bytes} of all files below `root`, but locks."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file() and p.name != ".lock"}


def same(one, other):
    pd.testing.assert_frame_equal(one.runs, other.runs)
    pd.testing.assert_frame_equal(one.samples, other.samples)


def left_out(source, whole, caplog):
    """The seeds that are left out of what `load` gives; the others are as in `whole`, and arrays as well."""
    caplog.clear()
    try:
        now = records.load("s", source)
    except ValueError:
        return {0, 1, 2}
    missing = set(whole.runs.seed) - set(now.runs.seed)
    assert len(now.runs) == 3 - len(missing) and (not missing or "left out" in caplog.text)
    rest = whole._replace(runs=whole.runs[~whole.runs.seed.isin(missing)].reset_index(drop=True),
                          samples=whole.samples[~whole.samples.seed.isin(missing)].reset_index(drop=True))
    same(now, rest)
    return missing


# ---- a record is bound to its place and its parts ----

@pytest.mark.parametrize("name", records.FILES)
def test_a_file_of_another_run_is_named_and_that_run_left_out(place, name, caplog):
    whole = records.load("s")
    shutil.copy(folder(place, 0) / name, folder(place, 1) / name)
    assert left_out("fresh", whole, caplog) == {1} and str(folder(place, 1)) in caplog.text
    with pytest.raises(ValueError, match="none/1"):
        records.check(folder(place, 1))
    if name != "samples.parquet":   # which arrays do not need
        with pytest.raises(ValueError, match="none/1"):
            records.arrays("s", CONDITION, 1, "fresh")
        with pytest.raises(ValueError, match="none/1"):
            whole.arrays(CONDITION, 1)
    with pytest.raises(ValueError, match="none/1"):
        records.publish("s")
    assert not (place / "results" / "s").exists()


def test_each_exchange_of_files_between_runs_is_noticed(place, caplog):
    """All 2^4 - 2 ways to take some files of another run; to take all is to take its place."""
    whole, mine = records.load("s"), {name: (folder(place, 1) / name).read_bytes() for name in records.FILES}
    for taken in itertools.product((False, True), repeat=4):
        for name, other in zip(records.FILES, taken):
            (folder(place, 1) / name).write_bytes((folder(place, 0) / name).read_bytes() if other else mine[name])
        assert left_out("fresh", whole, caplog) == ({1} if any(taken) else set()), taken


@pytest.mark.parametrize("to", [("s", CONDITION, 4), ("s", "digits.tiny-cnn.mixup-1.0", 0), ("t", CONDITION, 0)], ids=str)
def test_a_copy_in_another_place_is_not_ours(place, to, caplog):
    shutil.copytree(folder(place, 0), records.run_folder(*to, place / "runs"))
    with pytest.raises(records.NotOurs, match=f"it is the record of study s, condition {CONDITION}, seed 0"):
        records.check(records.run_folder(*to, place / "runs"))
    with pytest.raises(ValueError, match="it is the record of study s"):
        records.arrays(*to, "fresh")
    with pytest.raises(ValueError, match="it is the record of study s"):
        records.publish(to[0])
    assert records.load("s").runs.seed.tolist() == [0, 1, 2]


def test_what_is_written_is_written_in_its_place(place):
    with pytest.raises(records.NotOurs, match="it is the record of study s"):
        records.write(folder(place, 8), *made_up(7))
    assert not folder(place, 8).exists()


@pytest.mark.parametrize("name", records.FILES)
def test_a_flipped_bit_is_never_a_wrong_value(place, name, caplog):
    whole, file = records.load("s"), folder(place, 1) / name
    bytes_, rng = file.read_bytes(), np.random.default_rng(0)
    for at in rng.choice(len(bytes_), 60, replace=False):
        flipped = bytes_[at] ^ (1 << rng.integers(8))
        file.write_bytes(bytes_[:at] + bytes([flipped]) + bytes_[at + 1:])
        missing = left_out("fresh", whole, caplog)
        assert missing == {1} or not missing and name == "run.json" and chr(bytes_[at]).isspace() and chr(flipped).isspace()


def test_an_edited_scalar_or_seed_is_noticed(place):
    file = folder(place, 1) / "run.json"
    run = json.loads(file.read_text())
    for change in ({"scalars": run["scalars"] | {"accuracy": .99}}, {"seed": 0}, {"schema": 2}, {"parts": {}},
                   {"identity": "0"}, {"new": 1}, {"recipe": {"epochs": 5.0}}):
        file.write_text(json.dumps(run | change))
        with pytest.raises(records.Damaged, match="1/run.json is damaged or missing"):
            records.check(folder(place, 1))
    for gone in ("parts", "checksum", "schema", "scalars"):
        file.write_text(json.dumps({k: v for k, v in run.items() if k != gone}))
        with pytest.raises(records.Damaged, match="1/run.json is damaged or missing"):
            records.check(folder(place, 1))
    file.write_text(json.dumps(run, sort_keys=True))   # another layout of the same is the same
    assert records.check(folder(place, 1)) == run


def test_a_record_that_was_replaced_since_it_was_loaded_does_not_answer(place):
    recorded = records.load("s")
    records.set_aside(folder(place, 1))
    records.write(folder(place, 1), *made_up(1, recipe={"epochs": 6}))
    with pytest.raises(records.NotOurs, match="another than the one that was loaded"):
        recorded.arrays(CONDITION, 1)
    assert len(records.arrays("s", CONDITION, 1)["clean"]) == 40


def test_a_record_of_a_later_schema_is_neither_read_nor_set_aside(place):
    run, *rest = made_up(7)
    records.write(folder(place, 7), run, *rest)
    file = folder(place, 7) / "run.json"
    files.write_json(file, files.sealed(json.loads(file.read_text()) | {"schema": 4}))
    for look in (records.check, records.read_run, records.set_aside):
        with pytest.raises(records.NotOurs, match="7/run.json: it is of schema 4, and this version reads those up to 3"):
            look(folder(place, 7))
    assert records.load("s").runs.seed.tolist() == [0, 1, 2]


def test_identities_tell_apart_all_that_determines_a_run():
    settings = made_up(0)[0]
    others = [settings | change for change in ({"data_digest": "e"}, {"seed": 1}, {"recipe": {"epochs": 6}},
              {"model": "mlp"}, {"measures": "thorough"}, {"sources": ["m:a"]}, {"feature_dim": 2})]
    assert len({records.identity(each) for each in [settings, *others]}) == 8
    with pytest.raises(ValueError, match="settings lack .'data_digest'."):
        records.identity({k: v for k, v in settings.items() if k != "data_digest"})
    keys = [records.training_key(each) for each in [settings, *others]]
    assert keys[0] == keys[5] and len(set(keys)) == 7, "what is measured does not change the training"


# ---- errors are told apart ----

ERRORS = ["EMFILE", "ENFILE", "ENOMEM", "EACCES", "EPERM", "EIO", "ENOSPC", "EDQUOT", "ELOOP", "ESTALE", "EINTR"]


def cannot_open(monkeypatch, code, kind, name):
    """No file called `name` below the folder `kind` can be opened by a function of records."""
    def fail(path, *how, **more):
        if Path(path).name == name and kind in Path(path).parts: raise OSError(code, os.strerror(code), str(path))
        return open(path, *how, **more)
    monkeypatch.setattr(files, "open", fail, raising=False)


@pytest.mark.parametrize("code", ERRORS)
def test_an_error_of_the_system_renames_and_writes_nothing(place, code, monkeypatch, caplog):
    records.publish("s")
    code, whole, before = getattr(errno, code), records.load("s"), content(place)
    for name in records.FILES:
        with monkeypatch.context() as patch:
            cannot_open(patch, code, "runs", name)
            for act in (records.check, records.publish, *[records.set_aside] * (name == "run.json")):
                with pytest.raises(records.Unreadable, match="cannot be read now, and is left as it is") as error:
                    act("s" if act is records.publish else folder(place, 1))
                assert error.value.errno == code and not isinstance(error.value, ValueError)
                assert Path(error.value.filename).name == name
            if code in (errno.EACCES, errno.EPERM, errno.EIO):
                assert records.load("s").runs.source.tolist() == ["published"] * 3 and name in caplog.text
            else:
                with pytest.raises(records.Unreadable): records.load("s")
        assert content(place) == before
    for name in PUBLISHED:
        with monkeypatch.context() as patch:
            cannot_open(patch, code, "results", name)
            for act in (records.publish, records.published_identities):
                with pytest.raises(records.Unreadable): act("s")
        assert content(place) == before
    same(records.load("s"), whole)


@pytest.mark.parametrize("code", ["EMFILE", "EACCES", "ENOMEM"])
def test_a_run_that_cannot_be_read_now_is_not_made_again(place, code, monkeypatch):
    from repspace import study
    recipe = {"epochs": 1, "batch_size": 50, "lr": 0.05}
    condition = study.Condition("digits", "tiny-cnn", "none", recipe)
    for seed in range(2):
        settings = study.run_settings(condition, seed)
        run, *rest = made_up(seed)
        records.set_aside(folder(place, seed))
        records.write(folder(place, seed), run | settings | {"identity": records.identity(settings)}, *rest)
    assert study.missing_seeds("s", condition, [0, 1]) == []
    before = content(place)
    for name in records.FILES:
        with monkeypatch.context() as patch:
            cannot_open(patch, getattr(errno, code), "runs", name)
            with pytest.raises(records.Unreadable):
                study.missing_seeds("s", condition, [0, 1])
        assert content(place) == before


def test_a_folder_that_cannot_be_looked_into_is_not_empty(place, monkeypatch):
    def fail(path):
        if path.name == CONDITION: raise OSError(errno.EMFILE, "Too many open files", str(path))
        return real(path)
    real = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", fail)
    for act in (records.load, records.publish):
        with pytest.raises(records.Unreadable, match=CONDITION):
            act("s")


# ---- published files are bound to each other ----

def two_states(place):
    """What was published, before and after all runs were made anew: two dicts of contents."""
    root = records.publish("s")
    before, whole = content(root), records.load("s", "published")
    for seed in range(3):
        records.set_aside(folder(place, seed))
        run, *rest = made_up(seed + 100)
        records.write(folder(place, seed), run | {"seed": seed}, *rest)
    records.publish("s")
    return root, before, content(root), whole


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_of_yesterday_among_those_of_today_is_named(place, name, caplog):
    root, before, after, _ = two_states(place)
    today = records.load("s", "published")
    (root / name).write_bytes(before[name])
    missing = left_out("published", today, caplog)
    assert missing == ({0, 1, 2} if not name.endswith("npz") else set())
    if name.endswith("npz"):
        with pytest.raises(records.Damaged, match=name): today._replace(folders=records.Folders()).arrays(CONDITION, 1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_flipped_bit_in_what_is_published_is_never_a_wrong_value(place, name, caplog):
    file = records.publish("s") / name
    whole = records.load("s", "published")
    arrays = {seed: whole.arrays(CONDITION, seed) for seed in range(3)}
    bytes_, rng = file.read_bytes(), np.random.default_rng(0)
    for at in rng.choice(len(bytes_), 60, replace=False):
        file.write_bytes(bytes_[:at] + bytes([bytes_[at] ^ (1 << rng.integers(8))]) + bytes_[at + 1:])
        missing = left_out("published", whole, caplog)
        assert missing or name.endswith("npz") or name == "manifest.json" or file.read_bytes().split() == bytes_.split()
        for seed in set(range(3)) - missing:
            try: again = records.arrays("s", CONDITION, seed, "published")
            except ValueError as error: assert name in str(error)
            else: assert all(np.array_equal(again[key], arrays[seed][key]) for key in arrays[seed])


def test_a_published_study_under_another_name_is_not_that(place):
    root = records.publish("s")
    shutil.copytree(root, root.with_name("t"))
    with pytest.raises(ValueError, match="t/manifest.json: it is that of study s"):
        records.load("t", "published")
    assert "t" in records.studies("published")


def test_published_files_that_lost_their_manifest_are_not_taken_for_old_ones(place):
    root = records.publish("s")
    (root / "manifest.json").unlink()
    with pytest.raises(ValueError, match="its checksum is missing, since manifest.json is"):
        records.load("s", "published")
    as_schema = [json.loads(line) | {"schema": 2} for line in (root / "runs.jsonl").read_text().splitlines()]
    assert {line["seed"] for line in as_schema} == {0, 1, 2}


# ---- publishing is a transaction ----

CHILD = """
import errno, json, os, shutil, sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
os.environ.pop("REPSPACE_RUNS", None)
from repspace import records
from repspace.records import files, transaction
from test_records import CONDITION, made_up

def steps(at, act):
    # `act` before the step number `at` of all that write, rename or remove; returns how many there were
    count = 0
    def watched(function):
        def step(*args, **more):
            nonlocal count
            count += 1
            if count == at: act()
            return function(*args, **more)
        return step
    os.replace, os.unlink, files._sync = watched(os.replace), watched(os.unlink), watched(files._sync)
    Path.write_bytes, Path.unlink = watched(Path.write_bytes), watched(Path.unlink)
    return lambda: count
"""


def child(place, script, **more):
    code = CHILD.format(here=str(HERE)) + textwrap.dedent(script)
    return subprocess.Popen([sys.executable, "-c", code], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **more)


def done(process):
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out


def prepared(place):
    """Two states of the study: results/ holds the first, later/ what the second will be; and both as they are read."""
    root, before, after, one = two_states(place)
    two = records.load("s", "published")
    shutil.move(root, place / "later")
    root.mkdir()
    for name, bytes_ in before.items(): (root / name).write_bytes(bytes_)
    return root, one, two


def test_a_publisher_killed_at_any_step_leaves_the_old_state_or_the_new(place):
    root, one, two = prepared(place)
    out = done(child(place, """
        import pyarrow   # the thread pool is to be started after each fork
        number = 0
        while True:
            number += 1
            shutil.copytree("results", f"killed/{number}")
            child = os.fork()
            if not child:
                steps(number, lambda: os._exit(9))
                records.publish("s", results=f"killed/{number}")
                os._exit(0)
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0: break
        print(number)
    """))
    last, states = int(out), []
    assert last > 20, "every file, its rename, the folder"
    for number in range(1, last + 1):
        results = place / "killed" / str(number)
        found = records.load("s", "published", results=results)
        new = found.runs.accuracy.tolist() == two.runs.accuracy.tolist()
        same(found, two if new else one)
        for seed in range(3):
            assert found.arrays(CONDITION, seed).keys() == made_up(seed)[2].keys() | {"head.weight", "head.bias"}
        states.append(new)
        records.publish("s", results=results)
        assert content(results / "s") == content(place / "later"), "the next publisher settles it"
    assert states == sorted(states) and not states[0] and states[-1], "one moment at which it changes"


def test_a_disk_that_is_full_at_any_step_leaves_the_old_state_or_the_new(place):
    root, one, two = prepared(place)
    done(child(place, """
        def full(): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        number, states = 0, []
        before = {p.name: p.read_bytes() for p in Path("results/s").iterdir()}
        while True:
            number += 1
            shutil.copytree("results", f"full/{number}")
            child = os.fork()
            if not child:
                steps(number, full)
                try: records.publish("s", results=f"full/{number}")
                except OSError as error: os._exit(3 if error.errno == errno.ENOSPC else 4)
                os._exit(0)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert code in (0, 3), code
            if code == 0: break
    """))
    states, numbers = [], sorted(int(p.name) for p in (place / "full").iterdir())
    assert len(numbers) > 20
    for number in numbers:
        results = place / "full" / str(number)
        found = records.load("s", "published", results=results)
        states.append(found.runs.accuracy.tolist() == two.runs.accuracy.tolist())
        same(found, two if states[-1] else one)
        records.publish("s", results=results)
        assert content(results / "s") == content(place / "later")
    assert states == sorted(states) and not states[0] and states[-1]


def test_who_reads_while_another_publishes_sees_one_state(place):
    """Made anew and published again and again by one process; read by this one: scalars, rows, arrays of one version."""
    for version in range(2):
        for seed in range(3):
            run, samples, logits, head = made_up(seed)
            run |= {"study": "v", "scalars": {"accuracy": float(version)}}
            logits |= {"version": np.full(40, version)}
            at = records.run_folder("v", CONDITION, seed, place / f"version{version}")
            records.write(at, run, samples.assign(version=version), logits, {"weight": head["weight"] * 0 + version})
    records.publish("v", "version0")
    process = child(place, """
        print("ready", flush=True)
        end, number = time.monotonic() + 4, 0
        while time.monotonic() < end:
            number += 1
            records.publish("v", f"version{number % 2}")
        print(number)
    """)
    assert process.stdout.readline() == "ready\n"
    seen = []
    while process.poll() is None:
        recorded = records.load("v", "published")
        versions = {*recorded.runs.accuracy, *recorded.samples.version}
        for seed in range(3):
            arrays = recorded.arrays(CONDITION, seed)
            versions |= {*arrays["version"], *arrays["head.weight"].ravel()}
        assert len(versions) == 1, versions
        seen += versions
    assert int(done(process)) > 5 and len(seen) > 5 and set(seen) == {0, 1}


def test_two_publishers_lose_nobodys_runs(place):
    for who in range(2):
        for seed in (2 * who, 2 * who + 1):
            run, *rest = made_up(seed)
            records.write(records.run_folder("r", CONDITION, seed, place / f"of{who}"), run | {"study": "r"}, *rest)
    script = """
        import threading
        for number in range(20):
            go = Path(f"go{number}")
            Path(f"ready{number}-WHO").touch()
            while not go.exists(): time.sleep(.001)
            records.publish("r", "ofWHO", f"race/{number}")
    """
    both = [child(place, script.replace("WHO", str(who))) for who in range(2)]
    for number in range(20):
        end = time.monotonic() + 60
        while not all((place / f"ready{number}-{who}").exists() for who in range(2)):
            assert time.monotonic() < end and not any(process.poll() for process in both)
            time.sleep(.002)
        (place / f"go{number}").touch()
    for process in both: done(process)
    first = content(place / "race" / "0")
    for number in range(20):
        assert records.load("r", "published", results=place / "race" / str(number)).runs.seed.tolist() == [0, 1, 2, 3]
        assert content(place / "race" / str(number)) == first


def test_who_waits_for_another_publisher_says_so(place, caplog):
    root = records.publish("s")
    process = child(place, """
        with transaction.locked(Path("results/s")):
            print("held", flush=True)
            time.sleep(4)
    """)
    assert process.stdout.readline() == "held\n"
    records.publish("s")
    assert f"{root}: another process publishes there, this one waits for it" in caplog.text
    done(process)


def test_what_comes_and_goes_is_said_before_it_happens(place, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    root = records.publish("s")
    assert "publishing 3 runs of s: 0 stay, 3 are new, 0 replaced, 0 go" in caplog.text
    records.set_aside(folder(place, 0))
    records.write(folder(place, 0), *made_up(0, recipe={"epochs": 6}))
    records.write(folder(place, 3), *made_up(3))
    monkeypatch.setattr(transaction, "commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): records.publish("s")
    assert "publishing 4 runs of s: 2 stay, 1 are new, 1 replaced, 0 go" in caplog.text
    assert records.load("s", "published").runs.recipe[0] == {"epochs": 5}


def test_fewer_runs_only_when_they_are_named(place):
    root = records.publish("s")
    before, wanted = content(root), {made_up(seed)[0]["identity"] for seed in (0, 1)}
    names = [f"{CONDITION}/{seed}" for seed in range(4)]
    for drop, said in (((), f"1 of the 3 published runs of s are not among the wanted ones, and would go: {names[2]}"),
                       ([names[3]], "are not published"), (names[:3], "nothing would be left of s")):
        with pytest.raises(ValueError, match=said):
            records.publish("s", only=wanted, drop=drop)
        assert content(root) == before
    records.publish("s", only=wanted, drop=[names[2]])
    assert records.load("s", "published").runs.seed.tolist() == [0, 1]
    records.publish("s", drop=[names[0]])
    assert records.load("s", "published").runs.seed.tolist() == [1, 2], "fresh, but named"


def test_litter_of_killed_publishers_goes_and_what_is_not_ours_stays(place):
    root = records.publish("s")
    for name in (".runs.jsonl.0123456789abcdef", "..heads.npz.0123456789abcdef.0123456789ab", ".manifest.json.0123456789ab"):
        (root / name).write_text("litter")
    (root / "notes.md").write_text("mine")
    (root / ".hidden").write_text("mine")
    records.publish("s")
    assert sorted(content(root)) == sorted([*PUBLISHED, ".hidden", "notes.md"])


def test_publishing_again_touches_no_file(place):
    root = records.publish("s")
    before = {p.name: p.stat().st_mtime_ns for p in root.iterdir() if p.name != ".lock"}
    records.publish("s")
    assert {p.name: p.stat().st_mtime_ns for p in root.iterdir() if p.name != ".lock"} == before


# ---- text is written when it changes ----

def test_text_is_written_whole_and_only_when_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "README.md"
    assert records.write_text(path, "one\n") and not records.write_text(path, "one\n")
    before = path.stat()
    assert not records.write_text(path, "one\n") and path.stat().st_mtime_ns == before.st_mtime_ns
    def full(self, content):
        with open(self, "wb") as file: file.write(content[:4096])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError): records.write_text(path, "two\n" * 5000)
    assert path.read_text() == "one\n" and os.listdir(tmp_path) == ["README.md"]
    assert records.write_text(path, "two\n" * 5000) and path.read_text() == "two\n" * 5000


# ---- no code, no bombs ----

def npy(array, **header):
    file = io.BytesIO()
    if header: np.lib.format.write_array_header_1_0(file, dict(shape=array.shape, fortran_order=False, descr="<f8") | header)
    else: np.lib.format.write_array(file, array, allow_pickle=True)
    return file.getvalue() + (array.tobytes() if header else b"")


class Bad:
    def __reduce__(self): return os.mkdir, ("executed",)


def crafted():
    """{name: the members of an archive}."""
    small = np.arange(4.)
    yield "objects", {"a.npy": npy(np.array([Bad()], object))}
    yield "pickle", {"a.npy": pickle.dumps(Bad())}
    yield "text", {"a.npy": npy(np.array(["abc"]))}
    yield "large", {"a.npy": npy(small, shape=(10 ** 13,))}
    yield "negative", {"a.npy": npy(small, shape=(-4, -10 ** 9))}
    yield "object header", {"a.npy": npy(small, descr="|O")}
    yield "no array", {"a": b"1, 2, 3"}
    yield "empty", {"a.npy": b""}
    yield "zeros", {"a.npy": npy(np.zeros(1 << 26))}   # 512 MiB in half a MiB
    yield "many zeros", {f"{i}.npy": npy(np.zeros(1 << 22)) for i in range(10)}


@pytest.mark.parametrize("name, members", list(crafted()), ids=lambda x: x if isinstance(x, str) else "")
def test_a_crafted_archive_executes_nothing_and_takes_no_memory(tmp_path, name, members, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for member, bytes_ in members.items(): archive.writestr(member, bytes_)
    tracemalloc.start()
    with pytest.raises(records.Damaged, match="x.npz"):
        for each in (arrays := files.read_npz("x.npz")):
            with files.naming("x.npz"): arrays[each]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e7 and not Path("executed").exists()


def test_a_name_that_stands_twice_in_an_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive, pytest.warns(UserWarning):
        for number in range(2): archive.writestr("a.npy", npy(np.full(2, number)))
    with pytest.raises(records.Damaged, match="a name stands in it twice"): files.read_npz(tmp_path / "x.npz")


def test_headers_that_ask_for_gigabytes_are_damage(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    def header(text): return len(text).to_bytes(8, "little") + text
    entry = {"a": {"dtype": "F32", "shape": [10 ** 12], "data_offsets": [0, 4 * 10 ** 12]}}
    for bytes_ in ((2 ** 62).to_bytes(8, "little") + b"{}", header(json.dumps(entry).encode()), header(b"[" * 100_000),
                   header(json.dumps({"a": entry["a"] | {"data_offsets": [0, 4]}}).encode()) + bytes(4)):
        (tmp_path / "x.safetensors").write_bytes(bytes_)
        with pytest.raises(records.Damaged, match="x.safetensors"): files.read_arrays(tmp_path / "x.safetensors")
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(5_000_000, np.int32)), pa.array([1.0]))
    pq.write_table(pa.table({f"c{i}": column for i in range(20)}), tmp_path / "x.parquet", compression="zstd")
    assert (tmp_path / "x.parquet").stat().st_size < 1e6
    with pytest.raises(records.Damaged, match="x.parquet .* say that they hold 800000000"):
        files.read_frame(tmp_path / "x.parquet")
    (tmp_path / "run.json").write_text("[" * 100_000)
    with pytest.raises(records.Damaged, match="run.json"): files.read_json(tmp_path / "run.json")


# ---- schema 2 ----

def fresh_of_schema_2(where):
    """Make the fresh record in `where` such as it was before there were checksums."""
    run = json.loads((where / "run.json").read_text())
    new = ("parts", "checksum", "data_digest")
    (where / "run.json").write_text(json.dumps({k: v for k, v in run.items() if k not in new} | {"schema": 2}))


def test_fresh_records_of_schema_2_are_read_and_said_to_be_without_checksums(place, caplog):
    whole = records.load("s")
    for seed in range(2): fresh_of_schema_2(folder(place, seed))
    now = records.load("s")
    pd.testing.assert_frame_equal(now.samples, whole.samples)
    assert now.runs.accuracy.tolist() == whole.runs.accuracy.tolist()
    assert "2 of 3 runs of s are of schema 2: without checksums" in caplog.text
    assert [made["schema"] for made in now.runs.made] == [2, 2, 3] and now.arrays(CONDITION, 0)["clean"].shape == (40, 3)
    records.publish("s")
    assert len(records.load("s", "published").runs) == 3


def old_identity(run):
    names = [name for name in records.IDENTITY if name != "data_digest"]
    return records.key({name: run[name] for name in names} | {"schema": 2})


def as_published_by_schema_2(place):
    for seed in range(3):
        records.set_aside(folder(place, seed))
        run, *rest = made_up(seed)
        run |= {"identity": old_identity(run), "training_key": "old", "recipe": run["recipe"] | {"momentum": .9}}
        records.write(folder(place, seed), run, *rest)
    root = records.publish("s")
    as_schema_2(root)
    return root


def test_published_records_of_schema_2_are_migrated(place, caplog):
    root = as_published_by_schema_2(place)
    before, old = content(root), records.load("s", "published")
    assert "3 of 3 runs of s are of schema 2: without checksums" in caplog.text
    caplog.clear()
    assert records.migrate("s", {"digits": "f" * 64}) == 3 and records.migrate("s", {}) == 0
    after, new = content(root), records.load("s", "published")
    assert not caplog.text and {name for name in before if before[name] != after[name]} == {"runs.jsonl"}
    pd.testing.assert_frame_equal(new.samples, old.samples)
    told = ("identity", "made")
    pd.testing.assert_frame_equal(new.runs.drop(columns=[*told]), old.runs.drop(columns=[*told]))
    for one, other in zip(before["runs.jsonl"].splitlines(), after["runs.jsonl"].splitlines()):
        one, other = json.loads(one), json.loads(other)
        assert other.pop("schema") == 3 and one.pop("schema") == 2
        assert other.pop("data_digest") == "f" * 64 and other.pop("data_digest_added_by") == "migration"
        identity, key = other.pop("identity"), other.pop("training_key")
        settings = other | {"recipe": {"epochs": 5}, "data_digest": "f" * 64}
        assert (identity, key) == (records.identity(settings), records.training_key(settings))
        assert (other.pop("identity_schema_2"), other.pop("training_key_schema_2")) == (one.pop("identity"), one.pop("training_key"))
        assert one == other
    records.publish("s", place / "none")
    assert content(root) == after, "what was migrated is published as any other"


def test_what_cannot_be_verified_is_not_migrated(place):
    root = as_published_by_schema_2(place)
    with pytest.raises(ValueError, match="'digits'"): records.migrate("s", {"cifar10": "f"})
    lines = (root / "runs.jsonl").read_text()
    (root / "runs.jsonl").write_text(lines.replace('"momentum": 0.9', '"momentum": 0.8', 1))
    before = content(root)
    with pytest.raises(ValueError, match="seed 0, is not that of its settings"): records.migrate("s", {"digits": "f"})
    assert content(root) == before


# ---- what is published here ----

def test_all_that_is_published_is_bound_and_verified_within_seconds(caplog):
    studies = records.studies("published", results=records.results_root())
    begun = time.process_time()
    for study in studies:
        published = records.Folders().published(study)
        assert published.state.manifest and not published.faults
        assert not any(isinstance(each, Exception) for each in published.state.contents.values())
    assert studies and time.process_time() - begun < 10
    for study in studies:
        for run in records.Folders().published(study).runs.values():
            defaults = {field.name: field.default for field in fields(Recipe)}
            recipe = {k: v for k, v in run["recipe"].items() if k not in defaults or defaults[k] != v}
            settings = run | {"recipe": recipe, "data_digest": records.digest_of_data(run)}
            assert run["identity"] == records.identity(settings)
    assert "schema 2" not in caplog.text
