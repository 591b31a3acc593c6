"""The waiting and the running of programs that the tools share."""

import sys
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.waiting import AT_ONCE
from tools.steps import run, wait_until

PRINT = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"


def test_wait_until_returns_the_first_true_result() -> None:
    results: Iterator[list[int]] = iter([[], [], [7]])
    assert wait_until(lambda: next(results), 5, "a number") == [7]


def test_wait_until_names_what_it_waited_for_and_the_last_ignored_exception() -> None:
    with pytest.raises(TimeoutError) as caught:
        wait_until(lambda: 0, 0.1, "the server")
    assert str(caught.value) == "timed out after 0.1 s waiting for the server"
    with pytest.raises(TimeoutError) as caught:
        wait_until(lambda: {}["key"], 0.1, "the server", ignore=(KeyError,))
    assert str(caught.value) == "timed out after 0.1 s waiting for the server: 'key'"
    with pytest.raises(KeyError):
        wait_until(lambda: {}["key"], 5, "the server")


def test_a_failed_command_is_reported_with_the_end_of_its_output() -> None:
    with pytest.raises(RuntimeError) as caught:
        run([sys.executable, "-c", PRINT], "a step")
    assert str(caught.value) == "a step: exit code 3\nout\nerr"


def test_an_event_stops_a_command_and_everything_it_started() -> None:
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(["sh", "-c", "sleep 60 & sleep 60"], stop=stop)
    assert time.monotonic() - start < AT_ONCE
