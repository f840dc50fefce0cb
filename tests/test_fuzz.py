"""Whatever is in a file, who reads it gets the right value or an error that names it: a bounded, seeded campaign."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

import fuzzing

# What a campaign found once, by target and number, and what came of it before it was mended.
FOUND = {
    "definition=517": "KeyError of !!bool maybe", "definition=571": "KeyError of !<tag:yaml.org,2002:bool> 3",
    "raw=87": "a message of 5078 letters", "raw=146": "TokenError of an npy header",
    "raw=245": "TypeError of what pandas noted in a Parquet file", "raw=546": "TypeError of the same",
    "raw=370": "MemoryError of an npy header, an expression", "images=137": "7 s, and half a GB, for a PNG of 13000 × 13000 pixels",
    "tensors=569": "a message of 5215 letters",
    "published=11079": "TypeError of a column of conditions that are numbers",
    "published=10449": "5 s, for a stack of arrays that was decompressed for each of its names",
}


def campaign(*words, timeout):
    """What `fuzzing.py` with these `words` says, in a process of its own: {tried, wrong}."""
    done = subprocess.run([sys.executable, fuzzing.__file__, *map(str, words)], text=True, timeout=timeout, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env=None, cwd=Path(__file__).parent)
    assert done.returncode == 0, f"exit code {done.returncode}, last input and words: {done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def verdict(said):
    """Nothing is wrong; else each input with what is wrong, and how to try it again."""
    print("inputs tried:", said["tried"])
    again = " ".join(f"--only {name}" for name in said["wrong"])
    assert not said["wrong"], "\n".join([f"again: python tests/fuzzing.py {again}", *(f"{k}: {v}" for k, v in said["wrong"].items())])


def test_what_was_found_once_stays_mended():
    verdict(campaign(*(f"--only={name}" for name in FOUND), timeout=300))


def test_some_seconds_of_damaged_files(fuzz):
    verdict(campaign("--seconds", fuzz.seconds or 7, "--seed", fuzz.seed, timeout=300 + 2 * (fuzz.seconds or 7)))


@pytest.mark.deep
@pytest.mark.parametrize("target", fuzzing.TARGETS)
def test_a_minute_of_damaged_files(target, fuzz):
    seconds = fuzz.seconds or 60
    verdict(campaign(target, "--seconds", seconds, "--seed", fuzz.seed + 10_000, timeout=300 + 2 * seconds))
