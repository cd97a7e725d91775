"""Stage 2 over a part of the vocabulary (`pretrain.sampled_words`), against softmax over it in plain PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bitdistill import pipeline
from bitdistill.config import PretrainConfig
from bitdistill.data.batches import Batch, PackedBatches, SampledWords
from bitdistill.errors import DataError
from bitdistill.models.attention import causal_only
from bitdistill.models.surgery import refine
from bitdistill.stages.pretrain import LanguageModelStep
from bitdistill.train.step import Totals
from tests.models.conftest import tiny_model
from tests.stages.conftest import recipe

SETTINGS = ("bitnet_sft=null", "pretrain.loop.batch_rows=2", "pretrain.loop.micro_batch_rows=1")


class Tokens:
    def __init__(self, vocabulary: int) -> None:
        self.ids = np.random.default_rng(3).integers(0, vocabulary, 2000)
        self.n_tokens = len(self.ids)

    def read(self, start: int, count: int) -> np.ndarray:
        return self.ids[start : start + count]


def batch_of(vocabulary: int, count: int | None) -> Batch:
    tokens = Tokens(vocabulary)
    words = None if count is None else SampledWords(count, vocabulary, tokens, 0)
    (batch,) = PackedBatches(tokens, sequence_length=8, batch_rows=3, seed=0, words=words).micro_batches(0)
    return batch


@pytest.mark.parametrize("model", ["llama", "gemma3_text"])
@pytest.mark.parametrize("objective", ["lm", "kl", "mix"])
def test_loss_and_gradients_are_those_of_softmax_over_the_words(model: str, objective: str) -> None:
    teacher = tiny_model(model).eval().requires_grad_(False)
    student = refine(tiny_model(model), gains="ones").eval()
    vocabulary = student.get_input_embeddings().weight.shape[0]
    batch = batch_of(vocabulary, vocabulary // 2)
    assert batch.words_S is not None
    config = PretrainConfig(corpus="corpus", objective=objective, mix_lm=0.3, hidden_weight=0.0)  # type: ignore[arg-type]
    totals = Totals(rows=3, tokens=24, answers=21)

    def twin() -> torch.Tensor:
        ids = batch.input_ids_BT
        own, other = (m(input_ids=ids).logits[:, :-1].float() for m in (student, teacher))
        own_log, other_log = (z[..., batch.words_S].log_softmax(-1) for z in (own, other))
        kl = (other_log.exp() * (other_log - own_log)).sum()
        chosen = ids[:, 1:, None] == batch.words_S
        lm = -(own_log * chosen).sum()
        weight = {"lm": 1.0, "kl": 0.0, "mix": 0.3}[objective]
        return (weight * lm + (1 - weight) * kl) / 21

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        student.zero_grad()
        loss.backward()
        return {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}

    want_loss = twin()
    want = gradients(want_loss)
    step = LanguageModelStep(student, None if objective == "lm" else teacher, config, compiling=False)
    with causal_only(student, teacher):
        output = step(batch, totals)
        got = gradients(output.loss)
    assert float(output.loss.detach()) == pytest.approx(float(want_loss.detach()), rel=1e-4)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=2e-3, atol=2e-6, msg=name)
    others = torch.ones(vocabulary, dtype=torch.bool)
    others[batch.words_S] = False
    assert others.any()
    head = "model.embed_tokens.weight" if student.config.tie_word_embeddings else "lm_head.weight"
    assert not got[head][others].any(), "words that were not drawn stay where they are"


def test_all_words_are_what_no_sampling_is() -> None:
    student, teacher = refine(tiny_model("llama_tied"), gains="ones"), tiny_model("llama_tied").eval()
    vocabulary = student.get_input_embeddings().weight.shape[0]
    step = LanguageModelStep(student, teacher, PretrainConfig(corpus="corpus"), compiling=False)
    totals = Totals(rows=3, tokens=24, answers=21)
    with causal_only(student, teacher):
        losses = [float(step(batch_of(vocabulary, n), totals).loss.detach()) for n in (None, vocabulary)]
    assert losses[0] == losses[1]


def test_a_base_is_trained_on_them_and_has_a_key_of_its_own(work: Path) -> None:
    def made(name: str, *settings: str) -> tuple[str, list[float]]:
        chosen = recipe(work, *SETTINGS, f"name={name}", "pretrain.loop.log_every_steps=1", *settings)
        found = pipeline.run(chosen, until="pretrain", command="test", quiet=True)
        log = found.run_dir / "logs/pretrain.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []  # none where the base was there
        key = json.loads((found.run_dir / "base.json").read_text())["key"]
        return key, [json.loads(line)["kl"] for line in lines]

    whole, kl = made("whole")
    part, kl_part = made("part", "pretrain.sampled_words=64")
    assert part != whole
    assert len(kl_part) == len(kl) > 0
    assert all(value > 0 for value in kl_part)
    assert kl_part[0] != kl[0]
    assert made("off", "pretrain.sampled_words=null") == (whole, []), "what is off changes no key"


def test_more_words_than_the_model_has_are_refused(work: Path) -> None:
    chosen = recipe(work, *SETTINGS, "pretrain.sampled_words=100000")
    with pytest.raises(DataError, match=r"pretrain.sampled_words: 100000 of a vocabulary of"):
        pipeline.run(chosen, until="pretrain", command="test", quiet=True)
