"""The engine against the PyTorch model it was exported from.

Tolerance: float models agree to 2e-5. In a packed student a last-bit difference in a norm (another order of
summation) may carry an activation over a rounding border of the int8 quantizer; that moves the logits of this
token and, through its keys and values, of later ones by a visible step (5e-2 is allowed here). Short prompts
rarely meet a border: nine in ten agree to 2e-5. The integer products are exact.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bitdistill as bd
from bitdistill.config import Task
from bitdistill.errors import ArtifactError, DataError, ModelError
from tests.models.conftest import TINY, VOCAB, make_tokenizer, tiny_model
from tests.models.test_student import save, trained_student

pytest.importorskip("bitdistill.engine._native", reason="the native engine is not built")

from bitdistill.engine import Engine
from bitdistill.engine.generation import NewText
from bitdistill.engine.text import FolderTokenizer
from bitdistill.models.student import load_student, pack
from bitdistill.models.tokenizer import read_tokenizer
from bitdistill.stages.demo import demo_folder

EXACT, STEP = 2e-5, 5e-2


def prompt_ids(n: int, seed: int = 1) -> list[int]:
    return torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def torch_logits(model: Any, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float().numpy()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<family>-<packed|float> folders of every tiny family."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    for name in TINY:
        save(tiny_model(name), root / f"{name}-float", "teacher")
        packed = pack(trained_student(name), "bfloat16")
        save(packed, root / f"{name}-packed", "packed", float_dtype="bfloat16")
    return root


def test_subln_uses_the_models_epsilon(tmp_path: Path) -> None:
    student = bd.refine(tiny_model("llama", rms_norm_eps=0.5), torch.tensor([prompt_ids(13)]))
    save(pack(student, "bfloat16"), tmp_path / "m", "packed", float_dtype="bfloat16")
    ids = prompt_ids(2)
    want = torch_logits(load_student(tmp_path / "m")[0], ids)
    assert np.abs(Engine(tmp_path / "m", threads=1).logits(ids) - want).max() < STEP


@pytest.mark.parametrize("name", sorted(TINY))
def test_float_logits(folders: Path, name: str) -> None:
    folder, ids = folders / f"{name}-float", prompt_ids(60)
    expected = torch_logits(load_student(folder)[0], ids)
    np.testing.assert_allclose(Engine(folder, threads=2).logits(ids), expected, atol=EXACT, rtol=EXACT)


@pytest.mark.parametrize("name", sorted(TINY))
@pytest.mark.parametrize("layout", ["2bit", "base3"])
def test_packed_logits(folders: Path, name: str, layout: Any) -> None:
    folder, ids = folders / f"{name}-packed", prompt_ids(60)
    expected = torch_logits(load_student(folder)[0], ids)
    got = Engine(folder, threads=2, layout=layout).logits(ids)
    assert np.abs(got - expected).max() < STEP
    assert (got.argmax(1) == expected.argmax(1)).all()


def share_equal(engine: Engine, model: Any, count: int = 40) -> float:
    """Share of three-token prompts whose logits agree to EXACT."""
    prompts = [prompt_ids(3, seed=n) for n in range(count)]
    worst = [np.abs(engine.logits(ids) - torch_logits(model, ids)).max() for ids in prompts]
    assert max(worst) < STEP
    return float(np.mean(np.array(worst) < EXACT))


@pytest.mark.parametrize("name", sorted(TINY))
def test_packed_logits_to_float_rounding(folders: Path, name: str) -> None:
    folder = folders / f"{name}-packed"
    assert share_equal(Engine(folder, threads=1), load_student(folder)[0]) >= 0.9


@pytest.mark.parametrize("subln", ["every_linear", "none"])
def test_other_subln_positions(tmp_path: Path, subln: str) -> None:
    packed = pack(trained_student("qwen3", subln), "float32")
    save(packed, tmp_path / "m", "packed", float_dtype="float32")
    assert share_equal(Engine(tmp_path / "m"), packed) >= 0.9


def test_weights_only_ablation(tmp_path: Path) -> None:
    import bitdistill as bd

    student = bd.refine(tiny_model("llama"), torch.tensor([prompt_ids(13)]), quantize_activations=False)
    packed = pack(student, "float32")
    save(packed, tmp_path / "m", "packed", float_dtype="float32")
    ids = prompt_ids(30)
    np.testing.assert_allclose(
        Engine(tmp_path / "m").logits(ids), torch_logits(packed, ids), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", sorted(TINY))
def test_greedy_tokens(folders: Path, name: str) -> None:
    """64 greedy tokens, prompts of 1 and 9 tokens, the same as transformers' own generate."""
    folder = folders / f"{name}-packed"
    model = load_student(folder)[0]
    engine = Engine(folder, threads=1)
    for length in (1, 9):
        ids = prompt_ids(length, seed=length)
        output = model.generate(
            torch.tensor([ids]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=2
        )
        engine.stop_ids = frozenset()
        assert list(engine.generate(ids, max_new_tokens=64).ids) == output[0, length:].tolist()


def test_results_do_not_depend_on_threads_isa_or_company(folders: Path) -> None:
    """Bit for bit: thread counts, instruction sets, prefill against decode, alone against a batch."""
    from bitdistill.engine import _native

    folder, ids = folders / "gemma3_text-packed", prompt_ids(41)
    engine = Engine(folder, threads=1)
    before = engine.isa
    expected = engine.logits(ids)
    try:
        for isa in _native.available_isas():
            np.testing.assert_array_equal(Engine(folder, threads=3, isa=isa).logits(ids), expected)
    finally:
        _native.set_isa(before)
    one, other = _native.Sequence(engine.model), _native.Sequence(engine.model)
    array = np.array(ids, dtype=np.int32)
    rows = [engine.model.forward([(one, array[:20])], "all")]
    for n in range(20, 41):
        together = engine.model.forward([(other, array[n - 20 : n - 19]), (one, array[n : n + 1])], "last")
        rows.append(together[1:])
    np.testing.assert_array_equal(np.concatenate(rows), expected)


def test_batches_and_prefix_reuse(folders: Path) -> None:
    engine = Engine(folders / "qwen3-packed", threads=2)
    prompts = [prompt_ids(n, seed=n) for n in (3, 12, 7)]
    alone = [engine.generate(p, max_new_tokens=24).ids for p in prompts]
    assert [g.ids for g in engine.generate(prompts, max_new_tokens=24)] == alone
    first = engine.generate(prompts[1], max_new_tokens=10)
    longer = [*prompts[1], *first.ids, 5, 9]
    again = engine.generate(longer, max_new_tokens=10)
    assert again.reused_tokens >= len(prompts[1]) + len(first.ids) - 1
    assert again.ids == Engine(folders / "qwen3-packed").generate(longer, max_new_tokens=10).ids


def test_callers_in_several_threads(folders: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    engine = Engine(folders / "qwen2-packed", threads=2)
    prompts = [prompt_ids(3 + n % 5, seed=n) for n in range(24)]
    alone = [engine.generate(p, max_new_tokens=12).ids for p in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda p: engine.generate(p, max_new_tokens=12).ids, prompts))
    assert together == alone


def test_sampling_is_seeded_and_greedy_at_zero(folders: Path) -> None:
    engine = Engine(folders / "llama-packed")
    ids = prompt_ids(8)
    drawn = [engine.generate(ids, max_new_tokens=20, temperature=1.0, seed=s).ids for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = engine.generate(ids, max_new_tokens=20).ids
    assert engine.generate(ids, max_new_tokens=20, temperature=0.9, top_k=1, seed=4).ids == greedy
    assert engine.generate(ids, max_new_tokens=20, temperature=0.9, top_p=1e-9, seed=4).ids == greedy


def test_sampling_frequencies(folders: Path) -> None:
    """1,000 draws of one next token follow softmax(logits / temperature) (chi-square, 5 sigma)."""
    engine = Engine(folders / "llama-packed", threads=1)
    ids = prompt_ids(8)
    z = engine.logits(ids)[-1].astype(np.float64) / 0.7
    p = np.exp(z - z.max())
    p /= p.sum()
    engine.stop_ids = frozenset()
    draws = [engine.generate(ids, max_new_tokens=1, temperature=0.7, seed=s).ids[0] for s in range(1000)]
    counts = np.bincount(draws, minlength=VOCAB)
    common = p * 1000 >= 5
    chi = ((counts - 1000 * p) ** 2 / (1000 * p))[common].sum()
    freedom = common.sum() - 1
    assert chi < freedom + 5 * np.sqrt(2 * freedom)


def test_stops_and_streaming(folders: Path) -> None:
    engine = Engine(folders / "llama-packed")
    engine.stop_ids = frozenset()
    whole = engine.generate("w5 w6 w7", max_new_tokens=12)
    assert whole.finish_reason == "length"
    pieces: list[str] = []
    streamed = engine.generate("w5 w6 w7", max_new_tokens=12, stream=lambda _, text: pieces.append(text))
    assert "".join(pieces) == streamed.text == whole.text
    third = whole.ids[2]
    cut = engine.generate("w5 w6 w7", max_new_tokens=12, stop=[third])
    assert cut.finish_reason == "stop"
    assert cut.ids == whole.ids[: whole.ids.index(third)]
    word = whole.text.split()[2]
    by_text = engine.generate("w5 w6 w7", max_new_tokens=12, stop=word)
    assert by_text.text == whole.text[: whole.text.index(word)]
    stopped = engine.generate("w5 w6 w7", max_new_tokens=12, stream=lambda *_: False)
    assert stopped.finish_reason == "callback"
    assert len(stopped.ids) == 1


def test_chat(folders: Path) -> None:
    engine = Engine(folders / "llama-packed")
    asked = engine.tokenizer.render_chat([{"role": "user", "content": "w9 w4"}])
    assert asked == make_tokenizer().apply_chat_template(
        [{"role": "user", "content": "w9 w4"}], tokenize=False, add_generation_prompt=True
    )
    assert engine.chat([{"role": "user", "content": "w9 w4"}], max_new_tokens=3).prompt_tokens == 3


TEMPLATES = {
    "break": "{% for m in messages %}{{ m.content }}{% if loop.first %}{% break %}{% endif %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }} w7{% endgeneration %}{% endfor %}",
    "continue": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "strftime": "{{ strftime_now('%Y') }} {{ strftime_now(format='%Y') }} {{ messages[0].content }}",
    "tojson": "{{ {'b': 'é', 'a': 1} | tojson }} {{ {'b': 'é', 'a': 1} | tojson(ensure_ascii=True, sort_keys=True) }}",
    "special": "{{ mask_token }}|{{ cls_token }}|{{ eos_token }}",
    "documents": "{% if documents is defined and tools is defined %}w8{% else %}w9{% endif %}",
    "named": [
        {"name": "other", "template": "w3"},
        {"name": "default", "template": "{{ messages[0].content }}"},
    ],
}


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_chat_templates_as_transformers_renders_them(folders: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(folders / "llama-packed", tmp_path / "m"))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    config["chat_template"] = TEMPLATES[name]
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    messages = [{"role": "user", "content": "w9 w4"}, {"role": "assistant", "content": "w5"}]
    expected = read_tokenizer(folder).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert FolderTokenizer(folder).render_chat(messages) == expected


def test_a_template_that_refuses_the_messages(folders: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders / "llama-packed", tmp_path / "m"))
    template = folder / "chat_template.jinja"
    template.write_text("{{ raise_exception('roles must alternate') }}", "utf-8")
    with pytest.raises(ModelError, match=r"chat template: roles must alternate; change the messages"):
        FolderTokenizer(folder).render_chat([{"role": "user", "content": "w9"}])
    for wrong in ("{{ messages.nothing.there }}", "{{ '%(a)s' % {} }}", "{% for m in messages %}"):
        template.write_text(wrong, "utf-8")
        with pytest.raises(ModelError, match=r"chat template: .*; mend chat_template.jinja"):
            FolderTokenizer(folder).render_chat([{"role": "user", "content": "w9"}])


def test_streamed_text_is_the_whole_text_also_inside_a_character() -> None:
    tokenizer = FolderTokenizer(demo_folder() / "model")
    ids = tokenizer("naïve 😀 €5")["input_ids"]
    for words in ([], ["€"]):
        for room in range(1, len(ids) + 1):
            pieces: list[str] = []
            text = NewText(tokenizer, words, frozenset(), room, pieces.append)
            for token in ids:
                if text.finish_reason is None:
                    text.add(token)
            assert "".join(pieces) == text.result(0, 0).text, (words, room)
    assert any("\ufffd" in tokenizer.decode(ids[:n]) for n in range(len(ids))), (
        "the test needs a broken character"
    )


def byte_fallback(folder: Path) -> FolderTokenizer:
    """As Llama's and Gemma's: what is no word is written in bytes."""
    from tokenizers import Tokenizer, decoders, models

    words = [f"<0x{byte:02X}>" for byte in range(256)] + ["\u2581foo", "bar", "\u2581", "<s>"]
    made = Tokenizer(
        models.BPE({word: n for n, word in enumerate(words)}, [], unk_token="<s>", byte_fallback=True)
    )
    made.add_special_tokens(["<s>"])
    steps = [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    made.decoder = decoders.Sequence(steps)
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return FolderTokenizer(folder)


def test_streamed_bytes(tmp_path: Path) -> None:
    tokenizer = byte_fallback(tmp_path / "t")
    euro = [0xE2, 0x82, 0xAC]

    def said(ids: list[int], words: list[str], refuse_at: int = -1) -> str:
        """The text of these ids, streamed (until a piece is refused) and not, which are the same."""
        pieces: list[str] = []

        def take(piece: str) -> bool:
            pieces.append(piece)
            return len(pieces) != refuse_at

        texts = []
        for stream in (take, None) if refuse_at < 0 else (take,):
            text = NewText(tokenizer, words, frozenset(), len(ids), stream)
            for token in ids:
                if text.finish_reason is None:
                    text.add(token)
            texts.append(text.result(0, 0).text)
        assert {*texts} == {"".join(pieces)}, (ids, refuse_at)
        return texts[0]

    for valid in ([256, 257, *euro, 256], [*euro, *euro, 258, 257], [258, 256, 0x41, *euro]):
        assert said(valid, []) == tokenizer.decode(valid)
    # A broken byte behind a finished character, of which a decoder of all ids makes broken bytes too
    assert said([256, *euro, 256, 0xFF, 257], []) == "foo€ foo\ufffdbar"
    assert said([256, *euro, 0xFF, 257], []).startswith("foo€")
    assert said([256, *euro, *euro[:1]], []).startswith("foo€\ufffd")
    assert said([256, 257, *euro, 257], ["€b"]) == "foobar"
    assert said([256, *euro[:2]], ["\ufffd"]) == "foo"  # which only the end makes
    rng = np.random.default_rng(0)
    for _ in range(300):
        ids = rng.choice([256, 257, 258, *euro, 0xFF, 0x41], 12).tolist()
        for refuse_at in (-1, 1, 2, 3):
            said(ids, ["bar foo", "€A"], refuse_at)


@pytest.mark.parametrize(
    "labels", [{"a": " w5", "b": " w9"}, {"a": " w5 w6", "b": " w5 w7", "c": " w8 w8 w8"}]
)
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_classification_equals_pytorch(folders: Path, name: str, labels: dict[str, str]) -> None:
    from bitdistill.data import tasks
    from bitdistill.data.readers import Row
    from bitdistill.eval.classify import classify

    task = Task(name="t", kind="classification", template="{text} w3", labels=labels)
    folder = folders / f"{name}-packed"
    model, tokenizer, _ = load_student(folder)
    texts = [" ".join(f"w{i}" for i in prompt_ids(2 + n % 9, seed=n)) for n in range(40)]
    rows = [Row({"text": text}, f"row {n}") for n, text in enumerate(texts)]
    examples = tasks.encode(task, rows, tokenizer, 64, require_answers=False)
    expected = classify(model, tokenizer, task, examples, batch_rows=8, device="cpu", pad_id=2)
    engine = Engine(folder, threads=2)
    classifier = engine.classifier(task, 64)
    own = classifier.encode(rows, VOCAB)
    assert [e.prompt_ids for e in own] == [e.prompt_ids for e in examples]
    got = classifier.predictions(engine.model, own)
    assert [p.label for p in got] == [p.label for p in expected]
    np.testing.assert_allclose([p.scores for p in got], [p.scores for p in expected], atol=0.1)
    answers = engine.classify(texts, task=task, max_length=64)
    assert [a.text for a in answers] == [p.text for p in expected]
    assert all(abs(sum(a.probabilities.values()) - 1) < 1e-9 for a in answers)


def test_task_from_the_manifest(folders: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no task"):
        Engine(folders / "llama-packed").classify(["w4"])


def test_inputs_that_are_none(folders: Path) -> None:
    engine = Engine(folders / "llama-packed")
    task = Task(name="t", kind="classification", template="{text} w3", labels={"a": " w5", "b": " w9"})
    one: Any
    for one in ("w4 w5", {"text": "w4 w5"}):  # letters and names of fields are no inputs
        with pytest.raises(DataError, match="is one input; give a list"):
            engine.classify(one, task=task)
    for bad, what in (("half \ud83d", "lone surrogate"), ("nul \0", "NUL")):
        with pytest.raises(DataError, match=f"input 2: field `text` holds a {what}"):
            engine.classify(["w4", bad], task=task)
        with pytest.raises(DataError, match=f"prompt holds a {what}"):
            engine.generate(bad)
        with pytest.raises(DataError, match=f"messages.0: field `content` holds a {what}"):
            engine.chat([{"role": "user", "content": bad}])


def test_requests_out_of_range(folders: Path) -> None:
    engine = Engine(folders / "llama-packed")
    for bad in ([], [0, VOCAB], [-1], list(range(3, 90)) * 2):
        with pytest.raises(ModelError):
            engine.generate(bad)
    for options in (
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"max_new_tokens": 0},
        {"stop": ""},
    ):
        with pytest.raises(ModelError):
            engine.generate([5], **options)
    with pytest.raises(ModelError, match="mmx"):
        Engine(folders / "llama-packed", isa="mmx")
    for threads in (0, 100_000):
        with pytest.raises(ModelError, match="thread"):
            Engine(folders / "llama-packed", threads=threads)
    summary = Task(name="g", kind="generation", template="{text}", target_field="y")
    with pytest.raises(DataError):
        engine.classify(["w4"], task=summary)
    filled = engine.generate(prompt_ids(126), max_new_tokens=50)
    assert filled.finish_reason in ("length", "stop")
    assert len(filled.ids) <= 2


def test_int8_head_and_float16_cache_are_close(folders: Path) -> None:
    folder, ids = folders / "qwen3-packed", prompt_ids(40)
    expected = Engine(folder).logits(ids)
    spread = expected.std()
    assert np.abs(Engine(folder, head="int8").logits(ids) - expected).max() < 0.15 * spread
    rounded = np.abs(Engine(folder, head="int4").logits(ids) - expected)
    assert rounded.max() < 1.0 * spread
    assert rounded.mean() < 0.2 * spread
    halved = np.abs(Engine(folder, kv="float16").logits(ids) - expected).max(axis=1)
    assert np.median(halved) < 0.05 * spread


@pytest.mark.parametrize("head", ["screened", "screened4"])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen3", "gemma3_text"])
def test_screened_head_gives_the_tokens_of_the_stored_head(folders: Path, name: str, head: Any) -> None:
    folder = folders / f"{name}-packed"
    stored, screened = Engine(folder, threads=1), Engine(folder, threads=2, head=head)
    drawn = {"temperature": 1.3, "top_k": 7, "seed": 3}
    for options in ({}, drawn, {"temperature": 0.9, "top_k": 1000, "top_p": 0.8}):
        for seed in range(4):
            ids = prompt_ids(3, seed=seed)
            assert screened.generate(ids, max_new_tokens=40, **options) == stored.generate(
                ids, max_new_tokens=40, **options
            )
    facts = screened.model.facts
    assert facts["screened_tokens"] > 0
    assert facts["rescored_rows"] < 0.6 * VOCAB * facts["screened_tokens"]
    ids = prompt_ids(20)
    np.testing.assert_array_equal(screened.logits(ids), stored.logits(ids))


def test_screened_head_with_ties(folders: Path, tmp_path: Path) -> None:
    """Equal rows of the head: the first of equals wins, screened or not."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[51:] = model.lm_head.weight[: VOCAB - 51].clone()
    save(model, tmp_path / "m", "teacher")
    ids = prompt_ids(5)
    stored = Engine(tmp_path / "m", threads=1).generate(ids, max_new_tokens=30)
    for head in ("screened", "screened4"):
        assert Engine(tmp_path / "m", threads=1, head=head).generate(ids, max_new_tokens=30) == stored
    assert max(stored.ids) < 51  # the twins of rows 0 to 49 never win


def test_no_torch_and_one_public_name(folders: Path) -> None:
    code = (
        "import sys, bitdistill as bd\n"
        f"engine = bd.Engine({str(folders / 'llama-packed')!r})\n"
        "engine.generate('w4 w5', max_new_tokens=3)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_forced_isa_by_environment(folders: Path) -> None:
    import os

    code = f"import bitdistill as bd; print(bd.Engine({str(folders / 'llama-packed')!r}).isa)"
    for isa, status in (("scalar", 0), ("mmx", 1)):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "BITDISTILL_ISA": isa},
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stderr
        assert isa in (done.stdout if status == 0 else done.stderr)


def test_rope_variants(tmp_path: Path) -> None:
    """llama3 and linear scaling of the rotary positions."""
    ids = prompt_ids(60)
    ropes: list[dict[str, Any]] = [
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "rope_theta": 500.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ]
    for rope in ropes:
        model = tiny_model("llama", rope_parameters=rope)
        folder = tmp_path / rope["rope_type"]
        save(model, folder, "teacher")
        np.testing.assert_allclose(Engine(folder).logits(ids), torch_logits(model, ids), atol=1e-4, rtol=1e-4)
        config = json.loads((folder / "config.json").read_text())
        assert config["rope_parameters"]["rope_type"] == rope["rope_type"]


def test_soft_cap_and_window_of_qwen(tmp_path: Path) -> None:
    ids = prompt_ids(60)
    variants = {
        "cap": tiny_model("gemma3_text", final_logit_softcapping=3.0, query_pre_attn_scalar=33),
        "window": tiny_model("qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=1),
    }
    for name, model in variants.items():
        save(model, tmp_path / name, "teacher")
        np.testing.assert_allclose(
            Engine(tmp_path / name).logits(ids), torch_logits(model, ids), atol=1e-4, rtol=1e-4
        )
