"""Ternary layers under the microscope: shares of -1/0/+1, scales, latents near a threshold, SubLN gains.

Latents are measured in units of their own scale, x = W / scale with scale = mean|W| (paper, sec. 2): a
code is 0 where |x| <= 0.5, so ||x| - 0.5| is how far a latent is from flipping its code. Packed students
hold codes and no latents; those columns are then absent, not zero.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from bitdistill import artifact
from bitdistill.errors import ArtifactError, ModelError
from bitdistill.report import text

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor, nn

STATS_VERSION = 1
HISTOGRAM_LIMIT = 3.0
HISTOGRAM_BINS = 61  # odd, so that one bin is centred on 0
THRESHOLD = 0.5
NEAR = 0.05
_CHUNK = 1 << 22  # weights handled at once in float64: 32 MB


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LatentStats(_Frozen):
    """Distribution of the latents W of one layer, in units of its scale (x = W / scale)."""

    distance_mean: float
    """Mean of ||x| - 0.5|."""
    near_share: float
    """Share (0..1) of latents with ||x| - 0.5| < 0.05: about to flip."""
    std: float
    kurtosis: float
    """Fourth standardised moment of x: 3 for a Gaussian; 0 when all latents are equal."""
    histogram: tuple[int, ...]
    """Counts: below -3, then 61 equal bins over [-3, 3), then 3 and above."""


class GainStats(_Frozen):
    """SubLN gain of one layer."""

    min: float
    mean: float
    max: float


class LayerStats(_Frozen):
    """One ternary linear. Shares are 0..1; `scale` is in the units of the weights."""

    name: str
    out_features: int
    in_features: int
    negative: float
    zero: float
    positive: float
    scale: float
    latent: LatentStats | None = None
    """None for a packed layer: it keeps codes only."""
    gain: GainStats | None = None
    """None for a layer without SubLN."""

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features

    @property
    def kind(self) -> str:
        """Last part of the module name without `_proj`: q, k, v, o, gate, up, down."""
        return self.name.rsplit(".", 1)[-1].removesuffix("_proj")

    @property
    def layer(self) -> int | None:
        """Index of the transformer block (the first number in the module name), if there is one."""
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", self.name)
        return int(number.group(1)) if number else None


def layer_stats(model: nn.Module) -> list[LayerStats]:
    """Statistics of every `BitLinear` and `PackedBitLinear` of `model`, in module order.

    Raises:
        ModelError: the model has no ternary layer, or a layer holds NaN or Inf.
    """
    from bitdistill.quant.linear import BitLinear, PackedBitLinear

    stats = [
        _one_layer(name, module)
        for name, module in model.named_modules()
        if isinstance(module, BitLinear | PackedBitLinear)
    ]
    if not stats:
        raise ModelError(
            f"{type(model).__name__}: no ternary layers; inspect a refined, base, student or packed folder"
        )
    return stats


def _one_layer(name: str, module: Any) -> LayerStats:
    import torch

    from bitdistill.quant.linear import BitLinear
    from bitdistill.quant.packing import unpack_2bit
    from bitdistill.quant.ternary import ternarize

    latent = None
    if isinstance(module, BitLinear):
        weight = module.weight.detach()
        if not bool(torch.isfinite(weight).all()):
            raise ModelError(f"{name}.weight: holds NaN or Inf; go back to an earlier checkpoint")
        codes, scale = ternarize(weight)
        latent = _latent_stats(weight, float(scale))
    else:
        codes, scale = unpack_2bit(module.codes.cpu(), int(module.in_features)), module.scale
    out_features, in_features = codes.shape
    total = codes.numel()
    negative, positive = int((codes < 0).sum()), int((codes > 0).sum())
    subln = getattr(module, "subln", None)
    return LayerStats(
        name=name,
        out_features=out_features,
        in_features=in_features,
        negative=negative / total,
        zero=(total - negative - positive) / total,
        positive=positive / total,
        scale=float(scale),
        latent=latent,
        gain=None if subln is None else _gain_stats(subln.weight.detach().float()),
    )


def _gain_stats(gain: Tensor) -> GainStats:
    return GainStats(min=float(gain.min()), mean=float(gain.double().mean()), max=float(gain.max()))


def _latent_stats(weight: Tensor, scale: float) -> LatentStats:
    """Moments and histogram of W / scale, in float64 and in chunks (a 4B model's largest matrix fits)."""
    import torch

    edges = torch.linspace(-HISTOGRAM_LIMIT, HISTOGRAM_LIMIT, HISTOGRAM_BINS + 1, dtype=torch.float64)
    flat = weight.reshape(-1)
    total = flat.numel()
    counts = torch.zeros(HISTOGRAM_BINS + 2, dtype=torch.int64)
    mean = float(flat.mean(dtype=torch.float64)) / scale
    second = fourth = distance_sum = 0.0
    near = 0
    for start in range(0, total, _CHUNK):
        x = flat[start : start + _CHUNK].to("cpu", torch.float64) / scale
        counts += torch.bincount(torch.bucketize(x, edges, right=True), minlength=HISTOGRAM_BINS + 2)
        distance = (x.abs() - THRESHOLD).abs()
        distance_sum += float(distance.sum())
        near += int((distance < NEAR).sum())
        square = (x - mean).square()
        second += float(square.sum())
        fourth += float(square.square().sum())
    variance = second / total
    return LatentStats(
        distance_mean=distance_sum / total,
        near_share=near / total,
        std=variance**0.5,
        kurtosis=fourth / total / variance**2 if variance > 1e-12 else 0.0,
        histogram=tuple(counts.tolist()),
    )


def inspect_model(path: str | Path) -> list[LayerStats]:
    """Statistics of the model in a bitdistill folder (refined, base, student, bitnet_sft or packed).

    Raises:
        ArtifactError: no artifact there, or it is corrupt.
        ModelError: the model has no ternary layers (a teacher).
    """
    from bitdistill.models.student import load_student

    model, _, _ = load_student(Path(path))
    try:
        return layer_stats(model)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def stats_path(run_dir: str | Path, name: str) -> Path:
    """Where the statistics of one model of a run are kept: `run_dir/stats/<name>.json`."""
    return Path(run_dir) / "stats" / f"{name}.json"


def write_stats(model: nn.Module | str | Path, run_dir: str | Path, name: str) -> Path:
    """Measure `model` and write `run_dir/stats/<name>.json` (atomically); returns that path.

    A folder is loaded, verified and measured, unless the statistics there were made from the same files.
    The report looks for the names refined, base, student and bitnet_sft.

    Raises:
        ArtifactError: `model` is a folder and no sound artifact.
        ModelError: the model has no ternary layers.
        StorageError: the file system refused.
    """
    path = stats_path(run_dir, name)
    if isinstance(model, str | Path):
        source = artifact.hash_json(artifact.read_manifest(Path(model))["files"])
        if _source_of(path) == source:
            return path
        content = as_json(inspect_model(model)) | {"source": source}
    else:
        content = as_json(layer_stats(model))
    return text.write(path, json.dumps(content) + "\n")


def _source_of(path: Path) -> str | None:
    """Hash of the files that existing statistics were made from; None when unknown or of another version."""
    try:
        content = json.loads(path.read_text("utf-8"))
        return content["source"] if content["stats_version"] == STATS_VERSION else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def as_json(stats: Iterable[LayerStats]) -> dict[str, Any]:
    """JSON form of the statistics: `{"stats_version", "bin_edges", "layers"}`."""
    width = 2 * HISTOGRAM_LIMIT / HISTOGRAM_BINS
    return {
        "stats_version": STATS_VERSION,
        "bin_edges": [round(index * width - HISTOGRAM_LIMIT, 6) for index in range(HISTOGRAM_BINS + 1)],
        "layers": [layer.model_dump() | {"kind": layer.kind, "layer": layer.layer} for layer in stats],
    }


def read_stats(run_dir: str | Path, name: str) -> list[LayerStats] | None:
    """Statistics written by `write_stats`; None when they were not written.

    Raises:
        ArtifactError: the file is not one of ours.
    """
    path = stats_path(run_dir, name)
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["stats_version"] != STATS_VERSION:
            raise ValueError(f"stats_version {content['stats_version']!r}, expected {STATS_VERSION}")
        derived = ("kind", "layer")
        return [
            LayerStats.model_validate({key: value for key, value in layer.items() if key not in derived})
            for layer in content["layers"]
        ]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(f"{path}: unreadable layer statistics ({reason}); repeat the stage") from error


class KindStats(_Frozen):
    """Layers of one kind together, each weight counting once."""

    kind: str
    layers: int
    weights: int
    negative: float
    zero: float
    positive: float
    scale_min: float
    scale_max: float
    near_share: float | None
    distance_mean: float | None


def by_kind(stats: Sequence[LayerStats]) -> list[KindStats]:
    """One summary a kind of layer (in order of first appearance), then one named `all`."""
    groups: dict[str, list[LayerStats]] = {}
    for layer in stats:
        groups.setdefault(layer.kind, []).append(layer)
    return [_summary(kind, group) for kind, group in [*groups.items(), ("all", list(stats))]]


def _summary(kind: str, group: Sequence[LayerStats]) -> KindStats:
    weights = sum(layer.weights for layer in group)

    def mean(values: Iterable[float]) -> float:
        return sum(value * layer.weights for value, layer in zip(values, group, strict=True)) / weights

    latents = [layer.latent for layer in group if layer.latent is not None]
    whole = len(latents) == len(group)
    return KindStats(
        kind=kind,
        layers=len(group),
        weights=weights,
        negative=mean(layer.negative for layer in group),
        zero=mean(layer.zero for layer in group),
        positive=mean(layer.positive for layer in group),
        scale_min=min(layer.scale for layer in group),
        scale_max=max(layer.scale for layer in group),
        near_share=mean(latent.near_share for latent in latents) if whole else None,
        distance_mean=mean(latent.distance_mean for latent in latents) if whole else None,
    )


def stats_table(stats: Sequence[LayerStats], title: str | None = None) -> Table:
    """Rich table for `bitdistill inspect`, readable at 80 columns: one row a layer, one total row."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    latent = any(layer.latent for layer in stats)
    total = by_kind(stats)[-1]
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_footer=True)
    table.add_column("layer", footer=f"all {total.layers}", overflow="fold")
    table.add_column("shape", footer=f"{total.weights / 1e6:.2f}M", justify="right", no_wrap=True)
    table.add_column("-1   0  +1 %", footer=_shares(total), justify="right", no_wrap=True)
    table.add_column("scale", justify="right", no_wrap=True)
    if latent:
        table.add_column("dist", footer=_number(total.distance_mean), justify="right", no_wrap=True)
        table.add_column("near%", footer=_percent(total.near_share), justify="right", no_wrap=True)
        table.add_column("kurt", justify="right", no_wrap=True)
    table.add_column("SubLN gain", justify="right", no_wrap=True)
    for layer in stats:
        short = layer.name if layer.layer is None else f"{layer.layer}.{layer.kind}"
        cells = [short, f"{layer.out_features}x{layer.in_features}", _shares(layer), f"{layer.scale:.3g}"]
        if latent:
            known = layer.latent
            cells.append(_number(known.distance_mean if known else None))
            cells.append(_percent(known.near_share if known else None))
            cells.append(_number(known.kurtosis if known else None, 1))
        table.add_row(*cells, _gain_text(layer.gain))
    legend = "SubLN gain: min/mean/max."
    if latent:
        legend += "\ndist: mean ||W|/scale - 0.5|. near: within 0.05 of 0.5. kurt: 3 is Gaussian."
    else:
        legend += " Packed: codes only, no latents."
    table.caption, table.caption_justify = legend, "left"
    return table


def _shares(one: LayerStats | KindStats) -> str:
    return " ".join(f"{100 * share:4.1f}" for share in (one.negative, one.zero, one.positive))


def _gain_text(gain: GainStats | None) -> str:
    if gain is None:
        return "-"
    return f"{gain.mean:.2g}" if gain.min == gain.max else f"{gain.min:.2g}/{gain.mean:.2g}/{gain.max:.2g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
