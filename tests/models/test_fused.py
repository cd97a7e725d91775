"""Fused layers compute what the plain ones do: same integers forward, same gradients, nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from bitdistill.errors import ModelError
from bitdistill.models.fused import fused_layers
from bitdistill.models.surgery import refine
from bitdistill.quant.linear import BitLinear
from bitdistill.train.compile import compile_blocks

from .conftest import TINY, tiny_model


def student_of(name: str, subln: str = "paper", config: dict[str, Any] | None = None, **options: Any) -> Any:
    student = refine(tiny_model(name, **(config or {})), subln=subln, gains="ones", **options)
    torch.manual_seed(5)
    with torch.no_grad():
        for layer in student.modules():
            if isinstance(layer, BitLinear) and layer.subln is not None:
                layer.subln.weight.uniform_(0.5, 2.0)
    return student.train()


def loss_and_gradients(student: Any, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    student.zero_grad(set_to_none=True)
    logits = student(ids, use_cache=False).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    (logits * weights.to(logits.device)).sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("subln", ["paper", "every_linear", "none"])
@pytest.mark.parametrize("name", sorted(TINY))
def test_fused_layers_equal_the_plain_ones(name: str, subln: str, ids: torch.Tensor) -> None:
    student = student_of(name, subln)
    want, want_grads = loss_and_gradients(student, ids)
    with fused_layers(student):
        got, grads = loss_and_gradients(student, ids)
    assert torch.equal(got, want)
    assert grads.keys() == want_grads.keys()
    for key, grad in grads.items():
        torch.testing.assert_close(
            grad, want_grads[key], rtol=1e-4, atol=1e-5 * float(want_grads[key].abs().max())
        )


@pytest.mark.parametrize("subln", ["paper", "none"])
def test_int8_backward_changes_gradients_a_little_and_the_forward_not_at_all(
    subln: str, ids: torch.Tensor
) -> None:
    student = student_of("qwen3", subln)
    want, want_grads = loss_and_gradients(student, ids)
    with fused_layers(student, int8_backward=True):
        got, grads = loss_and_gradients(student, ids)
    assert torch.equal(got, want)
    assert grads.keys() == want_grads.keys()
    differ = 0
    for key, grad in grads.items():
        cosine = torch.nn.functional.cosine_similarity(grad.flatten(), want_grads[key].flatten(), dim=0)
        assert cosine > 0.998, key
        differ += not torch.allclose(grad, want_grads[key], rtol=1e-4, atol=1e-6)
    assert differ > 0


def test_norms_of_the_models_own_before_down_are_kept(ids: torch.Tensor) -> None:
    """An activation that the gated kernel knows must not make it step over BitNet's ffn_sub_norm."""
    student = student_of("bitnet", config={"hidden_act": "silu"})
    want, want_grads = loss_and_gradients(student, ids)
    with fused_layers(student):
        got, grads = loss_and_gradients(student, ids)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)  # SiLU of a slice may differ in the last bit
    assert grads.keys() == want_grads.keys()
    assert any("ffn_sub_norm" in key for key in grads)


def test_codes_follow_the_latents_only_when_refreshed_and_the_model_is_left_as_it_was(
    ids: torch.Tensor,
) -> None:
    student = student_of("qwen3")
    names, before = list(student.state_dict()), student(ids).logits
    with fused_layers(student) as fused:
        assert list(student.state_dict()) == names
        with torch.no_grad():
            for parameter in student.model.layers.parameters():
                parameter.mul_(1.0 + 0.3 * torch.rand_like(parameter))
        fused.refresh()
        got = student(ids).logits
    want = student(ids).logits
    assert torch.equal(got, want)
    assert not torch.equal(got, before)
    assert all(m.fused is None for m in student.modules() if isinstance(m, BitLinear))
    assert not any("forward" in vars(m) for m in student.modules())


def test_blocks_compile_once_and_compute_the_same(ids: torch.Tensor) -> None:
    student = student_of("llama")
    want, want_grads = loss_and_gradients(student, ids)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for layer in student.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    with fused_layers(student):
        got, grads = loss_and_gradients(student, ids)
        loss_and_gradients(student, ids)
    assert counter.frame_count == 1  # one graph for all blocks, and none anew in the second pass
    torch._dynamo.reset()
    torch.testing.assert_close(got, want)
    for key, grad in grads.items():
        torch.testing.assert_close(
            grad, want_grads[key], rtol=1e-4, atol=1e-5 * float(want_grads[key].abs().max())
        )


def test_under_autocast_and_checkpointing_gradients_stay_close(ids: torch.Tensor) -> None:
    student = student_of("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want, want_grads = loss_and_gradients(student, ids)
        student.gradient_checkpointing_enable()
        with fused_layers(student):
            got, grads = loss_and_gradients(student, ids)
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05 * float(want.abs().max()))
    for key, grad in grads.items():
        cosine = torch.nn.functional.cosine_similarity(grad.flatten(), want_grads[key].flatten(), dim=0)
        assert cosine > 0.98, key


@pytest.mark.gpu
@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
def test_kernels_on_a_gpu_stay_close_to_the_plain_layers(
    name: str, compiling: bool, ids: torch.Tensor
) -> None:
    student = student_of(name).to("cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        want, want_grads = loss_and_gradients(student, ids.to("cuda"))
        torch._dynamo.reset()
        if compiling:
            compile_blocks(student)
        with fused_layers(student):
            got, grads = loss_and_gradients(student, ids.to("cuda"))
    torch._dynamo.reset()
    assert want.isfinite().all()
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.1 * float(want.abs().max()))
    assert grads.keys() == want_grads.keys()
    for key, grad in grads.items():
        assert float((grad - want_grads[key]).norm()) <= 0.2 * float(want_grads[key].norm()), key


def test_what_cannot_be_fused_is_refused_by_name() -> None:
    student = student_of("llama", quantize_activations=False)
    with (
        pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.q_proj.*loop\.kernels"),
        fused_layers(student),
    ):
        pass
    with pytest.raises(ModelError, match="no BitLinear"), fused_layers(tiny_model("llama")):
        pass
