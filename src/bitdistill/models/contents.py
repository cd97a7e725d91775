"""What a model folder must hold: every tensor's name, shape and dtype, known before any weight is read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdistill.errors import ArtifactError, ModelError
from bitdistill.models.families import Layout, layout_of

if TYPE_CHECKING:
    from bitdistill.models.surgery import SurgeryPlan

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOAT = frozenset({"F32", "F16", "BF16"})

Expected = dict[str, tuple[tuple[int, ...], frozenset[str]]]


def expected_tensors(
    config: Mapping[str, Any], plan: SurgeryPlan | None, packed: bool, where: str
) -> Expected:
    """Name -> (shape, allowed safetensors dtypes) of every tensor of a folder.

    A tied output head is not stored. A `plan` of None is a plain full-precision model.

    Raises:
        ModelError: the family is not supported.
        ArtifactError: the plan names a linear that the config does not have, or one of another shape.
    """
    from bitdistill.quant.packing import packed_width  # torch: not for callers that only plan

    layout = layout_of(config, where)
    expected: Expected = {kept.name: (kept.shape, FLOAT) for kept in layout.kept}
    _check_plan(layout, plan, where)
    for linear in layout.linears:
        spec = None if plan is None else plan.replace.get(linear.name)
        shape = (linear.out_features, linear.in_features)
        if spec is None or not packed:
            expected[f"{linear.name}.weight"] = (shape, FLOAT)
        else:
            width = packed_width(linear.in_features)
            expected[f"{linear.name}.codes"] = ((linear.out_features, width), frozenset({"U8"}))
            expected[f"{linear.name}.scale"] = ((), frozenset({"F32"}))
        if spec is not None and spec.subln:
            expected[f"{linear.name}.subln.weight"] = ((linear.in_features,), FLOAT)
    return expected


def _check_plan(layout: Layout, plan: SurgeryPlan | None, where: str) -> None:
    if plan is None:
        return
    known = {lin.name: (lin.in_features, lin.out_features, lin.bias) for lin in layout.linears}
    for name, spec in plan.replace.items():
        if known.get(name) != (spec.in_features, spec.out_features, spec.bias):
            raise ArtifactError(
                f"{where}: the plan's {name} is not a linear of this config with in {spec.in_features}, out "
                f"{spec.out_features}; the folder is damaged, export it again"
            )


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype) of a safetensors file, checked by the safetensors library; no tensor is read.

    Raises:
        ArtifactError: the file is not valid safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            return {name: (tuple(s.get_shape()), str(s.get_dtype())) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path}: not a valid safetensors file ({error}); make it again") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or the shards of its index.

    Raises:
        ArtifactError: none there, or the index is damaged or names a file outside the folder.
    """
    single, index = folder / WEIGHTS, folder / INDEX
    if not index.exists():
        if not single.is_file():
            raise ArtifactError(f"{folder}: no {WEIGHTS}; the folder is incomplete, make it again")
        return [_inside(folder, WEIGHTS, folder)]
    try:
        mapping = json.loads(index.read_text("utf-8"))["weight_map"]
        names = sorted({str(shard) for shard in mapping.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{index}: unreadable index ({error!r}); make the folder again") from error
    files = [_inside(folder, name, index) for name in names]
    owner = {tensor: path.name for path in files for tensor in read_header(path)}
    if single.exists():
        raise ArtifactError(f"{folder}: holds both {WEIGHTS} and an index; remove one of them")
    if owner != mapping:
        wrong = sorted(t for t in owner.keys() | mapping.keys() if owner.get(t) != mapping.get(t))
        raise ArtifactError(f"{index}: disagrees with the shards about {wrong[0]}; make the folder again")
    return files


def _inside(folder: Path, name: str, where: Path) -> Path:
    """`folder / name`, refused if it is anything but a file of this folder (or of its hub cache)."""
    bad = (
        not name
        or "\0" in name
        or "\\" in name
        or name != Path(name).name
        or not name.endswith(".safetensors")
    )
    path = folder / name if not bad else folder
    roots = [folder.resolve()]
    if folder.parent.name == "snapshots":  # a hub cache: snapshot files are links to ../../blobs
        roots.append((folder.parent.parent / "blobs").resolve())
    if bad or not path.is_file() or path.resolve().parent not in roots:
        raise ArtifactError(
            f"{where}: names the weight file {name!r}, which is not a plain file in this folder"
        )
    return path


def check_full_precision(config: Mapping[str, Any], where: str) -> None:
    """Refuse the config of a model that is quantized already.

    Raises:
        ModelError: it has a `quantization_config`, as students have.
    """
    section = config.get("quantization_config")
    if section is None:
        return
    method = section.get("quant_method") if isinstance(section, dict) else section
    hint = "a student; give the full-precision model" if method == "bitdistill" else "already quantized"
    raise ModelError(f"{where}: quantization_config {method!r}: this model is {hint}; choose full precision")


def check_headers(files: Iterable[Path], expected: Expected) -> None:
    """Compare the tensors of `files` with `expected`, both ways.

    Raises:
        ArtifactError: a tensor is missing, unexpected, stored twice, or of another shape or dtype.
    """
    left = dict(expected)
    place: Path | None = None
    for place in files:
        for name, (shape, dtype) in read_header(place).items():
            if name not in expected:
                raise ArtifactError(
                    f"{place}: unexpected tensor {name}; the folder belongs to another model or plan"
                )
            if name not in left:
                raise ArtifactError(f"{place}: tensor {name} is stored twice; make the folder again")
            wanted_shape, wanted_dtypes = left.pop(name)
            if shape != wanted_shape:
                raise ArtifactError(
                    f"{place}: {name} has shape {list(shape)}, not {list(wanted_shape)}; export again"
                )
            if dtype not in wanted_dtypes:
                allowed = " or ".join(sorted(wanted_dtypes))
                raise ArtifactError(f"{place}: {name} has dtype {dtype}, not {allowed}; export again")
    if left:
        missing = next(iter(left))
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise ArtifactError(
            f"{place}: tensor {missing}{more} missing; the folder is incomplete, export again"
        )


def count_weights(folder: Path) -> int:
    """Weights of a teacher or packed folder: ternary ones counted unpacked, tied ones once, scales not at all.

    Raises:
        ArtifactError: the folder's weight files or its config are damaged.
    """
    section = read_config(folder).get("quantization_config")
    try:
        replaced = section["plan"]["replace"].values() if section else ()
        total = sum(int(spec["in_features"]) * int(spec["out_features"]) for spec in replaced)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{folder}: config.json holds no plan ({error!r}); export it again") from error
    for path in weight_files(folder):
        for name, (shape, _) in read_header(path).items():
            if not name.endswith((".codes", ".scale")):
                total += math.prod(shape)
    return total


def check_values(model: Any) -> None:
    """Check the numbers of a loaded model: legal codes, positive finite scales, finite floats.

    Raises:
        ArtifactError: names the first bad tensor.
    """
    import torch

    from bitdistill.quant.linear import PackedBitLinear
    from bitdistill.quant.packing import unpack_2bit

    for name, module in model.named_modules():
        if isinstance(module, PackedBitLinear):
            try:
                unpack_2bit(module.codes, module.in_features)
            except ValueError as error:
                raise ArtifactError(f"{name}.codes: {error}") from error
            scale = float(module.scale)
            if not (math.isfinite(scale) and scale > 0.0):
                raise ArtifactError(
                    f"{name}.scale: {scale} is not positive and finite; re-export the student"
                )
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ArtifactError(f"{name}: holds values that are not finite; make the folder again")


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder.

    Raises:
        ModelError: missing or not a JSON object.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ModelError(f"{path}: missing; this is not a Hugging Face model folder")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder.

    Raises:
        ModelError: missing, unreadable, nested too deeply, or not an object.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: unreadable ({error}); fetch the model again") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: not a JSON object; fetch the model again")
    return values
