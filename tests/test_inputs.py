"""What a study takes in: data that were replaced, weights of another run, folders of other people, machines that lack something."""
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
import yaml
from PIL import Image

from repspace import data, records, study
from repspace.study import checkpoint, cluster, definition, digests, jobs, notebooks
from repspace.study.__main__ import main
from repspace.study.checkpoint import Unusable, read_bound
from repspace.study import Condition, load_classifier, missing_seeds, run_condition, run_settings, weights_path
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
    start = time.process_time()
    assert len({records.identity(run_settings(c, seed)) for c in conditions for seed in range(10)}) == 80
    assert time.process_time() - start < 5, "data are looked at once for each of them"


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


# Places where others may write

def small_study(name="mine", data="digits", **recipe):
    return yaml.safe_dump({"study": name, "seeds": 1, "grid": [{
        "data": data, "models": ["tiny-cnn"], "regularizers": ["none"], "recipe": TINY.recipe | recipe}]})


def test_a_study_above_the_working_directory_is_not_found(place, monkeypatch, caplog):
    above, here = place / "nbs" / "experiments", place / "down" / "here"
    above.mkdir(parents=True)
    (here / "nbs" / "experiments").mkdir(parents=True)
    for folder, epochs in ((above, 7), (here / "nbs" / "experiments", 3)):
        (folder / "mine.yaml").write_text(small_study(epochs=epochs))
        (folder / "condition.ipynb").write_text("{}")
    (above / "digits.yaml").write_text(small_study("digits"))
    monkeypatch.chdir(here)
    assert study.read("mine").conditions[0].recipe["epochs"] == 3
    assert len(study.read("digits").conditions) == 8, "the package's, not that of the folder above"
    assert notebooks.template() == definition.HOME / "condition.ipynb"
    monkeypatch.chdir(place / "down")
    with pytest.raises(ValueError, match="study 'mine' is unknown"):
        study.read("mine")
    assert study.read("../nbs/experiments/mine.yaml").conditions[0].recipe["epochs"] == 7, "what is named is taken"
    monkeypatch.chdir(here)
    for folder in (here, here / "nbs" / "experiments"):
        folder.chmod(0o777)
        with pytest.raises(ValueError, match="study 'mine' is unknown"):
            study.read("mine")
        assert "is not searched, since others can write to it" in caplog.text
        folder.chmod(0o755)


def test_a_template_is_executed_only_if_it_is_the_packages_or_named(place):
    with pytest.raises(ValueError, match="no.ipynb is not there"):
        study.run(study.read(write(place, small_study())), notebooks="book", template="no.ipynb")
    assert main(["mine.yaml", "--notebooks", "book", "--template", "no.ipynb"]) == 2
    mine = nbformat.read(notebooks.template(), 4)
    mine.cells.append(nbformat.v4.new_code_cell("6 * 7"))
    nbformat.write(mine, place / "my.ipynb")
    assert main(["mine.yaml", "--notebooks", "book", "--template", "my.ipynb", "--afresh"]) == 0
    executed, = (place / "book").iterdir()
    assert nbformat.read(executed, 4).cells[-1].outputs[0].data["text/plain"] == "42"


def test_what_a_node_keeps_lies_in_a_folder_that_is_closed_to_others(cache, monkeypatch, caplog):
    kept = cluster._place("abc")
    assert kept == cache.parent / "cluster" / "abc" == cluster._place("abc")
    kept.parent.chmod(0o755)
    other, third = cluster._place("abc"), cluster._place("abc")
    assert len({kept, other, third}) == 3 and other.stat().st_mode & 0o777 == 0o700, "nobody can guess it"
    assert "is not used" in caplog.text
    other.rmdir(), third.rmdir()


def test_a_node_with_other_data_is_found_out(place, images, monkeypatch):
    condition = Condition(f"folder:{images}", "tiny-cnn", "none", RECIPE)
    run_condition(condition, [0], "tiny", place / "away", progress=False)
    folder = records.run_folder("tiny", condition.slug, 0, place / "away")
    returned = cluster.Returned("node-7", 0, "", {name: (folder / name).read_bytes() for name in records.FILES}, {})
    paint(images / "test" / "two" / "3.png", 99)
    here = records.run_folder("tiny", condition.slug, 0)
    with pytest.raises(ValueError, match="node-7 made another run than was asked for: the data there"):
        cluster._deliver(returned, here, place / "runs", records.identity(run_settings(condition, 0)))
    assert not here.exists()


# Surroundings

def write(place, text):
    (place / "mine.yaml").write_text(text)
    return place / "mine.yaml"


def command(place, *words, before="", **environment):
    """A study as a process in a shell → (exit code, what it said)."""
    words = [sys.executable, "-m", "repspace.study", "mine.yaml", "--afresh", *words]
    done = subprocess.run(["sh", "-c", f"{before} exec \"$@\" {environment.pop('to', '')}", "sh", *map(str, words)], cwd=place,
                          env=os.environ | environment, text=True, capture_output=True, timeout=280)
    return done.returncode, done.stdout + done.stderr


def made(place):
    return len(list(place.glob("runs/mine/*/0/run.json")))


def test_without_a_home_a_study_is_made_all_the_same(place):
    write(place, small_study())
    code, said = command(place, "--notebooks", "book", HOME="/dev/null", XDG_CACHE_HOME="", TMPDIR=str(place))
    assert code == 0 and made(place) == 1 and "Traceback" not in said, said


def test_with_a_long_tmpdir_a_study_is_made_all_the_same(place):
    long = place / ("x" * 97)
    long.mkdir()
    write(place, small_study())
    code, said = command(place, "--notebooks", "book", TMPDIR=str(long))
    assert code == 0 and made(place) == 1 and not list(long.iterdir()), said


@pytest.mark.parametrize("closed", ["2>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-"])
def test_with_closed_streams_a_study_is_made_and_nothing_is_written_into_its_files(place, closed):
    write(place, small_study())
    code, said = command(place, to=closed)
    assert code == 0 and made(place) == 1, said
    assert records.load("mine", "fresh").runs.seed.tolist() == [0]
    (place / "mine.yaml").write_text("study: [")
    assert command(place, to=closed)[0] == 2


def test_a_stopped_holder_of_a_lock_is_named_until_it_goes_on(place):
    write(place, small_study())
    folder = records.run_folder("mine", "digits.tiny-cnn.none", 0).parent
    folder.mkdir(parents=True)
    program = f"from repspace.study.locks import held; h = held({str(folder / '.lock')!r}); h.__enter__(); print(flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    holder.send_signal(signal.SIGSTOP)
    for words in ([], ["--notebooks", "book"]):
        waits = subprocess.Popen([sys.executable, "-m", "repspace.study", "mine.yaml", "--afresh", *words], cwd=place, text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for line in waits.stdout:
            if line.startswith("waiting for "): break
        assert f"which process {holder.pid} on" in line and "holds since 20" in line and f"kill -CONT {holder.pid}" in line
        if words:
            holder.kill()
            holder.communicate()
            assert waits.wait(200) == 0 and made(place) == 1
        else:
            waits.kill()
        waits.communicate()


@pytest.fixture
def read_only(place):
    """Makes runs/ a disk that is read-only."""
    def turn(how):
        if subprocess.run(["mount", *how, place / "runs"], capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
    turn(["-t", "tmpfs", "tmpfs"])
    yield lambda: turn(["-o", "remount,ro"])
    subprocess.run(["umount", "-l", place / "runs"], check=True)


def test_runs_on_a_disk_that_is_read_only(place, read_only, capsys):
    write(place, small_study())
    condition = study.read("mine.yaml").conditions[0]
    assert run_condition(condition, [0], "mine", progress=False).status.tolist() == ["made"]
    read_only()
    assert main(["mine.yaml"]) == 0 and "1 runs were there, 0 were made" in capsys.readouterr().out
    assert run_condition(condition, [0], "mine", progress=False).status.tolist() == ["done"]
    write(place, small_study(epochs=2))
    assert main(["mine.yaml"]) == 2
    said = capsys.readouterr().err
    assert "Read-only file system" in said and f"{place}/runs" in said and "Traceback" not in said, said
    write(place, small_study("other"))
    assert main(["mine.yaml"]) == 2
    assert f"records cannot be written to {place}/runs (Read-only file system): name another" in capsys.readouterr().err


def test_data_that_cannot_be_downloaded_to_their_folder_are_read_from_it(place, monkeypatch):
    monkeypatch.setenv("REPSPACE_DATA", "/dev/null/data")
    asked = []
    monkeypatch.setattr(data, "load", lambda name, **options: asked.append((name, options)))
    jobs.fetch_data("cifar10")
    jobs.fetch_data("digits")
    assert asked == [("cifar10", {"download": False}), ("digits", {})]
