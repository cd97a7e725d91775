"""`bitdistill plan`: validate everything and print what a run will do and cost. No torch, no weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from bitdistill.cli.options import AsJson, Overrides, RecipePath, StageName, print_json, stdout

if TYPE_CHECKING:
    from rich.console import Console

    from bitdistill.planning.plan import Plan

SUBLN_WORDS = {
    "paper": "before o and down (paper, sec. 3.1)",
    "every_linear": "before every ternary linear",
    "none": "none",
}


def plan(
    recipe: RecipePath,
    set_: Overrides = None,
    on: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE",
            help="Estimate for another device: cpu, h200, h100, a100, l40s, rtx4090, rtx3090.",
            show_default="this machine",
        ),
    ] = None,
    until: Annotated[
        StageName | None,
        typer.Option(metavar="STAGE", help="Plan a run that stops after this stage.", show_default=False),
    ] = None,
    json_: AsJson = False,
) -> None:
    """Validate recipe, data and model in two seconds; print surgery, sizes, memory and time estimates."""
    from bitdistill.planning.plan import make_plan
    from bitdistill.recipe import load_recipe

    made = make_plan(load_recipe(recipe, set_ or []), on, until=until.value if until else None)
    if json_:
        print_json(made.as_json())
    else:
        _print(made, stdout())


def _print(plan: Plan, console: Console) -> None:
    from rich.text import Text

    layout, recipe = plan.layout, plan.recipe
    lines = [
        f"{recipe.name}: {recipe.task.name} ({recipe.task.kind}), method {recipe.method}",
        "",
        f"Model     {recipe.model.path}  ({layout.family}, {layout.layers} layers)",
        f"          config from {plan.config_from}",
        f"          {layout.parameters:,} parameters: {layout.ternary_parameters:,} become ternary",
        *_teacher_lines(plan),
        "",
        f"Surgery   {sum(plan.ternary.values())} linears become ternary: "
        + ", ".join(f"{count} {kind}" for kind, count in plan.ternary.items()),
        f"          SubLN {SUBLN_WORDS[recipe.refine.subln]}, gains {recipe.refine.gains}",
        "          stays in high precision: "
        + ", ".join(f"{reason} {_count(elements)}" for reason, (_, elements) in plan.kept.items())
        + (" (head tied to the embedding)" if layout.tied else ""),
        f"Stage 2   {_stage2(plan)}",
        "",
        f"Packed    about {_bytes(plan.packed_bytes)} (whole model in bfloat16: "
        f"{_bytes(2 * layout.parameters)}): codes {_bytes(plan.packed['codes'])}, "
        f"embedding {_bytes(plan.packed['embedding'])}, "
        f"other {_bytes(plan.packed['scales'] + plan.packed['other'])}",
        "",
        *(_data_line(source) for source in plan.data),
    ]
    console.print(Text("\n".join(lines)), soft_wrap=True)
    _print_stages(plan, console)


def _teacher_lines(plan: Plan) -> list[str]:
    if plan.teacher is None:
        return []
    shape = f"{plan.teacher.family}, {plan.teacher.layers} layers, {plan.teacher.parameters:,} parameters"
    return [f"Teacher   {plan.recipe.teacher_source.path}  ({shape}): its labels alone are distilled"]


def _stage2(plan: Plan) -> str:
    config = plan.recipe.pretrain
    if config is None:
        return "none: the student goes from surgery to the task"
    if config.base is not None:
        return f"the ternary base {config.base}"
    start = f", from the ternary base {config.start}" if config.start is not None else ""
    return f"{config.objective.upper()} over {_count(config.budget_tokens)} tokens of {config.corpus}{start}"


def _data_line(source: object) -> str:
    from bitdistill.planning.check import Source

    assert isinstance(source, Source)
    rows = "rows unknown until run time" if source.rows is None else f"{source.rows:,} rows"
    checked = f"first {source.checked} checked" if source.checked else "not checked"
    notes = [part for part in (source.note, checked) if part]
    return f"{source.key:<16}  {source.source}: {rows} ({', '.join(notes)})"


def _print_stages(plan: Plan, console: Console) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from bitdistill.planning.estimate import DEVICES

    device = DEVICES[plan.device]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage")
    for heading in ("tokens", "time", "peak memory", "of it activations"):
        table.add_column(heading, justify="right", no_wrap=True)
    for stage in plan.stages:
        cells = (
            _count(stage.tokens),
            _duration(stage.seconds),
            _bytes(stage.peak_bytes),
            _bytes(stage.memory["activations"]),
        )
        table.add_row(stage.name, *cells)
    console.print()
    console.print(
        Text(f"Estimates on {device.name} ({device.basis}); real runs differ, often by a factor of two")
    )
    console.print(table)
    total = sum(stage.seconds for stage in plan.stages)
    console.print(Text(f"About {_duration(total)} in all."))
    short = [
        s.name for s in plan.stages if device.memory_bytes is not None and s.peak_bytes > device.memory_bytes
    ]
    if short:
        advice = "set loop.micro_batch_rows or loop.micro_batch_tokens smaller, or loop.gradient_checkpointing: true"
        console.print(Text(f"Does not fit {device.name}: {', '.join(short)}; {advice}"))
    if recipe_uses_hub(plan):
        console.print(Text("Hub data are read at run time and need: pip install 'bitdistill[hub]'"))


def recipe_uses_hub(plan: Plan) -> bool:
    """Whether any data source or the corpus is a hub name."""
    corpus = plan.recipe.pretrain.corpus if plan.recipe.pretrain else None
    return any(s.source.startswith("hub:") for s in plan.data) or (corpus or "").startswith("hub:")


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit in ("B", "kB") else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def _count(number: float) -> str:
    for unit in ("", "k", "M"):
        if number < 1000:
            return f"{number:.0f}" if not unit else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.2f}B"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 72 else f"{hours / 24:.0f} days"
