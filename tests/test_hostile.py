"""Whatever records, YAML and file names hold, a page shows it as text: no script, no directive, no file of this machine."""
import functools
import http.server
import json
import os
import re
import shutil
import zlib
import subprocess
import sys
import threading
from pathlib import Path
from xml.etree import ElementTree

import nbformat.v4 as v4
import numpy as np
import pandas as pd
import pytest
import yaml
from bs4 import BeautifulSoup
from test_site import CHROMIUM
from test_stats_claims import constructed

from repspace import claims, figures, findings, records
from repspace.claims import Markdown
from repspace.vocabulary import shown, visible

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "book"))

import build  # noqa: E402
import readme  # noqa: E402

SECRET = "a line of a file of this machine"
PAYLOADS = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<svg/onload=alert(1)>", "</td></table><iframe src=//e.invalid>",
    "```{include} SECRET\n```", "\n\n```{literalinclude} SECRET\n```\n\n", ":::{include} SECRET\n:::", "{include}`SECRET`",
    "```{raw} html\n<script>alert(1)</script>\n```", "{{ substitution }}", "{{ '%s' }}", "$\\input{SECRET}$",
    r"$$\href{javascript:alert(1)}{x}$$", r"\(\href{javascript:alert(1)}{x}\)", "\\begin{equation}x\\end{equation}",
    "[a](javascript:alert(1))", "![a](http://e.invalid/x.png)", "<javascript:alert(1)>", "[a]: javascript:alert(1)", "`` `code` ``",
    "a|b | c", "one\n# two\n\n- three", "(target)=", "% comment", "+++", ": term", "1. one", "> quoted", "]]>", "<![CDATA[<b>]]>",
    "&lt;script&gt; &#60;b&#62;", "*a* **b** _c_ ~~d~~ ^e^", "<!-- <b> -->", "\\", "\\*", "\u202egnp.exe\u202c", "\x00\x07\x1b[31m",
    "\ud800", "\u2028\u2029\x85", "#000000 id=\"x\" url(#y) currentColor", "'\" onmouseover=alert(1) x=\"", "x" * 10_000,
    "{0} {name} {}", "%s %(x)s", "{eval-rst}`x`", "--- -- ...", "http://e.invalid www.e.invalid a@e.invalid"]
SHORT = [text for text in PAYLOADS if len(text) < 1_000]
CHUNKS = [" ".join(SHORT[i::3]) for i in range(3)]  # what is longer is cut


def as_text(page):
    """What a reader of the parsed `page` sees, without white space and with quotes and dashes as they were typed."""
    text = page.get_text().translate(str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "."}))
    return re.sub(r"[\s.-]", "", text)


def is_shown(payload, page):
    expected = BeautifulSoup("", "html.parser")
    expected.append(visible(payload))
    return as_text(expected) in as_text(page)


def faults_of(page):
    """What in the parsed `page` is no text: tags that act, and in its article also those and attributes that may."""
    article = page.select_one("article") or BeautifulSoup("", "html.parser")
    around = [str(tag)[:200] for tag in page.find_all(True) if tag.name == "iframe" or tag.get("src") == "x"
              or (tag.name == "script" and "alert(" in tag.get_text())
              or any(name.startswith("on") and "alert" in str(value) for name, value in tag.attrs.items())
              or re.match(r"\s*javascript:", tag.get("href", ""), re.IGNORECASE)]
    tags = around + [str(tag)[:200] for tag in article.select("script, iframe, object, embed, form, base, meta, link, .math, mjx-container")
            if "thebe" not in str(tag) and tag.get_text() != "kernelName = 'python3'"]  # the theme's own
    for tag in article.find_all(True):
        tags += [f"{tag.name} {name}={value}"[:200] for name, value in tag.attrs.items()
                 if name.startswith("on") or (name in ("href", "src", "xlink:href", "action")
                 and re.match(r"\s*(javascript|data|vbscript):|(https?:)?//", str(value), re.IGNORECASE))]
    return tags + [SECRET] * (SECRET in page.get_text())


def written(path, cells, **metadata):
    """The path of a notebook of `cells`, written there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"language_info": {"name": "python", "pygments_lexer": "ipython3"}, **metadata}
    path.write_text(json.dumps(v4.new_notebook(cells=cells, metadata=about)))
    return path


def rendered(place, monkeypatch, cells):
    """Pages that Jupyter Book makes of an index with `cells`, and of what is in the lab: {name: page}."""
    project = place / "project"
    (project / "book/_static").mkdir(parents=True)
    for name in ("_config.yml", "references.bib", "book/repspace_book.py"):
        shutil.copy(ROOT / name, project / name)
    names = [f"findings/{name}" for name in claims.chapters]
    toc = {"format": "jb-book", "root": "index", "parts": [{"caption": "Log", "chapters": [
        *({"file": name} for name in names), {"file": "lab/index"}]}]}
    (project / "_toc.yml").write_text(yaml.safe_dump(toc))
    executed = {name: written(place / "made" / f"{name}.ipynb", [v4.new_markdown_cell(f"# {name}"),
        *(v4.new_markdown_cell(f"({claim.id})=\n## {claim.id}") for claim in claims.CLAIMS if name == f"findings/{claim.chapter}")]) for name in names}
    executed["index"] = written(place / "made/index.ipynb", [v4.new_markdown_cell("# Index"), *cells])
    monkeypatch.setattr(build, "ROOT", project)
    monkeypatch.setattr(build, "NBS", project / "nbs")
    build.assemble(executed, place, place / "runs")
    assert build.render(place, build.child_environment(place / "runs", place / "private"))
    html = place / "html"
    return {str(p.relative_to(html)): BeautifulSoup(p.read_text(), "html.parser") for p in html.rglob("*.html")
            if "_static" not in p.parts}


def cell(*displayed):
    """A code cell that has displayed these, as a kernel hands them over."""
    outputs = []
    for each in displayed:
        methods = {"text/html": "_repr_html_", "text/markdown": "_repr_markdown_"}
        data = {kind: getattr(each, method)() for kind, method in methods.items() if hasattr(each, method)}
        outputs.append(v4.new_output("display_data", data | {"text/plain": repr(each).encode(errors="replace").decode()}))
    return v4.new_code_cell("display()", outputs=outputs, execution_count=1)


def hostile_study(payload, model="net", data="digits"):
    """A `Judged` study whose made-up records say `payload` wherever they hold text."""
    made = constructed({claims.get("magnitude").primary: -0.06}, n_seeds=5, data="x")
    by = {"version": payload, "commit": payload, "code": payload, "training": {"version": payload}}
    model, data = (text.replace("\ud800", "?") for text in (model, data))  # pandas refuses them: such a study is left out
    name = f"hostile-{zlib.crc32(payload.encode(errors='replace'))}"
    runs = made.runs.assign(
        study=name, data=data, model=model, source="fresh", seconds=1.0, settings=[{"reference": 0.4}] * len(made.runs),
        made=[{"device": payload, "versions": {"torch": payload}, "provenance": by}] * len(made.runs), success_square=0.5)
    samples = pd.DataFrame([dict(condition=run.condition, seed=run.seed, image=i, label=0, prediction=0, subset=True,
                                 norm=i + run.seed / 10) for run in runs.itertuples() for i in range(9)])
    return findings.Judged(name, records.Records(runs, samples))


def drawn(study):
    return [figures.effects(study.rows("magnitude"), "magnitude"), figures.scorecard(study.ledger),
            figures.paired_lines(study.runs, "rms"), figures.distributions(study.recorded, "norm")]


def lab_notebook(path, title="a title", exception=None, end="2026-01-01", outputs=()):
    """The executed notebook of a condition at `path`, as papermill leaves it."""
    parameters = {"data": "digits", "model": "net", "regularizer": "none", "feature_dim": None}
    first = v4.new_markdown_cell(f"# {shown(title)}\n> A condition.")
    code = v4.new_code_cell("1", execution_count=1, outputs=list(outputs))
    written(path, [first, code], papermill={"parameters": parameters, "exception": exception, "end_time": end})


# ---- text ----

@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_shown_is_one_line_that_html_reads_back_as_it_was(payload):
    assert "\n" not in shown(payload) and re.sub(r"&(#\d+|lt|gt|amp);", "", shown(payload)).isprintable()
    assert not re.search(r"""[<>"\\`*{}\[\]|$~^@#!](?!\d+;)""", re.sub(r"&#(?=\d+;)", "", shown(payload)))
    assert BeautifulSoup(shown(payload), "html.parser").get_text() == visible(payload)


def test_a_template_is_no_place_for_values():
    assert Markdown("{} {x}", "{y}", x="{z}").text == "&#123;y&#125; &#123;z&#125;"
    for text in ("{device}", "a {", "} b"):
        with pytest.raises((LookupError, ValueError)):
            Markdown(text)


# ---- pages, by Sphinx ----

@pytest.fixture
def secret(tmp_path_factory):
    """Puts the path of a file of this machine into a payload that would show what it holds."""
    path = tmp_path_factory.mktemp("elsewhere") / "secret.txt"
    path.write_text(SECRET)
    return lambda text: text.replace("SECRET", str(path))


def test_pages_of_hostile_records_show_them_as_text(tmp_path, monkeypatch, secret):
    payloads = [secret(text) for text in PAYLOADS]
    chunks = [secret(text) for text in CHUNKS]
    hard, *others = (hostile_study(text, model=text, data=f"folder:{text}") for text in chunks)
    studies = findings.Studies([hard], {text: f"damaged: {text}" for text in payloads})
    cells = [cell(*(Markdown("{}", text) for text in payloads)), cell(*(Markdown("- **{}** of {}", text, text) for text in payloads)),
             cell(findings.overview([hard, *others]), findings.overview(studies), findings.scope(studies), hard.heading),
             cell(findings.opening([hard], "magnitude"), findings.attack_success([hard]), findings.limits([hard])),
             cell(claims.table(hard.rows("magnitude"), "magnitude"), hard.recorded),
             cell(claims.overview(hard.ledger), claims.scorecard(hard.ledger, hard.models[0])),
             cell(*drawn(hard))]
    lab = tmp_path / "lab/digits"
    for number, text in enumerate(chunks):
        lab_notebook(lab / f"digits.net{number}.none.ipynb", text)
    lab_notebook(lab / "<img src=x onerror=alert(1)>.ipynb")
    lab_notebook(tmp_path / "lab/<b>/digits.net.none.ipynb")
    lab_notebook(lab / "digits.net.none.failed.ipynb", "did not end")
    lab_notebook(lab / "digits.net.other.ipynb", "did not end", exception=True)
    lab_notebook(lab / "digits.net.third.ipynb", "did not end", end=None)
    (lab / "digits.net.cut.ipynb").write_text('{"cells": [')
    folder = tmp_path / "runs/digits/digits.net0.none"
    for seed, text in enumerate(('{"scal', json.dumps({"scalars": {"accuracy": "<b>"}}))):
        (folder / str(seed)).mkdir(parents=True)
        (folder / str(seed) / "run.json").write_text(text)
    pages = rendered(tmp_path, monkeypatch, cells)
    assert {name: faults for name, page in pages.items() if (faults := faults_of(page))} == {}
    assert [text for text in payloads if not is_shown(text, pages["index.html"])] == []
    log = pages["lab/index.html"]
    for number, text in enumerate(chunks):
        assert is_shown(text, pages[f"lab/digits/digits.net{number}.none.html"].h1) and is_shown(text, log)
        assert is_shown(text, pages["index.html"])
    assert len(log.select("article tbody tr")) == 3 and not [n for n in pages if "img" in n or "failed" in n or "third" in n]
    assert not [name for name, page in pages.items() if "did not end" in page.get_text()]
    index = json.loads((tmp_path / "html/searchindex.js").read_text().partition("(")[2].rstrip().removesuffix(")"))
    assert not [title for title in [*index["alltitles"], *index["titles"]] if "<" in title]


def test_figures_hold_no_markup_and_are_xml():
    texts = [text.replace("\ud800", "") for text in PAYLOADS if visible(text)]
    fig, axes = figures.subplots(figsize=(7, 20))
    for y, text in enumerate(texts):
        axes[0, 0].text(0, y / len(texts), figures.label_of(text))
    many, chunk = figures.Figure(fig, "c", "a"), CHUNKS[0]
    for figure, told in ((many, texts), *((figure, [chunk]) for figure in drawn(hostile_study("x", model=chunk)))):
        page, root = BeautifulSoup(figure._repr_html_(), "html.parser"), ElementTree.fromstring(figure.file_text())
        assert not faults_of(page) and float(root.get("width").removesuffix("pt")) < 5_000
        said = BeautifulSoup("", "html.parser")
        said.append("".join(root.itertext()) + root.get("aria-label"))
        assert [text for text in told if not is_shown(text[:60], said)] == []


def test_readme_shows_hostile_records_as_text(monkeypatch):
    monkeypatch.setattr(findings.front, "QUESTIONS", {})  # these records have no folder that their arrays could be read from
    text = readme.block(findings.Studies([hostile_study(text, model=text) for text in CHUNKS]))
    bare = re.sub(r"&#\d+;|&(lt|gt|amp);|<br>", "", text)
    assert not re.search(r"[<>$`{}\\]|\]\((?!nbs/findings/\w+\.ipynb(#[\w-]+)?\))", bare) and "\n#" not in text


# ---- the whole way, in a browser ----

NAME = "x <img src=x onerror=alert(1)> {{x}} $\\input{y}$ `|` [a](javascript:alert(1)) \"'"


@pytest.fixture(scope="module")
def hostile_site(tmp_path_factory):
    """The chapters and the lab log of a study of a folder with hostile names, whose records were made hostile too."""
    from PIL import Image
    place = tmp_path_factory.mktemp("h")
    file = tmp_path_factory.mktemp("elsewhere") / "secret.txt"
    file.write_text(SECRET)
    for part in ("train", "test"):
        for number, name in enumerate(("<script>alert(1)<", "$\\input{x}$ {{x}}")):
            (place / NAME / part / name).mkdir(parents=True)
            for i in range(12):
                pixels = np.random.default_rng(i).integers(0, 120, (8, 8, 3), np.uint8) + 100 * number
                Image.fromarray(pixels.astype(np.uint8)).save(place / NAME / part / name / f"<b>{i}.png")
    recipe = {"epochs": 3, "batch_size": 8, "lr": 0.05}
    study = {"study": "hostile", "seeds": 2, "grid": [{"data": f"folder:{NAME}", "models": ["tiny-cnn"], "recipe": recipe,
                                                       "regularizers": ["none", "label-smoothing:0.1"]}]}
    (place / "hostile.yaml").write_text(yaml.safe_dump(study))
    made = subprocess.run([sys.executable, "-m", "repspace.study", "hostile.yaml", "--runs", place / "runs", "--notebooks",
                           place / "lab/hostile"], cwd=place, env=os.environ | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    payload = CHUNKS[0].replace("SECRET", str(file))
    for folder in sorted((place / "runs/hostile").glob("*/*/")):
        run, samples = records.read_run(folder), records.files.read_frame(folder / "samples.parquet")
        arrays = [records.files.read_arrays(folder / f"{name}.safetensors") for name in ("logits", "head")]
        shutil.rmtree(folder)
        records.write(folder, run | {"device": payload, "versions": {"torch": payload}, "provenance": {
            "version": payload, "commit": payload, "code": payload}}, samples, *arrays)
    chapters = {name: path for name, path in build.notebooks().items() if name in ("index", "glossary") or name.startswith("findings/")}
    env = build.child_environment(place / "runs", place / "private")
    before = dict(os.environ)
    os.environ.update(env | {"PYTHONPATH": str(ROOT)})
    try:
        executed, _ = build.execute_all(chapters, dict.fromkeys(chapters, "0" * 16), place / "executed", 2, place / "log", ())
        for name in build.notebooks().keys() - executed.keys():  # what the chapters link to
            executed[name] = written(place / "stubs" / f"{name}.ipynb", [v4.new_markdown_cell(f"# {name}")])
        build.assemble(executed, place, place / "runs")
        build.render(place, env)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return place / "html", payload


@pytest.mark.deep
def test_a_hostile_study_becomes_text(hostile_site):
    html, payload = hostile_site
    pages = {str(p.relative_to(html)): BeautifulSoup(p.read_text(), "html.parser") for p in html.rglob("*.html")
             if "_static" not in p.parts}
    assert is_shown(payload, pages["index.html"]) and is_shown(f"folder:{NAME}", pages["index.html"])
    lab = [page for name, page in pages.items() if name.startswith("lab/hostile/")]
    assert len(lab) == 2 and all(is_shown(f"folder:{NAME}", page.h1) for page in lab)
    assert all(is_shown(NAME, page) for page in lab) and is_shown(NAME, pages["lab/index.html"])
    for name, page in pages.items():
        wrong = [fault for fault in faults_of(page) if 'class="math' not in fault and not re.search("data:image/png;", fault)]
        assert not wrong, name


@pytest.mark.deep
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome on the PATH")
def test_a_hostile_site_executes_nothing(hostile_site):
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright")
    html, _ = hostile_site
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=html)
    handler.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, playwright.sync_playwright() as play:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        home, happened = f"http://127.0.0.1:{server.server_port}", []
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.add_init_script("window.alert = (...words) => { throw new Error('executed') }")
        page.on("dialog", lambda dialog: (happened.append(("dialog", page.url, dialog.message)), dialog.dismiss()))
        page.on("console", lambda line: line.type == "error" and happened.append(("console", page.url, line.text)))
        page.on("response", lambda response: response.status < 400 or happened.append(("response", page.url, response.url)))
        page.on("pageerror", lambda error: happened.append(("error", page.url, str(error))))
        page.on("request", lambda request: request.url.startswith(home) or happened.append(("request", page.url, request.url)))
        names = [str(p.relative_to(html)) for p in html.rglob("*.html") if "_static" not in p.parts
                 and ("findings" in p.parts or "lab" in p.parts or p.parent == html)]
        for name in [*names, *(f"search.html?q={word}" for word in ("img", "onerror", "alert", "javascript", "input"))]:
            page.goto(f"{home}/{name}", wait_until="networkidle")
            page.wait_for_timeout(300)
            for link in page.query_selector_all("article a[href]"):
                assert not re.match(r"\s*(javascript|data):", link.get_attribute("href"), re.IGNORECASE)
        found = page.goto(f"{home}/search.html?q=onerror", wait_until="networkidle") and page.wait_for_selector(
            "#search-results li a")
        assert found and page.query_selector("#search-results img") is None
        browser.close()
        server.shutdown()
    usual = ("/favicon.ico", "404 (File not found)", "Got invalid theme mode: . Resetting to auto.")
    assert [each for each in happened if not each[2].endswith(usual)] == []
