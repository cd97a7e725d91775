"""Which layer's attention relations to distil (the paper takes one late layer and gives no rule for which).

Before stage 3, on a few batches of training rows, every layer l gets cheap figures:

    divergence       L_AD of layer l: how far the student's relations are from the teacher's
    alignment        cosine of the gradients of L_AD (layer l) and L_CE on the weights that both reach: the blocks
                     up to l, of l itself the q/k/v projections. High: imitating this layer also serves the task
    gradient_ratio   norm of the one over the norm of the other, on the same weights
    teacher_entropy  mean entropy of the teacher's causal attention, over ln of the visible positions (0: each query
    student_entropy  looks at one token, 1: at all alike)

`layer: auto` takes the layer of the later half with the best figure of its rule (RULES). How well a figure ranks
layers is measured by its rank correlation with a layer sweep (report/layer_choice.py).

Shape legend: B rows, T tokens, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bitdistill.config import DistillConfig, RelationConfig
from bitdistill.data.batches import Batch
from bitdistill.errors import RecipeError
from bitdistill.losses.logits import cross_entropy_sum
from bitdistill.losses.relation import attention_distillation_sum
from bitdistill.models.capture import States, capture_states
from bitdistill.models.forward import final_hidden, logits_at, predicting, tokens_at

BATCHES, BATCH_ROWS = 4, 16
# Rule -> (figure, sign): auto takes the layer with the largest sign * figure. entropy: the most focused teacher layer.
RULES: dict[str, tuple[str, int]] = {
    "divergence": ("divergence", 1),
    "alignment": ("alignment", 1),
    "entropy": ("teacher_entropy", -1),
}
AUTO_RULE = "divergence"
Metrics = dict[str, list[float]]


def relation_options(relation: RelationConfig) -> dict[str, Any]:
    """Keyword arguments of the relation loss from the recipe section."""
    return {
        "alphas": (relation.alpha_q, relation.alpha_k, relation.alpha_v),
        "form": relation.form,
        "temperature": relation.temperature,
        "heads": relation.heads,
    }


def rule_of(layer: int | str | tuple[int, ...]) -> str | None:
    """The rule that `distill.relation.layer` asks for; None for layers by number."""
    if not isinstance(layer, str):
        return None
    return AUTO_RULE if layer == "auto" else layer.removeprefix("auto:")


def resolve_layers(config: DistillConfig, metrics: Mapping[str, Sequence[float]]) -> list[int]:
    """Layer indices of L_AD, from the figures of `measure`.

    Raises:
        RecipeError: an index is outside the model.
    """
    count = len(metrics["divergence"])
    wanted = config.relation.layer
    rule = rule_of(wanted)
    if rule is not None:
        return [choose(metrics, rule)]
    chosen = [wanted] if isinstance(wanted, int) else [int(i) for i in wanted]
    for index in chosen:
        if not -count <= index < count:
            raise RecipeError(f"distill.relation.layer: {index} is outside the model's {count} layers")
    return sorted({index % count for index in chosen})


def choose(metrics: Mapping[str, Sequence[float]], rule: str) -> int:
    """The layer of the later half with the best figure of a rule; the first of equals."""
    name, sign = RULES[rule]
    values = metrics[name]
    return max(range(len(values) // 2, len(values)), key=lambda layer: sign * values[layer])


def measure(
    student: Any, teacher: Any, batches: Sequence[Batch], config: DistillConfig, *, full: bool
) -> Metrics:
    """Figures of every layer, means over batches; models are left as they were.

    Args:
        student: at the start of stage 3, in float32 masters.
        teacher: the frozen teacher.
        batches: on the models' device; at least one.
        full: all figures, for which gradients are taken; else `divergence` alone.
    """
    training = student.training
    student.eval()
    one = _all_figures if full else _divergences
    try:
        found = [one(student, teacher, batch, config) for batch in batches]
    finally:
        student.train(training)
    return {
        name: [math.fsum(values) / len(found) for values in zip(*(f[name] for f in found), strict=True)]
        for name in found[0]
    }


def _states(model: Any, input_ids_BT: Tensor) -> tuple[Tensor, States]:
    with capture_states(model, list(range(model.config.num_hidden_layers))) as states:
        hidden = final_hidden(model, input_ids_BT)
    return hidden, dict(states)


def _relation_loss(states: Any, teacher_states: Any, batch: Batch, relation: RelationConfig) -> Tensor:
    """L_AD of one layer: the batch's mean over rows."""
    total = attention_distillation_sum(
        states, teacher_states, batch.attention_mask_BT, **relation_options(relation)
    )
    return total / batch.input_ids_BT.shape[0]


@torch.no_grad()
def _divergences(student: Any, teacher: Any, batch: Batch, config: DistillConfig) -> Metrics:
    _, states = _states(student, batch.input_ids_BT)
    _, teacher_states = _states(teacher, batch.input_ids_BT)
    values = [float(_relation_loss(states[i], teacher_states[i], batch, config.relation)) for i in states]
    return {"divergence": values}


def _all_figures(student: Any, teacher: Any, batch: Batch, config: DistillConfig) -> Metrics:
    with torch.no_grad():
        _, teacher_states = _states(teacher, batch.input_ids_BT)
    with torch.enable_grad():
        hidden, states = _states(student, batch.input_ids_BT)
        logits_NV = logits_at(student, predicting(hidden, batch.answer_index_N))
        targets_N = tokens_at(batch.input_ids_BT, batch.answer_index_N)
        ce = cross_entropy_sum(logits_NV, targets_N) / max(1, int((batch.answer_index_N >= 0).sum()))
        weights = [_block_weights(student, layer) for layer in states]
        flat = [weight for block in weights for weight in block]
        ce_grads = torch.autograd.grad(ce, flat, retain_graph=True)
        found: Metrics = {name: [] for name in ("divergence", "alignment", "gradient_ratio")}
        for layer in states:
            loss = _relation_loss(states[layer], teacher_states[layer], batch, config.relation)
            reached = sum(len(block) for block in weights[:layer]) + 3  # q, k, v come first in a block
            grads = torch.autograd.grad(loss, flat[:reached], retain_graph=True, allow_unused=True)
            cosine, ratio = _cosine_and_ratio(grads, ce_grads[:reached])
            found["divergence"].append(float(loss.detach()))
            found["alignment"].append(cosine)
            found["gradient_ratio"].append(ratio)
    with torch.no_grad():
        for name, model, kept in (("teacher", teacher, teacher_states), ("student", student, states)):
            found[f"{name}_entropy"] = [
                attention_entropy(
                    kept[i][0], kept[i][1], batch.attention_mask_BT, **_attention_options(model, i)
                )
                for i in kept
            ]
    return found


def _block_weights(model: Any, layer: int) -> list[Tensor]:
    """Weights of a block's linears, those of q, k and v first."""
    block = model.get_submodule(f"model.layers.{layer}")
    first = [getattr(block.self_attn, name).weight for name in ("q_proj", "k_proj", "v_proj")]
    known = {id(weight) for weight in first}
    return first + [p for p in block.parameters() if p.ndim == 2 and id(p) not in known]


def _cosine_and_ratio(grads: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> tuple[float, float]:
    """(cosine, norm of the first over norm of the second) of two gradients given in pieces; 0 for a zero one."""
    dot = first = second = 0.0
    for a, b in zip(grads, others, strict=True):
        if a is not None:
            first += float(a.double().square().sum())
        if b is not None:
            second += float(b.double().square().sum())
        if a is not None and b is not None:
            dot += float((a.double() * b.double()).sum())
    if first == 0.0 or second == 0.0:
        return 0.0, 0.0
    return dot / math.sqrt(first * second), math.sqrt(first / second)


def _attention_options(model: Any, layer: int) -> dict[str, Any]:
    """Scale and window of a layer's attention, as its module applies them."""
    attention = model.get_submodule(f"model.layers.{layer}.self_attn")
    return {
        "scale": float(attention.scaling),
        "window": getattr(attention, "sliding_window", None),
    }


def attention_entropy(
    query_BHTD: Tensor, key_BGTD: Tensor, mask_BT: Tensor, *, scale: float, window: int | None = None
) -> float:
    """Mean entropy of causal attention over ln(visible positions), in 0..1; queries that see one token are left out.

    Args:
        query_BHTD, key_BGTD: states after q/k-norm and RoPE; G divides H.
        mask_BT: True at real tokens, which stand left of the padding.
        scale: factor of the scores.
        window: a query sees itself and window - 1 tokens before it; None: all before it.
    """
    key = key_BGTD.float().repeat_interleave(query_BHTD.shape[1] // key_BGTD.shape[1], dim=1)
    scores = query_BHTD.float() @ key.transpose(-1, -2) * scale
    position = torch.arange(scores.shape[-1], device=scores.device)
    distance = position[:, None] - position[None, :]
    seen_TT = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    log_p = torch.log_softmax(scores.masked_fill(~seen_TT, -torch.inf), dim=-1)
    entropy_BHT = -(log_p.exp() * log_p.masked_fill(~seen_TT, 0.0)).sum(-1)
    visible_T = seen_TT.sum(-1)
    counted_BT = mask_BT & (visible_T > 1)
    normalised = entropy_BHT / visible_T.clamp_min(2).log()
    total = (normalised * counted_BT[:, None, :]).sum(dtype=torch.float64)
    return float(total / (counted_BT.sum() * entropy_BHT.shape[1]).clamp_min(1))
