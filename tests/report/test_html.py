from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bitdistill.errors import ArtifactError, StorageError
from bitdistill.eval.row_scores import encode
from bitdistill.report.html import write_report

from .conftest import build_run

VOID = {"meta", "link", "br", "img", "input", "hr"}
HOSTILE = "</pre><script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)> {{ 7*7 }} \x00"


class Page(HTMLParser):
    """Tags, their attributes and text of a page; fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text("utf-8"))


def test_whole_report(run_folder: Path) -> None:
    path = write_report(run_folder)
    assert path == run_folder / "report.html"
    page = Page(path.read_text("utf-8"))
    rows = json.loads((run_folder / "results.json").read_text())["rows"]
    text = " ".join(page.text.split())
    for row in rows:
        assert f"{row['value']:.2f}" in text
    assert "banking-mini" in text
    assert "tiny-llama" in text
    assert "This run is not complete" not in text
    for part in ("Results", "Where teacher and student differ", "Training", "Weights", "Use the student"):
        assert part in text
    assert "bitdistill predict" in text
    assert "Only the teacher is right" in text
    assert "budget_tokens: 2000000" in text
    assert "10 min 40 s" in text  # all stages together
    assert page.count("article") == 8  # report.samples of the recipe
    # 2 result panels, 4 losses, terms, ratio, 1 + 7 histograms, 2 panels of zero shares
    assert page.count("figure") == page.count("svg") == 18


def test_report_is_offline(run_folder: Path) -> None:
    page = page_of(run_folder)
    assert not {"script", "iframe", "object", "embed", "link", "img", "form"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"src", "href", "xlink:href", "action"}:
                assert value is not None
                assert value.startswith("#"), (tag, value)
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'" in policy
    text = (run_folder / "report.html").read_text("utf-8")
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text


def test_numbers_are_the_runs_own(run_folder: Path) -> None:
    teacher, student = (
        [json.loads(line) for line in (run_folder / "predictions" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("teacher", "bitdistill")
    )
    pairs = list(zip(teacher, student, strict=True))
    differ = sum(a["prediction"] != b["prediction"] for a, b in pairs)
    lost = sum(a["correct"] and not b["correct"] for a, b in pairs)
    won = sum(b["correct"] and not a["correct"] for a, b in pairs)
    text = " ".join(page_of(run_folder).text.split())
    assert f"They give different answers to {differ} of 600 rows." in text
    assert f"{lost} rows only the teacher answers, {won} only the student" in text
    assert f"{100 - 100 * differ / 600:.1f}%" in text
    change = 100 * (won - lost) / 600
    assert f"{change:+.2f}".replace("-", "−") in text


def poison(run: Path) -> None:
    """Hostile text wherever text from outside is shown; each place has its own number after it."""
    for path in (run / "predictions").iterdir():
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            for number, place in enumerate(("prompt", "prediction", "reference", "where")):
                record[place] = f"{HOSTILE} place{number} {path.stem}\ud800"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    content = json.loads((run / "results.json").read_text())
    for row in content["rows"]:
        row["label"] = f"{HOSTILE} place4"
    (run / "results.json").write_text(json.dumps(content))
    name = json.dumps(f"{HOSTILE} place5".replace("\x00", ""))
    recipe = (run / "recipe.yaml").read_text().replace("name: banking-mini", f"name: {name}")
    (run / "recipe.yaml").write_text(recipe + f"# {HOSTILE} place6\n".replace("\x00", ""))
    info = {"command": f"{HOSTILE} place7", f"{HOSTILE} place8": {HOSTILE: [f"{HOSTILE} place9"]}}
    (run / "run.json").write_text(json.dumps(info))


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = build_run(tmp_path / "banking", rows=40, steps=40)
    poison(run)
    text = write_report(run).read_text("utf-8")
    page = Page(text)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "<script" not in text
    assert "\x00" not in text
    for number in range(10):
        kept = "" if number in (5, 6) else "\ufffd"  # YAML takes no NUL, other places show a replacement
        assert f"alert(1)> {{{{ 7*7 }}}} {kept} place{number}" in page.text, number


@pytest.mark.parametrize(
    ("gone", "said", "figures"),
    [
        (["results.json", "packed"], "nothing has been evaluated yet", 16),
        (["logs"], "no training log", 12),
        (["stats", "predictions"], "no single predictions", 8),
        (["results.json", "logs", "stats", "predictions", "packed", "run.json"], "are not recorded", 0),
    ],
)
def test_partial_runs_say_what_is_missing(run_folder: Path, gone: list[str], said: str, figures: int) -> None:
    for name in gone:
        path = run_folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = page_of(run_folder)
    assert "This run is not complete." in page.text
    assert said in page.text
    assert ("bitdistill predict" in page.text) is ("packed" not in gone)
    assert page.count("svg") == figures


def test_generation_task(run_folder: Path) -> None:
    for name in ("stats", "logs"):
        shutil.rmtree(run_folder / name)
    recipe = (run_folder / "recipe.yaml").read_text().replace("kind: classification", "kind: generation")
    (run_folder / "recipe.yaml").write_text(recipe)
    content = json.loads((run_folder / "results.json").read_text())
    for row in content["rows"]:
        row["metric"] = "rougeL"
    (run_folder / "results.json").write_text(json.dumps(content))
    for path in (run_folder / "predictions").iterdir():
        records = [json.loads(line) | {"correct": None} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    text = page_of(run_folder).text
    assert "reaches ROUGE-L" in text
    assert "Different answers" in text
    assert "McNemar" not in text
    assert "interval of the difference" not in text  # no scores of single rows
    n = content["rows"][0]["n"]
    for row in content["rows"]:
        row["row_scores"] = encode([0.5 - 0.2 * (row["name"] == "bitdistill")] * (n - 1) + [0.9])
    (run_folder / "results.json").write_text(json.dumps(content))
    text = page_of(run_folder).text
    assert re.search(r"95% interval of the difference −20\.0 to −\d\d\.\d", text)
    assert "paired permutation" in text
    assert "rows only the teacher answers" not in text
    assert "McNemar" not in text
    for row in content["rows"]:  # right or wrong by their scores, and the same but for one row
        row["row_scores"] = encode([1.0] * (n - 1) + [float(row["name"] == "teacher")])
    (run_folder / "results.json").write_text(json.dumps(content))
    text = page_of(run_folder).text
    assert "so these rows do not tell the two apart" in text
    assert "McNemar, exact" not in text
    assert "McNemar" in text
    assert "permutation" not in text
    content["rows"][0]["references_sha256"] = "0" * 64  # other rows: no gap, and a report all the same
    content["rows"][-1]["references_sha256"] = "1" * 64
    (run_folder / "results.json").write_text(json.dumps(content))
    assert "interval of the difference" not in page_of(run_folder).text
    assert "Most confused labels" not in text
    assert "✓" not in text


def test_large_run_stays_under_5_mb(tmp_path: Path) -> None:
    run = build_run(tmp_path / "banking", rows=300, prompts=["many words " * 5000], steps=40)
    with (run / "recipe.yaml").open("a") as recipe:
        recipe.write("# padding\n" * 300_000)
    records = [
        {"step": i, "steps": 50_000, "loss": 1 + 1 / (i + 1), "tokens": 100 * i, "elapsed_s": float(i)}
        for i in range(50_000)
    ]
    (run / "logs" / "sft.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert write_report(run).stat().st_size < 1_500_000


def test_report_replaces_an_older_one_and_repeats(run_folder: Path) -> None:
    shutil.rmtree(run_folder / "stats")
    before = sorted(p.name for p in run_folder.iterdir())
    (run_folder / "report.html").write_text("old")
    first, second = (re.sub(r"\bf\d+-", "", write_report(run_folder).read_text()) for _ in range(2))
    assert "banking-mini" in first
    assert first == second
    assert sorted(p.name for p in run_folder.iterdir()) == sorted([*before, "report.html"])


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"recipe\.yaml"):
        write_report(tmp_path)


def test_unwritable(run_folder: Path) -> None:
    for name in ("stats", "logs"):
        shutil.rmtree(run_folder / name)
    (run_folder / "report.html").mkdir()
    (run_folder / "report.html" / "x").touch()
    with pytest.raises(StorageError, match=r"report\.html"):
        write_report(run_folder)
