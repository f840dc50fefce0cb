"""What may go wrong around a study: full disks, damaged data, kernels, drivers and nodes that die."""
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torchvision
import yaml
from PIL import Image

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # else gRPC may hang in what Ray forks
os.environ.setdefault("RAY_worker_niceness", "0")  # else whatever else runs here goes before the cluster

from repspace import data, records, study
from repspace.study import jobs, notebooks
from repspace.study.__main__ import main
from repspace.study import Condition, run_condition

RECIPE = {"epochs": 2, "batch_size": 50, "lr": 0.05}
PLAIN, MIXUP = "digits.tiny-cnn.none", "digits.tiny-cnn.mixup-1.0"


def define(place, regularizers=("mixup:1.0", "none"), seeds=1, **recipe):
    content = {"study": "tiny", "seeds": seeds, "grid": [{"data": "digits", "models": ["tiny-cnn"],
               "regularizers": list(regularizers), "recipe": RECIPE | recipe}]}
    (place / "tiny.yaml").write_text(yaml.safe_dump(content))
    return place / "tiny.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small study that one machine has made: its working directory."""
    place = tmp_path_factory.mktemp("finished")
    (place / "runs").mkdir()
    outcome = study.run(define(place, ["mixup:1.0"], seeds=2), runs=place / "runs", published=False)
    assert outcome.made == 2, outcome.summary()
    return place


def wait_for(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def when_made(place):
    """When each record of the study was made."""
    return {str(p.relative_to(place)): p.stat().st_mtime_ns for p in place.glob("runs/tiny/*/[0-9]/run.json")}


def litter(place):
    """What is left below runs/ that is neither a record, nor weights, nor a lock."""
    files = [p for p in place.glob("runs/**/*") if p.is_file() and not p.name.endswith(".lock")]
    whole = [p for p in files if p.parent.name.partition(".")[0].isdigit() and p.name in records.FILES
             or p.parent.name == "weights" and p.suffix == ".safetensors"]
    return [p for p in files if p not in whole]


# A disk that is full

@pytest.fixture
def small_disk(place):
    """runs/ on a disk of 4 MiB."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place / "runs"], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield place
    subprocess.run(["umount", "-l", place / "runs"], check=True)


def test_a_study_on_a_full_disk_says_so_and_goes_on_when_there_is_room(small_disk, capsys):
    define(small_disk, ["none"], seeds=2)
    ballast = small_disk / "runs" / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        while shutil.disk_usage(small_disk / "runs").free > 150_000:
            file.write(bytes(4096))
    assert main(["tiny.yaml", "--afresh"]) == 1
    said = capsys.readouterr().out
    assert "0 were made, 2 failed" in said and said.count("no space is left on the disk of") == 2
    assert str(small_disk / "runs" / "tiny" / PLAIN) in said and "free some and run the study again" in said
    assert not when_made(small_disk)
    assert all(p.name == "ballast" or p.name.endswith(".failed.json") for p in litter(small_disk))
    ballast.unlink()
    assert main(["tiny.yaml", "--afresh"]) == 0
    assert "2 were made, 0 failed" in capsys.readouterr().out
    assert len(records.load("tiny", "fresh").runs) == 2 and not litter(small_disk)


@pytest.mark.parametrize("writer, again", [("write_frame", "remeasured"), ("write_arrays", "remeasured"),
                                           ("write_json", "remeasured"), ("write_file", "made")])
def test_no_space_at_any_file_leaves_nothing_half_written(place, monkeypatch, writer, again):
    def full(path, *_):
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"record")
    condition = Condition("digits", "tiny-cnn", "none", RECIPE)
    make = lambda: run_condition(condition, [0], "tiny", progress=False).iloc[0]
    with monkeypatch.context() as patch:
        patch.setattr(records if writer == "write_file" else records.files, writer, full)  # weights go by the first
        row = make()
    assert row.status == "failed" and "no space is left on the disk of" in row.reason and PLAIN in row.reason
    assert not when_made(place) and all(p.name == "0.failed.json" for p in litter(place))
    assert make().status == again and not litter(place)


# A truncated file

def test_a_truncated_table_is_named_and_that_run_made_again(place, finished, caplog):
    shutil.copytree(finished, place, dirs_exist_ok=True)
    before, table = when_made(place), place / "runs" / "tiny" / MIXUP / "1" / "samples.parquet"
    whole = table.read_bytes()
    table.write_bytes(whole[:len(whole) - 100])
    with caplog.at_level(logging.WARNING):
        outcome = study.run("tiny.yaml", published=False)
    assert (outcome.done, outcome.made, len(outcome.failed)) == (1, 1, 0)
    assert f"{table} is damaged" in caplog.text and "it is kept as 1." in caplog.text
    assert table.read_bytes() == whole, "made again from the same weights, it is the same"
    kept = f"runs/tiny/{MIXUP}/0/run.json"
    assert when_made(place)[kept] == before[kept]


# Drivers

def lives(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def holder_of(lock):
    """The process that holds the file `lock`, or None."""
    locks = [line.split() for line in Path("/proc/locks").read_text().splitlines() if "->" not in line]
    pids = [int(words[4]) for words in locks if words[5].endswith(f":{lock.stat().st_ino}")]
    return psutil.Process(pids[0]) if pids else None


def test_a_driver_that_is_killed_leaves_the_rest_to_another(place):
    define(place, ["none"], seeds=6)
    command = [sys.executable, "-m", "repspace.study", "tiny.yaml", "--afresh"]
    first, second = (subprocess.Popen(command, cwd=place, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                     for _ in range(2))
    wait_for(lambda: len(when_made(place)) > 1 and holder_of(place / "runs" / "tiny" / PLAIN / ".lock"))
    worker = holder_of(place / "runs" / "tiny" / PLAIN / ".lock")
    at_work, other = (first, second) if worker.ppid() == first.pid else (second, first)
    before = when_made(place)
    at_work.kill()
    at_work.communicate()
    wait_for(lambda: not lives(worker), 20)
    said = other.communicate(timeout=300)[0]
    assert other.returncode == 0 and " 0 failed" in said, said
    after = when_made(place)
    assert len(after) == 6 and before.items() <= after.items() and not litter(place)
    assert not list(place.glob("runs/tiny/*/*.*-1")), "no record was set aside"


# A long training

LONG = """
import functools, sys
from repspace import train
from repspace.study import checkpoint
from repspace.study import Condition, run_condition
checkpoint.EVERY = 0   # a checkpoint after every epoch
train.fit = functools.partial(train.fit, progress=True)
recipe = {"epochs": 60, "batch_size": 50, "lr": 0.05}
made = run_condition(Condition("digits", "tiny-cnn", "mixup:1.0", recipe), [0], "long", sys.argv[1], progress=False)
assert made["status"].item() == "made", made["reason"].item()
"""


def test_a_training_that_is_killed_goes_on_to_the_same_end(place):
    def begin(runs):
        return subprocess.Popen([sys.executable, "-c", LONG, runs], stderr=subprocess.PIPE, text=True)

    whole, stopped = begin("runs/whole"), begin("runs/stopped")
    wait_for(lambda: list(place.glob("runs/stopped/weights/*.checkpoint")))
    stopped.kill()
    stopped.communicate()
    left, = place.glob("runs/stopped/weights/*.checkpoint")
    for name in (f"{left.name}.1", f".{left.name.partition('.')[0]}.safetensors.0123456789ab"):
        left.with_name(name).write_bytes(b"half")   # what a process leaves that is killed while it writes
    again = begin("runs/stopped")
    said = again.communicate(timeout=240)[1]
    assert again.returncode == 0, said
    assert 0 < int(re.search(r"\d+/(\d+)", said)[1]) < 60, f"it did not go on from where it was: {said}"
    assert whole.communicate(timeout=240) and whole.returncode == 0
    one, other = (place / "runs" / name / "long" / MIXUP / "0" for name in ("whole", "stopped"))
    for file in ("samples.parquet", "logits.safetensors", "head.safetensors"):
        assert (one / file).read_bytes() == (other / file).read_bytes()
    assert records.read_run(one)["history"] == records.read_run(other)["history"]
    assert not litter(place)


# Kernels and GPUs

def test_a_kernel_that_fails_to_start_is_tried_again(place, monkeypatch, caplog):
    kernel, notebook = place / "jupyter" / "kernels" / "python3", place / "small.ipynb"
    kernel.mkdir(parents=True)
    fails_twice = "import os, sys; n = len(os.listdir('.')); open(f'start-{n}', 'w'); sys.exit(1) if " \
        "len([f for f in os.listdir('.') if f.startswith('start-')]) < 3 else None; " \
        "os.execv(sys.executable, [sys.executable, '-m', 'ipykernel_launcher', *sys.argv[1:]])"
    (kernel / "kernel.json").write_text(json.dumps({
        "argv": [sys.executable, "-c", fails_twice, "-f", "{connection_file}"], "display_name": "x",
        "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(place / "jupyter"))
    notebook.write_text(json.dumps({
        "cells": [{"cell_type": "code", "execution_count": None, "id": "a", "metadata": {}, "outputs": [], "source": "6 * 7"}],
        "metadata": {"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}},
        "nbformat": 4, "nbformat_minor": 5}))
    executed = notebooks.execute_notebook(notebook, place / "out.ipynb", cwd=place)
    assert executed.cells[0].outputs[0].data["text/plain"] == "42"
    assert caplog.text.count("the kernel did not last") == 2 and len(list(place.glob("start-*"))) == 3
    for start in place.glob("start-*"):
        start.unlink()
    (kernel / "kernel.json").write_text((kernel / "kernel.json").read_text().replace("< 3", "< 99"))
    with pytest.raises(Exception, match="[Kk]ernel died"):
        notebooks.execute_notebook(notebook, place / "out.ipynb", cwd=place)
    assert len(list(place.glob("start-*"))) == 3


def test_jobs_share_the_gpus_without_crowding(monkeypatch):
    taken, most, lock = {"a": 0, "b": 0}, {"a": 0, "b": 0}, threading.Lock()
    def pretend(job, stop, environment):
        gpu = environment["CUDA_VISIBLE_DEVICES"]
        with lock:
            taken[gpu] += 1
            most[gpu] = max(most[gpu], taken[gpu])
        time.sleep(0.02)
        with lock:
            taken[gpu] -= 1
        return {}
    monkeypatch.setattr(jobs, "_do", pretend)
    monkeypatch.setattr(jobs, "_gpus", lambda: {"a": 1.0, "b": 0.6})
    assert jobs.do(range(20), jobs.room(gpus=0.5), lambda running: None) == {}
    assert most == {"a": 2, "b": 1}


def test_a_worker_sees_the_gpu_of_its_place_and_no_other(place, monkeypatch):
    seen = "import json, os, sys; sys.exit(os.environ['CUDA_VISIBLE_DEVICES'] + os.environ['OMP_NUM_THREADS'])"
    monkeypatch.setattr(sys, "executable", place / "python")
    (place / "python").write_text(f"#!/bin/sh\nexec {os.path.realpath('/proc/self/exe')} -c \"{seen}\"\n")
    (place / "python").chmod(0o700)
    code, last = jobs.call(jobs.Job("tiny", {}, "tiny", [0], "runs", False), threading.Event(), {"CUDA_VISIBLE_DEVICES": "GPU-7"})
    assert (code, last) == (1, "GPU-71")


def test_memory_limits_how_many_run(monkeypatch):
    monkeypatch.setattr(jobs, "_gpus", dict)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    for free, expected in ((5.5 * 2 ** 30, 2), (2 ** 20, 1), (1e15, 64)):
        monkeypatch.setattr(jobs, "_free_memory", lambda: free)
        assert len(jobs.room()) == expected
    monkeypatch.setattr(jobs, "_gpus", lambda: {str(i): 1.0 for i in range(8)})
    monkeypatch.setattr(jobs, "_free_memory", lambda: 7 * 2 ** 30)
    assert len(jobs.room(gpus=0.25)) == 3 and len(jobs.room(workers=2)) == 2


# Data sets with a damaged file

@pytest.fixture
def cifar(place, monkeypatch):
    """A CIFAR-10 of twenty images, with its checksums as torchvision knows those of the true one."""
    folder, rng = place / "data" / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir(parents=True)
    sums = {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]:
        content = {"label_names": list("abcdefghij")} if name == "batches.meta" else {
            "data": rng.integers(256, size=(20, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(20)]}
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    source = torchvision.datasets.CIFAR10
    monkeypatch.setattr(source, "train_list", [[n, sums[n]] for n in sums if n.startswith("data")])
    monkeypatch.setattr(source, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(source, "meta", {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]})
    monkeypatch.setattr(source, "url", "file:///nowhere/cifar.tar.gz")
    monkeypatch.setenv("REPSPACE_DATA", str(place / "data"))
    return folder


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch"])
@pytest.mark.parametrize("download", [True, False])
def test_a_wrong_byte_in_cifar_is_found_and_its_file_named(cifar, name, download):
    assert data.load("cifar10", download=download).train.images.shape == (100, 3, 32, 32)
    content = bytearray((cifar / name).read_bytes())
    content[-500] ^= 1
    (cifar / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{cifar / name}.*REPSPACE_DATA"):
        data.load("cifar10", download=download)


def test_a_study_of_damaged_data_stops_before_it_starts(place, capsys):
    for split in ("train", "test"):
        for label in ("one", "two"):
            (place / "images" / split / label).mkdir(parents=True)
            for i in range(4):
                pixels = np.random.default_rng(i).integers(256, size=(32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / "images" / split / label / f"{i}.png")
    broken = place / "images" / "test" / "two" / "2.png"
    for damaged in (broken.read_bytes()[:1500], b"no image"):
        broken.write_bytes(damaged)
        with pytest.raises(ValueError, match="test/two/2.png"):
            data.load(f"folder:{place / 'images'}")
    content = yaml.safe_load(define(place).read_text())
    content["grid"][0] |= {"data": f"folder:{place / 'images'}", "models": ["resnet8"]}
    (place / "tiny.yaml").write_text(yaml.safe_dump(content))
    assert main(["tiny.yaml"]) == 2 and "test/two/2.png" in capsys.readouterr().err
    assert not when_made(place)


# Clusters

@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory):
    """A Ray cluster on this machine: a head that computes nothing, and a node."""
    from ray.cluster_utils import Cluster
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    small = dict(include_dashboard=False, object_store_memory=100 * 2 ** 20)
    made = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0, ray_client_server_port=port, **small))
    made.client = f"ray://127.0.0.1:{port}"
    made.grow = lambda: made.add_node(num_cpus=2, **small)
    made.node = made.grow()
    yield made
    made.shutdown()


def same_records(one, other, seed):
    """Whether two folders of runs hold the same record, but for time and memory."""
    folders = [place / "runs" / "tiny" / MIXUP / str(seed) for place in (one, other)]
    for name in records.FILES[1:]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    first, second = ({k: v for k, v in records.read_run(folder).items() if k not in ("seconds", "peak_memory_mb", "checksum")}
                     for folder in folders)
    assert first == second
    return True


def test_a_cluster_makes_the_same_records(ray_cluster, place, finished):
    define(place, ["mixup:1.0"], seeds=2)
    outcome = study.run("tiny.yaml", on=ray_cluster.address, notebooks="book", published=False)
    assert (outcome.made, len(outcome.failed)) == (2, 0), outcome.summary()
    assert same_records(finished, place, 0) and same_records(finished, place, 1)
    weights = [{p.name for p in where.glob("runs/weights/*.safetensors")} for where in (finished, place)]
    assert weights[0] == weights[1] and len(weights[0]) == 2
    notebook, = (place / "book").iterdir()
    assert notebook.name == f"{MIXUP}.ipynb" and notebook.read_text().count("<figure") == 6, "one needs the weights"
    assert not litter(place)
    again = study.run("tiny.yaml", on=ray_cluster.address, notebooks="book", published=False)
    assert (again.done, again.made, len(again.failed)) == (2, 0, 0)


def test_at_a_distance_and_from_the_weights_that_are_here(ray_cluster, place, finished):
    shutil.copytree(finished, place, dirs_exist_ok=True)
    before = {p: p.stat().st_mtime_ns for p in place.glob("runs/weights/*.safetensors")}
    shutil.rmtree(place / "runs" / "tiny" / MIXUP / "0")
    command = [sys.executable, "-m", "repspace.study", "tiny.yaml", "--afresh", "--on", ray_cluster.client]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "1 were made, 0 failed" in done.stdout, done.stderr
    assert same_records(finished, place, 0)
    assert records.read_run(place / "runs" / "tiny" / MIXUP / "0")["seconds"]["train"] == \
        records.read_run(finished / "runs" / "tiny" / MIXUP / "0")["seconds"]["train"], "it was not trained again"
    assert {p: p.stat().st_mtime_ns for p in place.glob("runs/weights/*.safetensors")} == before


MINE = """
import torch
from repspace import models

def small_net(num_classes, in_channels, small_images):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64 * in_channels, num_classes))

models.register("ray-net", small_net)
"""


def test_a_cluster_takes_modules_of_the_command_along(ray_cluster, place):
    (place / "my_ray_nets.py").write_text(MINE)
    content = yaml.safe_load(define(place, ["none"]).read_text())
    content["grid"][0]["models"] = ["ray-net"]
    (place / "tiny.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "repspace.study", "tiny.yaml", "--with", "my_ray_nets", "--on", ray_cluster.address]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "1 were made, 0 failed" in done.stdout, done.stdout + done.stderr
    run = records.read_run(place / "runs/tiny/digits.ray-net.none/0")
    source = hashlib.sha256(b"my_ray_nets.py\0" + hashlib.sha256(MINE.encode()).digest()).hexdigest()[:16]
    assert run["sources"] == ["my_ray_nets:small_net"] and run["provenance"]["with"] == {"my_ray_nets": source}
    assert not litter(place)


def workers():
    """The processes on this machine that make runs."""
    return [p for p in psutil.process_iter(["cmdline"]) if "repspace.study.worker" in (p.info["cmdline"] or [])]


def test_a_node_that_dies_and_a_worker_that_is_killed_cost_no_run(ray_cluster, place, caplog):
    define(place, epochs=60)
    known = set(workers())
    new = lambda: set(workers()) - known
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(study.run, "tiny.yaml", ray_cluster.address, published=False)
        wait_for(lambda: len(new()) == 2)
        victim = next(iter(new()))
        victim.kill()
        wait_for(lambda: len(new() - {victim}) == 2)
        lost = new()
        ray_cluster.remove_node(ray_cluster.node, allow_graceful=False)
        wait_for(lambda: not any(map(lives, lost)), 20)
        ray_cluster.node = ray_cluster.grow()
        outcome = future.result(timeout=300)
    assert (outcome.made, len(outcome.failed)) == (2, 0), outcome.summary()
    assert "killed by signal 9" in caplog.text
    assert len(records.load("tiny", "fresh").runs) == 2 and not litter(place)


def test_here_and_on_a_cluster_at_once(ray_cluster, place):
    define(place)
    here = subprocess.Popen([sys.executable, "-m", "repspace.study", "tiny.yaml", "--afresh"], cwd=place, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    outcome = study.run("tiny.yaml", on=ray_cluster.address, published=False)
    said = here.communicate(timeout=300)[0]
    assert here.returncode == 0 and " 0 failed" in said and outcome.failed.empty, said + outcome.summary()
    assert len(when_made(place)) == 2 and not list(place.glob("runs/tiny/*/*.*-1"))


def test_what_a_cluster_cannot_do_is_said(ray_cluster, place, capsys):
    define(place)
    with pytest.raises(ValueError, match="needs a node with CPU 1, GPU 1.*add a node, or change gpus"):
        study.run("tiny.yaml", on=ray_cluster.address, gpus=1, published=False)
    define(place, ["none"], lr=1e30)
    outcome = study.run("tiny.yaml", on=ray_cluster.address, published=False)
    assert len(outcome.failed) == 1 and "Diverged" in outcome.summary()
    assert "Diverged" in records.failed("tiny").reason[0] and not when_made(place)


@pytest.fixture
def done_here(monkeypatch):
    """The jobs that this machine was given; it does none of them."""
    taken = []
    monkeypatch.setattr(jobs, "do", lambda todo, places, tick: taken.extend(todo) or {})
    return taken


def test_without_ray_only_the_cluster_is_missing(place, monkeypatch, capsys, done_here):
    define(place)
    monkeypatch.setitem(sys.modules, "ray", None)
    for on in ("auto", "ray://127.0.0.1:1", "127.0.0.1:1"):
        assert main(["tiny.yaml", "--on", on, "--afresh"]) == 2
        assert "pip install repspace[ray]" in capsys.readouterr().err
    assert not done_here
    outcome = study.run("tiny.yaml", published=False)
    assert [job.slug for job in done_here] == [PLAIN, MIXUP]
    assert outcome.summary().count("it was not made, and nothing says why") == 2
    light = "import sys; sys.modules['ray'] = None; import repspace.study, repspace.study.cluster"
    assert subprocess.run([sys.executable, "-c", light]).returncode == 0


def test_auto_without_a_cluster_is_this_machine(place, monkeypatch, done_here):
    import ray
    def none_runs(*_, **__): raise ConnectionError("Could not find any running Ray instance.")
    monkeypatch.setattr(ray, "init", none_runs)
    study.run(define(place), on="auto", published=False)
    assert [job.slug for job in done_here] == [PLAIN, MIXUP]
    with pytest.raises(ValueError, match="no Ray cluster can be used at .*ray start --head"):
        study.run("tiny.yaml", on="127.0.0.1:1")


def test_an_address_at_which_no_cluster_answers_is_said_within_seconds(place, monkeypatch):
    define(place)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        for on in ("127.0.0.1:1", "ray://127.0.0.1:1", address, f"ray://{address}", "ray://no.such.host.invalid:10001"):
            start = time.monotonic()
            with pytest.raises(ValueError, match="no Ray cluster can be used at .*ray start --head"):
                study.run("tiny.yaml", on=on)
            assert time.monotonic() - start < 30, on
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ValueError, match="at '127.0.0.1:1'"):
        study.run("tiny.yaml", on="auto")
    assert not list((place / "runs").iterdir())


# Notebooks that cannot be executed

def small_notebook(path, kernel="python3"):
    path.write_text(json.dumps({
        "cells": [{"cell_type": "code", "execution_count": None, "id": "a", "metadata": {}, "outputs": [], "source": "6 * 7"}],
        "metadata": {"kernelspec": {"name": kernel, "display_name": "x", "language": "python"}}, "nbformat": 4, "nbformat_minor": 5}))
    return path


def test_what_another_try_cannot_mend_is_said_once(place, caplog):
    (place / "broken.ipynb").write_text("{")
    for source, message in ((small_notebook(place / "julia.ipynb", "julia-1.9"), "kernel 'julia-1.9', which is not installed"),
                            (place / "missing.ipynb", "there is no notebook"), (place / "broken.ipynb", "is no notebook")):
        with pytest.raises(ValueError, match=message):
            notebooks.execute_notebook(source, place / "out.ipynb")
    assert "trying again" not in caplog.text and not (place / "out.ipynb").exists()


def test_a_long_folder_for_temporary_files_is_too_long_for_sockets_only(place, monkeypatch):
    long = place / ("x" * 100) / "{y}"
    long.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(long))
    monkeypatch.setenv("TMPDIR", str(long))
    source = small_notebook(long / "small.ipynb")
    assert notebooks.execute_notebook(source, long / "out.ipynb").cells[0].outputs[0].data["text/plain"] == "42"
    assert sorted(p.name for p in long.iterdir()) == ["out.ipynb", "small.ipynb"]
