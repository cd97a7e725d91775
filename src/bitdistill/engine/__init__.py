"""The native engine: a model folder on a CPU, without torch.

    engine = bd.Engine("runs/demo/packed", threads=2)
    print(engine.generate("Once upon a time", max_new_tokens=64).text)

The extension module `_native` holds the kernels and the model (sources in native/); see docs/engine.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitdistill.engine.engine import Engine
    from bitdistill.engine.generation import Generation
    from bitdistill.engine.labels import Answer

__all__ = ["Answer", "Engine", "Generation"]

_HOMES = {
    "Answer": "bitdistill.engine.labels",
    "Engine": "bitdistill.engine.engine",
    "Generation": "bitdistill.engine.generation",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'bitdistill.engine' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value
