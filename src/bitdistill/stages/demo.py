"""The embedded demo: a small pre-trained model, its ternary base, and Banking77 (CC BY 4.0)."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from bitdistill.config import Recipe
from bitdistill.errors import RecipeError
from bitdistill.recipe import load_recipe


def demo_folder() -> Path:
    """Folder of the embedded demo's model, base, data and recipe."""
    return Path(str(files("bitdistill") / "assets" / "demo"))


def demo_recipe(*, seed: int = 0, output_dir: str = "runs", redo_stage2: str | None = None) -> Recipe:
    """The demo's recipe.

    Args:
        seed: of data order; the run's folder is named by it.
        output_dir: where the run's folder goes.
        redo_stage2: a text corpus (file, folder or token shards): train the ternary base anew on it instead
            of starting from the shipped one.

    Raises:
        RecipeError: the corpus does not exist.
    """
    overrides = [f"seed={seed}", f"output_dir={output_dir}"]
    if redo_stage2 is not None:
        if not Path(redo_stage2).exists():
            raise RecipeError(
                f"{redo_stage2}: no such corpus; name a text, jsonl or parquet file, or a folder of them"
            )
        overrides += ["name=demo-stage2", "pretrain.base=null", f"pretrain.corpus={redo_stage2}"]
    return load_recipe(demo_folder() / "recipe.yaml", overrides)
