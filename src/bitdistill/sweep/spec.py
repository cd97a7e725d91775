"""A sweep: one or more recipes, times cells (named overrides), times seeds. YAML in, recipes out; no torch.

    name: loss-ablation
    title: Loss ablation (paper, Table 6)
    recipes: [../mnli-smollm2-135m.yaml]
    seeds: [0, 1, 2]
    set: {pretrain.budget_tokens: 52_428_800}      # for every cell
    reference: both                                # the cell that others are compared with
    cells:
      - {name: both}
      - {name: no-relations, label: "CE + logits", set: {distill.gamma: 0}}

Relative paths are relative to the sweep file's folder, as a recipe's are to its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from bitdistill import recipe_errors
from bitdistill.artifact import hash_json
from bitdistill.config import Recipe, Seed, Strict
from bitdistill.errors import RecipeError, UsageError
from bitdistill.recipe import absolute_source, load_recipe, read_yaml, resolved_value

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
RowName = Literal["teacher", "bitnet_sft", "bitdistill"]
StageLogName = Literal["sft", "pretrain", "distill", "bitnet_sft"]
PRETRAIN_SOURCES = ("corpus", "base", "start")
MAX_RUNS = 2_000


class Cell(Strict):
    """One setting of a sweep."""

    name: Name
    label: str = ""
    """What tables and figures show; default: the name."""
    settings: dict[str, Any] = Field(default={}, alias="set")
    """Recipe keys (dotted) and values, over the sweep's own `set`."""
    x: float | None = None
    """Place on the figure's axis (tokens, a layer, parameters)."""
    line: str = ""
    """Curve of the figure that this cell belongs to."""
    rows: Annotated[tuple[RowName, ...], Field(min_length=1)] | None = None
    """Models that are made and scored; default: the sweep's."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] | None = None
    """Default: the sweep's."""
    recipes: tuple[str, ...] | None = None
    """Names of the recipes that it is for (`*` and `?` stand for others); default: all of the sweep's."""


class Axis(Strict):
    """A recipe key and the values that it takes, one cell a value."""

    key: str
    values: tuple[Any, ...] = Field(min_length=1)


class Sweep(Strict):
    """The file as a value."""

    name: Name
    title: str = ""
    note: str = ""
    """A sentence under the table: what the rows are, and what they do not compare with."""
    figure: Literal["table", "layers", "tokens", "curves"] = "table"
    """How docs/results.md shows it, besides the table."""
    x_label: str = ""
    recipes: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[Seed, ...] = Field(default=(0,), min_length=1)
    settings: dict[str, Any] = Field(default={}, alias="set")
    """Recipe keys and values of every cell."""
    cells: tuple[Cell, ...] = Field(default=(Cell(name="run"),), min_length=1)
    grid: tuple[Axis, ...] = ()
    """Every cell is taken with every combination of these."""
    reference: str = ""
    """Cell that the others' students are compared with; empty: each with its own teacher."""
    rows: tuple[RowName, ...] = Field(default=("teacher", "bitdistill"), min_length=1)
    curves: tuple[StageLogName, ...] = ()
    """Stages whose training curves are kept in the results."""
    stats: bool = False
    """Measure weight statistics of every model (seconds each); kept in the runs' folders."""

    @model_validator(mode="after")
    def _consistent(self) -> Sweep:
        for place, keys in (
            ("set", self.settings),
            *((f"cell {cell.name}: set", cell.settings) for cell in self.cells),
            ("grid", [axis.key for axis in self.grid]),
        ):
            for key, instead in (("seed", "use seeds"), ("name", "runs are named by recipe and cell")):
                if key in keys:
                    raise ValueError(f"{place}: {key}: not here; {instead}")
        for seeds in (self.seeds, *(cell.seeds or () for cell in self.cells)):
            if len(set(seeds)) < len(seeds):
                raise ValueError(f"seeds: {', '.join(map(str, seeds))}: one is there twice; give each once")
        names = [cell.name for cell in self.cells]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"cells: the name {twice[0]!r} is used twice; names must differ")
        if self.reference and self.reference not in names:
            raise ValueError(f"reference: no cell {self.reference!r}; cells: {', '.join(names)}")
        if self.reference and self.grid:
            raise ValueError("reference: not with a grid, whose cells are named by their values")
        return self


@dataclass(frozen=True)
class Unit:
    """One run of a sweep."""

    recipe_name: str
    cell: str
    label: str
    line: str
    x: float | None
    seed: int
    rows: tuple[str, ...]
    settings: dict[str, Any]
    """What distinguishes it from the sweep's other runs."""
    recipe: Recipe
    digest: str
    """Hash of the resolved recipe without its name and places: an equal run has an equal one."""

    @property
    def id(self) -> str:
        """`recipe/cell/seed`, as `--only` matches it."""
        return f"{self.recipe_name}/{self.cell}/{self.seed}"


def load_sweep(path: str | Path) -> Sweep:
    """The sweep at `path`.

    Raises:
        RecipeError: unreadable YAML, an unknown key, a wrong type. One line.
    """
    path = Path(path)
    tree, lines = read_yaml(path)
    try:
        return Sweep.model_validate(tree)
    except ValidationError as error:
        places = recipe_errors.Places(str(path), lines)
        raise RecipeError(recipe_errors.one_line(error, tree, Sweep, places)) from None


def expand(
    sweep: Sweep,
    folder: Path,
    *,
    overrides: Sequence[str] = (),
    local: Mapping[str, str] | None = None,
    only: Sequence[str] = (),
) -> list[Unit]:
    """Every run of a sweep, in the order in which they run: recipe, cell, seed.

    Args:
        folder: the sweep file's, for relative paths.
        overrides: `KEY=VALUE` over the recipe and the sweep's `set`, below the cells' own keys.
        local: local places of sources, by the name that the recipes give them (see `read_local`).
        only: patterns (`*`, `?`) over `recipe/cell/seed`; none: all.

    Raises:
        UsageError: nothing matches `only`.
        RecipeError: a recipe, key or value is not valid, or more than MAX_RUNS runs.
    """
    for text in overrides:
        if text.partition("=")[0].strip() in ("seed", "name"):
            raise UsageError(
                f"--set {text}: a sweep's runs have the seeds and names of its file; change these there"
            )
    units: list[Unit] = []
    names = _recipe_names(sweep, folder)
    for recipe_path in sweep.recipes:
        source = Path(absolute_source(recipe_path, folder))
        common = [_override(key, value, folder) for key, value in sweep.settings.items()]
        for cell, point, x in _points(sweep):
            if cell.recipes is not None and not _is_for(cell, names[recipe_path]):
                continue
            # What a cell stands for is not to be overridden: its keys come last.
            own = {**cell.settings, **point}
            texts = [*common, *overrides, *(_override(key, value, folder) for key, value in own.items())]
            name = "-".join([cell.name, *(_word(key, value) for key, value in point.items())])
            for seed in cell.seeds if cell.seeds is not None else sweep.seeds:
                if len(units) >= MAX_RUNS:
                    raise RecipeError(f"{sweep.name}: more than {MAX_RUNS} runs; split the sweep")
                try:
                    recipe = load_recipe(source, [*texts, f"seed={seed}"])
                except RecipeError as error:
                    raise RecipeError(f"{sweep.name}: cell {name}: {error}") from None
                recipe = _localised(recipe, local or {})
                digest = _digest(recipe)
                unit_name = f"{recipe.name}--{name}-{digest[:8]}"
                units.append(
                    Unit(
                        recipe_name=recipe.name,
                        cell=name,
                        label=cell.label or name,
                        line=cell.line,
                        x=x,
                        seed=seed,
                        rows=tuple(cell.rows or sweep.rows),
                        settings=own,
                        recipe=recipe.model_copy(update={"name": unit_name}),
                        digest=digest,
                    )
                )
    _check_units(sweep, units)
    if only:
        for pattern in only:
            if not any(_matches(unit, pattern) for unit in units):
                known = ", ".join(dict.fromkeys(unit.id for unit in units))
                raise UsageError(f"--only {pattern}: no run matches; runs: {known[:300]}")
        units = [unit for unit in units if any(_matches(unit, pattern) for pattern in only)]
    return units


def _check_units(sweep: Sweep, units: Sequence[Unit]) -> None:
    """Runs that could not be told apart, and runs that would make nothing."""
    seen: set[str] = set()
    for unit in units:
        if unit.id in seen:
            raise RecipeError(
                f"{sweep.name}: recipes: two have the name {unit.recipe_name}, by which their results are kept; "
                "give each its own (name: in the recipe)"
            )
        seen.add(unit.id)
        if set(unit.rows) == {"bitnet_sft"} and unit.recipe.bitnet_sft is None:
            raise RecipeError(
                f"{sweep.name}: cell {unit.cell}: rows: only bitnet_sft, but {unit.recipe_name} has bitnet_sft: null; "
                "name another row"
            )


def _recipe_names(sweep: Sweep, folder: Path) -> dict[str, str]:
    """Names of the recipes, where a cell asks for them: its keys need not fit other recipes than its own."""
    if all(cell.recipes is None for cell in sweep.cells):
        return {}
    sources = {path: Path(absolute_source(path, folder)) for path in sweep.recipes}
    names = {path: str(read_yaml(source)[0].get("name", "")) for path, source in sources.items()}
    for cell in sweep.cells:
        if cell.recipes is not None and not any(_is_for(cell, name) for name in names.values()):
            asked, known = ", ".join(cell.recipes), ", ".join(names.values())
            raise RecipeError(f"{sweep.name}: cell {cell.name}: recipes: {asked}: this sweep has {known}")
    return names


def _is_for(cell: Cell, recipe_name: str) -> bool:
    return any(fnmatchcase(recipe_name, pattern) for pattern in cell.recipes or ())


def read_local(path: Path) -> dict[str, str]:
    """Local places of models and data: a YAML mapping from the name in a recipe to a path.

        HuggingFaceTB/SmolLM2-135M-Instruct: models/smollm2-135m
        hub:stanfordnlp/sst2:train: data/sst2/train.jsonl.zst

    Relative paths are relative to the file's folder.

    Raises:
        RecipeError: not such a mapping.
    """
    tree, _ = read_yaml(path)
    if not all(isinstance(value, str) for value in tree.values()):
        raise RecipeError(f"{path}: expected `name in the recipe: path` lines; quote names that hold a colon")
    return {str(name): absolute_source(value, path.resolve().parent) for name, value in tree.items()}


def _points(sweep: Sweep) -> Iterator[tuple[Cell, dict[str, Any], float | None]]:
    """(cell, values of the grid's keys, place on the x axis)."""
    for cell in sweep.cells:
        for values in product(*(axis.values for axis in sweep.grid)):
            point = {axis.key: value for axis, value in zip(sweep.grid, values, strict=True)}
            numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
            yield cell, point, cell.x if cell.x is not None else (float(numbers[0]) if numbers else None)


def _word(key: str, value: Any) -> str:
    """A grid value as a part of a cell's name: `layer12`, `learning_rate0.001`."""
    text = value if isinstance(value, str) else json.dumps(value)
    return key.rpartition(".")[2] + "".join(c if c.isalnum() or c in "._-" else "_" for c in text)


def _override(key: str, value: Any, folder: Path) -> str:
    """A `KEY=VALUE` for load_recipe, whose values are YAML: JSON is. Paths are the sweep file's."""
    return f"{key}={json.dumps(resolved_value(key, value, folder), allow_nan=False)}"


def _localised(recipe: Recipe, local: Mapping[str, str]) -> Recipe:
    """The recipe with its sources replaced by local ones."""
    tree = recipe.model_dump(mode="json", by_alias=True)
    sources = {
        "model": ("path",),
        "teacher": ("path",),
        "data": ("train", "validation", "test"),
        "pretrain": PRETRAIN_SOURCES,
    }
    for section, keys in sources.items():
        for key in keys:
            if tree.get(section) is not None and tree[section].get(key) in local:
                tree[section][key] = local[tree[section][key]]
    tree["data"]["unlabelled"] = [local.get(source, source) for source in tree["data"]["unlabelled"]]
    if tree["augment"] is not None:
        tree["augment"]["texts"] = [local.get(source, source) for source in tree["augment"]["texts"]]
    return Recipe.model_validate(tree)


def _digest(recipe: Recipe) -> str:
    tree = recipe.model_dump(mode="json", by_alias=True)
    for place in ("name", "output_dir", "track", "report"):
        tree.pop(place)
    # Results from before a section or key stay valid
    if tree["augment"] is None:
        del tree["augment"]
    elif not tree["augment"]["whole_share"]:
        del tree["augment"]["whole_share"]
    if tree["pretrain"] is not None:  # changes no result
        del tree["pretrain"]["processes"]
    for section in tree.values():
        loop = section.get("loop") if isinstance(section, dict) else None
        if loop is not None and loop["micro_batch_tokens"] is None:
            del loop["micro_batch_tokens"]
        optim = section.get("optim") if isinstance(section, dict) else None
        if optim is not None and optim["matrix_rate"] == "equal":
            del optim["matrix_rate"]
    return hash_json(tree)


def only_rows(units: Sequence[Unit], names: Sequence[str]) -> list[Unit]:
    """The units with no other rows than these; units without any of them are left out.

    Raises:
        RecipeError: a row that there is not, or none of these in any unit.
    """
    for name in names:
        if name not in get_args(RowName):
            raise UsageError(f"--row {name}: expected some of {', '.join(get_args(RowName))}")
    kept = [(unit, tuple(row for row in unit.rows if row in names)) for unit in units]
    if not any(rows for _, rows in kept):
        raise UsageError(f"--row {', '.join(names)}: no run of this sweep has it")
    return [replace(unit, rows=rows) for unit, rows in kept if rows]


def _matches(unit: Unit, pattern: str) -> bool:
    """A pattern names the whole id, or one of its parts from the left: recipe, or recipe/cell; or the cell."""
    candidates = (unit.id, unit.recipe_name, f"{unit.recipe_name}/{unit.cell}", unit.cell)
    return any(fnmatchcase(candidate, pattern) for candidate in candidates)
