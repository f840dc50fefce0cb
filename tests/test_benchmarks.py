"""Each benchmark at a tiny size: its two sides give the same answer, and what it says is kept and printed."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as bench  # noqa: E402
from benchmarks import attack, batches, centers, ece, race, sample, training  # noqa: E402


@pytest.fixture(autouse=True)
def without_cifar(monkeypatch, tmp_path):
    """The same images everywhere, whether CIFAR-10 lies here or not, and one thread."""
    monkeypatch.setenv("REPSPACE_DATA", str(tmp_path))
    sample.images.cache_clear()
    with training.threads(1):
        yield
    sample.images.cache_clear()
    attack.victim.cache_clear()


def rows_of(benchmark, **sizes):
    """The rows of a benchmark, whose sides agree wherever there are two."""
    rows = list(benchmark(**sizes))
    assert rows and all(row["same"] is (True if row["peer"] else None) for row in rows), rows
    for row in rows:
        assert row["ours"] > 0 and json.dumps(row) and bench.line(row).startswith(row["what"])
        assert row["reached"] or row["profile"], "a missed target without its profile"
    return rows


def test_pgd_leaves_the_same_images_standing():
    rows = rows_of(attack.pgd, count=32, steps=5, train_images=200, repeats=1)
    assert [row["target"] for row in rows] == ["≥ 2×", "≥ 1×"] * 2 and rows[0]["data"] == "digits, enlarged"


def test_auto_attack_leaves_the_same_images_standing():
    rows_of(attack.auto, count=16, steps=4, queries=20, train_images=200, repeats=1)


def test_ece_agrees_with_torchmetrics():
    assert len(rows_of(ece.ece, count=20_000, repeats=1)) == 2


def test_centers_agree_with_the_solvers():
    rows = rows_of(centers.centers, sizes=((4, 6), (12, 20)), sample=2, repeats=1, alone=(20, 30))
    assert [row["peer"] and row["peer"].split()[0] for row in rows] == ["cvxpy", "SciPy"] * 2 + [None]
    assert rows[2]["solved"] == "2 of 12"


def test_batches_agree_with_torchvision():
    # In a process of its own: DataLoader forks its workers, and what is forked from a process with threads may wait for ever.
    alone = "import test_benchmarks as t; t.rows_of(t.batches.augmented, count=256, sizes=(64,), repeats=1)"
    done = subprocess.run([sys.executable, "-c", alone], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows_of(batches.mixed, batches=2, sizes=(32,), repeats=1)


def test_training_starts_alike_and_sets_threads_back():
    rows = rows_of(training.on_cpu, train_images=64, epochs=1, repeats=1, thread_counts=(1,), n=256)
    assert torch.get_num_threads() == 1 and 0 < rows[0]["ceiling_share"]
    assert rows[0]["flops_per_image"] == pytest.approx(3 * 2 * 40e6, rel=.5)  # forward and twice that backward


def test_sides_take_turns_and_the_warm_up_is_not_counted():
    calls = []
    seconds, answers, memory = race.race({"ours": lambda: calls.append("a"), "theirs": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3 and all(len(times) == 2 for times in seconds.values())


def test_peak_memory_sees_what_is_freed_again():
    def side():
        return float(torch.ones(30_000_000).sum())
    with race.peak_memory() as peak:
        side()
    assert peak["MB"] is None or 100 < peak["MB"] < 200


def test_missed_targets_and_other_answers_are_said():
    found = race.row("a thing", {"ours": [2.0, 3.0], "peer": [3.0, 2.5]}, "peer", target=2, profile=lambda: [("slow", 1.0)])
    assert found["ratio"] == 1.25 and not found["reached"] and found["profile"] == [("slow", 1.0)]
    assert "1.25×" in bench.line(found | {"device": "cpu"}) and "≥ 2× missed" in bench.line(found | {"device": "cpu"})
    wrong = race.row("a thing", {"ours": [1.0], "peer": [9.0]}, "peer", same=False)
    assert not wrong["reached"] and "NO" in bench.line(wrong | {"device": "cpu"})


def test_results_are_kept_beside_those_of_other_machines(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"another machine": {"rows": []}}))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--quick", "--only", "mixing", "--out", str(path)])
    bench.main()
    kept, said = json.loads(path.read_text()), capsys.readouterr().out
    assert kept.pop("another machine") == {"rows": []} and len(kept) == 1 and list(tmp_path.glob(".*")) == []
    run = next(iter(kept.values()))
    assert run["quick"] and {row["benchmark"] for row in run["rows"]} == {"mixing"}
    assert all(row["what"] in said for row in run["rows"]) and str(ROOT) not in path.read_text()
