"""The optional `gguf` package, imported when a GGUF file is written."""

from __future__ import annotations

from typing import Any

from bitdistill.errors import MissingDependencyError


def gguf() -> Any:
    """The package.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import gguf as package
        import gguf.quants
    except ImportError:
        raise MissingDependencyError(
            'GGUF files need two more packages: pip install "bitdistill[gguf]"'
        ) from None
    return package
