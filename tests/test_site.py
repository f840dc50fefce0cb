"""The site, built from two conditions and two seeds, read page by page and opened in a browser."""
import errno
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
REGULARIZERS = ["none", "label-smoothing:0.1"]
sys.path.insert(0, str(ROOT / "book"))

import build  # noqa: E402
import place  # noqa: E402
import readme  # noqa: E402
from repspace.study import locks  # noqa: E402
from repspace_book import strip_directives  # noqa: E402


def only_for_tests():
    """Modules of packages that are pinned for the tests and not for the book: a reader's machine lacks them."""
    book, test = ({re.sub(r"[-_.]+", "-", name).lower() for name in re.findall(r"^([\w.-]+)==", (ROOT / f"locks/{lock}.txt").read_text(), re.MULTILINE)}
                  for lock in ("book", "test"))
    of_module = importlib.metadata.packages_distributions().items()
    return sorted(module for module, names in of_module if {re.sub(r"[-_.]+", "-", name).lower() for name in names} <= test - book)


HIDE = """import sys
from importlib.machinery import PathFinder
class WithoutThem(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in THEM else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutThem
"""


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """`make book` in a folder of its own, with a corner of the digits study, and without what only tests need."""
    place, hiding = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("hiding")
    (hiding / "sitecustomize.py").write_text(f"THEM = {only_for_tests()}\n{HIDE}")
    env = os.environ | {"PYTHONPATH": str(hiding)}
    study = yaml.safe_load((ROOT / "nbs/experiments/digits.yaml").read_text())
    study["seeds"] = study["round"] = 2
    study["grid"] = [study["grid"][0] | {"models": ["tiny-cnn"], "regularizers": REGULARIZERS}]
    (place / "digits.yaml").write_text(yaml.safe_dump(study))
    made = subprocess.run([sys.executable, "-m", "repspace.study", place / "digits.yaml", "--afresh", "--runs",
                           place / "runs", "--notebooks", place / "_build/lab/digits"], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    # Executed chapters are kept under what they depend on, so the book and this test share those of the instruments.
    command = [sys.executable, ROOT / "book/build.py", "--runs", place / "runs", "--out", place,
               "--executed", ROOT / "_build/executed"]
    built = subprocess.run(command, capture_output=True, text=True, env=env)
    assert built.returncode == 0, built.stdout + built.stderr
    again = subprocess.run(command, capture_output=True, text=True, env=env)
    return place / "_build/html", built.stdout, again.stdout


@pytest.fixture(scope="session")
def pages(site):
    """Every page, parsed: path → soup."""
    return {p: BeautifulSoup(p.read_text(), "html.parser") for p in sorted(site[0].rglob("*.html"))
            if "_static" not in p.parts}


def chapters(pages):
    return {p: soup for p, soup in pages.items() if p.name not in ("search.html", "genindex.html")}


# ---- what the build says and does ----

def test_the_site_was_built_without_what_only_tests_need(tmp_path):
    assert {"grpc", "ray", "pytest", "torchattacks"} <= set(only_for_tests()) and not {"torch", "papermill", "repspace"} & set(only_for_tests())
    (tmp_path / "sitecustomize.py").write_text(f"THEM = {only_for_tests()}\n{HIDE}")
    code = "from importlib.util import find_spec; print(find_spec('grpc'), find_spec('torch') is not None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.stdout.split() == ["None", "True"], done.stderr


def test_build_says_where_the_site_is_and_how_long_it_took(site):
    html, said, _ = site
    assert said.rstrip().endswith((html / "index.html").as_uri())
    for stage in ("Chapters", "Pages", "Site", "Largest process"):
        assert re.search(rf"^{stage}.*\d (s|GB)$", said, re.MULTILINE)


def test_second_build_does_nothing_again(site):
    assert re.search(r"^  0 executed", site[2], re.MULTILINE) and "  unchanged" in site[2]


def test_every_chapter_and_every_condition_has_a_page(site, pages):
    listed = {f"{name}.html" for name in [*build.chapters(), "lab/index"]}
    listed |= {f"lab/digits/digits.tiny-cnn.{slug}.html" for slug in ("none", "label-smoothing-0.1")}
    assert listed <= {str(p.relative_to(site[0])) for p in pages}


def test_lab_log_lists_the_conditions(site, pages):
    rows = [row.get_text(" ", strip=True) for row in pages[site[0] / "lab/index.html"].select("article tbody tr")]
    assert len(rows) == 2 and "digits · tiny-cnn · plain 2 0." in rows[0] and "label smoothing 0.1" in rows[1]


def test_condition_pages_have_titles_of_their_own(site, pages):
    page = pages[site[0] / "lab/digits/digits.tiny-cnn.label-smoothing-0.1.html"]
    assert page.h1.get_text().startswith("digits · tiny-cnn · label smoothing 0.1")


# ---- what stands in the pages ----

def test_links_anchors_and_files_exist(site, pages):
    html, ids, broken = site[0], {}, []
    for path, soup in pages.items():
        ids[path] = {tag["id"] for tag in soup.select("[id]")} | {tag["name"] for tag in soup.select("a[name]")}
    for path, soup in pages.items():
        for tag, attribute in [(t, a) for a in ("href", "src") for t in soup.select(f"[{a}]")]:
            url = urlsplit(tag[attribute])
            if url.scheme or url.netloc or tag[attribute] in ("#", ""):
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not target.is_file() or not target.is_relative_to(html.resolve()):
                broken.append((path.name, tag[attribute]))
            elif url.fragment and target in ids and unquote(url.fragment) not in ids[target]:
                broken.append((path.name, tag[attribute]))
    assert not broken


def test_nothing_is_loaded_from_elsewhere(site, pages):
    outside = re.compile(r"^(https?:)?//")
    loads = [(p.name, str(tag)[:120]) for p, soup in pages.items()
             for tag in soup.select("script, link, img, iframe, source, object, video, audio, form")
             for a in ("src", "href", "srcset", "data", "action") if outside.match(tag.get(a, ""))]
    loads += [(p.name, "url in a script") for p, soup in pages.items() for script in soup.select("script")
              if re.search(r"https?://", script.get_text())]
    loads += [(p.name, url) for p in site[0].rglob("*.css")
              for url in re.findall(r"url\(\s*[\"']?(?:https?:)?//[^)]*\)|@import\s+[\"'](?:https?:)?//[^;]*", p.read_text())]
    assert not loads


def test_pages_show_no_directives_errors_or_warnings(pages):
    wrong = re.compile(r"^\s*#\s*\|.*|Traceback \(most recent call last\).*|^\S*Warning: .*|.*<object at 0x.*", re.MULTILINE)
    shown = [(p.name, found.group(0)[:100]) for p, soup in chapters(pages).items()
             for found in [wrong.search(soup.select_one("article").get_text())] if found]
    assert not shown


def test_pages_say_nothing_of_the_machine(site):
    words = [str(ROOT), str(site[0].parent), str(site[0].parent.parent), sys.prefix]
    words += [str(Path.home())] if len(str(Path.home())) > 6 else []
    texts = [p for p in site[0].rglob("*") if p.suffix in (".html", ".js", ".ipynb", ".md", ".inv", ".svg")]
    told = [(p.name, word) for p in texts if "mathjax" not in p.parts for word in words
            if re.search(re.escape(word) + r"(?![\w-])", p.read_text(errors="replace"))]
    assert not told


def test_figures_have_alternative_texts(pages):
    silent = []
    for path, soup in chapters(pages).items():
        article = soup.select_one("article")
        for image in article.select("img"):
            alt = image.get("alt", "").strip()
            if not alt or "_images/" in alt or alt.endswith((".png", ".svg")):
                silent.append((path.name, str(image)[:80]))
        for svg in (s for s in article.select("svg") if not s.find_parent("svg") and "aria-hidden" not in s.attrs):
            if not (svg.get("aria-label") or svg.find("title", recursive=False)):
                silent.append((path.name, str(svg)[:80]))
    assert not silent


def test_one_search_field_and_no_page_is_an_orphan(site, pages):
    front = pages[site[0] / "index.html"]
    assert len(front.select("nav .search-button-field, .bd-sidebar-primary .search-button-field")) == 1
    reached = {urlsplit(a["href"]).path for a in front.select(".bd-sidebar-primary a[href]")}
    assert {f"{name}.html" for name in build.chapters() if name != "index"} <= reached | {"#"}


# ---- in a browser without a network ----

def browse(page, profile, *options):
    """The page's DOM after its scripts have run, and the errors that the browser logged."""
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
         "--virtual-time-budget=8000", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", *options,
         page.as_uri()], capture_output=True, text=True, timeout=120, env=os.environ | {"LANG": "C.UTF-8"})
    # The theme's own console.log lines are no errors; a script or file that fails is.
    logged = re.compile(r"CONSOLE.*(Uncaught|Error|ERR_|Failed|Refused|blocked)")
    return done.stdout, [line for line in done.stderr.splitlines() if logged.search(line)]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome on the PATH")
@pytest.mark.parametrize("name", ["index", "findings/regions", "instruments/geometry/index"])
def test_page_renders_offline(site, tmp_path, name):
    page = site[0] / f"{name}.html"
    dom, console = browse(page, tmp_path / "profile", "--dump-dom")
    assert not console
    assert ('class="math' in page.read_text()) == ("<mjx-container" in dom)
    assert "<mjx-merror" not in dom


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome on the PATH")
def test_pages_fit_a_phone(site, pages, tmp_path):
    """No page scrolls sideways at 390 pixels: what is wider scrolls in a frame of its own. Many pages in one browser."""
    copy, names = tmp_path / "html", [str(p.relative_to(site[0])) for p in chapters(pages)]
    shutil.copytree(site[0], copy)
    for first in range(0, len(names), 15):
        some = names[first:first + 15]
        frames = "".join(f'<iframe width="390" height="800" src="{name}"></iframe>' for name in some)
        (copy / "frames.html").write_text(f"""<body>{frames}<script>
            addEventListener("load", () => setTimeout(() => {{
                document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(
                    f => f.contentDocument.documentElement.scrollWidth));
            }}, 3000))</script></body>""")
        dom, _ = browse(copy / "frames.html", tmp_path / f"profile{first}", "--dump-dom", "--allow-file-access-from-files")
        widths = json.loads(re.search(r"<title>(.*?)</title>", dom).group(1))
        assert not [(name, width) for name, width in zip(some, widths, strict=True) if width > 390]


# ---- the parts of the machinery ----

def test_chapters_depend_on_the_records_of_every_study(tmp_path, monkeypatch):
    for name in ("locks/book.txt", "repspace/a.py", "results/digits/runs.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    states = [build.state(tmp_path / "runs")]
    for name in ("results/cifar10-cpu/logits.npz", "runs/cifar10-cpu/cifar10.resnet8.none/0/run.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("new")
        states.append(build.state(tmp_path / "runs"))
    assert states[0][0] != states[1][0] == states[2][0]
    assert len({reads_runs for _, reads_runs in states}) == 3


def test_directives_are_stripped_and_hidden_cells_dropped():
    def cell(source):
        return {"cell_type": "code", "source": source.splitlines(keepends=True)}
    notebook = {"cells": [cell("#| default_exp arrays"), cell("#| hide\nimport os"), cell("#|export\n#| slow\nx = 1  #| no")]}
    assert [c["source"] for c in strip_directives(notebook)["cells"]] == ["x = 1  #| no"]


def write(path, *sources):
    import nbformat.v4 as v4
    import nbformat
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(v4.new_notebook(cells=[v4.new_code_cell(source) for source in sources]), path)
    return path


def executed(tmp_path, path):
    """What `build.execute` returns for the notebook at `path`, as text."""
    code = (f"import sys; from pathlib import Path; sys.path.insert(0, {str(ROOT / 'book')!r}); import build; "
            f"print(build.execute('x', Path({str(path)!r}), Path({str(tmp_path / 'done.ipynb')!r}), ()))")
    with tempfile.TemporaryDirectory() as runtime:
        env = build.child_environment(tmp_path, runtime)
        return subprocess.run([sys.executable, "-c", code], env=env, check=True, stdout=subprocess.PIPE, text=True).stdout


def test_failing_chapter_is_named_with_its_cell_and_traceback(tmp_path):
    said = executed(tmp_path, write(tmp_path / "bad.ipynb", "x = 1", "x / 0"))
    assert "x / 0" in said and "ZeroDivisionError: division by zero" in said
    assert not (tmp_path / "done.ipynb").exists()


def test_slow_cells_are_not_executed(tmp_path):
    said = executed(tmp_path, write(tmp_path / "slow.ipynb", "#| slow\n1 / 0", "#| eval: false\n1 / 0", "2"))
    assert said.rstrip().endswith("None)") and (tmp_path / "done.ipynb").exists()


def test_kernels_are_those_of_this_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "agg")
    write(tmp_path / "which.ipynb", "import sys, os; open('which', 'w').write(sys.executable + str('MPLBACKEND' in os.environ))")
    executed(tmp_path, tmp_path / "which.ipynb")
    assert (tmp_path / "which").read_text().startswith(sys.executable)


# ---- builds that meet, clocks that go back, disks that are full ----

def test_what_the_last_builds_wanted_is_kept_whatever_the_clock_says(tmp_path):
    def build_of(key):
        (tmp_path / "findings").mkdir(exist_ok=True)
        path = tmp_path / f"findings/a.{key * 16}.ipynb"
        path.write_text("{}")
        os.utime(path, (0, 0) if key == "5" else (4e9, 4e9))  # the newest seems the oldest
        build.forget(tmp_path, [f"findings/a.{key * 16}.ipynb"])
    (tmp_path / "wanted.json").write_text("[cut")
    (tmp_path / f"b.{'f' * 16}.failed.ipynb").write_text("{}")
    (tmp_path / f".b.{'f' * 16}.ipynb.0123456789ab").write_text("{}")
    (tmp_path / "notes.ipynb").write_text("{}")
    for key in "12345":
        build_of(key)
    assert sorted(p.name[2:3] for p in tmp_path.glob("findings/*")) == ["3", "4", "5"]
    build_of("5")
    assert len(list(tmp_path.glob("findings/*"))) == 3
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["notes.ipynb", "wanted.json"]


def test_a_second_build_waits_and_says_for_whom(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "PATIENCE", 0.5)
    code = (f"import sys, time; sys.path.insert(0, {str(ROOT / 'book')!r}); from pathlib import Path; from place import alone\n"
            f"with alone(Path({str(tmp_path)!r})): print('in', flush=True); time.sleep(3)")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "in\n"
        with place.alone(tmp_path, tmp_path / "executed", tmp_path):
            assert first.wait() == 0
    said = [record.getMessage() for record in caplog.records]
    assert len(said) > 1 and said[0].startswith(f"waiting for {tmp_path / '.lock'}, which process {first.pid} on ")


def test_folders_of_others_are_refused(tmp_path):
    assert place.private(tmp_path / "a/own").stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(tmp_path / "a/own")
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "theirs").mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(tmp_path / "theirs", 12345, 12345)
    for name in ("link", "open", *(["theirs"] if os.geteuid() == 0 else [])):
        with pytest.raises(PermissionError, match="a link, another user's, or open to others"):
            place.private(tmp_path / name)


def test_files_stay_whole_when_the_disk_is_full_and_are_written_only_when_changed(tmp_path, monkeypatch):
    from repspace.records import files
    path = tmp_path / "README.md"
    build.write_changed(path, "old")
    os.utime(path, (1, 1))
    build.write_changed(path, "old")
    assert path.stat().st_mtime == 1

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError):
        build.write_changed(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["README.md"]
    figure = tmp_path / "figure.svg"
    figure.write_text("old")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "README", path)
    monkeypatch.setattr(readme, "FIGURE", figure)
    monkeypatch.setattr(readme, "expected", lambda: ("new", "new"))
    with pytest.raises(SystemExit, match="README.md is left as it was: No space left on device"):
        readme.main(check=False)
    assert path.read_text() == figure.read_text() == "old"


def test_what_is_in_the_way_is_one_line(tmp_path):
    (tmp_path / "_build").write_text("a file")
    done = subprocess.run([sys.executable, ROOT / "book/build.py", "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode and re.fullmatch(r"build\.py: \S+/_build\S*: [\w ]+\n", done.stderr)


def test_closed_streams_and_a_home_that_is_not_there_do_no_harm(tmp_path):
    """Kernels execute without a writable home, under a long TMPDIR, and where standard error is closed."""
    path = write(tmp_path / "plot.ipynb", "%matplotlib inline\nimport matplotlib.pyplot as plt, sys\nplt.plot([1]);",
                 "import os; open('said', 'w').write(os.environ['MPLCONFIGDIR']); os.write(2, b'noise')")
    long = tmp_path / ("t" * 97)
    long.mkdir()
    code = (f"import sys; from pathlib import Path; sys.path.insert(0, {str(ROOT / 'book')!r})\n"
            f"import build, place; build.open_streams(); place = Path({str(tmp_path)!r})\n"
            "import os; os.environ.update(build.child_environment(place / 'runs', build.private(place / 'private')))\n"
            "done = build.execute_all({'x': Path(sys.argv[1])}, {'x': '0' * 16}, place / 'executed', 1, place / 'log', ())\n"
            "print(done)")
    env = os.environ | {"HOME": "/dev/null/home", "TMPDIR": str(long)}
    env = {k: v for k, v in env.items() if not k.startswith(("XDG_", "JUPYTER", "IPYTHON", "MPL"))}
    script = tmp_path / "script.py"
    script.write_text("if __name__ == '__main__':\n" + "".join(f"    {line}\n" for line in code.splitlines()))
    done = subprocess.run(["sh", "-c", f"'{sys.executable}' '{script}' '{path}' 2>&-"], env=env, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0 and (tmp_path / "executed" / f"x.{'0' * 16}.ipynb").exists(), done.stdout
    assert (tmp_path / "said").read_text() == str(tmp_path / "private/matplotlib")
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o700
