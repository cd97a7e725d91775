"""The one native test that is never skipped: without the engine the others skip, and a run would look well."""

from __future__ import annotations


def test_the_engine_is_built() -> None:
    from bitdistill.engine import _native

    assert "scalar" in _native.available_isas()
