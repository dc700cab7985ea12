"""The files that belong to the project: what git knows or would add."""

from __future__ import annotations

import subprocess

from lshv2.runs import repo_root

ROOT = repo_root()
LISTED = subprocess.run(
    ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
).stdout
FILES = sorted(name for name in LISTED.split("\0") if name and (ROOT / name).is_file())
PAGES = [name for name in FILES if name.endswith(".md")]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")
