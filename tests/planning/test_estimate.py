"""Estimates against the real thing: what autograd saves, packed tensors, and hand-worked sums."""

from __future__ import annotations

import pytest

from bitdistill.config import Recipe
from bitdistill.models.families import layout_of
from bitdistill.planning import estimate
from bitdistill.planning.estimate import Work

TINY = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 104,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


def layout(model_type: str = "llama", layers: int = 2):
    return layout_of({**TINY, "model_type": model_type, "num_hidden_layers": layers}, "test")


def recipe(**sections) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "t",
            "model": {"path": "x/y"},
            "task": {
                "name": "t",
                "kind": "classification",
                "template": "{a}",
                "labels": {"0": " a", "1": " b"},
            },
            "data": {"train": "train.jsonl"},
            **sections,
        }
    )


def saved_bytes(model_type: str, layers: int, *, subln: str | None, autocast: bool) -> int:
    """Bytes that autograd keeps for a forward pass of 2 x 36 tokens, without parameters and their copies."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from bitdistill.config import RefineConfig
    from bitdistill.models import surgery

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **TINY, num_hidden_layers=layers)
    config._attn_implementation = "sdpa"
    model = AutoModelForCausalLM.from_config(config).float()
    if subln is not None:
        model = surgery.apply(surgery.plan(config, RefineConfig(subln=subln)), model)
    shapes = {tuple(p.shape) for p in model.parameters() if p.ndim == 2}
    shapes |= {shape[::-1] for shape in shapes}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tuple(tensor.shape) not in shapes:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    ids = torch.arange(72).view(2, 36)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model.model(input_ids=ids, use_cache=False)
    return sum(kept.values())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("subln", [None, "none", "paper", "every_linear"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
def test_activation_bytes_are_what_autograd_saves(model_type, subln, autocast):
    # The difference of two depths is what a block keeps: embedding, last norm and masks drop out.
    block = saved_bytes(model_type, 3, subln=subln, autocast=autocast)
    block -= saved_bytes(model_type, 2, subln=subln, autocast=autocast)
    told = estimate.activation_bytes(
        layout(model_type), 2 if autocast else 4, ternary=subln is not None, subln=subln or "none"
    )
    assert told == pytest.approx(block / 72, rel=0.06)


def test_packed_bytes_by_hand():
    sizes = estimate.packed_bytes(layout(layers=1), "paper", "bfloat16")
    # q, k, v, o: 12 bytes a row of 48 (16 of 64); gate, up: 12; down: 26 a row of 104.
    assert sizes["codes"] == 64 * 12 + 2 * 32 * 12 + 48 * 16 + 2 * 104 * 12 + 48 * 26
    assert sizes["scales"] == 4 * 7
    assert sizes["embedding"] == 320 * 48 * 2
    assert sizes["other"] == 2 * (3 * 48 + 64 + 104)  # three norms, SubLN gains of o and down


@pytest.mark.parametrize("subln", ["paper", "every_linear", "none"])
def test_subln_places_are_those_of_surgery(subln):
    from bitdistill.config import RefineConfig
    from bitdistill.models import surgery

    plan = surgery.plan({**TINY, "model_type": "llama", "num_hidden_layers": 2}, RefineConfig(subln=subln))
    gains = sum(spec.in_features for spec in plan.replace.values() if spec.subln)
    assert estimate.subln_gains(layout(), subln) == gains


def test_time_by_hand():
    work = Work(rows=1000, tokens_per_row=10.0, max_length=16)
    made = {s.name: s for s in estimate.stages(recipe(pretrain=None, threads=1), layout(), work, work, "cpu")}
    weights, attention = layout().ternary_parameters, 2 * 2 * 10 * 64
    plain = 20_000 * (6 * weights + 3 * attention) / estimate.DEVICES["cpu"].flops
    assert made["sft"].tokens == 20_000
    assert made["sft"].seconds == pytest.approx(plain)
    assert made["bitnet_sft"].seconds == pytest.approx(plain * estimate.TERNARY_SLOWDOWN["cpu"])
    teacher = 20_000 * (2 * weights + attention) / estimate.DEVICES["cpu"].flops
    assert made["distill"].seconds == pytest.approx(plain * estimate.TERNARY_SLOWDOWN["cpu"] + teacher)


def distilling(work: Work, distill: dict) -> dict[str, estimate.Stage]:
    stages = estimate.stages(recipe(pretrain=None, threads=1, distill=distill), layout(), work, None, "cpu")
    return {s.name: s for s in stages}


def test_the_prompts_words_cost_a_head_a_token():
    work = Work(rows=1000, tokens_per_row=10.0, max_length=16)
    made, more = (distilling(work, d) for d in ({}, {"prompt_weight": 1.0}))
    head = 320 * 48
    flops = 6 * head * estimate.TERNARY_SLOWDOWN["cpu"] + 2 * head
    took = more["distill"].seconds - made["distill"].seconds
    assert took == pytest.approx(20_000 * flops / estimate.DEVICES["cpu"].flops)
    tokens = 32 * 16  # of a batch: less than a piece
    added = more["distill"].memory["logits"] - made["distill"].memory["logits"]
    assert added == tokens * 320 * 4 * 6 + head * 4
    assert more["sft"] == made["sft"]


def test_further_teachers_are_trained_and_looked_at_in_every_step():
    work = Work(rows=1000, tokens_per_row=10.0, max_length=16)
    made, more = (distilling(work, d) for d in ({}, {"teachers": 3}))
    forward = 2 * layout().ternary_parameters + 2 * 2 * 10 * 64
    took = more["distill"].seconds - made["distill"].seconds
    passes = 2 * 20_000 * forward / estimate.DEVICES["cpu"].flops
    assert took == pytest.approx(2 * made["sft"].seconds + passes)
    assert more["distill"].memory["teacher"] == 3 * made["distill"].memory["teacher"]
    assert more["sft"] == made["sft"]


def test_short_rows_on_a_gpu_are_bound_by_launches():
    work = Work(rows=3200, tokens_per_row=10.0, max_length=16)
    made = {s.name: s for s in estimate.stages(recipe(pretrain=None), layout(), work, None, "h200")}
    assert made["sft"].seconds == pytest.approx(200 * 2 * estimate.STEP_S_PER_BLOCK["plain"])
    assert "eval" not in made


def test_a_part_of_the_vocabulary_takes_its_part_of_the_head():
    """Stage 2, kl: the student's product and its two gradients, the teacher's product."""
    work = Work(rows=100, tokens_per_row=10.0, max_length=16)
    vocab = layout().vocab
    settings = {"corpus": "c", "sequence_length": 16, "loop": {"batch_rows": 1}}

    def stage(words):
        made = recipe(pretrain={**settings, "sampled_words": words}, threads=1)
        return next(s for s in estimate.stages(made, layout(), work, None, "h200") if s.name == "pretrain")

    whole, half, quarter = stage(None), stage(vocab // 2), stage(vocab // 4)
    assert stage(vocab).seconds == whole.seconds
    assert whole.seconds - half.seconds == pytest.approx(2 * (half.seconds - quarter.seconds))
    assert whole.seconds > half.seconds
    kept = 4 * layout().hidden * vocab  # the gradient of the whole head
    assert half.memory["logits"] - kept == pytest.approx((whole.memory["logits"] - kept) / 2)


def test_memory_by_hand():
    work = Work(rows=100, tokens_per_row=10.0, max_length=16)
    sft = estimate.stages(recipe(pretrain=None), layout(), work, None, "h200")[0]
    parameters = layout().parameters
    assert sft.memory["weights"] == sft.memory["gradients"] == 4 * parameters
    assert sft.memory["adamw"] == 8 * parameters
    assert sft.memory["weight copies"] == 2 * parameters
    assert sft.peak_bytes == sum(sft.memory.values())


def test_checkpointing_and_smaller_micro_batches_need_less():
    def peak(**loop) -> int:
        made = recipe(pretrain=None, sft={"loop": {"batch_rows": 32, **loop}})
        return estimate.stages(made, layout(layers=8), Work(100, 16.0, 128), None, "h200")[0].peak_bytes

    assert peak() > peak(micro_batch_rows=8) > peak(micro_batch_rows=8, gradient_checkpointing=True)
    assert peak() == peak(micro_batch_tokens=32 * 128) > peak(micro_batch_tokens=8 * 128)


def test_a_given_base_costs_no_stage_2():
    work = Work(100, 10.0, 16)
    names = [s.name for s in estimate.stages(recipe(pretrain={"base": "base"}), layout(), work, work, "cpu")]
    assert names == ["sft", "distill", "bitnet_sft", "eval"]


def test_generated_answers_are_scored_twice_over():
    """Prompts are read to be answered, and with the references once more."""

    def scored(**settings) -> int:
        task = {
            "name": "g",
            "kind": "generation",
            "template": "{text}",
            "target_field": "y",
            "max_new_tokens": 4,
        }
        made = recipe(pretrain=None, bitnet_sft=None, task=task, eval=settings)
        work = Work(100, 10.0, 16)
        return {s.name: s for s in estimate.stages(made, layout(), work, work, "cpu")}["eval"].tokens

    assert scored(reference_nll=False) == 2 * 100 * (10 + 4)
    assert scored() == 2 * 100 * (10 + 4 + 10)


def test_an_unknown_gpu_is_not_promised_too_fast(tmp_path, monkeypatch):
    assert estimate.DEVICES["rtx3090"].flops == min(
        d.flops for k, d in estimate.DEVICES.items() if k != "cpu"
    )
    assert estimate.detect_device() in estimate.DEVICES
