"""How long a run still waits: one budget for the database, for other runs and for locked tables."""

from __future__ import annotations

import logging
import time

log = logging.getLogger("migration_runner")


class RetryBudget:
    """Seconds that a run may wait in all; the clock starts with the first wait, since work is no waiting."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.reset()

    def reset(self) -> None:
        """Start over: a revision was finished."""
        self.end: float | None = None
        self.delay = 0.25
        self.last_logged = (0.0, "")

    def extend(self, seconds: float) -> None:
        """Leave out `seconds` in which a revision did its own work."""
        if self.end is not None:
            self.end += seconds

    def wait(self, reason: str, max_delay: float = 10) -> bool:
        """Sleep a little longer than the last time, logging why every 10 s; False where the time is up."""
        now, (at, logged) = time.monotonic(), self.last_logged
        self.end = now + self.seconds if self.end is None else self.end
        left = self.end - now
        if left <= 0:
            return False
        if logged != reason or now - at > 10:
            self.last_logged = (now, reason)
            log.info("waiting, up to %.0f s more: %s", left, reason)
        time.sleep(min(self.delay, left))
        self.delay = min(self.delay * 2, max_delay)
        return True
