"""Figures of sweeps: scores against tokens or layers, gaps to the teacher, training curves, weights."""

from __future__ import annotations

from collections.abc import Sequence

from bitdistill.report import figures, panel, text
from bitdistill.report.panel import Figure
from bitdistill.report.sweep_results import RunResult, SweepResults
from bitdistill.report.sweep_tables import Line, gap_words, lines

AXES_OF_STAGES = {"pretrain": ("kl", "lm", "loss"), "distill": ("ce", "loss"), "sft": ("loss",)}


def of_sweep(results: SweepResults) -> dict[str, Figure]:
    """Every figure that the results have data for, by the slug of its file name."""
    found: dict[str, Figure] = {}
    made = lines(results, tests=False)
    for recipe in dict.fromkeys(line.recipe for line in made):
        group = [line for line in made if line.recipe == recipe]
        runs = [run for run in results.runs if run.recipe == recipe and run.status == "done"]
        several = {"tokens": True, "layers": False}.get(results.figure)
        figure = None if several is None else _scores(results, recipe, group, log=several)
        if figure is not None:
            found[f"{results.name}-{recipe}"] = figure
        for stage in AXES_OF_STAGES:
            curve = training_curves(runs, stage)
            if curve is not None:
                found[f"{results.name}-{recipe}-{stage}"] = curve
        found |= _weights(results.name, recipe, runs)
    gaps = gap_figure(results.title or results.name, made)
    if gaps is not None and results.figure == "table":
        found[f"{results.name}-gaps"] = gaps
    return found


def _weights(sweep: str, recipe: str, runs: Sequence[RunResult]) -> dict[str, Figure]:
    """Latent weights of the first measured run of each cell (paper, Figure 2)."""
    first: dict[str, RunResult] = {}
    for run in runs:
        if len(run.densities) > 1:
            first.setdefault(run.cell, run)
    found = {}
    for cell, run in first.items():
        alone = len(first) == 1
        note = f"{run.label}, seed {run.seed}." if alone else f"Seed {run.seed}."
        note += " Dotted: where codes change."
        if run.near:
            note += f" {figures.near_note(run.near)}"
        slug = f"{sweep}-{recipe}-weights" if alone else f"{sweep}-{recipe}-{cell}-weights"
        title = f"{recipe}: weights over their scale" + ("" if alone else f", {run.label}")
        found[slug] = figures.density_histogram(title, note, run.densities)
    return found


def _scores(results: SweepResults, recipe: str, group: Sequence[Line], *, log: bool) -> Figure | None:
    """Students' scores over x, a curve a `line`; the teacher as a dashed level. None below two points."""
    curves: dict[str, list[Line]] = {}
    for line in group:
        if line.row == "bitdistill" and line.x is not None:
            curves.setdefault(line.line, []).append(line)
    points = sum(map(len, curves.values()))
    if points < 2:
        return None
    teacher = next((line for line in group if line.row == "teacher"), None)
    first = next(iter(curves.values()))[0]
    with panel.axes() as axes:
        for slot, (name, members) in enumerate(curves.items()):
            members = sorted(members, key=lambda member: member.x or 0.0)
            xs, ys = [member.x for member in members], [member.mean for member in members]
            color, style = panel.series(slot)
            spread = [member.sd or 0.0 for member in members]
            axes.errorbar(
                xs, ys, yerr=spread if any(spread) else None, color=color, linestyle=style, marker="o",
                markersize=4, capsize=2, label=name or None,
            )  # fmt: skip
        if teacher is not None:
            panel.level(axes, teacher.mean, "teacher")
        if log:
            axes.set_xscale("log")
            panel.count_axis(axes.xaxis, [line.x for line in group if line.x is not None])
        axes.set_xlabel(results.x_label)
        axes.set_ylabel(text.metric_name(first.metric))
        if len(curves) > 1:
            panel.legend(axes, len(curves))
        svg = panel.as_svg(axes, f"{recipe}: {first.metric} by {results.x_label}")
    seeds = len(first.values)
    note = f"{seeds} seed{'s' if seeds > 1 else ''} a point, {first.n:,} {first.split} rows."
    return Figure(f"{recipe}: {results.title or results.name}", note, svg)


def gap_figure(title: str, made: Sequence[Line]) -> Figure | None:
    """Gaps with their interval over rows, a dot a line; None without any.

    Where cells are held against one of them, that one's own gap to the teacher is in the note: it has another zero.
    """
    paired = [line for line in made if line.gap is not None]
    shown = [line for line in paired if line.against != "teacher"] or paired
    if not shown:
        return None
    apart = [line for line in paired if line not in shown and line.row == "bitdistill"]
    many = len({line.recipe for line in shown}) > 1
    names = [f"{line.recipe} ({line.label})" if many else line.label for line in shown]

    def draw(axes: object) -> None:
        for index, line in enumerate(shown):
            assert line.gap is not None
            panel.interval(axes, index, line.gap.points, line.gap.low, line.gap.high)
        panel.zero(axes)

    labels = {line.cell: line.label for line in made if line.row == "bitdistill"}
    references = " or ".join(dict.fromkeys(labels.get(line.against, line.against) for line in shown))
    note = f"Points against {references}; bar: 95% interval over rows, mean of the seeds."
    for line in apart:
        recipe = f"{line.recipe}, " if many else ""
        note += f" {recipe}{line.label} against its teacher: {gap_words(line.gap)}."
    return panel.bars(f"{title}: gap", note, names, draw)


def training_curves(runs: Sequence[RunResult], stage: str) -> Figure | None:
    """One stage's loss of every cell against tokens (first seed that has it); None below two cells."""
    first: dict[str, RunResult] = {}
    for run in runs:
        if stage in run.curves:
            first.setdefault(run.label, run)
    for key in AXES_OF_STAGES[stage]:
        drawn = {label: run.curves[stage] for label, run in first.items() if key in run.curves[stage]}
        if len(drawn) >= 2:
            break
    else:
        return None
    with panel.axes() as axes:
        for slot, (label, values) in enumerate(drawn.items()):
            color, style = panel.series(slot)
            axes.plot(values["tokens"], values[key], color=color, linestyle=style, label=label)
        panel.log_if_wide(axes, [value for values in drawn.values() for value in values[key]])
        panel.token_axis(axes, [value for values in drawn.values() for value in values["tokens"]])
        axes.set_ylabel(f"{key} (nats)")
        panel.legend(axes, 1)
        svg = panel.as_svg(axes, f"{stage}: {key} over tokens for {', '.join(drawn)}")
    return Figure(f"{next(iter(first.values())).recipe}, {stage}: {key}", "Means over parts of the run.", svg)
