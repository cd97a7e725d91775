"""pydantic errors of a recipe as one line: place, value, remedy, with the nearest valid key."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from bitdistill.config import MOST_COUNT


@dataclass
class Places:
    """Where keys come from: the file with its key lines, or `--set`."""

    where: str
    lines: Mapping[tuple[str, ...], int]
    overridden: set[tuple[str, ...]] = field(default_factory=set)

    def of(self, keys: tuple[str, ...]) -> str:
        """`recipe.yaml:12: distill.gama`, `--set distill.gama`, or the nearest enclosing line."""
        dotted = ".".join(keys)
        if any(keys[: len(o)] == o for o in self.overridden):
            return f"--set {dotted}"
        # `--set distil.gamma` makes a section that the file does not have: the option is to blame, not the file.
        for option in self.overridden if keys and keys not in self.lines else ():
            if option[: len(keys)] == keys:
                return f"--set {'.'.join(option)}: {dotted}"
        line = next((self.lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self.lines), None)
        place = self.where if line is None else f"{self.where}:{line}"
        return f"{place}: {dotted}" if dotted else place


def one_line(error: ValidationError, tree: Mapping[str, Any], model: type[BaseModel], places: Places) -> str:
    """The first error in full, and how many more there are."""
    messages: dict[tuple[str, ...], str] = {}
    found = error.errors()
    # Unknown keys first: a misspelt key is often the cause of the others.
    for details in sorted(found, key=lambda e: e["type"] != "extra_forbidden"):
        here = details["loc"]
        # A list with a bad entry is called too short as well
        if details["type"] == "too_short" and any(e["loc"][: len(here)] == here != e["loc"] for e in found):
            continue
        keys = _keys(details, tree)
        messages.setdefault(keys, f"{places.of(keys)}: {_message(details, keys, tree, model)}")
    first = next(iter(messages.values())).replace("\n", " ")
    return first if len(messages) == 1 else f"{first} (and {len(messages) - 1} more)"


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """`did you mean "gamma"?` for the closest choice, or None."""
    names = list(choices)
    if name.lower() == "gpu" and "cuda" in names:  # by its letters it is closer to cpu
        return 'did you mean "cuda"?'
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f'did you mean "{close[0]}"?' if close else None


def show(value: Any) -> str:
    """A value for a message, at most about 60 characters, on one line."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "a section" if value else "an empty section"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = f'"{value}"' if isinstance(value, str) else repr(value)
    text = text.replace("\n", "\\n")
    return text if len(text) <= 60 else text[:57] + "..."


def _keys(details: ErrorDetails, tree: Mapping[str, Any]) -> tuple[str, ...]:
    """The error's location as keys of the recipe; pydantic's union and validator tags are dropped."""
    keys: list[str] = []
    here: Any = tree
    for position, step in enumerate(details["loc"]):
        last = position == len(details["loc"]) - 1
        if isinstance(here, Mapping) and (step in here or (last and details["type"] == "missing")):
            here = here.get(step)
        elif isinstance(here, list | tuple) and isinstance(step, int) and step < len(here):
            here = here[step]
        else:
            continue
        keys.append(str(step))
    return tuple(keys)


def _message(
    details: ErrorDetails, keys: tuple[str, ...], tree: Mapping[str, Any], model: type[BaseModel]
) -> str:
    kind = details["type"]
    if kind == "extra_forbidden":
        return _unknown_key(keys, model)
    if kind == "missing":
        return f"missing; add it ({_expected(keys, model)})"
    if kind == "value_error":
        return str(details["msg"]).removeprefix("Value error, ")
    value: Any = tree
    for key in keys:
        if isinstance(value, Mapping):
            value = value[key] if key in value else details["input"]
        elif isinstance(value, list | tuple):
            value = value[int(key)]
    found = _field(keys, model)
    hint = None
    if isinstance(value, str) and found is not None:
        choices = _literals(found[0])
        hint = f"write [{value}]" if kind == "tuple_type" else nearest(value, choices)
    expected = _expected(keys, model)
    if kind == "finite_number":
        expected = "a finite number"
    elif kind == "too_short":
        expected = "a list of one entry at least"
    elif kind == "string_too_short":
        expected = "a text that is not empty"
    elif kind in ("less_than", "less_than_equal"):
        limit = next(iter(details["ctx"].values()))
        expected = expected if limit < MOST_COUNT else f"less than {limit:.0e}"
    message = f"got {show(value)}, expected {expected}"
    return f"{message}; {hint}" if hint else message


def _unknown_key(keys: tuple[str, ...], model: type[BaseModel]) -> str:
    parent = _section(keys[:-1], model)
    siblings = _aliases(parent) if parent else []
    hint = nearest(keys[-1], siblings)
    if hint is None:
        elsewhere = [path for path in _all_keys(model) if path.rsplit(".", 1)[-1] == keys[-1]]
        if elsewhere:
            hint = " or ".join(f'"{path}"' for path in elsewhere[:3]) + " takes it"
    return f"unknown key; {hint or 'valid keys: ' + ', '.join(siblings)}"


def _aliases(model: type[BaseModel]) -> list[str]:
    return [info.alias or name for name, info in model.model_fields.items()]


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        path = f"{prefix}{info.alias or name}"
        yield path
        for inner in _models(info.annotation):
            yield from _all_keys(inner, f"{path}.")


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in get_args(annotation) for m in _models(part)]


def _section(keys: tuple[str, ...], model: type[BaseModel]) -> type[BaseModel] | None:
    if not keys:
        return model
    found = _field(keys, model)
    inner = _models(found[0]) if found else []
    return inner[0] if inner else None


def _field(keys: tuple[str, ...], model: type[BaseModel]) -> tuple[Any, list[Any]] | None:
    """Annotation and constraints of the field at `keys`; None when they lead into a list or mapping."""
    section: type[BaseModel] | None = model
    found = None
    for key in keys:
        if key.isdigit() and found is not None:  # an entry of a list
            item = _item(found[0])
            inner = [] if item is None else _models(item)
            found, section = None if item is None else (item, []), inner[0] if inner else None
            continue
        if section is None:
            return None
        for name, info in section.model_fields.items():
            if key in (name, info.alias):
                found = (info.annotation, list(info.metadata))
                inner = _models(info.annotation)
                section = inner[0] if inner else None
                break
        else:
            return None
    return found


def _item(annotation: Any) -> Any:
    """What a list's entries are; None where the annotation has no list."""
    if get_origin(annotation) in (tuple, list):
        return get_args(annotation)[0]
    return next((item for part in get_args(annotation) if (item := _item(part)) is not None), None)


def _expected(keys: tuple[str, ...], model: type[BaseModel]) -> str:
    for end in range(len(keys), 0, -1):
        found = _field(keys[:end], model)
        if found is not None:
            text = _describe(found[0], found[1])
            return text if end == len(keys) else f"{text} at {'.'.join(keys[:end])}"
    return "a section of `key: value` lines"


def _literals(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [a for a in get_args(annotation) if isinstance(a, str)]
    return [text for part in get_args(annotation) for text in _literals(part)]


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
_SIGNS = ((Ge, "ge", ">="), (Gt, "gt", ">"), (Le, "le", "<="), (Lt, "lt", "<"))


def _describe(annotation: Any, constraints: Iterable[Any] = ()) -> str:
    """An annotation in words: `a number >= 0 or "auto"`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _describe(args[0], _flatten(args[1:]))
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(part) for part in args)
    if origin is Literal:
        return " or ".join(show(a) for a in args)
    if origin is tuple:
        return f"a list ({_describe(args[0])} each)"
    if origin is dict:
        return "a section of `name: text` lines"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a section with keys {', '.join(_aliases(annotation))}"
    parts = [_NAMES.get(annotation, str(annotation))]
    for constraint in _flatten(constraints):
        for kind, attribute, sign in _SIGNS:
            if isinstance(constraint, kind) and getattr(constraint, attribute) < MOST_COUNT:
                parts.append(f"{sign} {getattr(constraint, attribute):g}")
        pattern = getattr(constraint, "pattern", None)
        if isinstance(pattern, str):
            parts.append(f"that matches {pattern}")
    return " ".join(dict.fromkeys(parts))


def _flatten(constraints: Iterable[Any]) -> Iterator[Any]:
    """Annotated[..., Field(ge=0)] keeps its constraints inside the FieldInfo's metadata."""
    for constraint in constraints:
        yield constraint
        yield from getattr(constraint, "metadata", ())
