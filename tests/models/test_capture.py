"""Captured states: what they are, that nothing else changes, and that gradients flow through them."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

import bitdistill as bd
from bitdistill.errors import ModelError
from bitdistill.models.capture import _SINK, FUNCTIONS, capture_states

from .conftest import tiny_model


def states_by_hand(model: Any, layer: int, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K, V of a layer rebuilt from its input: projections, q/k-norm, rotary embedding in complex form."""
    hidden: list[Tensor] = []
    attention = model.model.layers[layer].self_attn
    handle = attention.register_forward_pre_hook(
        lambda _, args, kwargs: hidden.append((args[0] if args else kwargs["hidden_states"]).detach()),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(ids)
        handle.remove()
        batch, tokens = ids.shape
        size = attention.head_dim
        parameters = model.config.rope_parameters
        kind = (getattr(model.config, "layer_types", None) or ["full_attention"] * 3)[layer]
        theta = parameters.get(kind, parameters)["rope_theta"]
        angles = torch.arange(tokens)[:, None] * theta ** (-torch.arange(0, size, 2) / size)
        turn = torch.polar(torch.ones_like(angles, dtype=torch.float64), angles.double())

        def project(name: str, norm: str | None) -> Tensor:
            x = getattr(attention, name)(hidden[0]).view(batch, tokens, -1, size)
            if norm and hasattr(attention, norm):
                x = getattr(attention, norm)(x)
            return x.transpose(1, 2).double()

        def rotate(x: Tensor) -> Tensor:
            half = size // 2
            turned = torch.complex(x[..., :half], x[..., half:]) * turn
            return torch.cat([turned.real, turned.imag], dim=-1)

        query, key = project("q_proj", "q_norm"), project("k_proj", "k_norm")
        return rotate(query), rotate(key), project("v_proj", None)


def test_states_equal_a_reconstruction(model: Any, ids: Tensor) -> None:
    with capture_states(model, [0, 2]) as states:
        model(ids)
    assert sorted(states) == [0, 2]
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    for layer, (q, k, v) in states.items():
        size = model.model.layers[layer].self_attn.head_dim
        assert q.shape == (2, heads, 13, size)
        assert k.shape == v.shape == (2, kv_heads, 13, size)
        for found, wanted in zip((q, k, v), states_by_hand(model, layer, ids), strict=True):
            torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_states_are_those_that_attention_takes(model: Any, ids: Tensor) -> None:
    """Under autocast the rotary embedding leaves queries and keys in float32, and attention rounds them."""
    taken: list[tuple[Tensor, ...]] = []

    def attention(module: Any, *states: Tensor, **kwargs: Any) -> Any:
        taken.append(states[:3])
        return FUNCTIONS["sdpa"](module, *states, **kwargs)

    with capture_states(model, [1]) as plain:
        model(ids)
    assert {x.dtype for x in plain[1]} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16), capture_states(model, [1]) as states:
        setattr(model.model.layers[1].self_attn, _SINK, (states, 1, attention))
        model(ids)
    for state, own, exact in zip(states[1], taken[0], plain[1], strict=True):
        assert state.dtype == torch.bfloat16
        assert torch.equal(state, own)
        torch.testing.assert_close(state.float(), exact, rtol=0.1, atol=0.1)


def test_outputs_and_gradients_do_not_change(model: Any, ids: Tensor) -> None:
    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    plain_logits, plain = model(ids).logits, gradients()
    with capture_states(model, [1, -1]) as states:
        assert torch.equal(model(ids).logits, plain_logits)
        assert all(torch.equal(a, b) for a, b in zip(gradients(), plain, strict=True))
    assert sorted(states) == [-1, 1]


def test_gradient_flows_through_the_states(ids: Tensor) -> None:
    student = bd.refine(tiny_model("qwen3"), ids)
    with capture_states(student, [1]) as states:
        student(ids)
        sum(s.square().sum() for s in states[1]).backward()
    for name in ("q_proj", "k_proj", "v_proj"):
        for layer, reached in ((0, True), (1, True), (2, False)):
            grad = getattr(student.model.layers[layer].self_attn, name).weight.grad
            assert (grad is not None and bool(grad.abs().max() > 0)) == reached


def test_restored_on_exit_even_after_an_error(ids: Tensor) -> None:
    model = tiny_model("gemma3_text")
    attentions = [block.self_attn for block in model.model.layers]
    with capture_states(model, [0]):
        assert attentions[0].config is not model.config
        assert attentions[1].config is model.config
        assert model.config._attn_implementation == "sdpa"
        with pytest.raises(IndexError):
            model(ids + 101)  # beyond the vocabulary
    with contextlib.suppress(RuntimeError), capture_states(model, [0]):
        raise RuntimeError("stop")
    assert all(a.config is model.config for a in attentions)
    with capture_states(model, []) as states:
        model(ids)
    assert states == {}
    with capture_states(model, [0]) as states:
        pass
    model(ids)
    assert states == {}


def test_right_padding_without_a_mask_leaves_real_tokens_alone(model: Any, ids: Tensor) -> None:
    padded = torch.cat([ids, torch.full((2, 5), 2)], dim=1)
    with capture_states(model, [2]) as short:
        model(ids)
    with capture_states(model, [2]) as long:
        model(padded)
    for a, b in zip(short[2], long[2], strict=True):
        torch.testing.assert_close(a, b[:, :, :13], rtol=1e-5, atol=1e-5)


def test_two_models_at_once(ids: Tensor) -> None:
    """Teacher and student are captured together and must not write into each other's dict."""
    teacher = tiny_model("llama")
    student = bd.refine(teacher, ids)
    with capture_states(teacher, [1]) as from_teacher, capture_states(student, [1]) as from_student:
        with torch.no_grad():
            teacher(ids)
        student(ids)
    assert not from_teacher[1][0].requires_grad
    assert from_student[1][0].requires_grad
    assert not torch.equal(from_teacher[1][0], from_student[1][0])


def test_sliding_window_still_applies() -> None:
    """More tokens than the window: a captured sliding layer must see the same mask."""
    model = tiny_model("gemma3_text")
    long = torch.randint(3, 101, (1, 40), generator=torch.Generator().manual_seed(3))
    plain = model(long).logits
    with capture_states(model, [0, 1, 2]):
        assert torch.equal(model(long).logits, plain)
    model.config.sliding_window = 64
    for block in model.model.layers:
        block.self_attn.sliding_window = 64 if block.self_attn.sliding_window else None
    assert not torch.equal(model(long).logits, plain)  # so the window did matter


@pytest.mark.parametrize(
    ("layers", "words"),
    [([3], "layer 3: the model has layers 0 to 2"), ([-4], "layer -4"), ([2, -1], "layer -1 is named twice")],
)
def test_layers_that_are_not_there(layers: list[int], words: str) -> None:
    with pytest.raises(ModelError, match=words), capture_states(tiny_model("llama"), layers):
        pass


def test_other_attention_is_refused() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(ModelError, match="'eager'; states are"), capture_states(model, [0]):
        pass


def test_gradient_checkpointing_gives_the_same_gradient(ids: Tensor) -> None:
    student = bd.refine(tiny_model("llama"), ids).train()
    weight = student.model.layers[0].mlp.up_proj.weight

    def gradient() -> Tensor:
        with capture_states(student, [1]) as states:
            student(ids, use_cache=False)
        return torch.autograd.grad(sum(s.square().sum() for s in states[1]), weight)[0]

    plain = gradient()
    for module in student.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = functools.partial(
                torch.utils.checkpoint.checkpoint, use_reentrant=False
            )
    assert torch.equal(gradient(), plain)


def test_other_layers_stay_one_compiled_graph(ids: Tensor) -> None:
    student = bd.refine(tiny_model("llama"), ids)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for layer in (0, 2):
        student.model.layers[layer].compile(backend=backend, fullgraph=True)  # a graph break would raise
    for _ in range(2):
        with capture_states(student, [1]):
            student.model(input_ids=ids, use_cache=False)
        student.model(input_ids=ids, use_cache=False)
    assert len(graphs) == 1
