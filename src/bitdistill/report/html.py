"""One offline HTML file a run: results, comparison with the teacher, curves, weights, recipe, provenance.

The page needs no script and asks nothing of a network (its Content-Security-Policy forbids both). Text from
data is escaped by the template engine; figures are made here and are the only markup taken as it is.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdistill.report import compare, figures, headline, panel, text
from bitdistill.report.inspect import KindStats, LayerStats, by_kind
from bitdistill.report.run_folder import STAGES, Answer, RunFolder, read_run

if TYPE_CHECKING:
    from bitdistill.eval.results import ResultRow

TEMPLATE = "template.html.j2"
PROMPT_LIMIT, ANSWER_LIMIT, RECIPE_LIMIT = 600, 400, 100_000  # characters; they bound the file's size
KIND_PANELS = 8
Panels = list[panel.Figure]


@dataclass(frozen=True)
class TableRow:
    """One line of the results table."""

    row: ResultRow
    gap: compare.Gap | None
    agreement: float | None
    size_ratio: float | None


@dataclass(frozen=True)
class Sample:
    """One prompt on which teacher and student differ, with every row's answer."""

    where: str
    prompt: str
    reference: str
    answers: list[tuple[str, Answer]]


def write_report(run_dir: str | Path) -> Path:
    """Write `run_dir/report.html` (atomically) from whatever the run has finished; returns its path.

    Raises:
        ArtifactError: `run_dir` is not a run folder, or a file in it cannot be understood.
        StorageError: the report cannot be written.
    """
    run = read_run(run_dir)
    return text.write(run.path / "report.html", render(run))


def render(run: RunFolder) -> str:
    """The whole page as text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bitdistill.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_presentable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "si": text.si,
        "size": text.size,
        "duration": text.duration,
        "count": text.count,
        "number": text.number,
        "signed": text.signed,
        "p_value": text.p_value,
        "metric": text.metric_name,
        "clean": text.clean,
    }
    return environment.get_template(TEMPLATE).render(view(run))


def _presentable(value: Any) -> Any:
    """Text on its way into the page: control characters out (escaping is the engine's); markup as it is."""
    return text.clean(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def view(run: RunFolder) -> dict[str, Any]:
    """Every value the template shows."""
    rows = {row.name: row for row in run.rows}
    teacher_answers = run.answers.get(headline.TEACHER, [])
    pairs = {
        name: compare.pair(teacher_answers, answers)
        for name, answers in run.answers.items()
        if name != headline.TEACHER
    }
    gaps = {
        name: found
        for name, both in pairs.items()
        if (found := compare.row_gap(rows, name, both, run.bootstrap_seed))
    }
    student_pairs = pairs.get(headline.STUDENT, [])
    return {
        "title": f"{_task(run, 'name')} · {_model_name(run)}",
        "task": text.clean(_task(run, "name")),
        "model": text.clean(_model_name(run)),
        "other_teacher": text.clean(_other_teacher(run)),
        "headline": headline.sentences(rows, gaps, run.split),
        "missing": run.missing,
        "table": [_table_row(row, rows.get(headline.TEACHER), gaps, pairs) for row in run.rows],
        "student": rows.get(headline.STUDENT),
        "teacher": rows.get(headline.TEACHER),
        "gap": gaps.get(headline.STUDENT),
        "likelihoods": headline.likelihoods(run.rows),
        "result_panels": _result_panels(run.rows),
        "samples": _samples(run, student_pairs),
        "disagreeing": sum(not compare.same(both) for both in student_pairs),
        "compared": len(student_pairs),
        "confusions": compare.confusions(student_pairs) if _task(run, "kind") == "classification" else [],
        "curves": _curves(run),
        "costs": run.costs,
        "stages": STAGES,
        "base_path": run.base_path if run.base_reused else None,
        "spent": [cost for cost in run.costs if not cost.reused],
        "weights": _weight_panels(run),
        "kind_tables": _kind_tables(run),
        "usage": _usage(run),
        "recipe": text.clean(run.recipe_text, RECIPE_LIMIT),
        "provenance": _provenance(run),
        "files": _files(run),
        "run": run,
    }


def _task(run: RunFolder, key: str) -> str:
    task = run.recipe.get("task")
    return str(task.get(key, "task")) if isinstance(task, dict) else str(task or "task")


def _model_name(run: RunFolder) -> str:
    model = run.recipe.get("model")
    path = str(model.get("path", "model")) if isinstance(model, dict) else str(model or "model")
    return text.model_name(path)


def _other_teacher(run: RunFolder) -> str:
    """The teacher's name where it is another model, else the empty text."""
    teacher = run.recipe.get("teacher")
    return text.model_name(str(teacher.get("path", ""))) if isinstance(teacher, dict) else ""


def _table_row(
    row: ResultRow,
    teacher: ResultRow | None,
    gaps: Mapping[str, compare.Gap],
    pairs: Mapping[str, Sequence[compare.Pair]],
) -> TableRow:
    both = pairs.get(row.name)
    ratio = None
    if teacher is not None and row is not teacher and teacher.size_bytes and row.size_bytes:
        ratio = teacher.size_bytes / row.size_bytes
    same = row.metrics.get("agreement_with_teacher")
    return TableRow(
        row=row,
        gap=gaps.get(row.name),
        agreement=compare.agreement(both) if same is None and both else same,
        size_ratio=ratio,
    )


def _result_panels(rows: Sequence[ResultRow]) -> Panels:
    metric = rows[0].metric if rows else ""
    scores = [(_label(row), row.value, row.low, row.high) for row in rows if row.metric == metric]
    sizes = [(_label(row), row.size_bytes) for row in rows if row.size_bytes]
    return _present(figures.score_bars(scores, text.metric_name(metric)), figures.size_bars(sizes))


def _label(row: ResultRow) -> str:
    return text.clean(row.label or row.name, 60)


def _samples(run: RunFolder, pairs: Sequence[compare.Pair]) -> dict[str, list[Sample]]:
    section = run.recipe.get("report")
    limit = int(section.get("samples", 20)) if isinstance(section, dict) else 20
    by_index = {name: {answer.index: answer for answer in group} for name, group in run.answers.items()}
    labels = {row.name: _label(row) for row in run.rows}

    def sample(teacher: Answer) -> Sample:
        answers = [
            (labels.get(name, name), group[teacher.index])
            for name, group in by_index.items()
            if teacher.index in group
        ]
        return Sample(
            where=text.clean(teacher.where, 200),
            prompt=text.clean(teacher.prompt, PROMPT_LIMIT),
            reference=text.clean(teacher.reference, ANSWER_LIMIT),
            answers=answers,
        )

    groups = compare.disagreements(pairs, max(0, limit))
    return {key: [sample(teacher) for teacher, _ in group] for key, group in groups.items()}


def _curves(run: RunFolder) -> Panels:
    pretrain = run.recipe.get("pretrain")
    objective = pretrain.get("objective", "kl") if isinstance(pretrain, dict) else "kl"
    names = {"lm": "LM loss", "kl": "KL to full precision", "mix": "LM and KL mix"}
    panels = [
        figures.loss_curve(
            log, STAGES[stage], names.get(objective, "loss") if stage == "pretrain" else "loss"
        )
        for stage, log in run.logs.items()
    ]
    if "distill" in run.logs:
        distill = run.recipe.get("distill")
        section = distill if isinstance(distill, dict) else {}
        target = section.get("gamma_ratio", 1.0) if section.get("gamma", "auto") == "auto" else None
        panels.append(figures.loss_terms(run.logs["distill"]))
        panels.append(figures.gamma_balance(run.logs["distill"], target))
    return _present(*panels)


def _weight_panels(run: RunFolder) -> dict[str, Panels]:
    named = {"refined": "before stage 2", "base": "after stage 2", "student": "after stage 3"}
    models = {label: run.stats[name] for name, label in named.items() if name in run.stats}
    kinds = list(dict.fromkeys(layer.kind for layers in models.values() for layer in layers))[:KIND_PANELS]
    histograms = [figures.weight_histogram("All ternary layers", models)]
    histograms += [figures.weight_histogram(f"{kind} projections", _of_kind(models, kind)) for kind in kinds]
    groups = {"before and after": _present(*histograms)}
    last = next((name for name in ("student", "base", "refined") if name in run.stats), None)
    if last:
        layers, label = run.stats[last], named[last]
        attention = [layer for layer in layers if layer.kind in figures.ATTENTION_KINDS]
        rest = [layer for layer in layers if layer.kind not in figures.ATTENTION_KINDS]
        groups["share of zeros by block"] = _present(
            figures.zero_shares(f"Attention, {label}", attention), figures.zero_shares(f"FFN, {label}", rest)
        )
    return {key: panels for key, panels in groups.items() if panels}


def _of_kind(models: Mapping[str, Sequence[LayerStats]], kind: str) -> dict[str, list[LayerStats]]:
    return {label: [layer for layer in layers if layer.kind == kind] for label, layers in models.items()}


def _kind_tables(run: RunFolder) -> dict[str, list[KindStats]]:
    named = {
        "student": "Student, after stage 3",
        "base": "Ternary base, after stage 2",
        "refined": "After stage 1",
    }
    return {label: by_kind(run.stats[name]) for name, label in named.items() if name in run.stats}


def _present(*panels: panel.Figure | None) -> Panels:
    return [panel for panel in panels if panel is not None]


def _usage(run: RunFolder) -> dict[str, str] | None:
    """Commands for the packed student as typed from here; None when it is not exported."""
    if "packed" not in run.manifests:
        return None
    folder = run.path / "packed"
    try:
        shown = str(folder.resolve().relative_to(Path.cwd()))
    except ValueError:
        shown = str(folder.resolve())
    first = next((answers[0] for answers in run.answers.values() if answers), None)
    return {
        "folder": shown,
        "predict": f"bitdistill predict {shlex.quote(shown)} {shlex.quote(_example(run, first))}",
        "inspect": f"bitdistill inspect {shlex.quote(shown)}",
        "python": (
            "import bitdistill  # registers the ternary layers with transformers\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({shown!r})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({shown!r})"
        ),
    }


def _example(run: RunFolder, answer: Answer | None) -> str:
    """A row's own text to type, without the template's fixed ending; a placeholder when there is none."""
    if answer is None:
        return "your text"
    ending = _task(run, "template").rpartition("}")[2]
    line = text.clean(answer.prompt.removesuffix(ending), 80).splitlines()
    return line[0] if line else "your text"


def _provenance(run: RunFolder) -> list[tuple[str, str]]:
    """(name, value) pairs: what made this run; nested values become `a 1, b 2`."""
    entries = [("run folder", run.path.name)]
    entries += [
        (key.replace("_", " "), _flat(value)) for key, value in run.info.items() if value not in (None, "")
    ]
    distilled = run.manifests.get("student", {}).get("distilled_layers")
    if distilled is not None:
        entries.append(("layers distilled by attention relations", _flat(distilled)))
    for row in run.rows:
        if row.predictions_sha256:
            entries.append((f"predictions of {row.label or row.name}, SHA-256", row.predictions_sha256))
    return [(key, text.clean(value, 2000)) for key, value in entries]


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return " ".join(_flat(item) for item in value)
    return str(value)


def _files(run: RunFolder) -> list[tuple[str, int, str]]:
    """(name, bytes, SHA-256) of the packed student's files."""
    manifest = run.manifests.get("packed", {})
    return [(name, entry["bytes"], entry["sha256"]) for name, entry in manifest.get("files", {}).items()]
