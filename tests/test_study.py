"""Studies under faults: real processes that are killed, runs that fail, definitions that are wrong."""
import copy
import json
import logging
import re
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

from repspace import claims, measure, records, study
from repspace.study import jobs, notebooks
from repspace.study.__main__ import main
from repspace.study import Condition, run_condition, weights_path
from repspace.study.weights import surrogate_paths
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
    return process.communicate(timeout=300)[0], process.returncode


def there(place):
    """When each record of the study was made."""
    return {str(p.relative_to(place)): p.stat().st_mtime_ns for p in place.glob("runs/tiny/*/[0-9]/run.json")}


def wait_for(condition, seconds=300):
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


EXPERIMENTS = Path(study.__file__).parents[2] / "nbs" / "experiments"


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_of_the_repository_are_sound_and_fair(path):
    known = study.read(path)
    assert known.name == path.stem and len(known.seeds) % known.round == 0
    recipes = {}
    for c in known.conditions:
        recipes.setdefault((c.data, c.model, c.feature_dim), []).append((c.regularizer, c.recipe))
    registered = claims.PREREGISTERED.get(known.name)
    judges = "nothing" if known.name == "digits-rates" else registered.judges if registered else "regularizers"
    for made in recipes.values():
        wanted = {"regularizers": {"none", "label-smoothing:0.1", "mixup:1.0", "cutmix:1.0"}, "arms": {"none"}, "nothing": set()}
        assert {name for name, _ in made} >= wanted[judges]
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
    changing = {"seconds", "peak_memory_mb", "checksum"}   # the checksum is over them as well
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
    assert "# digits · tiny-cnn · label smoothing 0.1" in json.dumps(notebook, ensure_ascii=False) and text.count("<figure") == 6
    assert str(Path(study.__file__).parents[2] / "nbs") not in json.dumps(notebook["metadata"])
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
    assert len(run["curves"]["masking"]["check"]) == 7
    assert [len(kind["ece"]) for kind in run["curves"]["corruptions"].values()] == [6] * 5
    for name in ("auto", "square", "transfer_plain", "transfer_same"):
        breaks = samples[f"breaks_{name}"]
        assert breaks.notna().sum() == 40
        assert run[f"robust_accuracy_{name}"] == pytest.approx((breaks.dropna() == float("inf")).mean())


# What is said before anything starts

TORCHLESS = """
import sys
class NoTorch:  # not `sys.modules["torch"] = None`: SciPy looks there to find out what its arguments are
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision"):
            raise ImportError(f"{name} where only a definition is read")
sys.meta_path.insert(0, NoTorch())
from repspace import records, study
for path in sys.argv[1:]:
    known = study.read(path)
    for condition in known.conditions:
        print(condition.title, condition.slug, records.identity(study.run_settings(condition, 0)))
"""


def test_every_study_can_be_read_and_checked_without_torch():
    paths = sorted(EXPERIMENTS.glob("*.yaml"))
    done = subprocess.run([sys.executable, "-c", TORCHLESS, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == sum(len(study.read(path).conditions) for path in paths)


def test_identities_of_published_runs_are_what_they_were():
    """They are those of the definitions of today, whose settings have no word on what was added."""
    for name in ("digits", "digits-2d", "cifar10-cpu"):
        known, results = study.read(EXPERIMENTS / f"{name}.yaml"), EXPERIMENTS.parents[1] / "results"
        settings = {(c.slug, seed): study.run_settings(c, seed) for c in known.conditions for seed in known.seeds}
        assert not any({"sources", "measure_sources"} & set(each) for each in settings.values())
        assert {key: records.identity(each) for key, each in settings.items()} == \
            records.published_identities(name, results)


BOMB = "\n".join(["a0: &a0 [1]", *(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(30))])
MERGED = "\n".join(["a0: &a0 {x: 1}", *(f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 9)}]}}" for i in range(30))])


def text(**changes):
    return yaml.safe_dump(definition(**changes), sort_keys=False)


@pytest.mark.parametrize("content, message", [
    (text() + "seeds: 3\n", "'seeds' stands in line 2 and again in line"),
    (text().replace("  regularizers:", "  regularizers: [none]\n  regularizers:"), "'regularizers' stands in line .* again in"),
    (text().replace("epochs: 2", "epochs: 2\n    epochs: 3"), "'epochs' stands in"),
    (text().replace("study: tiny", "study: 1.10"), 'line 1: YAML reads 1.10 in study as a number; write "1.10", in quotes'),
    (text().replace("study: tiny", "study: no"), 'reads no in study as yes or no; write "no"'),
    (text().replace("study: tiny", "study: 2024-01-31"), 'as a date; write "2024-01-31"'),
    (text().replace("study: tiny", "study:"), "reads no value in study as nothing; write a name"),
    (text().replace("- none", "- null"), "write none for no regularizer"),
    (text().replace("- none", "- off"), "write none for no regularizer"),
    (text().replace("- mixup:1.0", "- mixup: 1.0"), 'reads mixup: 1.0 in regularizers as a mapping; write "mixup:1.0"'),
    (text().replace("- tiny-cnn", "- 12:30"), 'reads 12:30 in models as a number; write "12:30"'),
    (text().replace("data: digits", "data: 10"), 'reads 10 in data as a number; write "10"'),
    (text().replace("seeds: 2", "seeds: 010"), "YAML reads 010 as another number"),
    (text().replace("seeds: 2", "seeds: 1_0"), "YAML reads 1_0 as another number"),
    (text().replace("seeds: 2", f"seeds: {'9' * 5000}"), "seeds|digits"),
    (text(seeds=10 ** 9), "seeds is 1000000000; allowed are .* up to 10000"), (text(seeds=[2 ** 32]), "none above 4294967295"),
    (text(study="x" * 300), "a name of 300 letters"), (text(grid=[]), "grid must be a list of one entry or more"),
    (text(grid=[entry("none") | {"models": ["tiny-cnn"] * 400, "regularizers": ["none"] * 400}]), "320000 runs"),
    (text(grid=[entry("none") | {"recipe": {1: 2}}]), r"recipe has unknown keys \[1\]"),
    (text(grid=[entry("none") | {"recipe": [1]}]), "recipe is .*mapping"),
    (text(grid=[entry("none") | {"data": "folder:" + "x" * 300}]), "letters, and files have at most"),
    (text(grid=[entry("none") | {"data": "folder:" + "x/" * 30}]), "there is no folder"),
    (text(grid=[entry("none") | {"feature_dim": 10 ** 9}]), "feature_dim is 1000000000; allowed"),
    (BOMB, "aliases"), (MERGED, "aliases"), ("a: &a {b: *a}", "aliases"), ("? [a]\n: 1", "unhashable"),
    ("[" * 5000, "nested too deeply"), ("- " * 5000, "nested too deeply"), ("{a: " * 5000, "nested too deeply|is not YAML"),
    ("x" * 300_000, "300000 bytes; allowed"), ("- a\n" * 15_000, "must be a mapping"), ("!!python/object/apply:os.system [ls]", "is not YAML"), ("", "must be a mapping"),
    ("a: \x00", "is not YAML"), ("---\na: 1\n---\nb: 1", "is not YAML"), ("!!binary |\n  aGFsbG8=", "is no binary: take away the tag"),
])
def test_every_fault_of_a_definition_is_one_valueerror_at_once(place, content, message):
    (place / "tiny.yaml").write_text(content)
    start = time.process_time()
    with pytest.raises(ValueError, match=message) as error:
        study.read("tiny.yaml")
    assert str(error.value).startswith("tiny.yaml") and len(str(error.value)) < 1500
    assert time.process_time() - start < 10, "it goes on and on"


def test_a_file_or_name_that_cannot_be_read_is_a_valueerror(place):
    (place / "tiny.yaml").write_bytes(b"study: \xff")
    for wrong in ("tiny.yaml", "x" * 300, "x" * 300 + ".yaml", "a\0b", ".", ""):
        with pytest.raises(ValueError):
            study.read(wrong)


def test_numbers_and_repetition_as_people_write_them(place):
    (place / "tiny.yaml").write_text("study: '1.10'\nseeds: 2\ngrid:\n  - &first {data: digits, models: [tiny-cnn], "
                                     "regularizers: [none], recipe: &r {epochs: 2, batch_size: 50, lr: 5e-2}}\n"
                                     "  - {<<: *first, regularizers: ['mixup:1']}\n")
    known = study.read("tiny.yaml")
    assert known.name == "1.10" and [c.recipe["lr"] for c in known.conditions] == [0.05, 0.05]


@pytest.mark.parametrize("changes, message", [
    (dict(models=["tiny-cnn-bn"], recipe=RECIPE | {"batch_size": 1}), "batch normalization cannot train on one image"),
    (dict(models=["resnet8"], recipe=RECIPE | {"train_images": 1}), "fewer than the 10 classes"),
    (dict(regularizers=["cutmix:1.0"], recipe=RECIPE | {"batch_size": 1}), "cutmix:1.0 mixes the images of a batch"),
    (dict(recipe=RECIPE | {"train_images": 201}), "train_images is 201; allowed are up to 200"),
    (dict(data="cifar10", models=["resnet8"], recipe=RECIPE | {"train_images": 50_001}), "allowed are up to 50000"),
    (dict(data="cifar100", models=["resnet8"], recipe=RECIPE | {"train_images": 99}), "fewer than the 100 classes"),
    (dict(models=["vit"]), r"vit.none cannot be trained on images of shape \(1, 8, 8\)"),
])
def test_what_cannot_train_is_said_before_anything_starts(place, changes, message, capsys):
    define(place, grid=[entry("none"), entry("none") | changes])
    if "data" not in changes and "models" not in changes:
        define(place, grid=[entry("none") | changes])
    assert main(["tiny.yaml", "--afresh"]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list((place / "runs").iterdir())


# What is added from outside

MINE = """
import torch
from repspace import data, models, regularize
from repspace.vocabulary import Strength


def small_net(num_classes, in_channels, small_images):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64 * in_channels, 32), torch.nn.ReLU(),
                               torch.nn.Linear(32, num_classes))


class Shrink(regularize.Regularizer):
    def penalty(self, features):
        return self.strength * features.abs().mean()


def shrink(strength):
    return Shrink(strength)


def bright(root=None, download=True, seed=0):
    return data.load("digits", seed=seed)


models.register("small-net", small_net, words="small net")
regularize.register("shrink", shrink, strength=Strength(0))
data.register("bright", bright, reference=16, grid=(8, 16, 32), published=200, split_by_seed=True)
"""


def define_mine(place, body=MINE):
    (place / "my_nets.py").write_text(body)
    return define(place, seeds=1, grid=[entry("none") | {"models": ["small-net"]},
                                        entry("shrink:0.1") | {"data": "bright"}])


def test_a_module_that_the_command_names_is_everywhere(place):
    define_mine(place)
    refused = subprocess.run([sys.executable, "-m", "repspace.study", "tiny.yaml"], cwd=place, capture_output=True, text=True)
    assert refused.returncode == 2 and "'small-net' is unknown" in refused.stderr
    said, code = finish(start(place, "--with", "my_nets"))
    assert code == 0 and "2 were made, 0 failed" in said, said
    run = records.read_run(place / "runs/tiny/bright.tiny-cnn.shrink-0.1/0")
    assert run["sources"] == ["my_nets:bright", "my_nets:shrink"]
    run = records.read_run(place / "runs/tiny/digits.small-net.none/0")
    assert run["sources"] == ["my_nets:small_net"] and list(run["provenance"]["with"]) == ["my_nets"]
    said, code = finish(start(place, "--with", "my_nets"))
    assert code == 0 and "2 runs were there, 0 were made" in said
    said, code = finish(subprocess.Popen([sys.executable, "-m", "repspace.study", "publish", "tiny.yaml", "--with=my_nets"],
                                         cwd=place, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    assert code == 0 and len(records.load("tiny", "published", results=place / "results").runs) == 2
    define(place, seeds=1, grid=[entry("none") | {"models": ["small-net"]}])
    said, code = finish(start(place, "--with", "my_nets", "--notebooks", "book"))
    assert code == 0 and "import_modules(['my_nets'])" in (place / "book/digits.small-net.none.ipynb").read_text(), said


@pytest.mark.parametrize("module, message", [
    ("no_such_module", "there is no module 'no_such_module'"), ("my_nets.py", "without folders and .py"),
    ("../my_nets", "without folders and .py"), ("broken", "module 'broken' cannot be imported: ZeroDivisionError"),
    ("leaves", "module 'leaves' cannot be imported: SystemExit"),
])
def test_a_module_that_cannot_be_imported_is_said(place, module, message):
    define(place, grid=[entry("none")])
    (place / "broken.py").write_text("1 / 0")
    (place / "leaves.py").write_text("raise SystemExit(0)")
    said, code = finish(start(place, "--with", module))
    assert code == 2 and message in said and "Traceback" not in said and not list((place / "runs").iterdir())


def test_yaml_alone_imports_nothing(place):
    (place / "my_nets.py").write_text("open('imported', 'w')")
    for word in ("my_nets", "my_nets:small_net", "my_nets.small_net"):
        define(place, grid=[entry("none") | {"models": [word]}])
        assert finish(start(place))[1] == 2 and not (place / "imported").exists()


# The command line

ECHO = """#!/bin/sh
printf '%s\\n' "$@" >> "$LOG"
"""


def make_says(place, *words):
    """The arguments that make gives the last program it starts, which is not started."""
    root = Path(study.__file__).parents[2]
    for name in ("Makefile", "pyproject.toml", *(f"locks/{each}.txt" for each in ("build", "book", "test"))):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes((root / name).read_bytes())
    (place / ".venv/bin").mkdir(parents=True, exist_ok=True)
    (place / ".venv/bin/python").write_text(ECHO)
    (place / ".venv/bin/python").chmod(0o700)
    log = place / "log"
    subprocess.run(["make", "setup", f"PYTHON={place}/.venv/bin/python"], cwd=place, env={"PATH": "/usr/bin:/bin", "LOG": log},
                   check=True, capture_output=True)
    log.unlink()
    subprocess.run(["make", *words], cwd=place, env={"PATH": "/usr/bin:/bin", "LOG": log}, check=True, capture_output=True)
    return log.read_text().splitlines()


@pytest.mark.parametrize("evil", ["`touch x`", "$(shell touch x)", "$$(touch x)", "\"; touch x; \"", "'; touch x; '", "a b", "*"])
def test_what_make_is_told_is_data(place, evil):
    assert make_says(place, "study", f"STUDY={evil}", f"ON={evil}", f"GPUS={evil}", "AFRESH=1") == [
        "-m", "repspace.study", f"--notebooks=_build/lab/{evil}", f"--on={evil}", f"--gpus={evil}", "--afresh", "--", evil]
    assert make_says(place, "publish", f"STUDY={evil}")[:5] == ["-m", "repspace.study", "publish", "--", evil]
    assert make_says(place, "bench", f"BENCH={evil}") == ["-m", "benchmarks", *evil.split()]
    assert make_says(place, "study", f"WITH={evil}")[4:] == [*(f"--with={word}" for word in evil.split()), "--", "digits"]
    assert not (place / "x").exists()


def test_an_arm_is_trained_measured_kept_and_found_again(place):
    """Held logits and a subset of its own, over the whole path: weights, record, publication."""
    text = "label-smoothing:0.1+logit-scale:4.28"
    define(place, keep="samples", seeds=[100, 101], grid=[entry(text, train_images=100, subset="own") | {"data": "digits:5"}])
    tiny = study.read("tiny.yaml")
    condition, = tiny.conditions
    assert condition.slug == "digits-5.tiny-cnn.label-smoothing-0.1-logit-scale-4.28"
    assert condition.title.endswith("label smoothing 0.1 + logit scale held at 4.28")
    outcome = study.run(tiny)
    assert outcome.made == 2, outcome.summary()
    made = records.load("tiny")
    net, loaded = study.load_classifier(condition, 100), made.arrays(condition.slug, 100)
    assert net.head.bias is None and net.hold.batches.item() == 4 and not loaded["head.bias"].any()
    from repspace import data
    test = data.load("digits:5", seed=100).test
    assert np.abs(net(test.images).detach().numpy() - loaded["clean"]).max() < 1e-4 and loaded["clean"].shape[1] == 5
    study.publish(tiny)
    published = records.load("tiny", "published")
    assert published.runs["accuracy"].round(6).tolist() == made.runs["accuracy"].round(6).tolist()
    with pytest.raises(records.NotKept): published.arrays(condition.slug, 100)


def test_a_surrogate_with_a_subset_of_its_own_is_the_run_of_its_seed(place):
    from repspace import data, train
    from repspace.study.weights import surrogates
    held = Condition("digits", "tiny-cnn", "logit-norm:6", RECIPE | {"train_images": 100, "subset": "own"})
    seen, fit = {}, train.fit
    def listen(classifier, dataset, recipe, regularizer, seed, *args, **options):
        seen[regularizer.text] = train.training_split(dataset.train, recipe, seed).images
        return fit(classifier, dataset, recipe, regularizer, seed, *args, **options)
    dataset = data.load("digits", seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "fit", listen)
        nets = surrogates(held, dataset, 1, place / "runs")
    wanted = data.first(dataset.train, 100, train.stream(0, "subset")).images
    assert set(nets) == {"plain", "same"} and nets["plain"].hold is None and nets["same"].hold.size == 6
    assert all((images == wanted).all() for images in seen.values()) and set(seen) == {"none", "logit-norm:6.0"}


@pytest.mark.parametrize("change, message", [
    ({"regularizers": ["logit-scale:4+logit-norm:4"]}, "logit_scale and logit_norm both hold"),
    ({"regularizers": ["logit-scale:0"]}, "needs a strength that is above 0"), ({"regularizers": ["epochs:7.5"]}, "a whole number"),
    ({"regularizers": ["no-bias:1"]}, "takes no strength"), ({"data": "digits:10"}, "digits:5 are its first 5 classes"),
    ({"data": "digits:1"}, "unknown"), ({"recipe": RECIPE | {"subset": "own"}}, "subset own needs train_images"),
    ({"recipe": RECIPE | {"logit_scale": "4"}}, "logit_scale must be a number"),
    ({"regularizers": ["learning-rate:1e999"]}, "needs a strength")])
def test_arms_that_cannot_be_are_refused_at_once(place, change, message):
    with pytest.raises(ValueError, match=message):
        study.read(define(place, grid=[entry("none") | change]))


def test_a_study_says_what_it_keeps(place):
    assert study.read(define(place, keep="scalars")).keep == "scalars" and study.read(define(place)).keep == "arrays"
    for wrong in ("all", True, ["arrays"]):
        with pytest.raises(ValueError, match="keep"): study.read(define(place, keep=wrong))


def test_arms_change_no_identity_of_old_texts_and_have_their_own():
    texts = ["none", "no-bias", "logit-scale:6", "logit-norm:6", "learning-rate:0.4", "epochs:300"]
    keys = {records.training_key(study.run_settings(Condition("digits", "tiny-cnn", text, RECIPE), 0)) for text in texts}
    assert len(keys) == 6
    same = [Condition("digits", "tiny-cnn", "none", RECIPE | extra) for extra in ({}, {"bias": True, "subset": "first", "logit_norm": None})]
    assert len({records.identity(study.run_settings(each, 0)) for each in same}) == 1
    data = {records.training_key(study.run_settings(Condition(name, "tiny-cnn", "none", RECIPE), 0)) for name in ("digits", "digits:5", "digits:2")}
    assert len(data) == 3


def test_a_grid_multiplies_its_lists(place):
    several = entry("none") | {"data": ["digits:5", "digits"], "feature_dim": [2, 8], "regularizers": ["none", "mixup:1"],
                               "arms": [["none", "logit-scale:6"], ["none", "learning-rate:0.4"]]}
    conditions = study.read(define(place, grid=[several])).conditions
    assert len({condition.slug for condition in conditions}) == 2 * 2 * 2 * 2 * 2
    assert {(condition.data, condition.feature_dim) for condition in conditions} == {
        (data, d) for data in ("digits:5", "digits") for d in (2, 8)}
    assert {condition.regularizer for condition in conditions if "mixup" in condition.regularizer} == {
        "mixup:1.0", "mixup:1.0+learning-rate:0.4", "mixup:1.0+logit-scale:6.0", "mixup:1.0+logit-scale:6.0+learning-rate:0.4"}


@pytest.mark.parametrize("change, message", [
    ({"arms": "logit-scale:6"}, "arms must be a list"), ({"arms": []}, "arms must be a list"), ({"arms": ["logit-scale:6"]}, "arms 1 must be a list"),
    ({"arms": [[]]}, "arms 1 must be a list"), ({"arms": [[None]]}, "arms"), ({"arms": [[3]]}, "arms"), ({"arms": [[["none"]]]}, "not text"),
    ({"data": []}, "data must be a list"), ({"feature_dim": []}, "feature_dim must be a list"), ({"feature_dim": [0]}, "feature_dim is 0"),
    ({"arms": [["none"] * 400, ["none"] * 400]}, "runs; allowed are up to"), ({"arms": [["none", "none"]]}, "is in the grid twice")])
def test_lists_that_cannot_be_multiplied_are_refused(place, change, message):
    with pytest.raises(ValueError, match=message):
        study.read(define(place, grid=[entry("none") | change]))


def test_a_study_that_measures_training_alone_attacks_nothing(place):
    study.run(define(place, measures="training", seeds=1), runs=place / "runs", workers=1)
    runs = records.load("tiny", "fresh", place / "runs").runs
    assert {"train_loss", "train_accuracy", "accuracy"} <= set(runs) and not [name for name in runs if "pgd" in name or "cone" in name]


def test_rows_that_are_kept_without_arrays_hold_what_claims_read():
    from repspace.records.published import ROWS
    assert set(claims.columns()[1]) | {"image", "label", "prediction", "subset"} <= set(ROWS)
