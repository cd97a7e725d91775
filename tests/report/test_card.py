from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from bitdistill import artifact
from bitdistill.errors import ArtifactError
from bitdistill.report.card import cell, source_licence, write_card


def front_matter(card: str) -> dict[str, Any]:
    matter = re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)
    assert matter is not None
    loaded: dict[str, Any] = YAML(typ="safe", pure=True).load(matter.group(1))
    return loaded


def test_card_of_a_finished_run(run_folder: Path) -> None:
    path = write_card(run_folder)
    assert path == run_folder / "packed" / "README.md"
    card = path.read_text("utf-8")
    student = json.loads((run_folder / "results.json").read_text())["rows"][2]
    matter = front_matter(card)
    assert matter["pipeline_tag"] == "text-classification"
    assert "1.58-bit" in matter["tags"]
    assert "license" not in matter
    assert "base_model" not in matter  # a local folder is no hub name
    (result,) = matter["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": round(student["value"], 4)}]
    assert f"| {student['value']:.2f} | {student['low']:.2f} to {student['high']:.2f} |" in card
    assert '| card\\_arrival | " arrival" |' in card  # the space belongs to the label word
    assert "```text\n{text}\nTopic:\n```" in card
    assert "licence of the source model is not known" in card
    assert student["predictions_sha256"] in card


def test_card_lists_hashes_and_does_not_change_the_artifact(run_folder: Path) -> None:
    before = artifact.read_manifest(run_folder / "packed")
    card = write_card(run_folder).read_text()
    assert artifact.verify(run_folder / "packed") == before
    for name, entry in before["files"].items():
        assert f"| {name} |" in card
        assert entry["sha256"] in card
    assert write_card(run_folder).read_text() == card
    assert sorted(p.name for p in (run_folder / "packed").iterdir()) == [
        "README.md",
        "bitdistill.json",
        "config.json",
        "model.safetensors",
    ]


def test_licence_and_hub_name(run_folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "source"
    model.mkdir()
    (model / "README.md").write_text("---\ntags: [a]\nlicense: apache-2.0\n---\n# A model\n")
    recipe = (run_folder / "recipe.yaml").read_text()
    (run_folder / "recipe.yaml").write_text(recipe.replace("assets/demo/tiny-llama", str(model)))
    card = write_card(run_folder).read_text()
    assert front_matter(card)["license"] == "apache-2.0"
    assert "Licence of the source model: apache-2.0" in card
    (run_folder / "recipe.yaml").write_text(recipe.replace("assets/demo/tiny-llama", "Qwen/Qwen3-0.6B"))
    assert front_matter(write_card(run_folder).read_text())["base_model"] == "Qwen/Qwen3-0.6B"


def test_licence_is_read_from_the_front_matter_only(tmp_path: Path) -> None:
    assert source_licence(str(tmp_path)) is None
    assert source_licence("Qwen/Qwen3-0.6B") is None
    (tmp_path / "README.md").write_text("# A model\nlicense: mit\n")
    assert source_licence(str(tmp_path)) is None


def test_data_fingerprints_come_from_the_manifests(run_folder: Path) -> None:
    for name, inputs in {
        "student": {"train": "11" * 32, "teacher": "22" * 32},
        "teacher": {"model": "33" * 32, "train": "11" * 32},
        "base": {"model": "33" * 32, "pretrain": {"corpus": "44" * 32}},
    }.items():
        with artifact.writing(run_folder / name, {"kind": name, "inputs": inputs}) as folder:
            (folder / "x").write_bytes(b"x")
    card = write_card(run_folder).read_text()
    assert f"| training rows | `{'11' * 32}` |" in card
    assert f"| stage-2 corpus | `{'44' * 32}` |" in card
    assert f"| source model | `{'33' * 32}` |" in card


def test_unfinished_runs(run_folder: Path) -> None:
    (run_folder / "results.json").unlink()
    shutil.rmtree(run_folder / "logs")
    card = write_card(run_folder).read_text()
    assert "This student has not been evaluated." in card
    assert "The cost of its training is not recorded." in card
    assert "model-index" not in front_matter(card)
    shutil.rmtree(run_folder / "packed")
    with pytest.raises(ArtifactError, match="no packed student yet"):
        write_card(run_folder)


def test_hostile_names_do_not_break_the_card(run_folder: Path) -> None:
    content = json.loads((run_folder / "results.json").read_text())
    content["rows"][2]["label"] = "x | y\n\n# Injected <script>"
    (run_folder / "results.json").write_text(json.dumps(content))
    recipe = (run_folder / "recipe.yaml").read_text()
    recipe = recipe.replace('"{text}\\nTopic:"', '"{text}\\n```\\n# Injected\\n````"')
    recipe = recipe.replace("name: banking-mini", 'name: "a\\n---\\nlicense: mit"')
    (run_folder / "recipe.yaml").write_text(recipe)
    card = write_card(run_folder).read_text()
    assert front_matter(card)["model-index"][0]["results"][0]["dataset"]["name"] == "a\n---\nlicense: mit"
    assert "license" not in front_matter(card)
    assert "`````text\n{text}\n```\n# Injected\n````\n`````" in card
    assert "| x \\| y \\# Injected \\<script\\> |" in card


def test_cell() -> None:
    assert cell(" a|b \n *c* ") == "a\\|b \\*c\\*"
