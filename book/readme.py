"""Writes what was found into README.md and draws its figure, from the published records of all studies.

`python book/readme.py` writes both; `python book/readme.py --check` only says whether they agree with the records.
"""

import re
import sys
from pathlib import Path

from repspace import claims, figures, findings
from repspace.claims.tables import escaped
from repspace.vocabulary import VERDICTS, listed

ROOT = Path(__file__).resolve().parent.parent
README, FIGURE = ROOT / "README.md", ROOT / "results" / "scorecard.svg"
BLOCK = re.compile(r"(<!-- found:[^\n]*-->\n).*?(<!-- /found -->)", re.S)


def made_by(runs):
    """Which code made `runs`, without saying whether it is today's: a README does not change with the code."""
    return listed(sorted({findings.version(made) for of_runs in findings.made_at(runs) for made in of_runs}))


def block(studies):
    """The README's paragraph and table, as Markdown."""
    lines = [f"- **{escaped(study.name)}**: {study.words}; {len(study.runs)} trainings, made by "
             f"{escaped(made_by(study.runs))}." for study in studies]
    meanings = "; ".join(f"*{row.name}*, {row.meaning}" for row in VERDICTS.values())
    lines += ["", "A row of the ledger is a measure on a net, with a regularizer or without, and has a verdict: "
              f"{meanings}.", "", claims.overview(findings.rows(studies), "nbs/findings").text]
    return "\n".join(lines) + "\n"


def expected():
    """(text of README.md, text of the figure) as the published records have them."""
    studies = findings.judged("published", results=ROOT / "results")
    if studies.left_out:
        sys.exit(f"records that cannot be read: {studies.left_out}")
    text = README.read_text(encoding="utf-8")
    if not BLOCK.search(text):
        sys.exit("README.md has no block <!-- found: … --> … <!-- /found -->")
    figure = figures.scorecard(findings.rows(studies))
    return BLOCK.sub(lambda m: m[1] + block(studies) + m[2], text), figure.file_text()


def main(check):
    text, figure = expected()
    wrong = [path.relative_to(ROOT) for path, content in ((README, text), (FIGURE, figure))
             if not path.exists() or path.read_text(encoding="utf-8") != content]
    if check:
        sys.exit(f"{', '.join(map(str, wrong))}: not what the published records say. Run: python book/readme.py"
                 if wrong else 0)
    README.write_text(text, encoding="utf-8")
    FIGURE.write_text(figure, encoding="utf-8")
    print(f"written: {', '.join(map(str, wrong)) or 'nothing, all agrees'}")


if __name__ == "__main__":
    main("--check" in sys.argv[1:])
