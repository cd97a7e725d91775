"""Texts longer than the model's context are cut or refused by us: transformers' warning would be false."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from transformers.utils import logging as hf_logging

from bitdistill.data.tokenizer import plain_ids
from bitdistill.models.tokenizer import read_tokenizer
from tests.models.conftest import make_tokenizer


def test_no_warning_of_long_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_tokenizer()
    made.model_max_length = 8
    made.save_pretrained(tmp_path)
    found = read_tokenizer(tmp_path)
    assert found.model_max_length == 8
    said: list[str] = []
    logger = hf_logging.get_logger("transformers.tokenization_utils_base")
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: said.append(record.getMessage()))
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.WARNING)
    monkeypatch.setattr(logger, "disabled", False)
    logger.manager._clear_cache()  # type: ignore[attr-defined]  # of levels
    assert len(plain_ids(found, ["w4 " * 20])[0]) == 20
    assert said == []
    made("w4 " * 20)  # the test itself: what is not quiet is heard
    assert any("longer than the specified maximum" in text for text in said)
