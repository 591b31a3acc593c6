"""Waiting for a condition."""

from collections.abc import Callable
from typing import TypeVar

from tools.steps import wait_until

T = TypeVar("T")

# Seconds that "at once" may take on a machine that is busy with other tests: more than twice what the slowest needed
# there, and far less than what a test lets a program wait for.
AT_ONCE = 10


def until(condition: Callable[[], T | None], seconds: float = 60) -> T:
    """Wait for a true value and return it; TimeoutError after `seconds`."""
    return wait_until(condition, seconds, "the condition of the test")
