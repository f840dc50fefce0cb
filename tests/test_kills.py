"""A study whose driver, workers and publisher are killed at random moments, again and again, ends as if nothing had happened."""
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from repspace import records

RECIPE = {"epochs": 2, "batch_size": 50, "lr": 0.05}
STUDY = {"study": "tiny", "seeds": 3, "grid": [{"data": "digits", "models": ["tiny-cnn"],
         "regularizers": ["none", "mixup:1.0"], "recipe": RECIPE}]}
RUN, PUBLISH = ("-m", "repspace.study", "tiny.yaml", "--afresh"), ("-m", "repspace.study", "publish", "tiny.yaml")
SECONDS = 60


def start(place, words):
    return subprocess.Popen([sys.executable, *words], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(place, words):
    process = start(place, words)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said


def family(process):
    try: return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess: return []


def values(place):
    """{name: content} of what the records hold: rows and arrays by byte, and of run.json what was measured."""
    held = {}
    for path in sorted(place.glob("runs/tiny/*/[0-9]/*")):
        name = str(path.relative_to(place))
        if path.name != "run.json": held[name] = path.read_bytes()
        else: held[name] = {key: records.check(path.parent).get(key) for key in ("scalars", "curves", "history", "identity", "seed", "settings")}
    return held


def published(place):
    """Rows and arrays of what is published, all of which must be readable; None before there is any."""
    if not (place / "results" / "tiny" / "manifest.json").exists(): return None
    there = records.load("tiny", "published", place / "runs", place / "results")
    names = list(zip(there.runs.condition, there.runs.seed))
    return {name: {key: array.tobytes() for key, array in there.arrays(*name).items()} for name in names}, there.samples


def kill_some(process, chance, until):
    """Kill a member of the family of `process` now and then, the driver with the given chance; how many died."""
    killed = 0
    while process.poll() is None and time.monotonic() < until:
        time.sleep(chance.expovariate(1))
        driver, *others = family(psutil.Process(process.pid)) or [None]
        if driver is None: break
        victim = driver if not others or chance.random() < .6 else chance.choice(others)
        try: victim.kill()
        except psutil.NoSuchProcess: continue
        killed += 1
    return killed


@pytest.mark.deep
def test_random_kills_change_no_record(tmp_path, fuzz, monkeypatch):
    monkeypatch.delenv("REPSPACE_RUNS", raising=False)
    calm, wild, chance = tmp_path / "calm", tmp_path / "wild", random.Random(fuzz.seed)
    for place in (calm, wild):
        for name in ("runs", "results"): (place / name).mkdir(parents=True)
        (place / "tiny.yaml").write_text(yaml.safe_dump(STUDY))
    finished(calm, RUN), finished(calm, PUBLISH)
    end, killed, before = time.monotonic() + (fuzz.seconds or SECONDS), 0, None
    while time.monotonic() < end:
        making = start(wild, RUN)
        killed += kill_some(making, chance, end)
        if making.poll() is None:
            making.send_signal(signal.SIGKILL)
            killed += 1
        making.communicate()
        if not any(wild.glob("runs/tiny/*/[0-9]/run.json")): continue
        publishing = start(wild, PUBLISH)
        time.sleep(chance.uniform(0, 5))
        publishing.kill()
        publishing.communicate()
        now = published(wild)   # whole, whenever it was killed
        assert before is None or now and before[0].items() <= now[0].items(), "what was published is lost, or other than it was"
        before = now
    finished(wild, RUN), finished(wild, PUBLISH)
    print("killed:", killed)
    assert killed > 3 and values(wild) == values(calm) and len(values(calm)) == 6 * len(records.FILES)
    (arrays, samples), (same, rows) = published(wild), published(calm)
    assert arrays == same and samples.equals(rows) and len(arrays) == 6
    assert not [p for p in wild.glob("runs/tiny/*/.*") if p.name != ".lock"], "unfinished records are removed"
