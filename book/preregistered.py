"""Writes when the rules were written down, and what was published after: results/preregistration.json and preregistration-later.json
for those of the claims, results/preregistration-held.json for that of the question that has one of its own.

`python book/preregistered.py` asks the repository's history; `make publish` calls it.
"""

import sys
from pathlib import Path

from repspace import records
from repspace.claims import preregistration
from repspace.findings import held

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"


def commits():
    """The commits of all published records."""
    made = [made for study in records.studies("published", results=RESULTS)
            for made in records.load(study, "published", results=RESULTS).runs["made"]]
    return set().union(*map(preregistration.commits, made))


def main():
    known = commits()
    kept = [("claims/preregistration", of.rules, of.file) for of in preregistration.REGISTRATIONS]
    for source, rules, file in (*kept, ("findings/held", held.RULE, held.FILE)):
        found = preregistration.in_history(ROOT, known, f"repspace/{source}.py", rules)
        if found.commit is None:
            sys.exit(f"No commit here has the rules {rules} of {source}: commit them before what they judge is run. Every row is exploratory.")
        preregistration.write(RESULTS, found, file)
        print(f"rules {found.rules}: commit {found.commit[:7]} of {found.date}, {len(found.later)} commits of records came after")


if __name__ == "__main__":
    main()
