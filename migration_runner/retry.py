"""The retry budget: one for the database, for other runs and for locked tables."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger("migration_runner")

MIN_DELAY, MAX_DELAY = 0.25, 10.0  # seconds between two attempts
LOG_INTERVAL = 10  # seconds


class RetryBudget:
    """The seconds that a run may wait until its first revision has finished, and again until each further one.

    The clock starts with the first wait, as work does not count. `before` is called before each wait.
    """

    def __init__(self, seconds: float, before: Callable[[], None] = lambda: None) -> None:
        self.seconds, self.before = seconds, before
        self.reset()

    def reset(self) -> None:
        """Start over, after a finished revision."""
        self.end: float | None = None
        self.delay = MIN_DELAY
        self.last_logged = (0.0, "")

    def extend(self, seconds: float) -> None:
        """Exclude `seconds` in which a revision did its own work."""
        if self.end is not None:
            self.end += seconds

    def wait(self, reason: str, max_delay: float = MAX_DELAY) -> bool:
        """Sleep twice as long as the last time, logging the reason; False if the budget is used up."""
        self.before()
        now, (at, logged) = time.monotonic(), self.last_logged
        self.end = now + self.seconds if self.end is None else self.end
        left = self.end - now
        if left <= 0:
            return False
        if logged != reason or now - at > LOG_INTERVAL:
            self.last_logged = (now, reason)
            log.info("waiting, up to %.0f s more: %s", left, reason)
        time.sleep(min(self.delay, left))
        self.delay = min(self.delay * 2, max_delay)
        return True
