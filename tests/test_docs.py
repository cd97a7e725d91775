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
    """Each row's first path gives the folder of the names in that row, as modules of two folders share names."""
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    listed, whole = set(), set()
    for row in re.findall(r"^\| `.*", text, re.MULTILINE):
        names = re.findall(r"`([\w/*.]+)`", row)
        folder, slash, rest = names[0].rpartition("/")
        if rest in ("", "*.py") and folder in ("cli", "planning", "stages"):
            whole.add(folder)
        listed |= {name if "/" in name else folder + slash + name for name in names}
    package = ROOT / "src/bitdistill"
    modules = {
        path.relative_to(package).as_posix() for path in package.rglob("*.py") if path.name != "__init__.py"
    }
    assert whole == {"cli", "planning", "stages"}
    missing = {name for name in modules - listed if name.partition("/")[0] not in whole}
    assert not missing, f"docs/architecture.md does not name {sorted(missing)}"
    gone = {name for name in listed - modules if name.endswith(".py") and "*" not in name}
    absent = sorted(name for name in gone if not (ROOT / name).is_file())  # of benchmarks/ and scripts/
    assert not absent, f"docs/architecture.md names {absent}"


def test_paper_map_names_existing_code_and_tests() -> None:
    text = (ROOT / "docs/paper_map.md").read_text("utf-8")
    found = re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9]+\.py)(?:::([A-Za-z_0-9]+))?", text)
    assert len(found) >= 20
    for place, name in found:
        path = ROOT / place if place.startswith("tests/") else ROOT / "src/bitdistill" / place
        assert path.is_file(), place
        if name:
            assert re.search(rf"^\s*(def|class) {name}\b", path.read_text("utf-8"), re.MULTILINE), (
                f"{place}::{name}"
            )


def test_relative_links_lead_somewhere() -> None:
    found = [
        (page, link)
        for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text("utf-8"))
    ]
    assert len(found) >= 20
    for page, link in found:
        assert (page.parent / link).exists(), f"{page.name}: {link}"
