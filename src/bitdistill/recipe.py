"""Recipes from YAML: load, apply `method` and `--set`, name the nearest key in errors, dump, hash. No torch.

Paths: a relative path in a recipe is relative to the recipe's own folder; a relative path given with `--set`
is relative to the working directory; `output_dir` and `pretrain.cache_dir` are always relative to the working
directory (they are written, not read). The loaded recipe holds absolute paths, so that the copy in a run
folder can be run again from anywhere. YAML is read as YAML 1.2 with the safe constructor only.
"""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from bitdistill import recipe_errors
from bitdistill.artifact import hash_json
from bitdistill.config import METHODS, ExportConfig, Recipe, Task
from bitdistill.errors import ArtifactError, RecipeError

MAX_BYTES = 1 << 20
MAX_NODES = 20_000
MAX_DEPTH = 40

Tree = dict[str, Any]
Lines = dict[tuple[str, ...], int]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at `path`, with `overrides` (each `key.path=value`, the value read as YAML) on top.

    Order of precedence: defaults of config.py < defaults of `method` < the file < overrides. A `method` among the
    overrides puts its choices over the file's, below all other overrides: one flag is enough for the paper's recipe.

    Raises:
        RecipeError: unreadable or invalid YAML, unknown key (the nearest valid key is named), wrong type,
            contradicting values, unknown task. One line.
    """
    path = Path(path)
    tree, lines = read_yaml(path, missing="`bitdistill init` writes a recipe")
    places = recipe_errors.Places(str(path), lines)
    _normalise(tree)
    _resolve_paths(tree, path.resolve().parent)
    for override in sorted(overrides, key=lambda text: text.partition("=")[0].strip() != "method"):
        keys = _apply_override(tree, override)
        places.overridden.add(keys)
        if keys == ("method",) and isinstance(tree["method"], str):
            tree = _merge_under(_present(METHODS.get(tree["method"], {}), tree), tree)
    _expand_task(tree, path.resolve().parent, places.of(("task",)))
    _normalise(tree)
    method = tree.get("method", "bitdistill")
    chosen = METHODS.get(method, {}) if isinstance(method, str) else {}
    tree = _merge_under(tree, _merge_under(dict(chosen), _section_defaults()))
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(recipe_errors.one_line(error, tree, Recipe, places)) from None


def parse_recipe(tree: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from an already resolved mapping, such as the one embedded in an artifact.

    Raises:
        RecipeError: as load_recipe; `where` names the place.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        places = recipe_errors.Places(where, {})
        raise RecipeError(recipe_errors.one_line(error, dict(tree), Recipe, places)) from None


def check_base(recipe: Recipe, manifest: Mapping[str, Any], key: str, folder: Path) -> None:
    """Whether a ternary base is what the recipe's own stages 1 and 2 would make, as far as the recipe says it.

    A base brings SubLN, gains and losses of its own, which `refine` and `pretrain` would only seem to set.

    Args:
        key: `base`, which is taken as it is, or `start`, which stage 2 trains further, by its own objective.

    Raises:
        ArtifactError: it was made with other settings. What a manifest does not hold is not compared.
    """
    assert recipe.pretrain is not None
    plan = manifest.get("plan") or {}
    made = {f"refine.{name}": plan.get(name) for name in ("subln", "quantize_activations")}
    if plan.get("subln") != "none":
        made["refine.gains"] = ((manifest.get("recipe") or {}).get("refine") or {}).get("gains")
    if key == "base":
        stage = (manifest.get("inputs") or {}).get("pretrain") or {}
        made["pretrain.objective"] = stage.get("objective")
        if stage.get("objective") != "lm":
            made["pretrain.hidden_weight"] = stage.get("hidden_weight")
    differing = []
    for name, value in made.items():
        section, _, field = name.partition(".")
        own = getattr(getattr(recipe, section), field)
        if value is not None and value != own:
            differing.append(f"{name}: {recipe_errors.show(value)} (the recipe: {recipe_errors.show(own)})")
    if differing:
        raise ArtifactError(
            f"pretrain.{key}: {folder}: made with {', '.join(differing)}; take the base's values, or train another "
            f"(pretrain.{key}: null, and a corpus)"
        )


def resolved_value(key: str, value: Any, folder: Path) -> Any:
    """The value of a dotted key, or of a whole section, with its relative paths made absolute against `folder`."""
    *sections, last = key.split(".")
    tree: Tree = {}
    leaf = tree
    for name in sections:
        leaf = leaf.setdefault(name, {})
    leaf[last] = copy.deepcopy(value)
    _resolve_paths(tree, folder)
    return (leaf if sections else tree)[last]


def export_options(overrides: Sequence[str]) -> ExportConfig:
    """The recipe's `export` section from `export.key=value` overrides alone, for a student without its recipe.

    Raises:
        RecipeError: as load_recipe; also an override of another section.
    """
    tree: Tree = {}
    for override in overrides:
        if not override.startswith("export."):
            raise RecipeError(
                f"--set {override}: only export.* applies to a student's folder; give the recipe instead"
            )
        _apply_override(tree, override)
    section = tree.get("export", {})
    try:
        return ExportConfig.model_validate(section)
    except ValidationError as error:
        places = recipe_errors.Places("export", {})
        raise RecipeError(recipe_errors.one_line(error, section, ExportConfig, places)) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every key written out; `load_recipe` of it gives an equal recipe."""
    stream = io.StringIO()
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    writer.width = 1 << 20
    writer.dump(recipe.model_dump(mode="json", by_alias=True), stream)
    return stream.getvalue()


def recipe_hash(*sections: BaseModel | None) -> str:
    """Hex SHA-256 of the given sections (a whole recipe, or what one stage depends on), defaults included."""
    return hash_json([s if s is None else s.model_dump(mode="json", by_alias=True) for s in sections])


def run_dir(recipe: Recipe) -> Path:
    """The run's folder: `output_dir/name`, or `output_dir/name-seedN` when the seed is not 0."""
    name = recipe.name if recipe.seed == 0 else f"{recipe.name}-seed{recipe.seed}"
    return Path(recipe.output_dir).expanduser() / name


def builtin_task_names() -> list[str]:
    """Names of the tasks in assets/tasks, sorted."""
    folder = resources.files("bitdistill.assets") / "tasks"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def builtin_task(name: str) -> Task:
    """The built-in task `name`.

    Raises:
        RecipeError: there is none; the nearest name is given.
    """
    return _validate_task(_builtin_tree(name, "task"), f"built-in task {name}")


def builtin_tasks() -> dict[str, Task]:
    """All built-in tasks by name."""
    return {name: builtin_task(name) for name in builtin_task_names()}


# --- YAML -------------------------------------------------------------------------------------------------


def read_yaml(path: Path, missing: str = "check the path") -> tuple[Tree, Lines]:
    """A YAML mapping and the line (1-based) of each of its keys.

    Args:
        missing: what to do where there is no such file.

    Raises:
        RecipeError: missing or unreadable file, not UTF-8, not YAML 1.2, duplicate key, more than MAX_BYTES,
            more than MAX_NODES after alias expansion, or not a mapping.
    """
    try:
        with path.open("rb") as handle:
            raw = handle.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file; {missing}") from None
    except OSError as error:
        raise RecipeError(
            f"{path}: cannot be read ({error.strerror}); check the path and its rights"
        ) from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{path}: larger than {MAX_BYTES} bytes; this is not a recipe")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> tuple[Tree, Lines]:
    """As read_yaml, from text; `where` names it in errors."""
    lines: Lines = {}
    try:
        node = YAML(typ="safe", pure=True).compose(text)
        if isinstance(node, Node):
            _expanded_nodes(node, {}, 0, where)
            _key_lines(node, (), lines)
        tree = YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        in_file = error.problem_mark is not None and not where.startswith("--set")
        line = f":{error.problem_mark.line + 1}" if in_file and error.problem_mark else ""
        problem = (error.problem or error.context or "syntax error").split("\n")[0]
        raise RecipeError(f"{where}{line}: not valid YAML: {problem}{_yaml_hint(problem)}") from None
    except RecursionError:
        raise RecipeError(f"{where}: nested too deeply (more than {MAX_DEPTH} levels); flatten it") from None
    except (YAMLError, ValueError, TypeError, OverflowError) as error:
        problem = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise RecipeError(f"{where}: not valid YAML: {problem}{_yaml_hint(problem)}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{where}: expected `key: value` lines, found {recipe_errors.show(tree)}")
    return tree, lines


def _yaml_hint(problem: str) -> str:
    if "\\t" in problem:
        return "; indent with spaces, not tabs"
    if "duplicate key" in problem:
        return "; keep one of the two"
    if "special characters are not allowed" in problem:
        return "; remove the control character"
    return "; quote texts that hold : # { [ or start with a special character"


def _expanded_nodes(node: Node, seen: dict[int, int], depth: int, where: str) -> int:
    """Nodes of the document after alias expansion: bounds what construction may cost before it starts."""
    if depth > MAX_DEPTH:
        raise RecipeError(f"{where}: nested too deeply (more than {MAX_DEPTH} levels); flatten it")
    if id(node) in seen:
        if seen[id(node)] < 0:
            raise RecipeError(
                f"{where}: an alias refers to a section that contains it; write the section out"
            )
        return seen[id(node)]
    seen[id(node)] = -1
    total = 1
    if isinstance(node, MappingNode):
        children = [part for pair in node.value for part in pair]
    else:
        children = list(node.value) if isinstance(node, SequenceNode) else []
    for child in children:
        total += _expanded_nodes(child, seen, depth + 1, where)
        if total > MAX_NODES:
            raise RecipeError(
                f"{where}: more than {MAX_NODES} values once aliases are expanded; not a recipe"
            )
    seen[id(node)] = total
    return total


def _key_lines(node: Node, prefix: tuple[str, ...], lines: Lines) -> None:
    if isinstance(node, MappingNode):
        for key, value in node.value:
            place = (*prefix, str(key.value))
            lines.setdefault(place, key.start_mark.line + 1)
            _key_lines(value, place, lines)


# --- overrides, defaults, tasks, paths --------------------------------------------------------------------


def _apply_override(tree: Tree, override: str) -> tuple[str, ...]:
    """Put `key.path=value` into the tree; returns the key path."""
    key, equals, text = override.partition("=")
    keys = tuple("lambda" if part == "lambda_" else part for part in key.strip().split("."))
    if not equals or not all(keys):
        raise RecipeError(f"--set {override}: expected KEY=VALUE, for example --set distill.gamma=auto")
    value = parse_yaml(f"value: {text}", f"--set {key}")[0]["value"] if text.strip() else text
    if keys[0] == "task" and len(keys) > 1:
        _expand_task(tree, Path.cwd(), "--set task")
    branch = tree
    for depth, name in enumerate(keys[:-1]):
        child = branch.setdefault(name, {})
        if child is None:
            child = branch[name] = {}
        if not isinstance(child, dict):
            place = ".".join(keys[: depth + 1])
            raise RecipeError(f"--set {key}: {place} is {recipe_errors.show(child)}, which has no keys")
        branch = child
    fresh: Tree = {}
    leaf = fresh
    for name in keys[:-1]:
        leaf = leaf.setdefault(name, {})
    leaf[keys[-1]] = value
    _resolve_paths(fresh, Path.cwd())
    for name in keys[:-1]:
        fresh = fresh[name]
    branch[keys[-1]] = fresh[keys[-1]]
    return keys


def _merge_under(user: Tree, defaults: Mapping[str, Any]) -> Tree:
    """`user` over `defaults`, section by section; a user's null or scalar hides a whole default section."""
    merged = copy.deepcopy(dict(defaults))
    for key, value in user.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            merged[key] = _merge_under(value, below)
        else:
            merged[key] = value
    return merged


def _present(method: Mapping[str, Any], tree: Tree) -> Tree:
    """A method's choices without the sections that the file sets to null: what is left out stays out."""
    present = {key: value for key, value in method.items() if tree.get(key, {}) is not None}
    return {key: dict(value) if isinstance(value, Mapping) else value for key, value in present.items()}


def _section_defaults() -> Tree:
    """Each section's own defaults: `sft: {optim: {schedule: linear}}` keeps that stage's learning rate."""
    fields = Recipe.model_fields.items()
    return {
        info.alias or name: info.default.model_dump(mode="json", by_alias=True)
        for name, info in fields
        if isinstance(info.default, BaseModel)
    }


def _normalise(tree: Tree) -> None:
    """YAML keys that are natural to write but not strings (`labels: {0: …}`), and the alias of `lambda`."""
    task = tree.get("task")
    if isinstance(task, dict) and isinstance(task.get("labels"), dict):
        task["labels"] = {_label_key(k): v for k, v in task["labels"].items()}
    distill = tree.get("distill")
    if isinstance(distill, dict) and "lambda_" in distill and "lambda" not in distill:
        distill["lambda"] = distill.pop("lambda_")


def _label_key(key: Any) -> Any:
    if isinstance(key, bool):
        return "true" if key else "false"
    return str(key) if isinstance(key, int | float) else key


def _expand_task(tree: Tree, folder: Path, where: str) -> None:
    """Replace `task: name` by the section of that built-in task or task file; `where` names the key in errors."""
    task = tree.get("task")
    if not isinstance(task, str):
        return
    if task.endswith((".yaml", ".yml")) or os.sep in task:
        path = folder / Path(task).expanduser()
        if not path.exists():
            raise RecipeError(f"{where}: {path}: no such file; check the path, or name a built-in task")
        section, _ = read_yaml(path)
        section.setdefault("name", path.stem)
        _normalise({"task": section})
        tree["task"] = _validate_task(section, str(path)).model_dump(mode="json", exclude_defaults=True)
    else:
        tree["task"] = _builtin_tree(task, where)


def _builtin_tree(name: str, where: str) -> Tree:
    names = builtin_task_names()
    if name not in names:
        hint = recipe_errors.nearest(name, names) or f"built-in tasks: {', '.join(names)}"
        raise RecipeError(f'{where}: no built-in task "{name}"; {hint} (a section or a .yaml file also do)')
    text = (resources.files("bitdistill.assets") / "tasks" / f"{name}.yaml").read_text("utf-8")
    holder = {"task": parse_yaml(text, f"assets/tasks/{name}.yaml")[0]}
    _normalise(holder)
    return {"name": name, **holder["task"]}


def _validate_task(tree: Tree, where: str) -> Task:
    try:
        return Task.model_validate(tree)
    except ValidationError as error:
        places = recipe_errors.Places(where, {})
        raise RecipeError(recipe_errors.one_line(error, tree, Task, places)) from None


_PATHS = (
    ("model", "path"),
    ("model", "tokenizer"),
    ("teacher", "path"),
    ("teacher", "tokenizer"),
    ("data", "train"),
    ("data", "validation"),
    ("data", "test"),
    ("pretrain", "corpus"),
    ("pretrain", "base"),
    ("pretrain", "start"),
)


def _resolve_paths(tree: Tree, folder: Path) -> None:
    """Make relative input paths absolute, against `folder`; hub names stay as they are."""
    for section, key in _PATHS:
        branch = tree.get(section)
        if isinstance(branch, dict) and isinstance(branch.get(key), str):
            branch[key] = _absolute(branch[key], folder, hub=section in ("model", "teacher"))
    for section, key in (("data", "unlabelled"), ("augment", "texts")):
        branch = tree.get(section)
        if isinstance(branch, dict) and isinstance(branch.get(key), str | list):
            found = branch[key]
            sources = [found] if isinstance(found, str) else found
            branch[key] = [_absolute(s, folder, hub=False) if isinstance(s, str) else s for s in sources]
    task = tree.get("task")
    if isinstance(task, str) and (task.endswith((".yaml", ".yml")) or os.sep in task):
        tree["task"] = _absolute(task, folder, hub=False)


def absolute_source(text: str, folder: Path, *, hub: bool = False) -> str:
    """A path made absolute against `folder`; hub names stay as they are.

    Args:
        hub: whether a plain `owner/name` may be a hub name (models), unless it exists as a path.
    """
    return _absolute(text, folder, hub=hub)


def _absolute(text: str, folder: Path, *, hub: bool) -> str:
    if not text or text.startswith("hub:") or "\0" in text:
        return text
    path = folder / Path(text).expanduser()
    # A model may also be a hub name (`Qwen/Qwen3-0.6B`): a path only if it looks like one or is there.
    looks_local = text.startswith((".", "~", os.sep)) or text.endswith(".gguf") or path.exists()
    return os.path.normpath(path) if looks_local or not hub else text
