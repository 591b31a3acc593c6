"""Values of a chart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def merged(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """Values as Helm merges two files of them: maps are merged, everything else is replaced."""
    result = dict(base)
    for key, value in overlay.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if nested else value
    return result


def leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything that is no map with further values."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
