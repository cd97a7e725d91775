"""Upload of a student's folder to a model hub, with a model card; planned first, so that a dry run shows all of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitdistill import artifact
from bitdistill.errors import ArtifactError, MissingDependencyError, ModelError, UsageError

CARD = "README.md"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_USES = {
    "packed": (
        "bitdistill, or transformers after `import bitdistill`",
        'import bitdistill as bd\n\nengine = bd.Engine("{folder}")\nmodel = bd.load("{folder}")',
        "python",
    ),
    "transformers_bitnet": (
        "plain transformers",
        'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("{repo}")',
        "python",
    ),
    "gguf": ("llama.cpp", "llama-cli -hf {repo}", "bash"),
    "ollama": ("Ollama", "ollama create {name} -f Modelfile\nollama run {name}", "bash"),
}


@dataclass(frozen=True)
class PushFile:
    """A file as it will stand in the repository."""

    name: str
    size: int
    """Bytes."""


@dataclass(frozen=True)
class PushPlan:
    """An upload: what is sent where."""

    folder: Path
    repo: str
    files: tuple[PushFile, ...]
    card: str
    """README.md; it is not taken from the folder."""

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(file.size for file in self.files)


def check_repo(repo: str) -> None:
    """Whether a text is a repository's name.

    Raises:
        UsageError: it is not.
    """
    if not _REPO.fullmatch(repo):
        raise UsageError(f"--push {repo}: a repository is named OWNER/NAME")


def plan_push(folder: Path, packed: Path, repo: str) -> PushPlan:
    """What an upload of `folder` sends: the files of its manifest, the manifest, and a model card.

    Nothing else of the folder goes out, and every file is checked against its SHA-256 first. No network.

    Args:
        folder: a packed student or one of its further formats.
        packed: the packed student, whose card (written by `bitdistill run`) is used if there is one.
        repo: OWNER/NAME.

    Raises:
        ArtifactError: the folder is damaged, or not a student.
        UsageError: `repo` is no repository name.
    """
    check_repo(repo)
    manifest = artifact.verify(folder)
    kind = manifest.get("kind")
    if kind not in _USES:
        raise ArtifactError(f"{folder}: kind {kind!r} is not a student to publish; export it first")
    card = _card(folder, packed, repo, str(kind))
    files = [PushFile(name, int(entry["bytes"])) for name, entry in manifest["files"].items() if name != CARD]
    files.append(PushFile(artifact.MANIFEST, (folder / artifact.MANIFEST).stat().st_size))
    files.append(PushFile(CARD, len(card.encode())))
    return PushPlan(folder, repo, tuple(sorted(files, key=lambda f: f.name)), card)


def push(plan: PushPlan, *, private: bool = False) -> str:
    """Carry out a plan; returns the repository's address. The token is the hub client's own (`hf auth login`).

    Raises:
        MissingDependencyError: `huggingface_hub` is not installed.
        ModelError: the hub refused, or cannot be reached.
    """
    try:
        from huggingface_hub import CommitOperationAdd, HfApi
    except ImportError:
        raise MissingDependencyError('--push needs one more package: pip install "huggingface_hub"') from None
    api = HfApi()
    operations: list[Any] = [
        CommitOperationAdd(
            file.name, plan.card.encode() if file.name == CARD else str(plan.folder / file.name)
        )
        for file in plan.files
    ]
    try:
        url = str(api.create_repo(plan.repo, private=private, exist_ok=True, repo_type="model"))
        # One commit, so that a reader never finds half a student.
        api.create_commit(plan.repo, operations, commit_message="Upload ternary student (bitdistill)")
    except Exception as error:  # the hub client raises many types, httpx's and its own
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"--push {plan.repo}: the hub did not take it ({reason}); check the name and `hf auth login`"
        ) from error
    return url


def _card(folder: Path, packed: Path, repo: str, kind: str) -> str:
    """The student's own card with a section on this format, or a short one when it has none."""
    tool, code, language = _USES[kind]
    code = code.format(repo=repo, name=repo.split("/")[1], folder=f"path/to/{repo.split('/')[1]}")
    use = f"## Use with {tool}\n\n```{language}\n{code}\n```\n"
    written = packed / CARD
    if written.is_file():
        text = written.read_text("utf-8")
        return text if kind == "packed" else f"{text.rstrip()}\n\n{use}"
    manifest = artifact.read_manifest(packed)
    recipe = manifest.get("recipe") or {}
    base = (recipe.get("model") or {}).get("path")
    library = {"packed": "bitdistill", "transformers_bitnet": "transformers"}.get(kind, "gguf")
    front = [
        "---",
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        "tags: [bitdistill, bitnet, ternary, 1.58-bit]",
    ]
    if isinstance(base, str) and _REPO.fullmatch(base):
        front.append(f"base_model: {base}")
    linears = manifest["plan"]["replace"].values()
    ternary = sum(linear["in_features"] * linear["out_features"] for linear in linears)
    facts = f"{ternary:,} ternary weights in {len(linears)} linear layers, family {manifest['family']}"
    title = f"# {repo.split('/')[1]}\n\nA 1.58-bit (ternary) causal language model made with bitdistill: {facts}.\n"
    return "\n".join([*front, "---", "", title, use])
