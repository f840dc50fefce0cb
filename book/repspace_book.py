"""Sphinx extension of the book: nbdev's directives stay out of the pages, and MathJax comes with the site."""
import functools
import html
import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

DIRECTIVE = re.compile(r"^\s*#\s*\|.*\n?", re.MULTILINE)
TARGET = re.compile(r"^\(([\w-]+)\)=\s*$", re.MULTILINE)
LINK = re.compile(r"\]\(([^()\s#]+\.ipynb)#([\w-]+)\)")
HIDDEN = re.compile(r"^\s*#\s*\|\s*hide\s*$", re.MULTILINE)
# What a page with TeX asks for; the package holds ten times as much.
MATHJAX_PARTS = ["tex-chtml.js", "input/tex/extensions", "output/chtml/fonts/woff-v2"]


def strip_directives(notebook):
    """`notebook` (a dict) without lines like `#| export`, and without the cells marked `#| hide`."""
    kept = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            code = DIRECTIVE.sub("", source).strip("\n")
            if HIDDEN.search(source) or not code.strip():
                continue
            cell = cell | {"source": code}
        kept.append(cell)
    return notebook | {"cells": kept}


def targets(path):
    """The targets, `(name)=`, in the Markdown of the notebook at `path`; none without one."""
    if not path.is_file():
        return frozenset()
    stat = path.stat()
    return _targets(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(None)
def _targets(path, *state):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return frozenset(name for cell in cells if cell["cell_type"] == "markdown"
                     for name in TARGET.findall("".join(cell["source"])))


def link_targets(notebook, folder):
    """`notebook` whose links to targets in notebooks, seen from `folder`, are such as MyST resolves: `(#name)`."""
    def linked(text):
        return LINK.sub(lambda m: f"](#{m[2]})" if m[2] in targets((folder / unquote(m[1])).resolve()) else m[0], "".join(text))

    def cell_linked(cell):
        if cell["cell_type"] == "markdown":
            return cell | {"source": linked(cell["source"])}
        outputs = [output | {"data": output["data"] | {kind: linked(text) for kind, text in output["data"].items() if kind == "text/markdown"}}
                   if "data" in output else output for output in cell.get("outputs", [])]
        return cell | {"outputs": outputs}
    return notebook | {"cells": [cell_linked(cell) for cell in notebook["cells"]]}


def on_source_read(app, docname, source):
    path = Path(app.env.doc2path(docname))
    if path.suffix == ".ipynb":
        source[0] = json.dumps(link_targets(strip_directives(json.loads(source[0])), path.parent))


def copy_mathjax(app, error):
    if error is not None or app.builder.format != "html":
        return
    package = Path(find_spec("sphinx-mathjax-offline").submodule_search_locations[0], "static", "mathjax")
    target = Path(app.outdir, "_static", "mathjax")
    for part in MATHJAX_PARTS:
        (target / part).parent.mkdir(parents=True, exist_ok=True)
        if (package / part).is_dir():
            shutil.copytree(package / part, target / part, dirs_exist_ok=True)
        else:
            shutil.copy(package / part, target / part)


def escape_titles(app, error):
    """Search puts the titles of sections into the page as HTML; Sphinx 7 writes them into its index as text."""
    path = Path(app.outdir, "searchindex.js")
    if error is not None or not path.exists():
        return
    head, start, body = path.read_text(encoding="utf-8").partition("(")
    index = json.loads(body.rstrip().removesuffix(")"))
    index["alltitles"] = {html.escape(title): places for title, places in index["alltitles"].items()}
    path.write_text(f"{head}({json.dumps(index, ensure_ascii=False, sort_keys=True, separators=(',', ':'))})",
                    encoding="utf-8")


def drop_thebe(app, pagename, templatename, context, doctree):
    """Jupyter Book's pages name a script elsewhere for running cells in the browser, which this book does not offer."""
    if "script_files" in context:
        context["script_files"] = [script for script in context["script_files"]
                                   if "thebe" not in str(script) + str(getattr(script, "attributes", "")).lower()]


def escape_page_title(app, pagename, templatename, context, doctree):
    """The theme puts the title of the page, as text, above what is printed as if it were HTML."""
    if "pagetitle" in context:
        context["pagetitle"] = html.escape(context["pagetitle"])


def setup(app):
    app.config.mathjax_path = "mathjax/tex-chtml.js"
    app.connect("source-read", on_source_read)
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("html-page-context", escape_page_title, priority=900)
    app.connect("build-finished", copy_mathjax)
    app.connect("build-finished", escape_titles)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
