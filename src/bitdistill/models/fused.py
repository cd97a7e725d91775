"""Training with fused layers: weight codes made once a step, one quantization and product for linears that share an
input, norms and gates inside the kernels.

Nothing is moved or renamed: `fused_layers` hangs callables on the student's own modules for the time of training.

    q, k, v        one stacked product; the norm before them becomes a pass-through, its gain goes into the kernel
    gate, up, down one function from the residual stream to the layer's output, where there are no biases, no norm of
                   the model's own before down (family bitnet), and the kernels know the activation
    o              its SubLN goes into the kernel

Layers with a SubLN before q, k, v or gate, up (`subln: every_linear`) are fused one by one.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bitdistill.errors import ModelError
from bitdistill.kernels.functions import TernaryGatedMlp, TernaryProjections
from bitdistill.models.families import layout_of
from bitdistill.models.norms import norm_arguments
from bitdistill.quant.linear import BitLinear, out_dtype_of
from bitdistill.quant.ternary import ternarize

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class StackedCodes:
    """Codes and row scales of linears with the same input, stacked by rows: int8 [O, I], float32 [O]."""

    def __init__(self, layers: list[BitLinear], int8_backward: bool) -> None:
        self.layers, self.int8_backward = layers, int8_backward
        self.rows = [layer.out_features for layer in layers]
        weight = layers[0].weight
        size = (sum(self.rows), layers[0].in_features)
        self.codes = torch.zeros(size, dtype=torch.int8, device=weight.device)
        self.row_scale = torch.ones(size[0], dtype=torch.float32, device=weight.device)

    def tensors(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Weight, codes and row scales of each layer; the last two are views into the stack."""
        parts = zip(self.layers, self.codes.split(self.rows), self.row_scale.split(self.rows), strict=True)
        return [(layer.weight.detach(), codes, scale) for layer, codes, scale in parts]


class Projections:
    """Linears that read the same tensor: the first one called computes all, the others take their part."""

    def __init__(self, stack: StackedCodes, norm: nn.Module | None) -> None:
        self.stack = stack
        self.norm = norm
        self.source: Tensor | None = None
        self.parts: list[Tensor] = []

    def compute(self, x: Tensor) -> list[Tensor]:
        stack = self.stack
        dtype = out_dtype_of(x)
        parts = TernaryProjections.apply(
            x.reshape(-1, x.shape[-1]),
            *norm_arguments(self.norm),
            stack.codes,
            stack.row_scale,
            dtype,
            stack.int8_backward,
            *[layer.weight for layer in stack.layers],
        )
        shaped = [part.reshape(*x.shape[:-1], part.shape[-1]) for part in parts]
        return [
            part if layer.bias is None else part + layer.bias.to(dtype)
            for layer, part in zip(stack.layers, shaped, strict=True)
        ]

    def part(self, x: Tensor, index: int) -> Tensor:
        if len(self.stack.layers) == 1:
            return self.compute(x)[0]
        if self.source is not x:
            self.source, self.parts = x, self.compute(x)
        part = self.parts[index]
        if index == len(self.parts) - 1:
            self.source, self.parts = None, []
        return part


class Part:
    """What a `BitLinear` of a group calls."""

    def __init__(self, group: Projections, index: int) -> None:
        self.group, self.index = group, index

    def __call__(self, x: Tensor) -> Tensor:
        return self.group.part(x, self.index)


class GatedMlp:
    """A feed-forward module as one function."""

    def __init__(
        self, gate_up: StackedCodes, down: StackedCodes, norm: nn.Module | None, activation: str
    ) -> None:
        self.gate_up, self.down, self.norm, self.activation = gate_up, down, norm, activation

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up.layers
        (down,) = self.down.layers
        sub_gain, sub_eps, _ = norm_arguments(down.subln)
        y: Tensor = TernaryGatedMlp.apply(
            x.reshape(-1, x.shape[-1]),
            *norm_arguments(self.norm),
            sub_gain,
            sub_eps,
            self.activation,
            self.gate_up.codes,
            self.gate_up.row_scale,
            self.down.codes,
            self.down.row_scale,
            out_dtype_of(x),
            self.gate_up.int8_backward,
            gate.weight,
            up.weight,
            down.weight,
        )
        return y.reshape(x.shape)


def _pass_through(x: Tensor) -> Tensor:
    return x


def _gated_forward(self: Any, x: Tensor) -> Tensor:
    return self.fused(x)  # type: ignore[no-any-return]


class FusedLayers:
    """The fused layers of one student. `refresh` must run after every change of the latents."""

    def __init__(self, student: Any, int8_backward: bool) -> None:
        self.int8_backward = int8_backward
        self.stacks: list[StackedCodes] = []
        self._attached: list[tuple[nn.Module, str]] = []
        self._table: Any = None
        activation = ACTIVATIONS.get(layout_of(student.config.to_dict(), "student").activation)
        for block in student.get_submodule("model.layers").children():
            self._attach_block(block, activation)
        self.refresh()

    def _attach_block(self, block: Any, activation: str | None) -> None:
        attention, mlp = block.self_attn, block.mlp
        before_mlp = getattr(block, "pre_feedforward_layernorm", None)
        if before_mlp is None:
            before_mlp = block.post_attention_layernorm
        self._attach_group([attention.q_proj, attention.k_proj, attention.v_proj], fold=block.input_layernorm)
        self._attach_group([attention.o_proj])
        gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        shared = gate.subln is None and up.subln is None and not hasattr(mlp, "ffn_sub_norm")
        if shared and activation is not None and all(layer.bias is None for layer in (gate, up, down)):
            stacks = self._stack([gate, up]), self._stack([down])
            self.stacks += stacks
            # A method, not the object itself: torch.compile would make a graph for each block's object.
            self._set(mlp, "fused", GatedMlp(*stacks, before_mlp, activation))
            self._set(mlp, "forward", types.MethodType(_gated_forward, mlp))
            self._set(before_mlp, "forward", _pass_through)
        else:
            self._attach_group([gate, up], fold=before_mlp)
            self._attach_group([down])

    def _stack(self, layers: list[BitLinear]) -> StackedCodes:
        return StackedCodes(layers, self.int8_backward)

    def _attach_group(self, layers: list[BitLinear], fold: nn.Module | None = None) -> None:
        """One group where no layer has a SubLN of its own, else one group a layer."""
        if len(layers) > 1 and any(layer.subln is not None for layer in layers):
            for layer in layers:
                self._attach_group([layer])
            return
        stack = self._stack(layers)
        self.stacks.append(stack)
        group = Projections(stack, layers[0].subln if fold is None else fold)
        if fold is not None:
            self._set(fold, "forward", _pass_through)
        for index, layer in enumerate(layers):
            self._set(layer, "fused", Part(group, index))

    def _set(self, module: nn.Module, name: str, value: Callable[..., Tensor]) -> None:
        setattr(module, name, value)
        self._attached.append((module, name))

    def refresh(self) -> None:
        """Make codes and scales anew from the latents, in place."""
        tensors = [row for stack in self.stacks for row in stack.tensors()]
        if tensors[0][0].is_cuda:
            from bitdistill.kernels.weights import TernaryTable, ternarize_all

            if self._table is None or not self._table.fits(tensors):
                self._table = TernaryTable.of(tensors)
            ternarize_all(self._table)
            return
        for weight, codes, row_scale in tensors:
            new_codes, scale = ternarize(weight)
            codes.copy_(new_codes)
            row_scale.fill_(scale)

    def detach(self) -> None:
        """Give the modules their own forward back."""
        for module, name in self._attached:
            if isinstance(module, BitLinear):
                module.fused = None  # type: ignore[assignment]
            else:
                delattr(module, name)
        self._attached.clear()


def check_fusible(student: Any) -> None:
    """Raises ModelError when a layer of the student does not train as plain ternary with int8 activations."""
    layers = {name: m for name, m in student.named_modules() if isinstance(m, BitLinear)}
    if not layers:
        raise ModelError("the model has no BitLinear layer; fused kernels train latent students only")
    for name, layer in layers.items():
        if not (layer.quantize_weights and layer.quantize_activations and layer.ternary_blend == 1.0):
            raise ModelError(
                f"{name}: quantize_weights {layer.quantize_weights}, quantize_activations "
                f"{layer.quantize_activations}, ternary_blend {layer.ternary_blend}; the fused kernels need "
                "ternary weights and int8 activations: set loop.kernels: reference"
            )
        if layer.weight.dtype != torch.float32:
            raise ModelError(f"{name}: latents are {layer.weight.dtype}; training masters are float32")


@contextlib.contextmanager
def fused_layers(student: Any, int8_backward: bool = False) -> Iterator[FusedLayers]:
    """Inside, the student computes by fused layers; call `refresh` on what this yields before every step.

    Args:
        int8_backward: make the gradients of the layers' inputs with int8 products (see `kernels.functions`).

    Raises:
        ModelError: a layer is not plain ternary with int8 activations.
    """
    check_fusible(student)
    fused = FusedLayers(student, int8_backward)
    try:
        yield fused
    finally:
        fused.detach()
