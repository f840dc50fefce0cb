"""Writes results/preregistration.json: when the rules of the claims were written down, and what was published after.

`python book/preregistered.py` asks the repository's history; `make publish` calls it.
"""

import sys
from pathlib import Path

from repspace import records
from repspace.claims import preregistration

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"


def history():
    """The `History` of today's rules, with the commits of all published records."""
    made = [made for study in records.studies("published", results=RESULTS)
            for made in records.load(study, "published", results=RESULTS).runs["made"]]
    return preregistration.in_history(ROOT, set().union(*map(preregistration.commits, made)))


def main():
    found = history()
    if found.commit is None:
        sys.exit("No commit here has today's rules: commit them before what they judge is run. Every row is exploratory.")
    preregistration.write(RESULTS, found)
    print(f"rules {found.rules}: commit {found.commit[:7]} of {found.date}, {len(found.later)} commits of records came after")


if __name__ == "__main__":
    main()
