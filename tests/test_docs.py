"""Documents that are generated or that name code must agree with it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_results_page_is_what_the_results_say() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/make_results.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_architecture_names_every_module() -> None:
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    package = ROOT / "src/bitdistill"
    for path in package.rglob("*.py"):
        folder = path.parent.name
        listed_whole = folder in ("cli", "planning", "stages") and f"`{folder}/" in text
        if path.name != "__init__.py" and not listed_whole:
            assert path.name in text, f"{path.relative_to(ROOT)} is missing in docs/architecture.md"


def test_paper_map_names_existing_code_and_tests() -> None:
    text = (ROOT / "docs/paper_map.md").read_text("utf-8")
    for place, name in re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9]+\.py)(?:::([A-Za-z_0-9]+))?", text):
        path = ROOT / place if place.startswith("tests/") else ROOT / "src/bitdistill" / place
        assert path.is_file(), place
        if name:
            assert re.search(rf"^\s*(def|class) {name}\b", path.read_text("utf-8"), re.MULTILINE), (
                f"{place}::{name}"
            )


def test_relative_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
