"""Writes what was found into README.md and draws its figure, from the published records of all studies.

`python book/readme.py` writes both; `python book/readme.py --check` only says whether they agree with the records.
"""

import re
import sys
from pathlib import Path

from repspace import claims, figures, findings

ROOT = Path(__file__).resolve().parent.parent
README, FIGURE = ROOT / "README.md", ROOT / "results" / "scorecard.svg"
BLOCK = re.compile(r"(<!-- found:[^\n]*-->\n).*?(<!-- /found -->)", re.S)


def listed(made):
    """Which code made the runs, without saying whether it is today's: a README does not change with the code."""
    codes = [code for each in made for by in [each.get("provenance") or {}] for code in (by.get("training") or by, by)]
    versions = {(code.get("version"), (code.get("commit") or "")[:7]) for code in codes}
    return ", ".join(f"version {version}" + (f" (commit {commit})" if commit else "") for version, commit in sorted(versions))


def found(studies):
    """The README's paragraph and table, as Markdown."""
    lines = [f"- **{study.name}**: {study.words}; {len(study.runs)} trainings, made by {listed(study.runs['made'])}."
             for study in studies]
    lines += ["", "A row of the ledger is a measure on a net, with a regularizer or without; its verdict is *supported*, "
              "*contradicted*, *none* (neither: too small an effect, or between the claim's bounds) or *open* (too "
              "uncertain to say).", "", "| claim | " + " | ".join(study.name for study in studies) + " |",
              "|---" * (len(studies) + 1) + "|"]
    ledger = findings.ledger(studies)
    for claim in (claim for claim in claims.CLAIMS if claim.id in set(ledger["claim"])):
        cells = []
        for study in studies:
            verdicts = study.ledger.loc[study.ledger["claim"] == claim.id, "verdict"]
            counts = figures.counted(verdicts)
            cells.append(f"**{claims.overall(verdicts)}**: {counts}" if len(verdicts) else "–")
        lines.append(f"| {claim.sentence} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def expected():
    """(text of README.md, text of the figure) as the published records have them."""
    studies = findings.load("published", results=ROOT / "results")
    text = README.read_text(encoding="utf-8")
    if not BLOCK.search(text):
        sys.exit("README.md has no block <!-- found: … --> … <!-- /found -->")
    block = found(studies)
    figure = figures.scorecard(findings.ledger(studies))
    return BLOCK.sub(lambda m: m[1] + block + m[2], text), figure.file_text()


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
