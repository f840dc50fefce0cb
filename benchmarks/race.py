"""Functions timed in turn, and what came of it: one row of the table."""
import cProfile
import ctypes
import gc
import pstats
import re
import time
from contextlib import contextmanager
from pathlib import Path

import torch

GPU = torch.cuda.is_available()


def sync():
    if GPU:
        torch.cuda.synchronize()


def race(sides, repeats):
    """`sides` (name → function without arguments) called in turn, `repeats` times after one to warm up.

    Returns three dicts by name: seconds of each call, the last answer, peak memory in MB of the warm-up.
    """
    seconds, answers, memory = {name: [] for name in sides}, {}, {}
    for name, side in sides.items():
        with peak_memory() as peak:
            answers[name] = side()
        memory[name] = peak["MB"]
    for _ in range(repeats):
        for name, side in sides.items():
            gc.collect()
            sync()
            start = time.perf_counter()
            answers[name] = side()
            sync()
            seconds[name].append(time.perf_counter() - start)
    return seconds, answers, memory


# ---- memory ----

def _resident(field):
    "VmRSS (now) or VmHWM (highest) of this process in MB."
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(field))
    return int(line.split()[1]) / 1024


@contextmanager
def peak_memory():
    """A dict whose MB is, afterwards, what was used beyond what was there: on the GPU, else in this process (Linux)."""
    found, gpu = {"MB": None}, GPU
    gc.collect()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    elif (linux := Path("/proc/self/clear_refs")).exists():
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # else freed memory would be used without being counted
        linux.write_text("5")  # the highest so far is forgotten
        before = _resident("VmRSS")
    yield found
    if gpu:
        found["MB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    elif linux.exists():
        found["MB"] = _resident("VmHWM") - before


# ---- where the time goes ----

def python_profile(function, top=8):
    """The functions in which most of the time is spent: (name, share) pairs."""
    profile = cProfile.Profile()
    profile.runcall(function)
    stats = pstats.Stats(profile)
    rows = sorted(((own, where) for where, (_, _, own, _, _) in stats.stats.items()), reverse=True)[:top]
    return [(f"{name} ({Path(file).name}:{line})" if line else re.sub(" at 0x[0-9a-f]+", "", name), own / stats.total_tt)
            for own, (file, line, name) in rows]


def torch_profile(function, top=8):
    """The operators in which most of the time is spent: (name, share) pairs."""
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * GPU
    with torch.profiler.profile(activities=kinds) as profile:
        function()
    events = [(e.self_device_time_total if GPU else e.self_cpu_time_total, e.key) for e in profile.key_averages()]
    total = sum(own for own, _ in events)
    return [(name, own / total) for own, name in sorted(events, reverse=True)[:top]]


# ---- a row ----

def row(what, seconds, peer, amount=None, same=None, answer="", target=1, memory=None, profile=None, **more):
    """One line of the table, from the seconds of `race`: the best of each side, and how much faster ours is.

    `amount` makes rates of times; `same` and `answer` say whether both sides agree, and on what; `profile`
    is called where the target is missed. `more` is kept as it is.
    """
    best = {name: min(seconds[name]) for name in ("ours", peer)}
    shown = {name: amount / value if amount else value for name, value in best.items()}
    ratio, memory = best[peer] / best["ours"], memory or {}
    reached = ratio >= target and same is not False
    return {"what": what, "peer": peer, "unit": "1/s" if amount else "s", "ours": shown["ours"], "theirs": shown[peer],
            "ratio": ratio, "target": f"≥ {target:g}×", "reached": reached, "same": same, "answer": answer,
            "seconds": {"ours": seconds["ours"], "theirs": seconds[peer]},
            "memory_mb": {"ours": memory.get("ours"), "theirs": memory.get(peer)},
            "threads": torch.get_num_threads(), "profile": [] if reached or not profile else profile(), **more}
