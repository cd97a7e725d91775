"""`bitdistill plan` as one value: model, surgery, sizes, data and stage estimates of a recipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bitdistill.config import Recipe
from bitdistill.errors import DataError, RecipeError, UsageError
from bitdistill.models import contents
from bitdistill.models.families import Layout, layout_of
from bitdistill.planning import check, estimate, sources

ORDER = ("sft", "refine", "pretrain", "augment", "distill", "bitnet_sft", "export", "eval", "report")
"""Stages as they run; equal to pipeline.STAGES (tested), which cannot be imported here without torch."""


@dataclass(frozen=True)
class Plan:
    """Everything that `bitdistill plan` prints."""

    recipe: Recipe
    config_from: str
    layout: Layout
    packed: dict[str, int]
    data: list[check.Source]
    stages: list[estimate.Stage]
    device: str
    teacher: Layout | None = None
    """Of a teacher that is another model."""

    @property
    def packed_bytes(self) -> int:
        return sum(self.packed.values())

    @property
    def ternary(self) -> dict[str, int]:
        """Ternary linears by kind."""
        counts: dict[str, int] = {}
        for linear in self.layout.linears:
            counts[linear.kind] = counts.get(linear.kind, 0) + 1
        return counts

    @property
    def subln(self) -> list[str]:
        """Kinds of linears that get a SubLN, in forward order."""
        kinds = estimate.SUBLN_KINDS[self.recipe.refine.subln]
        return [kind for kind in self.ternary if kind in kinds]

    @property
    def kept(self) -> dict[str, tuple[int, int]]:
        """reason -> (tensors, parameters) of what stays in high precision."""
        found: dict[str, tuple[int, int]] = {}
        for kept in self.layout.kept:
            tensors, elements = found.get(kept.reason, (0, 0))
            found[kept.reason] = (tensors + 1, elements + kept.size)
        return found

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        layout = self.layout
        return {
            "name": self.recipe.name,
            "model": {
                "path": self.recipe.model.path,
                "config_from": self.config_from,
                "family": layout.family,
                "layers": layout.layers,
                "parameters": layout.parameters,
                "ternary_parameters": layout.ternary_parameters,
                "kept_parameters": layout.kept_parameters,
                "tied_head": layout.tied,
            },
            **self._teacher_json(),
            "surgery": {
                "ternary_linears": self.ternary,
                "subln_before": self.subln,
                "subln_gains": estimate.subln_gains(layout, self.recipe.refine.subln),
                "kept": {reason: {"tensors": t, "parameters": n} for reason, (t, n) in self.kept.items()},
            },
            "pretrain": self._pretrain_json(),
            "packed_bytes": {**self.packed, "total": self.packed_bytes},
            "data": [asdict(source) for source in self.data],
            "device": {"class": self.device, **asdict(estimate.DEVICES[self.device])},
            "stages": [
                {**asdict(stage), "peak_bytes": stage.peak_bytes, "estimate": True} for stage in self.stages
            ],
        }

    def _pretrain_json(self) -> dict[str, Any] | None:
        """Where the ternary base comes from."""
        config = self.recipe.pretrain
        if config is None:
            return None
        names = ("base",) if config.base is not None else ("objective", "budget_tokens", "corpus", "start")
        return {name: getattr(config, name) for name in names}

    def _teacher_json(self) -> dict[str, Any]:
        if self.teacher is None:
            return {}
        about = {name: getattr(self.teacher, name) for name in ("family", "layers", "parameters")}
        return {"teacher": {"path": self.recipe.teacher_source.path, **about}}


def make_plan(recipe: Recipe, device: str | None = None, *, until: str | None = None) -> Plan:
    """Validate a recipe's model and data and estimate its cost.

    Args:
        device: a key of `estimate.DEVICES`; None: this machine's.
        until: plan a run that stops after this stage (one of ORDER).

    Raises:
        UsageError: unknown device class.
        RecipeError: a key that contradicts the model (a layer it does not have).
        ModelError: no config for the model, or an unsupported family.
        DataError: missing files, rows that do not fit the task, or label words that cannot be told apart.
    """
    if device is None:
        device = "cpu" if recipe.device == "cpu" else estimate.detect_device()
    if device not in estimate.DEVICES:
        raise UsageError(f"--on {device}: unknown; choose from {', '.join(estimate.DEVICES)}")
    layout, where = _layout(recipe)
    _check_fit(recipe, layout)
    teacher = _teacher_layout(recipe)
    last = ORDER.index(until) if until else len(ORDER) - 1
    data = check.check_data(recipe, scoring=last >= ORDER.index("eval"))
    test = check.scored(data, recipe)
    length = recipe.data.max_length
    tokenizer = sources.find_tokenizer(recipe.model)
    if tokenizer is not None:
        check.check_tokens(recipe, tokenizer)
    if recipe.teacher is not None and (tokenizer := sources.find_tokenizer(recipe.teacher)) is not None:
        try:
            check.check_tokens(recipe, tokenizer)
        except DataError as error:
            raise DataError(f"teacher's tokenizer: {error}") from None
    stages = estimate.stages(
        recipe,
        layout,
        data[0].work(length),
        test.work(length) if test else None,
        device,
        check.distilled(data, length),
        teacher,
    )
    stages = [stage for stage in stages if ORDER.index(stage.name) <= last]
    packed = estimate.packed_bytes(layout, recipe.refine.subln, recipe.export.float_dtype)
    return Plan(recipe, where, layout, packed, data, stages, device, teacher)


def check_model(recipe: Recipe) -> None:
    """The model's kind and what must fit its shapes, as `make_plan` checks them, where its config is at hand.

    Raises:
        RecipeError, ModelError: see `make_plan`; not for a model that has to be downloaded first.
    """
    if not sources.is_at_hand(recipe.model):
        return
    layout, _ = _layout(recipe)
    _check_fit(recipe, layout)
    if recipe.teacher is not None and sources.is_at_hand(recipe.teacher):
        _teacher_layout(recipe)


def _layout(recipe: Recipe) -> tuple[Layout, str]:
    config, where = sources.find_config(recipe.model)
    contents.check_full_precision(config, where)
    return layout_of(config, where), where


def _check_fit(recipe: Recipe, layout: Layout) -> None:
    """Keys that must fit the model's shapes."""
    chosen = recipe.distill.relation.layer
    for layer in (chosen,) if isinstance(chosen, int) else (() if isinstance(chosen, str) else chosen):
        if not -layout.layers <= layer < layout.layers:
            raise RecipeError(
                f"distill.relation.layer: {layer}, the model has {layout.layers} layers; "
                f"use {-layout.layers} to {layout.layers - 1}, or auto"
            )
    heads = recipe.distill.relation.heads
    if heads is not None:
        for name, width in (("Q", layout.heads), ("K and V", layout.kv_heads)):
            if width * layout.head_dim % heads:
                features = width * layout.head_dim
                raise RecipeError(
                    f"distill.relation.heads: {heads} does not divide {name}'s {features} features"
                )
    limit = layout.max_positions
    for key, length in _lengths(recipe).items():
        if limit is not None and length > limit:
            raise RecipeError(f"{key}: {length}, the model has {limit} positions; use at most {limit}")


def _teacher_layout(recipe: Recipe) -> Layout | None:
    """Shapes of a teacher that is another model.

    Raises:
        ModelError: no config for it, or an unsupported family.
        RecipeError: prompts may be longer than it can read.
    """
    if recipe.teacher is None:
        return None
    layout = layout_of(*sources.find_config(recipe.teacher, "teacher.path"))
    limit, length = layout.max_positions, recipe.data.max_length
    if limit is not None and length > limit:
        raise RecipeError(
            f"data.max_length: {length}, the teacher has {limit} positions; use at most {limit}"
        )
    return layout


def _lengths(recipe: Recipe) -> dict[str, int]:
    lengths = {"data.max_length": recipe.data.max_length}
    if recipe.pretrain is not None:
        lengths["pretrain.sequence_length"] = recipe.pretrain.sequence_length
    return lengths
