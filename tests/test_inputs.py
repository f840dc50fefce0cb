"""What a study takes in: data that were replaced, weights of another run, folders of other people, machines that lack something."""
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from repspace import records
from repspace.study import checkpoint, digests
from repspace.study.__main__ import main
from repspace.study.checkpoint import Unusable, read_bound
from repspace.study.condition import Condition, load_classifier, missing_seeds, run_condition, run_settings, weights_path
from repspace.study.origin import code_key

RECIPE = {"epochs": 1, "batch_size": 8, "lr": 0.05}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("REPSPACE_VERIFY", raising=False)
    return tmp_path / "cache" / "repspace" / "digests"


def paint(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(256, size=(8, 8, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def images(tmp_path):
    """An image folder of two classes, written a while ago as far as its times say."""
    folder = tmp_path / "images"
    for part in ("train", "test"):
        for k, label in enumerate(("one", "two")):
            for i in range(4):
                paint(folder / part / label / f"{i}.png", 10 * k + i)
    return folder


# Data

def test_runs_of_images_that_were_replaced_are_made_again(place, images, caplog):
    condition = Condition(f"folder:{images}", "tiny-cnn", "none", RECIPE)
    make = lambda: run_condition(condition, [0], "tiny", progress=False).status.tolist()
    assert make() == ["made"] and make() == ["done"] and missing_seeds("tiny", condition, [0]) == []
    paint(images / "test" / "two" / "3.png", 99)
    assert make() == ["made"], "other images are another run, trained anew"
    assert "was made with other settings or data; it is kept as" in caplog.text
    assert len(list(place.glob("runs/weights/*.safetensors"))) == 2
    made = records.read_run(place / "runs" / "tiny" / condition.slug / "0")
    assert made["digests"]["data"] == digests.data_digest(condition.data)
    assert made["identity"] == records.identity(run_settings(condition, 0))


def test_a_copy_is_the_same_data_and_a_moved_or_renamed_image_is_not(images, tmp_path):
    one = digests.folder_digest(images)
    images.rename(tmp_path / "elsewhere")
    assert digests.folder_digest(tmp_path / "elsewhere") == one
    image = tmp_path / "elsewhere" / "test" / "two" / "3.png"
    image.rename(image.with_name("4.png"))
    assert digests.folder_digest(tmp_path / "elsewhere") != one




def test_what_is_kept_spares_the_reading_and_is_not_believed_when_anything_changed(images, cache, monkeypatch):
    monkeypatch.setattr(digests, "RECENT", -10 ** 12)   # as if the images had been written long ago
    one, read = digests.folder_digest(images), []
    hashed = digests._sha256
    monkeypatch.setattr(digests, "_sha256", lambda path, about: read.append(path) or hashed(path, about))
    assert digests.folder_digest(images) == one and not read
    image = images / "train" / "one" / "0.png"
    about, content = image.stat(), bytearray(image.read_bytes())
    content[-20] ^= 1
    image.write_bytes(content)
    os.utime(image, ns=(about.st_atime_ns, about.st_mtime_ns))   # same size, same time of content
    assert digests.folder_digest(images) != one and len(read) == 1
    read.clear()
    monkeypatch.setenv("REPSPACE_VERIFY", "1")
    assert digests.folder_digest(images) != one and len(read) == 16
    assert cache.stat().st_mode & 0o777 == 0o700


def test_two_writes_within_a_tick_of_the_clock_are_seen(images):
    image, seen = images / "train" / "one" / "0.png", set()
    for value in range(20):
        image.write_bytes(bytes([value]) * 100)
        seen.add(digests.folder_digest(images))
    assert len(seen) == 20


@pytest.mark.parametrize("spoil", [lambda f: f.write_bytes(b""), lambda f: f.write_bytes(f.read_bytes()[:100]),
                                   lambda f: f.write_text(f.read_text().replace("e", "f", 1)),
                                   lambda f: f.write_bytes(b"\xff" * 50), lambda f: (f.unlink(), f.mkdir())])
def test_a_memory_that_is_not_whole_is_none(images, cache, monkeypatch, spoil):
    monkeypatch.setattr(digests, "RECENT", -10 ** 12)
    one, (memory,) = digests.folder_digest(images), cache.iterdir()
    spoil(memory)
    assert digests.folder_digest(images) == one


def test_a_cache_that_others_may_write_to_is_not_used(images, cache, caplog, monkeypatch):
    one = digests.folder_digest(images)
    cache.chmod(0o777)
    assert digests.folder_digest(images) == one and "is not used, since others may write to it" in caplog.text
    caplog.clear()
    cache.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 4242)   # another user's
    assert digests.folder_digest(images) == one and "or it is another's" in caplog.text


def test_a_file_that_cannot_be_read_is_named_and_no_record_set_aside(place, images, monkeypatch, capsys):
    condition = Condition(f"folder:{images}", "tiny-cnn", "none", RECIPE)
    assert run_condition(condition, [0], "tiny", progress=False).status.tolist() == ["made"]
    (place / "tiny.yaml").write_text(yaml.safe_dump({"study": "tiny", "seeds": 1, "grid": [{
        "data": f"folder:{images}", "models": ["tiny-cnn"], "regularizers": ["none"], "recipe": RECIPE}]}))
    monkeypatch.setenv("REPSPACE_VERIFY", "1")   # reads all, however long the machine took until here
    before, really_open = sorted(place.glob("runs/tiny/*/*")), open
    for error in (PermissionError(13, "Permission denied"), OSError(24, "Too many open files"), OSError(5, "I/O error")):
        def refuse(path, *words, **options):
            if str(path).endswith("two/2.png"):
                raise type(error)(error.errno, error.strerror, str(path))
            return really_open(path, *words, **options)
        monkeypatch.setattr("builtins.open", refuse)
        assert main(["tiny.yaml"]) == 2
        said = capsys.readouterr().err
        assert "two/2.png cannot be read" in said and error.strerror in said and "Traceback" not in said
        assert sorted(place.glob("runs/tiny/*/*")) == before
    monkeypatch.setattr("builtins.open", really_open)
    assert run_condition(condition, [0], "tiny", progress=False).status.tolist() == ["done"]


def test_identities_of_a_large_study_take_no_time():
    conditions = [Condition("digits", "tiny-cnn", f"mixup:{i + 1}.0", RECIPE) for i in range(8)]
    digests.data_digest("digits")
    start = time.monotonic()
    assert len({records.identity(run_settings(c, seed)) for c in conditions for seed in range(10)}) == 80
    assert time.monotonic() - start < 1


# Weights and checkpoints

TINY = Condition("digits", "tiny-cnn", "none", {"epochs": 1, "batch_size": 50, "lr": 0.05})


def make(seeds, condition=TINY):
    return run_condition(condition, seeds, "tiny", progress=False)


def measured(place, seed, condition=TINY):
    return {name: (place / "runs" / "tiny" / condition.slug / str(seed) / name).read_bytes() for name in records.FILES[1:]}


def test_weights_under_another_runs_name_are_not_taken_for_its(place, caplog):
    """Fault U: the weights of seed 1, put where those of seed 0 are, were recorded as seed 0."""
    assert make([0, 1]).status.tolist() == ["made", "made"]
    before = measured(place, 0)
    zero, one = (weights_path(TINY, seed) for seed in (0, 1))
    zero.write_bytes(one.read_bytes())
    records.set_aside(place / "runs" / "tiny" / TINY.slug / "0")
    with pytest.raises(ValueError, match=f"{zero} is not what it is called"):
        load_classifier(TINY, 0)
    assert make([0]).status.tolist() == ["made"] and measured(place, 0) == before
    assert f"{zero.name} is not what it is called" in caplog.text and f"{one.stem}" in caplog.text
    assert zero.with_name(f"{zero.name}.unusable-1").read_bytes() == one.read_bytes(), "nothing is deleted"


@pytest.mark.parametrize("spoil", [
    lambda c: c[:-8000] + bytes(8000), lambda c: c[:-1], lambda c: c + b"\0", lambda c: b"", lambda c: c[:7],
    lambda c: b"\xff" * 8 + c[8:], lambda c: c.replace(b'\\"loss\\": [', b'\\"loss\\": [9', 1), lambda c: c.replace(b'"F32"', b'"I32"', 1)])
def test_weights_that_are_damaged_are_trained_again(place, caplog, spoil):
    make([0])
    before, path = measured(place, 0), weights_path(TINY, 0)
    whole = path.read_bytes()
    path.write_bytes(spoil(whole))
    assert path.read_bytes() != whole
    records.set_aside(place / "runs" / "tiny" / TINY.slug / "0")
    assert make([0]).status.tolist() == ["made"] and measured(place, 0) == before
    assert f"{path} is damaged" in caplog.text and "training starts from the beginning" in caplog.text


def test_every_flipped_bit_of_weights_is_noticed(place):
    make([0])
    path, rng = weights_path(TINY, 0), np.random.default_rng(0)
    whole, of = path.read_bytes(), {"training": weights_path(TINY, 0).stem, "condition": TINY.slug, "seed": 0}
    read_bound(path, of)
    for at in [*rng.integers(len(whole), size=150), *range(0, 1500, 10)]:
        content = bytearray(whole)
        content[at] ^= 1 << rng.integers(8)
        path.write_bytes(content)
        try:
            about, tensors = read_bound(path, of)   # blanks of JSON may be other blanks
            path.write_bytes(whole)
            same, weights = read_bound(path, of)
            assert about == same and all((weights[name] == tensors[name]).all() for name in weights | tensors)
        except Unusable:
            pass


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(24, "Too many open files"),
                                   OSError(5, "Input/output error"), MemoryError("no memory")])
@pytest.mark.parametrize("what", ["weights", "checkpoint"])
def test_what_cannot_be_read_now_stays_as_it_is(place, monkeypatch, error, what):
    make([0])
    path = weights_path(TINY, 0)
    if what == "checkpoint":
        path = path.rename(path.with_name(f"{path.stem}.{code_key()}.checkpoint"))
    records.set_aside(place / "runs" / "tiny" / TINY.slug / "0")
    before, really_open = path.read_bytes(), open
    def refuse(name, *words, **options):
        if str(name) == str(path): raise error
        return really_open(name, *words, **options)
    monkeypatch.setattr("builtins.open", refuse)
    row = make([0]).iloc[0]
    monkeypatch.setattr("builtins.open", really_open)
    assert row.status == "failed" and str(error.args[-1]) in row.reason
    assert path.read_bytes() == before and not list(path.parent.glob("*unusable*"))
    if what == "weights":
        assert make([0]).status.tolist() == ["remeasured"]


def test_a_checkpoint_of_another_run_or_other_code_is_not_gone_on_from(place, caplog, monkeypatch):
    monkeypatch.setattr(checkpoint, "EVERY", 0)
    long = replace(TINY, recipe=TINY.recipe | {"epochs": 4})
    make([0], long)
    before, kept, save = measured(place, 0, long), [], checkpoint.save_checkpoint
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda path, *words: (save(path, *words), kept.append(path.read_bytes())))
    make([1], long)   # its checkpoints, as they were after each epoch
    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    path = weights_path(long, 0)
    path.unlink()
    records.set_aside(place / "runs" / "tiny" / long.slug / "0")
    mine = path.with_name(f"{path.stem}.{code_key()}.checkpoint")
    mine.write_bytes(kept[1])
    assert make([0], long).status.tolist() == ["made"] and measured(place, 0, long) == before
    assert f"{mine} is not what it is called" in caplog.text


def test_the_checkpoint_goes_only_when_the_weights_are_on_the_disk(place, monkeypatch):
    monkeypatch.setattr(checkpoint, "EVERY", 0)
    path, there = weights_path(TINY, 0), []
    real = records.write_file
    def write(to, how):
        if Path(to) == path: there.append(list(path.parent.glob("*.checkpoint")))
        real(to, how)
        if Path(to) == path: there.append(list(path.parent.glob("*.checkpoint")))
    monkeypatch.setattr(records, "write_file", write)
    make([0])
    assert [len(files) for files in there] == [1, 1] and not list(path.parent.glob("*.checkpoint"))
