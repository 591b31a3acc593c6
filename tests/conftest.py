"""Loads the plugins; all helpers and fixtures are in tests/support."""

import pytest

pytest.register_assert_rewrite("tests.support")

pytest_plugins = [
    "tests.support.suite",
    "tests.support.fault_marks",
    "tests.support.database",
    "tests.support.project",
    "tests.support.chart",
    "tests.support.pod_scripts",
    "tests.support.fault_injection",
    "tests.support.cluster",
]
