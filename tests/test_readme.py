"""The README says what the published records say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_readme_agrees_with_the_published_records():
    done = subprocess.run([sys.executable, ROOT / "book" / "readme.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
