"""What decides a result is in the key of the stage that makes it, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from bitdistill.data import readers
from bitdistill.data.corpus import tokenize_corpus
from bitdistill.errors import ArtifactError, DataError
from bitdistill.stages.common import Run
from bitdistill.stages.evaluate import Entry, evaluate
from bitdistill.stages.refine import open_corpus, refine
from bitdistill.stages.sft import bitnet_sft, sft
from tests.models.conftest import make_tokenizer
from tests.stages.conftest import recipe


def opened(work: Path, *overrides: str) -> Run:
    return Run.open(recipe(work, *overrides), command="test", quiet=True)


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Inputs of the stages that are called; none does any work."""
    seen: list[dict[str, Any]] = []

    def finished(run: Run, stage: str, folder: Path, found: Mapping[str, Any]) -> bool:
        seen.append(json.loads(json.dumps(dict(found))))
        return True

    monkeypatch.setattr(Run, "finished", finished)
    return seen


def test_rows_are_scored_again_when_prompts_may_be_longer_or_shorter(work: Path) -> None:
    run = opened(work)
    teacher = sft(run)
    entries = [Entry("teacher", teacher, teacher)]
    prompts = []
    for length in (32, 6):
        (row,) = evaluate(opened(work, f"data.max_length={length}"), entries)
        lines = (run.run_dir / "predictions/teacher.jsonl").read_text().splitlines()
        prompts.append((row.score_key, max(len(json.loads(line)["prompt"].split()) for line in lines)))
    assert prompts[0][1] > 5 == prompts[1][1]  # one token is the label word's
    assert prompts[0][0] != prompts[1][0]


def test_eval_rows_that_are_not_there_are_named_by_split(work: Path) -> None:
    with pytest.raises(DataError, match=r"^eval\.split validation: no data\.validation is named, and"):
        opened(work, "eval.split=validation").eval_rows()
    with pytest.raises(DataError, match=r"^eval\.split test: no data\.test and no data\.validation is named"):
        opened(work, "data.test=null").eval_rows()


@pytest.mark.parametrize("key", ["calibration_rows", "calibration_length"])
def test_the_baseline_depends_on_calibration_where_it_calibrates(
    work: Path, inputs: list[dict[str, Any]], key: str
) -> None:
    for options in ((), ("bitnet_sft.subln=paper", "bitnet_sft.gains=ones"), ("bitnet_sft.subln=paper",)):
        bitnet_sft(opened(work, *options))
        bitnet_sft(opened(work, *options, f"refine.{key}=7"))
    assert inputs[0] == inputs[1]
    assert inputs[2] == inputs[3]
    assert not any("calibration" in found for found in inputs[:4])  # such keys stay what they were
    assert inputs[4] != inputs[5]


def test_a_hub_corpus_is_calibrated_on_by_as_much_as_is_read(
    work: Path, inputs: list[dict[str, Any]]
) -> None:
    for corpus in (f"{work}/corpus.txt", "hub:owner/name"):
        for budget in (512, 1024):
            refine(opened(work, f"pretrain.corpus={corpus}", f"pretrain.budget_tokens={budget}"))
    calibrations = [found["calibration"] for found in inputs]
    assert calibrations[0] == calibrations[1] == readers.source_fingerprint(f"{work}/corpus.txt")
    assert calibrations[2] != calibrations[3]


def with_bos() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="w3 $A", special_tokens=[("w3", 3)]
    )
    return tokenizer


def with_eos() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "w5"
    return tokenizer


def test_shards_are_of_one_end_and_one_beginning(work: Path) -> None:
    """Tokenizers that differ in nothing else have one fingerprint, and once had one cache folder."""
    run = opened(work)
    found = [open_corpus(run, tokenizer) for tokenizer in (make_tokenizer(), with_eos(), with_bos())]
    assert len({shards.tokenizer_sha256 for shards in found}) == 1
    assert len({shards.folder for shards in found}) == 3
    assert [(shards.bos_ids, shards.eos_id) for shards in found] == [((), 1), ((), 5), ((3,), 1)]
    given = tokenize_corpus([f"{work}/corpus.txt"], make_tokenizer(), work / "shards", workers=1)
    run = opened(work, f"pretrain.corpus={given}")
    assert open_corpus(run, make_tokenizer()).folder == given
    with pytest.raises(
        ArtifactError, match=r"shards: documents begin with .* \[\] and end with 1, .* \[\] and 5;"
    ):
        open_corpus(run, with_eos())
    with pytest.raises(ArtifactError, match=r"puts \[3\] and 1; run `bitdistill tokenize`"):
        open_corpus(run, with_bos())
