"""What a study takes in: data that were replaced, weights of another run, folders of other people, machines that lack something."""
import os
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from repspace import records
from repspace.study import digests
from repspace.study.__main__ import main
from repspace.study.condition import Condition, missing_seeds, run_condition, run_settings

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
    assert made["data_digest"] == digests.data_digest(condition.data)
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
