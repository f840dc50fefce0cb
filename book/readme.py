"""Writes what was found into README.md and draws its figure, from the published records of all studies.

`python book/readme.py` writes both; `python book/readme.py --check` only says whether they agree with the records.
"""

import re
import sys
from pathlib import Path

from repspace import claims, figures, findings
from repspace.claims import Markdown, joined
from repspace.findings import front, use
from repspace.records.files import write_text
from repspace.vocabulary import VERDICTS

ROOT = Path(__file__).resolve().parent.parent
README, FIGURE = ROOT / "README.md", ROOT / "results" / "scorecard.svg"
BLOCK = re.compile(r"(<!-- found:[^\n]*-->\n).*?(<!-- /found -->)", re.S)


def made_by(runs):
    """Which code made `runs`, without saying whether it is today's: a README does not change with the code."""
    return findings.versions(made for of_runs in findings.made_at(runs) for made in of_runs)


def block(studies):
    """The README's answer, advice and table, as Markdown: the sentences of the front page."""
    lines = [Markdown("- **{}** ({}): {}; {} trainings, made by {}.", study.name, findings.status(study),
                      study.words, len(study.runs), made_by(study.runs)) for study in studies]
    meanings = joined((Markdown("{} *{}*, {}", row.mark, row.name, Markdown(row.meaning)) for row in VERDICTS.values()), "; ")
    verdicts = Markdown("A claim is judged by one measure, on each net with each regularizer: {}. *Confirmatory* studies ran after the rules "
                        "had been written down, on seeds that nobody had looked at; where a net was run in several, one speaks for it.", meanings)
    table = claims.overview(findings.evidence(studies), "nbs/findings")
    return joined([front.answer(studies), "", use.shown(use.advice(studies), "nbs/", brief=True), "", verdicts, "", table, "", *lines, "",
                   front.not_tested(studies), ""]).text


def expected():
    """(text of README.md, text of the figure) as the published records have them."""
    studies = findings.judged("published", results=ROOT / "results")
    if studies.left_out:
        sys.exit(f"records that cannot be read: {studies.left_out}")
    text = README.read_text(encoding="utf-8")
    if not BLOCK.search(text):
        sys.exit("README.md has no block <!-- found: … --> … <!-- /found -->")
    figure = figures.scorecard(findings.evidence(studies))
    return BLOCK.sub(lambda m: m[1] + block(studies) + m[2], text), figure.file_text()


def main(check):
    text, figure = expected()
    wrong = {path: content for path, content in ((README, text), (FIGURE, figure))
             if not path.exists() or path.read_text(encoding="utf-8") != content}
    names = ", ".join(str(path.relative_to(ROOT)) for path in wrong)
    if check:
        sys.exit(f"{names}: not what the published records say. Run: python book/readme.py" if wrong else 0)
    for path, content in wrong.items():
        try:
            write_text(path, content)
        except OSError as error:
            sys.exit(f"{path.relative_to(ROOT)} is left as it was: {error.strerror or error}")
    print(f"written: {names or 'nothing, all agrees'}")


if __name__ == "__main__":
    main("--check" in sys.argv[1:])
