"""Waiting for a condition."""

from collections.abc import Callable
from typing import TypeVar

from tools.steps import wait_until

T = TypeVar("T")

# Seconds that "at once" may take on a machine that is busy with other tests: far more than on an idle one, and far less
# than what a test lets a program wait for (60 s).
AT_ONCE = 20


def until(condition: Callable[[], T | None], seconds: float = 60) -> T:
    """Wait for a true value and return it; TimeoutError after `seconds`."""
    return wait_until(condition, seconds, "the condition of the test")
