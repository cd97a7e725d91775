"""The model card: README.md of a packed student, in the form that model hubs read.

Every figure comes from the run's own files. README.md is not listed in the manifest: it is written after
evaluation, and a student's identity (its hashes) must not depend on its scores.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdistill.errors import ArtifactError
from bitdistill.report import compare, headline, text
from bitdistill.report.run_folder import STAGES, Cost, RunFolder, read_run

if TYPE_CHECKING:
    from bitdistill.eval.results import ResultRow

TEMPLATE = "card.md.j2"
TAGS = ["bitdistill", "bitnet", "ternary", "1.58-bit", "quantized"]
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def model_card(
    *,
    name: str,
    recipe: Mapping[str, Any],
    recipe_text: str,
    rows: Sequence[ResultRow],
    headline_sentences: Sequence[str],
    costs: Sequence[Cost],
    fingerprints: Mapping[str, str],
    files: Mapping[str, Mapping[str, Any]],
    info: Mapping[str, Any],
    licence: str | None,
) -> str:
    """README.md of a packed student as text.

    Args:
        name: title of the card.
        recipe: the resolved recipe; `recipe_text` is the same as YAML.
        rows: results (teacher, baseline, student), percent or perplexity.
        headline_sentences: see report.headline.
        costs: training stages.
        fingerprints: SHA-256 of each data source, by what it is (train, test, ...).
        files: the manifest's files: name -> {"sha256", "bytes"}.
        info: run.json.
        licence: licence of the source model; None when it is not known (the card then says so).
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bitdistill.report", "."),
        autoescape=False,  # Markdown; text from outside goes through `cell` or into a fenced block
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": cell, "size": text.size, "si": text.si, "duration": text.duration}
    environment.filters |= {"number": text.number, "metric": text.metric_name, "count": text.count}
    task = _mapping(recipe.get("task"))
    model = _mapping(recipe.get("model"))
    student = next((row for row in rows if row.name == headline.STUDENT), None)
    return environment.get_template(TEMPLATE).render(
        front_matter=_front_matter(name, str(model.get("path", "")), task, student, licence),
        name=name,
        sentences=headline_sentences,
        base=str(model.get("path", "unknown")),
        base_revision=model.get("revision"),
        teacher=_mapping(recipe.get("teacher")).get("path"),
        task=task,
        labels=dict(_mapping(task.get("labels"))),
        rows=rows,
        likelihoods=headline.likelihoods(rows),
        student=student,
        costs=costs,
        stages=STAGES,
        fingerprints=fingerprints,
        files=files,
        info=info,
        licence=licence,
        recipe=text.clean(recipe_text, 100_000).replace("```", "'''").rstrip(),
        fence=_fence(str(task.get("template", ""))),
    )


def write_card(run_dir: str | Path) -> Path:
    """Write `run_dir/packed/README.md` from the run's results; returns its path.

    Raises:
        ArtifactError: the run has no packed student, or a file of it cannot be understood.
        StorageError: the card cannot be written.
    """
    run = read_run(run_dir)
    if "packed" not in run.manifests:
        raise ArtifactError(f"{run.path / 'packed'}: no packed student yet; run `bitdistill export` first")
    path = run.path / "packed" / "README.md"
    content = model_card(
        name=f"{run.recipe.get('name', run.path.name)} (1.58-bit)",
        recipe=run.recipe,
        recipe_text=run.recipe_text,
        rows=run.rows,
        headline_sentences=_sentences(run),
        costs=run.costs,
        fingerprints=data_fingerprints(run),
        files=run.manifests["packed"]["files"],
        info=run.info,
        licence=source_licence(str(_mapping(run.recipe.get("model")).get("path", ""))),
    )
    return text.write(path, content)


def cell(value: Any) -> str:
    """Text from outside on one line of Markdown, its markup switched off."""
    line = " ".join(text.clean(value, 300).split())
    return re.sub(r"([\\`*_{}\[\]<>|#!~$])", r"\\\1", line)


def source_licence(model_path: str) -> str | None:
    """`license:` in the front matter of the source model's README.md, when the model is a local folder."""
    readme = Path(model_path).expanduser() / "README.md"
    if not model_path or not readme.is_file():
        return None
    front = re.match(r"---\s*\n(.*?)\n---", readme.read_text("utf-8", errors="replace"), flags=re.DOTALL)
    found = (
        re.search(r"^license:[ \t]*([\w.+-]+)[ \t]*$", front.group(1), flags=re.MULTILINE) if front else None
    )
    return found.group(1) if found else None


def data_fingerprints(run: RunFolder) -> dict[str, str]:
    """SHA-256 of the training rows and of the stage-2 corpus, as the manifests recorded them."""
    found: dict[str, str] = {}
    training = _mapping(_mapping(run.manifests.get("student")).get("inputs"))
    base = _mapping(_mapping(run.manifests.get("base")).get("inputs"))
    teacher = _mapping(_mapping(run.manifests.get("teacher")).get("inputs")).get("model")
    other = run.recipe.get("teacher") is not None  # then its source is not the student's
    refined = _mapping(_mapping(run.manifests.get("refined")).get("inputs")).get("model")
    for what, value in (
        ("training rows", _find(training, "train")),
        ("stage-2 corpus", _mapping(base.get("pretrain")).get("corpus")),
        ("source model", refined if other else teacher),
        ("teacher's source model", teacher if other else None),
    ):
        if isinstance(value, str):
            found[what] = value
    return found


def _find(value: Any, key: str) -> Any:
    """First value of `key` in nested mappings."""
    if not isinstance(value, Mapping):
        return None
    if isinstance(value.get(key), str):
        return value[key]
    return next((found for item in value.values() if (found := _find(item, key)) is not None), None)


def _sentences(run: RunFolder) -> list[str]:
    pairs = compare.pair(run.answers.get(headline.TEACHER, []), run.answers.get(headline.STUDENT, []))
    rows = {row.name: row for row in run.rows}
    found = compare.row_gap(rows, headline.STUDENT, pairs, run.bootstrap_seed)
    gaps = {headline.STUDENT: found} if found else {}
    return headline.sentences(rows, gaps, run.split)


def _front_matter(
    name: str, base: str, task: Mapping[str, Any], student: ResultRow | None, licence: str | None
) -> str:
    from ruamel.yaml import YAML

    kind = "text-classification" if task.get("kind") == "classification" else "text-generation"
    matter: dict[str, Any] = {"license": licence} if licence else {}
    if _HUB_NAME.fullmatch(base):
        matter["base_model"] = base
    matter |= {"library_name": "transformers", "pipeline_tag": kind, "tags": TAGS}
    if student is not None:
        metrics = [{"type": student.metric, "value": round(student.value, 4)}]
        dataset = {"name": str(task.get("name")), "type": str(task.get("name"))}
        result = {"task": {"type": kind}, "dataset": dataset, "metrics": metrics}
        matter["model-index"] = [{"name": name, "results": [result]}]
    buffer = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(matter, buffer)
    return buffer.getvalue().rstrip()


def _fence(content: str) -> str:
    """A Markdown code block that its content cannot close."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", content)), default=0))
    return f"{ticks}text\n{text.clean(content, 4000)}\n{ticks}"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
