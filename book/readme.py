"""Writes what was found into README.md and draws its figure, from the published records of the digits study.

`python book/readme.py` writes both; `python book/readme.py --check` only says whether they agree with the records.
"""

import re
import sys
from pathlib import Path

from repspace import claims, figures, records

ROOT = Path(__file__).resolve().parent.parent
README, FIGURE = ROOT / "README.md", ROOT / "results" / "digits" / "scorecard.svg"
BLOCK = re.compile(r"(<!-- found:[^\n]*-->\n).*?(<!-- /found -->)", re.S)


def found(ledger, runs):
    """The README's paragraph and table, as Markdown."""
    versions = ", ".join(sorted(runs["version"].unique()))
    lines = [f"{len(runs)} trainings of small nets on 8×8 digits, {runs['seed'].nunique()} seeds a condition, made by "
             f"version {versions}. A row is a measure on a net, with a regularizer or without; its verdict is *supported*, "
             "*contradicted*, *none* (neither: too small an effect, or between the claim's bounds) or *open* (too "
             "uncertain to say).", "",
             "| claim | | " + " | ".join(["supported", "contradicted", "none", "open"]) + " |",
             "|---|---|" + "--:|" * 4]
    for row in claims.summary(ledger).itertuples():
        lines.append(f"| {claims.get(row.claim).sentence} | {row.overall} | {row.supported} | {row.contradicted} | "
                     f"{row.none} | {row.open} |")
    return "\n".join(lines) + "\n"


def expected():
    """(text of README.md, text of the figure) as the published records have them."""
    published = records.load("digits", "published", results=ROOT / "results")
    ledger = claims.ledger(published)
    text = README.read_text(encoding="utf-8")
    if not BLOCK.search(text):
        sys.exit("README.md has no block <!-- found: … --> … <!-- /found -->")
    block = found(ledger, published.runs)
    return BLOCK.sub(lambda m: m[1] + block + m[2], text), figures.scorecard(ledger).file_text()


def main(check):
    text, figure = expected()
    wrong = [path.relative_to(ROOT) for path, content in ((README, text), (FIGURE, figure))
             if not path.exists() or path.read_text(encoding="utf-8") != content]
    if check:
        sys.exit(f"{', '.join(map(str, wrong))}: not what the published records say. Run: make publish STUDY=digits"
                 if wrong else 0)
    README.write_text(text, encoding="utf-8")
    FIGURE.write_text(figure, encoding="utf-8")
    print(f"written: {', '.join(map(str, wrong)) or 'nothing, all agrees'}")


if __name__ == "__main__":
    main("--check" in sys.argv[1:])
