"""Waiting for a condition."""

from collections.abc import Callable
from typing import TypeVar

from tools.steps import wait_until

T = TypeVar("T")


def until(condition: Callable[[], T | None], seconds: float = 60) -> T:
    """Wait for a true value and return it; TimeoutError after `seconds`."""
    return wait_until(condition, seconds, "the condition of the test")
