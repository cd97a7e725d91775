"""Turn any Hugging Face causal language model into a 1.58-bit (ternary) model for a task.

    import bitdistill as bd

    student = bd.refine(teacher, calibration_ids)     # stage 1: ternary linears and SubLN
    model = bd.load("runs/demo/packed")               # a model from any bitdistill folder
    codes, scale = bd.ternarize(weight)
    result = bd.run(bd.load_recipe("recipe.yaml"))    # every stage
    engine = bd.Engine("runs/demo/packed")            # the same model natively, without torch

Importing this package also lets `transformers.AutoModelForCausalLM.from_pretrained` read bitdistill folders.
Neither torch nor transformers is imported until a name needs it.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from bitdistill.version import __version__

if TYPE_CHECKING:
    from bitdistill.config import Recipe
    from bitdistill.engine.engine import Engine
    from bitdistill.interop.foreign import load
    from bitdistill.models.surgery import refine
    from bitdistill.pipeline import run
    from bitdistill.quant.ternary import quantize_activations, ternarize
    from bitdistill.recipe import load_recipe

__all__ = [
    "Engine",
    "Recipe",
    "__version__",
    "load",
    "load_recipe",
    "quantize_activations",
    "refine",
    "run",
    "ternarize",
]

# Public name -> module that defines it (PEP 562: imported at first use).
_HOMES = {
    "Engine": "bitdistill.engine.engine",
    "Recipe": "bitdistill.config",
    "load": "bitdistill.interop.foreign",
    "load_recipe": "bitdistill.recipe",
    "quantize_activations": "bitdistill.quant.ternary",
    "refine": "bitdistill.models.surgery",
    "run": "bitdistill.pipeline",
    "ternarize": "bitdistill.quant.ternary",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'bitdistill' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_with_transformers(_: Any) -> None:
    """Runs when transformers loads its quantizers, or now if it has already; importing hf registers."""
    importlib.import_module("bitdistill.models.hf")


class _BeforeTransformers:
    """Sets the hook when transformers is first looked for: wrapt takes a tenth of a second, which `--help` saves.

    It stays on `sys.meta_path`, which must not lose an entry while the import system walks over it.
    """

    hooked = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname == "transformers" and not self.hooked:
            self.hooked = True
            self.hook()

    @staticmethod
    def hook() -> None:
        import wrapt

        wrapt.register_post_import_hook(_register_with_transformers, "transformers.quantizers.auto")


if "transformers" in sys.modules:
    _BeforeTransformers.hook()
else:
    sys.meta_path.insert(0, _BeforeTransformers())
