"""Waiting for a condition."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T | None], seconds: float = 60) -> T:
    """Wait for a true value and return it."""
    end, pause = time.monotonic() + seconds, 0.02
    while not (value := condition()):
        assert time.monotonic() < end, f"still {value!r} after {seconds} s"
        time.sleep(pause)
        pause = min(pause * 1.2, 0.25)
    return value
