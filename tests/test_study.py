"""Studies under faults: real processes that are killed, runs that fail, definitions that are wrong."""
import copy
import json
import logging
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import numpy as np
import papermill
import psutil
import pytest
import yaml

from repspace import measure, records, study
from repspace.study import jobs, notebooks
from repspace.study.__main__ import main
from repspace.study.condition import Condition, run_condition, surrogate_paths, weights_path
from repspace.study.origin import provenance

RECIPE = {"epochs": 2, "batch_size": 50, "lr": 0.05}
PLAIN, MIXUP = "digits.tiny-cnn.none", "digits.tiny-cnn.mixup-1.0"


def definition(**changes):
    """A study of two conditions and two seeds, seconds of work."""
    return {"study": "tiny", "seeds": 2, "grid": [{"data": "digits", "models": ["tiny-cnn"],
            "regularizers": ["mixup:1.0", "none"], "recipe": RECIPE}]} | changes


def entry(regularizer, **changes):
    """A grid entry of one condition."""
    return {"data": "digits", "models": ["tiny-cnn"], "regularizers": [regularizer], "recipe": RECIPE | changes}


def define(place, **changes):
    path = place / "tiny.yaml"
    path.write_text(yaml.safe_dump(definition(**changes)))
    return path


def start(place, *words):
    """`python -m repspace.study tiny.yaml` as a process; Ctrl+C reaches it, also where tests run in the background."""
    return subprocess.Popen([sys.executable, "-m", "repspace.study", "tiny.yaml", *words], cwd=place, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def finish(process):
    return process.communicate(timeout=120)[0], process.returncode


def there(place):
    """When each record of the study was made."""
    return {str(p.relative_to(place)): p.stat().st_mtime_ns for p in place.glob("runs/tiny/*/[0-9]/run.json")}


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def running(family):
    return [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_a_killed_study_goes_on_and_does_only_what_is_missing(place, capsys):
    define(place, seeds=3)
    process = start(place, "--workers", "1")
    wait_for(lambda: there(place))
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    wait_for(lambda: not running(family), 10)
    before = there(place)
    assert 0 < len(before) < 6, "the study was to be killed in the middle"
    assert main(["tiny.yaml"]) == 0
    assert f"{len(before)} runs were there, {6 - len(before)} were made" in capsys.readouterr().out
    after = there(place)
    assert len(after) == 6 and before.items() <= after.items()
    assert not list(place.glob("runs/tiny/*/.*.*")), "unfinished records are removed"
    assert len(records.load("tiny", "fresh").samples) == 6 * 1597
    assert main(["tiny.yaml"]) == 0 and there(place) == after
    assert "6 runs were there, 0 were made, 0 failed" in capsys.readouterr().out


def test_interrupting_ends_the_workers(place):
    define(place, seeds=5)
    process = start(place)
    wait_for(lambda: there(place))
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    said, code = finish(process)
    assert code == 130 and "goes on from here" in said and "Traceback" not in said
    wait_for(lambda: not running(family), 10)


def test_a_killed_worker_is_replaced(place, caplog):
    define(place, grid=[entry("none")])
    known = set(psutil.Process().children())
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(study.run, "tiny.yaml")
        wait_for(lambda: set(psutil.Process().children()) - known)
        worker, = set(psutil.Process().children()) - known
        worker.kill()
        outcome = future.result()
    assert (outcome.made, len(outcome.failed)) == (2, 0) and "killed by signal 9" in caplog.text


def test_a_worker_that_is_killed_again_and_again_fails_its_runs(place, monkeypatch):
    monkeypatch.setattr(jobs, "call", lambda job, stop, environment: (-9, "out of memory"))
    outcome = study.run(define(place))
    assert len(outcome.failed) == 4 and "exit code -9: out of memory" in outcome.summary()


def test_a_run_that_diverges_is_marked_and_tried_again(place, capsys):
    define(place, seeds=1, grid=[entry("none"), entry("mixup:1.0", lr=1e30)])
    assert main(["tiny.yaml"]) == 1
    said = capsys.readouterr().out
    assert "1 were made, 1 failed" in said and "Diverged" in said
    failed = records.failed("tiny")
    assert failed[["condition", "seed"]].values.tolist() == [[MIXUP, 0]]
    assert "loss was" in failed.reason[0]
    assert records.load("tiny", "fresh").runs.condition.tolist() == [PLAIN]
    define(place, seeds=1)
    outcome = study.run("tiny.yaml")
    assert (outcome.done, outcome.made, len(outcome.failed)) == (1, 1, 0)
    assert records.failed("tiny").empty


def test_rounds_go_through_every_condition_plain_first(place):
    definition = study.read(define(place, round=1))
    for number in range(2):
        todo = list(study._jobs(definition, number, place / "runs", None, True))
        assert [(job.slug, job.seeds) for job in todo] == [(PLAIN, [number]), (MIXUP, [number])]
    todo = list(study._jobs(definition, 1, place / "runs", place / "book", True))
    assert [job.seeds for job in todo] == [[0, 1]] * 2, "a notebook shows the earlier rounds too"


@pytest.mark.parametrize("changes, message", [
    (dict(sedes=2), "unknown sedes; allowed are study, seeds, grid, round, measures"),
    (dict(seeds=0), "seeds is 0"), (dict(seeds=[1, 1]), "seeds is"), (dict(seeds=[-1]), "seeds is"),
    (dict(round=0), "round is 0"), (dict(measures="thorogh"), "thorogh.*standard"),
    (dict(study="../x"), "no name for a folder"), (dict(grid={}), "grid must be a list"),
    (dict(grid=[entry("mixpu:1.0")]), "mixpu.*label-smoothing"),
    (dict(grid=[entry("mixup:-1")]), "mixup:-1.*above 0"),
    (dict(grid=[entry("none", lr=-1)]), "lr must be.*-1"),
    (dict(grid=[entry("none", learning_rate=1)]), "learning_rate.*allowed are epochs"),
    (dict(grid=[entry("none") | {"models": ["tiny-cnm"]}]), "grid entry 1|tiny-cnm.*tiny-cnn-bn"),
    (dict(grid=[entry("none") | {"model": "tiny-cnn"}]), "unknown model; allowed are data, models"),
    (dict(grid=[entry("none") | {"data": "digist"}]), "digist.*cifar10"),
    (dict(grid=[entry("none") | {"feature_dim": 0}]), "feature_dim is 0"),
    (dict(grid=[entry("none"), entry("none", epochs=3)]), "twice"),
])
def test_a_wrong_definition_is_refused_before_anything_starts(place, changes, message, capsys):
    with pytest.raises(ValueError, match=message) as error:
        study.run(define(place, **changes))
    assert "tiny.yaml" in str(error.value)
    assert main(["tiny.yaml"]) == 2 and "tiny.yaml" in capsys.readouterr().err
    assert not list((place / "runs").iterdir())


def test_other_faults_are_refused(place):
    (place / "bad.yaml").write_text("study: [")
    for wrong, message in (("bad.yaml", "is not YAML"), ("none.yaml", "no file"), ("digist", "known are")):
        with pytest.raises(ValueError, match=message):
            study.run(wrong)
    with pytest.raises(ValueError, match="allowed is 'local'"):
        study.run(define(place), on="moon")


EXPERIMENTS = Path(study.__file__).parents[1] / "nbs" / "experiments"


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_of_the_repository_are_sound_and_fair(path):
    known = study.read(path)
    assert known.name == path.stem and len(known.seeds) % known.round == 0
    recipes = {}
    for c in known.conditions:
        recipes.setdefault((c.data, c.model, c.feature_dim), []).append((c.regularizer, c.recipe))
    for made in recipes.values():
        assert {name for name, _ in made} >= {"none", "label-smoothing:0.1", "mixup:1.0", "cutmix:1.0"}
        assert all(recipe == made[0][1] for _, recipe in made), "one recipe for all regularizers"


def condition(**changes):
    return Condition("digits", "tiny-cnn", "none", RECIPE | changes)


def make(seeds=(0,), **changes):
    return run_condition(condition(**changes), seeds, "tiny", progress=False).status.tolist()


def test_the_same_run_twice_is_the_same(place):
    first, second = place / "a", place / "b"
    for runs in (first, second):
        run_condition(condition(), [0], "tiny", runs, progress=False)
    one, two = (records.arrays("tiny", PLAIN, 0, "fresh", runs) for runs in (first, second))
    assert set(one) == set(two)
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)
    one, two = (records.read_run(runs / "tiny" / PLAIN / "0") for runs in (first, second))
    changing = {"seconds", "peak_memory_mb"}
    assert {k: v for k, v in one.items() if k not in changing} == {k: v for k, v in two.items() if k not in changing}


def test_another_recipe_sets_the_old_record_aside(place, caplog):
    assert make() == ["made"]
    old = records.read_run(place / "runs" / "tiny" / PLAIN / "0")
    with caplog.at_level(logging.WARNING):
        assert make(epochs=3) == ["made"]
    kept = place / "runs" / "tiny" / PLAIN / f"0.{old['identity'][:8]}-1"
    assert records.read_run(kept) == old and kept.name in caplog.text
    assert records.load("tiny", "fresh").runs.recipe[0]["epochs"] == 3


def test_a_new_schema_measures_again_without_training(place, monkeypatch):
    assert make() == ["made"]
    weights, = place.glob("runs/weights/*.safetensors")
    before, history = weights.stat().st_mtime_ns, records.load("tiny", "fresh").runs.history[0]
    monkeypatch.setattr(records, "SCHEMA", records.SCHEMA + 1)
    assert make() == ["remeasured"]
    assert weights.stat().st_mtime_ns == before
    assert records.load("tiny", "fresh").runs.history[0] == history
    weights.write_bytes(weights.read_bytes()[:1000])
    records.set_aside(place / "runs" / "tiny" / PLAIN / "0")
    assert make() == ["made"], "damaged weights are trained again"


def test_a_damaged_record_is_made_again(place, caplog):
    assert make() == ["made"]
    (place / "runs" / "tiny" / PLAIN / "0" / "samples.parquet").write_bytes(b"PAR1")
    assert make() == ["remeasured"] and "samples.parquet is damaged" in caplog.text
    assert make() == ["done"]


def test_a_damaged_checkpoint_costs_its_training_and_no_run(place, caplog):
    condition = Condition("digits", "tiny-cnn", "none", RECIPE)
    weights = weights_path(condition, 0, place / "runs")
    weights.parent.mkdir(parents=True)
    damaged = weights.with_name(f"{weights.stem}.{provenance()['code']}.checkpoint")
    damaged.write_bytes(b"half a checkpoint")
    assert run_condition(condition, [0], "tiny", place / "runs", progress=False)["status"].item() == "made"
    assert f"{damaged} is damaged" in caplog.text and not damaged.exists()


def test_published_runs_count_unless_asked_for_afresh(place):
    tiny = study.read(define(place))
    make([0, 1])
    study.publish(tiny)
    (place / "runs" / "tiny").rename(place / "away")
    assert make([0, 1]) == ["done", "done"]
    todo = list(study._jobs(tiny, 0, place / "runs", None, True))
    assert [(job.slug, job.seeds) for job in todo] == [(MIXUP, [0, 1])]
    todo = list(study._jobs(tiny, 0, place / "runs", None, False))
    assert [(job.slug, job.seeds) for job in todo] == [(PLAIN, [0, 1]), (MIXUP, [0, 1])]
    assert make([0, 1], epochs=3) == ["made", "made"], "published runs of another recipe do not count"


def test_two_processes_do_not_make_the_same_run_twice(place):
    define(place, grid=[entry("none")])
    other = start(place)
    outcome = study.run("tiny.yaml")
    said, code = finish(other)
    assert code == 0 and " 0 failed" in said and outcome.failed.empty
    assert len(there(place)) == 2 and not list(place.glob("runs/tiny/*/*.*-1"))


def test_notebooks_are_executed_once(place):
    define(place, seeds=1, grid=[entry("label-smoothing:0.1")])
    outcome = study.run("tiny.yaml", notebooks="book", published=False)
    assert (outcome.made, len(outcome.failed)) == (1, 0), outcome.summary()
    path = place / "book" / "digits.tiny-cnn.label-smoothing-0.1.ipynb"
    notebook = json.loads(path.read_text())
    text = json.dumps(notebook)
    assert "# digits · tiny-cnn · label smoothing 0.1" in json.dumps(notebook, ensure_ascii=False) and text.count("<figure") == 4
    assert str(Path(study.__file__).parents[1] / "nbs") not in json.dumps(notebook["metadata"])
    made = path.stat().st_mtime_ns
    study.run("tiny.yaml", notebooks="book", published=False)
    assert path.stat().st_mtime_ns == made
    notebook["metadata"].pop("repspace")
    path.write_text(json.dumps(notebook))
    records_before = there(place)
    study.run("tiny.yaml", notebooks="book", published=False)
    assert "repspace" in json.loads(path.read_text())["metadata"] and there(place) == records_before


def test_the_condition_notebook_runs_by_itself_and_again_in_the_same_kernel(place):
    notebook = nbformat.read(notebooks.template(), 4)
    again = copy.deepcopy(notebook.cells)
    for cell in again:
        cell.id, cell.metadata = f"again-{cell.id}", {}
    notebook.cells += again
    nbformat.write(notebook, place / "twice.ipynb")
    executed = study.execute_notebook(place / "twice.ipynb", place / "out.ipynb", cwd=place)
    tables = [cell.outputs[-1].data["text/plain"] for cell in executed.cells if cell.source.startswith("run_condition")]
    assert [("made" in table, "done" in table) for table in tables] == [(True, False), (False, True)]
    assert sorted(p.name for p in (place / "runs").iterdir()) == ["adhoc", "weights"]


def test_an_unknown_parameter_is_refused_by_caller_and_notebook(place):
    template = notebooks.template()
    with pytest.raises(ValueError, match="no parameters.*sedes"):
        study.execute_notebook(template, place / "x.ipynb", {"sedes": [0]})
    with pytest.raises(papermill.PapermillExecutionError, match="unknown parameters.*sedes.*allowed are study"):
        notebooks._execute(nbformat.read(template, 4), {"sedes": [0]}, place / "x.failed.ipynb", cwd=str(place))
    assert not (place / "x.ipynb").exists() and (place / "x.failed.ipynb").exists()


def test_thorough_measures_attack_from_another_seed_trained_on_the_same_images(place, monkeypatch):
    """The paper's black box is another network: here another seed, plain and with the same regularizer."""
    chosen = measure.settings("digits", "thorough")
    budget = chosen.thorough._replace(images=40, steps=5, targets=2, queries=20, masking_images=20)
    small = chosen._replace(attack_images=40, thorough=budget)
    monkeypatch.setattr(measure, "settings", lambda *asked: small)
    condition = Condition("digits", "tiny-cnn", "label-smoothing:0.1", RECIPE, measures="thorough")
    surrogates = surrogate_paths(condition, seed=3, runs=place / "runs")
    assert [(other.regularizer, seed) for other, seed, _ in surrogates.values()] == [
        ("none", 2), ("label-smoothing:0.1", 2)]
    assert list(run_condition(condition, [3], "deep", place / "runs", progress=False)["status"]) == ["made"]
    weights = {path.name for path in place.glob("runs/weights/*.safetensors")}
    assert {path.name for *_, path in surrogates.values()} < weights and len(weights) == 3

    run, samples = records.load("deep", runs=place / "runs", results=place / "results")
    run = run.iloc[0]
    stages = list(run["curves"]["auto_attack"].values())
    assert stages == sorted(stages, reverse=True) and run["robust_accuracy_auto"] == stages[-1]
    assert len(run["curves"]["masking"]["check"]) == 6 and len(run["curves"]["corruptions"]["ece"]) == 30
    for name in ("auto", "square", "transfer_plain", "transfer_same"):
        breaks = samples[f"breaks_{name}"]
        assert breaks.notna().sum() == 40
        assert run[f"robust_accuracy_{name}"] == pytest.approx((breaks.dropna() == float("inf")).mean())
