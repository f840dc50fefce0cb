"""Build the book: run studies, execute the chapters, assemble their pages, render the site.

    python book/build.py [--study NAME ...] [--with MODULE ...] [--runs DIR] [--out DIR] [--executed DIR] [--jobs N]

Everything is written under OUT/_build (OUT is the project's root unless given):
executed/  chapters with their outputs, one file per state of what they read: nothing is executed twice
private/   what kernels and libraries keep, in place of the user's own folders
lab/       the executed notebook of each condition, one folder per study
source/    the tree that Jupyter Book renders
html/      the site
"""
import argparse
import errno
import hashlib
import html
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import yaml

import kernels
from place import alone, folders, home, open_streams, private
from repspace import records, vocabulary
from repspace.records.files import write_text
from repspace.records.places import is_slug
from repspace.study import additions
from repspace.study.notebooks import execute_notebook

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
SKIPPED = re.compile(r"^\s*#\s*\|\s*(slow\s*$|eval\s*:\s*false)", re.MULTILINE)
ANSI = re.compile(r"\x1b\[[0-9;]*m")
# An executed chapter, one that failed, or what a build that was killed had begun to write.
EXECUTED = re.compile(r"\.[0-9a-f]{16}(\.failed)?\.ipynb(\.[0-9a-f]{12})?$")
RENDER = "from jupyter_book.cli.main import main; main()"


def duration(seconds):
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


def say(text=""):
    print(text, flush=True)


def stop(text):
    say()
    sys.exit(f"build.py: {text}")


def write_changed(path, text):
    """Write the file `path` where it does not hold `text` already: there whole, or as it was."""
    if not path.exists() or path.read_text(encoding="utf-8", errors="replace") != text:
        write_text(path, text)


# ---- what there is to build ----

def chapters():
    """Names of the pages in _toc.yml, in its order."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    pages = [page for part in toc["parts"] for page in part["chapters"]]
    names = [toc["root"]] + [each["file"] for page in pages for each in [page, *page.get("sections", [])]]
    return [name for name in names if name != "lab/index"]


def notebooks():
    """Chapters that are notebooks: name → file. A chapter without a file is an error."""
    found = {name: NBS / f"{name}.ipynb" for name in chapters() if not (ROOT / "book" / f"{name}.md").exists()}
    missing = [name for name, path in found.items() if not path.exists()]
    if missing:
        stop(f"_toc.yml lists chapters that nbs/ does not have: {', '.join(missing)}")
    return found


def digest(paths, base):
    """One hash over names and contents of files."""
    sha = hashlib.sha256()
    for path in sorted(paths):
        sha.update(f"{path.relative_to(base)}\0".encode())
        sha.update(hashlib.sha256(path.read_bytes()).digest())
    return sha.hexdigest()


def state(runs):
    """What chapters depend on besides their own text: (instruments, chapters that read fresh runs too)."""
    read = [ROOT / "locks/book.txt", *(ROOT / "repspace").rglob("*.py"),
            *(p for folder in ("results", "nbs/experiments") for p in (ROOT / folder).rglob("*") if p.is_file())]
    code = digest(read, ROOT) + "".join(f"{name}{text}" for name, text in additions.hashes().items())
    return code, code + digest(runs.glob("*/*/*/run.json"), runs)


# ---- executing ----

def child_environment(runs, runtime):
    """Kernels of this environment, whatever else the user's Jupyter, IPython and Matplotlib are set to.

    `runtime`: the private folder for what they keep.
    """
    env = os.environ | folders(runtime) | {
        "OMP_NUM_THREADS": "1", "REPSPACE_RUNS": str(runs), "JUPYTER_PATH": f"{sys.prefix}/share/jupyter",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    env.pop("MPLBACKEND", None)
    return env | additions.environment(additions.hashes())


def skip_marked(notebook):
    """Tag the cells of `notebook` that are marked `#| slow` or `#| eval: false`, so that they are not executed."""
    for cell in notebook.cells:
        if cell.cell_type == "code" and SKIPPED.search(cell.source):
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "skip-execution"]


def start_worker(log):
    """Kernels write their own messages (not those of cells) to the stderr they inherit."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)


def execute(name, source, target, modules):
    """Execute one notebook into `target`; returns its name, the seconds, and the error as text or None."""
    from papermill.exceptions import PapermillExecutionError
    start, error = time.monotonic(), None
    try:
        execute_notebook(source, target, cwd=source.parent, prepare=skip_marked, modules=modules, kernel="python3",
                         timeout=1800, manager=kernels.manager_for(source.read_text(encoding="utf-8")))
    except PapermillExecutionError as failure:
        trace = ANSI.sub("", "\n".join(failure.traceback)).splitlines()
        shown = "\n".join((["..."] if len(trace) > 60 else []) + trace[-60:])
        error = f"In [{failure.exec_count}], which is\n\n{failure.source}\n\n{shown}"
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
    target.with_name(f"{target.stem}.failed.ipynb").unlink(missing_ok=True)
    return name, time.monotonic() - start, error


# These take longest, and are begun first: else one of them would be left alone at the end, and a core idle.
LONGEST = ("findings/verdicts", "instruments/study/index", "instruments/study/cluster", "instruments/study/main", "index", "findings/cause",
           "findings/attacks", "findings/regions", "instruments/claims/sentences", "findings/confidence", "findings/race", "findings/direction",
           "instruments/measure/index", "instruments/study/jobs", "findings/when", "findings/others", "instruments/attacks/auto", "findings/length")


def longest_first(names):
    """`names` of chapters, those of `LONGEST` in front."""
    return sorted(names, key=lambda name: LONGEST.index(name) if name in LONGEST else len(LONGEST))


def execute_all(books, keys, folder, jobs, log, modules):
    """Execute what has changed; returns name → executed file and how many were executed."""
    targets = {name: folder / f"{name}.{keys[name]}.ipynb" for name in books}
    missing = [name for name, target in targets.items() if not target.exists()]
    with ProcessPoolExecutor(max(1, min(jobs, len(missing))), mp_context=get_context("spawn"),
                             initializer=start_worker, initargs=(log,)) as pool:
        futures = []
        for name in longest_first(missing):
            futures.append(pool.submit(execute, name, books[name], targets[name], modules))
        for count, future in enumerate(as_completed(futures), 1):
            name, seconds, error = future.result()
            if error:
                pool.shutdown(wait=False, cancel_futures=True)
                stop(f"the chapter nbs/{name}.ipynb fails\n\n{error}")
            say(f"  [{count:2}/{len(missing)}] {name:30} {duration(seconds):>10}")
    forget(folder, [str(target.relative_to(folder)) for target in targets.values()])
    return targets, len(missing)


def forget(folder, wanted, builds=3):
    """Delete executed chapters that none of the last different `builds` wanted, this one included.

    An older state may be wanted again, by the tests or after a git checkout.
    """
    kept = folder / "wanted.json"
    try:
        before = [names for names in json.loads(kept.read_text()) if isinstance(names, list) and names != wanted]
    except (OSError, ValueError, TypeError):
        before = []
    lists = [*before, wanted][-builds:]
    write_changed(kept, json.dumps(lists, indent=1))
    names = {name for names in lists for name in names}
    for path in folder.rglob("*.ipynb*"):
        if EXECUTED.search(path.name) and str(path.relative_to(folder)) not in names:
            path.unlink(missing_ok=True)


# ---- assembling ----

LAB_LINK = re.compile(r"\[([^\[\]]*)\]\((lab/[^()]*)\.ipynb\)")


def page(path, hidden, lab=()):
    """An executed notebook as it is published: no traces of the machine, no progress bars.

    A condition whose run was published by another machine has no page in this lab log: links to it become text.
    """
    text = LAB_LINK.sub(lambda link: link[0] if link[2] in lab else link[1], path.read_text())
    for prefix, instead in hidden.items():
        text = text.replace(prefix, instead)
    notebook = json.loads(text)
    notebook["metadata"].pop("papermill", None)
    for cell in notebook["cells"]:
        for key in ("papermill", "execution"):
            cell["metadata"].pop(key, None)
        if cell["cell_type"] == "code":
            cell["outputs"] = [o for o in cell["outputs"] if o.get("name") != "stderr"]
    return json.dumps(notebook, indent=1, ensure_ascii=False)


def ended(path):
    """The executed notebook of a condition at `path`, a dict, or None where it did not end, or is none."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        made, cells = notebook["metadata"]["papermill"], notebook["cells"]
        outputs = [output["output_type"] for cell in cells for output in cell.get("outputs", ())]
        whole = (made["end_time"] and not made["exception"] and "error" not in outputs
                 and all(isinstance(made["parameters"][name], str) for name in ("data", "model", "regularizer")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return notebook if whole and is_slug(path.stem) else None


def title_of(notebook):
    """The title of a condition's notebook, as text."""
    return html.unescape("".join(notebook["cells"][0]["source"]).splitlines()[0].removeprefix("# "))


def in_order(notebooks):
    """{path: notebook} of conditions by network, of each the plain training first, as in every table of the book."""
    made = {path: notebook["metadata"]["papermill"]["parameters"] for path, notebook in notebooks.items()}
    order = vocabulary.ordered(condition["regularizer"] for condition in made.values())
    return sorted(made, key=lambda path: (made[path]["data"], made[path]["model"], made[path].get("feature_dim") or 0,
                                          order.index(made[path]["regularizer"])))


def condition_row(page_name, title, folder):
    """One row of the lab log, cells from the run.json files of a condition."""
    from repspace.claims import Markdown
    runs, failed = [], len(list(folder.glob("*.failed.json")))
    for path in sorted(folder.glob("*/run.json")):
        try:
            runs += [records.read_run(path.parent)] if path.parent.name.isdigit() else []
        except (ValueError, OSError) as error:
            say(f"  left out of the lab log: {error}")

    def mean(part, name, words):
        values = [(run.get(part) or {}).get(name) for run in runs]
        values = [value for value in values if type(value) in (int, float)]
        return words.format(sum(values) / len(values)) if values else "–"
    return [Markdown("[{}]({})", title, Markdown(page_name)), f"{len(runs)}" + (f" ({failed} failed)" if failed else ""),
            mean("scalars", "accuracy", "{:.3f}"), mean("seconds", "train", "{:.1f} s"), mean("seconds", "measure", "{:.1f} s")]


LAB = """# The lab log

A condition is a data set, an architecture, a regularizer and a recipe; each of its runs has a seed of its
own. Here are those that were executed for this copy of the book, a notebook each: its parameters, its
seeds, its training curves, what it left behind. Studies that were run elsewhere are in the findings by
their published records, and not here.
"""
LAB_EMPTY = """
No condition has been executed in this folder yet: the findings of this copy of the book read the published
records alone. `make book` runs the studies on the embedded digits, and this page then lists them.
"""


def assemble_lab(build, runs, hidden):
    """Write the conditions' pages and the table that links them; returns their names."""
    from repspace.claims import Markdown, markdown_table
    names, text = [], LAB
    head = ["condition", "runs", "accuracy, mean", "training, per run", "measuring, per run"]
    for study in sorted(p for p in (build / "lab").glob("*") if p.is_dir() and is_slug(p.name)):
        paths = [p for p in study.glob("*.ipynb") if not p.name.endswith(".failed.ipynb")]
        whole = {path: notebook for path in paths if (notebook := ended(path))}
        rows = []
        for path in in_order(whole):
            name = f"lab/{study.name}/{path.stem}"
            write_text(build / "source" / f"{name}.ipynb", page(path, hidden))
            rows.append(condition_row(f"{study.name}/{path.name}", title_of(whole[path]), runs / study.name / path.stem))
            names.append(name)
        if rows:
            text += Markdown("\n## {}\n\n{}\n", study.name, markdown_table(head, rows)).text
    write_text(build / "source/lab/index.md", text if names else LAB + LAB_EMPTY)
    return names


def assemble(executed, build, runs):
    """The tree that Jupyter Book renders, in build/source."""
    source = build / "source"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    hidden = {f"{build}/": "_build/", f"{runs}/": "runs/", f"{ROOT}/": ""}
    if home() not in (None, Path("/")):
        hidden[f"{home()}/"] = "~/"
    lab = assemble_lab(build, runs, hidden)
    for name, path in executed.items():
        target = source / f"{name}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page(path, hidden, lab=lab))
    for name in chapters():
        if name not in executed:
            shutil.copy(ROOT / "book" / f"{name}.md", source / f"{name}.md")
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    for chapter in (c for part in toc["parts"] for c in part["chapters"]):
        if chapter["file"] == "lab/index" and lab:
            chapter["sections"] = [{"file": name} for name in lab]
    (source / "_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False))
    for name in ("_config.yml", "references.bib"):
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "book/_static", source / "_static")
    (source / "_ext").mkdir()
    shutil.copy(ROOT / "book/repspace_book.py", source / "_ext")
    experiments = sorted(p for p in (NBS / "experiments").glob("*.yaml")  # chapters may link to the studies
                         if p.is_file() and not p.is_symlink())
    if experiments:
        (source / "experiments").mkdir()
    for path in experiments:
        shutil.copy(path, source / "experiments")


# ---- rendering ----

def render(build, env):
    """Render build/source into build/html, with every warning an error; returns False where it was up to date."""
    source, html, stamp = build / "source", build / "html", build / "html.key"
    key = digest([p for p in source.rglob("*") if p.is_file() and "__pycache__" not in p.parts], source)
    if (html / "index.html").exists() and stamp.exists() and stamp.read_text() == key:
        return False
    # From nothing every time: Sphinx does not repeat the warnings of pages it keeps, and keeps pages that are gone.
    fresh = build / "rendering"
    shutil.rmtree(fresh, ignore_errors=True)
    command = [sys.executable, "-c", RENDER, "build", str(source), "--path-output", str(fresh),
               "-W", "-n", "--keep-going", "-q"]
    # Bytecode of the extension would be written into the source tree.
    done = subprocess.run(command, env=env | {"PYTHONDONTWRITEBYTECODE": "1"}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        stop(f"the pages could not be rendered without warnings\n\n{ANSI.sub('', done.stdout)}")
    stamp.unlink(missing_ok=True)
    old = build / "html.old"
    shutil.rmtree(old, ignore_errors=True)
    if html.exists():
        html.rename(old)
    (fresh / "_build/html").rename(html)
    for path in (old, fresh):
        shutil.rmtree(path, ignore_errors=True)
    write_text(stamp, key)
    return True


# ---- all of it ----

def run_study(name, build, runs, env, modules):
    command = [sys.executable, "-m", "repspace.study", name, "--afresh",
               "--notebooks", str(build / "lab" / name), "--runs", str(runs), *(f"--with={module}" for module in modules)]
    if subprocess.run(command, env=env, cwd=ROOT).returncode:
        stop(f"the study {name} has failed runs (see above); what is whole is kept, and `make book` goes on from there")


def main(argv=None):
    open_streams()
    logging.basicConfig(format="build.py: %(message)s")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--study", action="append", default=[], metavar="NAME", help="run this study first")
    parser.add_argument("--with", action="append", default=[], metavar="MODULE", dest="modules",
                        help="import this module first, in studies and chapters")
    parser.add_argument("--runs", type=Path, help="records are read from and written to here (default: REPSPACE_RUNS, runs/)")
    parser.add_argument("--out", type=Path, default=ROOT, help="folder in which _build is made")
    parser.add_argument("--executed", type=Path, help="keep executed chapters here (default: OUT/_build/executed)")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="chapters executed side by side")
    args = parser.parse_args(argv)
    if args.modules:
        sys.path.insert(0, os.getcwd())  # as `python -m` does, and not only book/
        try:
            additions.import_modules(args.modules)
        except ValueError as error:
            stop(error)
    build = args.out.resolve() / "_build"
    runs = Path(args.runs or os.environ.get("REPSPACE_RUNS") or ROOT / "runs").resolve()
    executed = (args.executed or build / "executed").resolve()
    with alone(build, executed):
        took = make(build, runs, executed, args)

    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    say()
    for name, seconds in took:
        say(f"{name:24} {duration(seconds):>12}")
    say(f"{'Largest process':24} {peak:9.1f} GB")
    say(f"\nThe book is here: {(build / 'html/index.html').as_uri()}")


def make(build, runs, executed, args):
    """Make the book in `build` as `args` say; returns the stages and how long each took."""
    took = []

    def stage(name, work, *arguments):
        say(f"\n{name}")
        start = time.monotonic()
        result = work(*arguments)
        took.append((name, time.monotonic() - start))
        return result

    env = child_environment(runs, private(build / "private"))
    os.environ.clear()
    os.environ.update(env)
    books = notebooks()
    for name in args.study:
        stage(f"Study {name}", run_study, name, build, runs, env, args.modules)
    code, reads = state(runs)
    keys = {name: hashlib.sha256(path.read_bytes() + (code if name.startswith("instruments/") else reads).encode())
            .hexdigest()[:16] for name, path in books.items()}
    targets, count = stage(f"Chapters ({len(books)})", execute_all, books, keys, executed, args.jobs,
                           build / "kernels.log", args.modules)
    say(f"  {count} executed, {len(books) - count} unchanged")
    stage("Pages", assemble, targets, build, runs)
    if not stage("Site", render, build, env):
        say("  unchanged")
    return took


# What is in the way, and not wrong here.
SURROUNDINGS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EMFILE,
                errno.ENFILE, errno.ENOTDIR, errno.EEXIST}

if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        if error.errno is not None and error.errno not in SURROUNDINGS:
            raise
        stop(f"{error.filename or 'a file'}: {error.strerror or error}")
