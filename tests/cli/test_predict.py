"""`predict` on a real (tiny, random) packed student: texts, fields, files, stdin and refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bitdistill.cli import predict as cli_predict
from bitdistill.cli.main import app
from bitdistill.errors import BitDistillError, DataError, RecipeError

SENTIMENT = {
    "name": "mood",
    "kind": "classification",
    "template": "{text} w9",
    "labels": {"0": " w4", "1": " w5", "2": " w6 w7"},
}
PAIR = {**SENTIMENT, "template": "{a} w9 {b}"}
STORY = {
    "name": "story",
    "kind": "generation",
    "template": "{text}",
    "target_field": "rest",
    "max_new_tokens": 4,
}


@pytest.fixture(scope="module")
def make_student(tmp_path_factory):
    """Writes a packed student of a tiny Llama whose manifest names the given task."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from bitdistill.config import RefineConfig
    from bitdistill.models import surgery
    from bitdistill.models.student import pack, save_student
    from bitdistill.recipe import parse_recipe

    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "llama", vocab_size=101, eos_token_id=1, pad_token_id=2, bos_token_id=None, **sizes
    )
    plan = surgery.plan(config, RefineConfig())
    student = pack(surgery.apply(plan, AutoModelForCausalLM.from_config(config).float()), "bfloat16")
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(101)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="w0", eos_token="w1", pad_token="w2"
    )

    def _make(task: dict) -> Path:
        recipe = parse_recipe(
            {"name": "t", "model": {"path": "x/y"}, "task": task, "data": {"train": "t.jsonl"}}
        )
        folder = tmp_path_factory.mktemp("student") / "packed"
        dumped = recipe.model_dump(mode="json")
        save_student(
            student,
            tokenizer,
            folder,
            kind="packed",
            plan=plan,
            recipe=dumped,
            extra={},
            float_dtype="bfloat16",
        )
        return folder

    return _make


@pytest.fixture(scope="module")
def classifier(make_student) -> Path:
    return make_student(SENTIMENT)


def predict(*arguments: object, stdin: str | bytes | None = None) -> list[dict]:
    """Runs `predict --json`; a failing one raises its error."""
    done = CliRunner().invoke(app, ["predict", *map(str, arguments), "--json"], input=stdin)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_probabilities_are_the_softmax_of_label_likelihoods(classifier):
    import torch

    from bitdistill.models.student import load_student

    (answer,) = predict(classifier, "w40 w41 w42")
    model, tokenizer, _ = load_student(classifier)
    scores = []
    for word in SENTIMENT["labels"].values():
        ids = tokenizer(f"w40 w41 w42 w9{word}", return_tensors="pt").input_ids
        logits = torch.log_softmax(model.eval()(ids).logits[0].double(), -1)
        scores.append(sum(logits[t - 1, ids[0, t]].item() for t in range(4, ids.shape[1])))
    weights = [math.exp(s) for s in scores]
    expected = {str(i): w / sum(weights) for i, w in enumerate(weights)}
    assert answer["probabilities"] == pytest.approx(expected, abs=1e-4)
    assert answer["label"] == max(expected, key=expected.__getitem__)
    assert answer["answer"] == SENTIMENT["labels"][answer["label"]].strip()


def test_ways_to_give_rows_agree(classifier, tmp_path):
    texts = ["w40 w41", "w50", "w30 w31 w32"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    wanted = [a["probabilities"] for a in predict(classifier, *texts)]
    for given in (
        predict(classifier, "--file", rows),
        predict(classifier, stdin="\n".join(texts)),
        predict(classifier, stdin="\n\n".join(json.dumps({"text": t}) for t in texts)),
        predict(classifier, *texts, "--batch-rows", 1),
    ):
        assert [a["probabilities"] for a in given] == [pytest.approx(w, abs=1e-5) for w in wanted]
    assert predict(classifier, "--field", "text=w50")[0]["probabilities"] == pytest.approx(
        wanted[1], abs=1e-5
    )
    assert [a["where"] for a in predict(classifier, "--file", rows)][1].endswith("rows.jsonl:2")


def test_top_and_text_for_people(classifier):
    (answer,) = predict(classifier, "w40", "--top", 1)
    assert len(answer["probabilities"]) == 1
    done = CliRunner().invoke(app, ["predict", str(classifier), "w40"])
    assert "%" in done.stdout


def test_generation(make_student):
    import torch

    from bitdistill.models.student import load_student

    folder = make_student(STORY)
    (answer,) = predict(folder, "w40 w41 w42")
    assert answer["label"] is None
    assert "probabilities" not in answer
    model, tokenizer, _ = load_student(folder)
    ids = tokenizer("w40 w41 w42", return_tensors="pt").input_ids
    for _ in range(4):
        following = int(model.eval()(ids).logits[0, -1].argmax())
        if following == 1:
            break
        ids = torch.cat([ids, torch.tensor([[following]])], 1)
    assert answer["answer"] == tokenizer.decode(ids[0, 3:])


@pytest.mark.parametrize(
    ("arguments", "stdin", "expected"),
    [
        (["w40", "--field", "text=w60"], None, "only one of them"),
        (["--field", "text"], None, "expected NAME=TEXT"),
        (["--field", "body=w60"], None, "no field `text`"),
        (["--file", "gone.jsonl"], None, "no such file"),
        ([], "", "no input"),
        ([], '{"text": \n', "stdin:1: starts like a JSON row"),
    ],
)
def test_refusals(classifier, arguments, stdin, expected):
    with pytest.raises(BitDistillError) as caught:
        predict(classifier, *arguments, stdin=stdin)
    assert expected in str(caught.value)


def test_one_text_for_a_pair_task(make_student):
    folder = make_student(PAIR)
    with pytest.raises(BitDistillError, match="needs 2 fields, not one text; use --field a=… --field b=…"):
        predict(folder, "w40")
    assert predict(folder, "--field", "a=w60", "--field", "b=w61")[0]["label"] in {"0", "1", "2"}


def test_no_model_there(tmp_path):
    with pytest.raises(BitDistillError) as caught:
        predict(tmp_path, "w40")
    assert caught.value.exit_code == 6


def test_stdin_that_is_not_utf_8_is_named_by_line(classifier):
    for given in (b"w40\r\ncaf\xe9\n", b"\xef\xbb\xbfw40\ncaf\xe9\n"):
        with pytest.raises(DataError, match="stdin:2: byte 3 is not UTF-8"):
            predict(classifier, stdin=given)


def test_half_characters_are_refused(classifier):
    with pytest.raises(DataError, match="stdin:1: field `text` holds a lone surrogate"):
        predict(classifier, stdin='{"text": "\\ud800"}')


def test_places_go_on_across_batches(classifier, monkeypatch):
    monkeypatch.setattr(cli_predict, "CHUNK", 2)
    assert [a["where"] for a in predict(classifier, *["w40"] * 5)] == [f"input {n}" for n in range(1, 6)]
    assert [a["where"] for a in predict(classifier, stdin="w40\n\nw41\nw42\n")] == [
        "stdin:1",
        "stdin:3",
        "stdin:4",
    ]


def test_devices(classifier):
    assert predict(classifier, "w40", "--device", "auto")
    assert CliRunner().invoke(app, ["predict", str(classifier), "w40", "--device", "foo"]).exit_code == 2
    if not torch.cuda.is_available():
        with pytest.raises(RecipeError, match="no CUDA device is visible"):
            predict(classifier, "w40", "--device", "cuda")
