"""The containers of a pod of several targets, run as in the rendered pod, in a folder in place of its volume."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.chart import Helm, containers
from tests.support.pod_scripts import CODE, CREDENTIALS, README, Volume
from tests.support.programs import Result, normalize

Target = dict[str, Any]
KANO = {"name": "kano", "schema": "ng_kano"}
KENYA = {"name": "kenya", "port": 6432, "configMap": {"name": "db-kenya"}, "secret": {"name": "db-kenya"}}
DATABASE = {"db-host": "kenya.example.org", "db-name": "k", "username": "ku", "password": "kp"}
FIRST_LINE = "target kenya (2 of 2)\n"
WRITES = 'printf "001 -> 002\\n" >"$POSITION_FILE"; '
PRINTS = 'printf "%s|" "$DB_HOST" "$DB_PORT" "$DB_NAME" "$DB_USER" "$DB_PASSWORD" "${DB_SCHEMA-unset}"'
SIGTERM = (
    "stopped by SIGTERM while running alembic upgrade head; PostgreSQL rolls back what was not committed; if the Job's"
    ' deadline was exceeded, raise "job.activeDeadlineSeconds" and Helm\'s --timeout together'
)


@pytest.fixture
def job(helm4: Helm) -> Callable[..., dict[str, Any]]:
    """Renders the Job of these targets; none is a canary, and so no failure is asked for at the Kubernetes API."""

    def render(*targets: Target, **values: Any) -> dict[str, Any]:
        values = {"requirements": "", "rollout": {"canary": 0, "maxFailures": None}, **values}
        (found, *_) = [each for each in helm4.render({"targets": targets, **values}) if each["kind"] == "Job"]
        return found

    return render


@pytest.fixture
def pod(volume: Volume, job: Callable, shell: str) -> Callable[..., Result]:
    """Runs the pod of the target kenya: `alembic` is a script, `objects` what the cluster has."""

    def run(alembic: str, target: Target = KENYA, objects: dict | None = None, **references: str) -> Result:
        volume.clone("alembic.ini")
        volume.program("alembic", alembic)
        of = job(KANO, target)
        chosen = volume.target(of, 1, {"db-kenya": DATABASE} if objects is None else objects)
        assert chosen.returncode == 0
        return volume.run(containers(of)["migrate"], shell, **CREDENTIALS | references)

    return run


def test_a_pod_has_its_targets_values_in_place_of_those_of_db(pod: Callable) -> None:
    assert pod(PRINTS) == Result(0, f"{FIRST_LINE}{CODE}kenya.example.org|6432|k|ku|kp|unset|")


def test_what_a_target_leaves_out_is_that_of_db(volume: Volume, job: Callable, shell: str) -> None:
    volume.clone("alembic.ini")
    volume.program("alembic", PRINTS)
    of = job(KANO, KENYA)
    volume.target(of, 0, {"db-kenya": DATABASE})
    assert volume.run(containers(of)["migrate"], shell, **CREDENTIALS) == Result(
        0, f"target kano (1 of 2)\n{CODE}db|5432|n|u|p|ng_kano|"
    )


AWKWARD = [
    "p\n",
    "\n\np \n\n",
    " p ",
    "\"'`p",
    "$HOME $(id) ${x} $$",
    "back\\slash\\n\\",
    "*",
    "-n",
    "a=b c",
    "ünïcode 🚀",
    "%s%d%",
    "# p; exit 1 &",
]


@pytest.mark.parametrize("at", range(0, len(AWKWARD), 4))
def test_a_value_of_a_target_is_unchanged(pod: Callable, at: int) -> None:
    """A reference of a container would not change it either."""
    values = AWKWARD[at : at + 4]
    found = pod(PRINTS, objects={"db-kenya": dict(zip(DATABASE, values, strict=True))})
    host, name, user, password = values
    assert found == Result(0, normalize(f"{FIRST_LINE}{CODE}{host}|6432|{name}|{user}|{password}|unset|"))


@pytest.mark.parametrize("schema", ["a b  c\"'`d\\ $(id) ${x} * ünï ", "-n"])
def test_a_schema_of_a_target_is_unchanged(pod: Callable, schema: str) -> None:
    found = pod('printf "%s|" "$DB_SCHEMA"', {"name": "kenya", "schema": schema})
    assert found == Result(0, f"{FIRST_LINE}{CODE}{schema}|")


@pytest.mark.fault(
    "Code and settings",
    fault="A ConfigMap, Secret or key of a target is missing",
    sees='`FAILED: no value for <variable> (key "<key>" of ...): create it in namespace "...", or point "db", the'
    ' target or "extraEnv" to it ...`, exit 1; no value of another database is used',
    state="The database is not contacted",
    do="Create it, or fix the name in `targets`, deploy again",
)
@pytest.mark.parametrize("value", [None, "", "\n"], ids=["missing", "empty", "a newline"])
@pytest.mark.parametrize(
    ("key", "missing"),
    [
        ("db-host", 'DB_HOST (key "db-host" of ConfigMap "db-kenya")'),
        ("db-name", 'DB_NAME (key "db-name" of ConfigMap "db-kenya")'),
        ("username", 'DB_USER (key "username" of Secret "db-kenya")'),
        ("password", 'DB_PASSWORD (key "password" of Secret "db-kenya")'),
    ],
)
def test_what_a_target_lacks_is_named_and_not_taken_from_db(
    volume: Volume, pod: Callable, key: str, missing: str, value: str | None
) -> None:
    data = {name: text for name, text in {**DATABASE, key: value}.items() if text is not None}
    assert pod("echo not reached", objects={"db-kenya": data}) == Result(
        1,
        f'{FIRST_LINE}{CODE}FAILED: no value for {missing}: create it in namespace "health", or point "db", the target '
        f'or "extraEnv" to it ({README}, "Database")\n',
    )
    assert volume.termination_log.read_text().startswith("position:  -> \nFAILED: no value for ")


def test_everything_that_is_missing_is_named_with_its_own_object(pod: Callable) -> None:
    target = {"name": "kenya", "configMap": {"name": "x", "nameKey": "k"}}
    assert pod("echo not reached", target, {}, DB_USER="").failure == (
        'no value for DB_HOST (key "db-host" of ConfigMap "x"), DB_NAME (key "k" of ConfigMap "x"), DB_USER (key '
        '"username" of Secret "db"): create it in namespace "health", or point "db", the target or "extraEnv" to it '
        f'({README}, "Database")'
    )


def test_a_password_of_extra_env_is_not_unset(volume: Volume, job: Callable, shell: str) -> None:
    """An empty one, for a client certificate."""
    volume.clone("alembic.ini")
    volume.program("alembic", PRINTS)
    of = job(KENYA, extraEnv=[{"name": "DB_PASSWORD", "value": ""}])
    volume.target(of, 0, {"db-kenya": DATABASE})
    found = volume.run(containers(of)["migrate"], shell, DB_HOST="db", DB_NAME="n", DB_USER="u")
    assert found == Result(0, f"target kenya (1 of 1)\n{CODE}kenya.example.org|6432|k|ku||unset|")


@pytest.mark.parametrize(("status", "expected"), [(0, 0), (1, 1), (253, 1), (254, 1), (255, 255)])
def test_the_exit_code_is_alembics_but_not_one_of_the_report(pod: Callable, status: int, expected: int) -> None:
    """A target's 254 would stop the others, and its 253 would be ignored."""
    assert pod(f"exit {status}").returncode == expected


@pytest.mark.parametrize("status", [253, 254])
def test_one_databases_exit_code_is_alembics(volume: Volume, container: Callable, shell: str, status: int) -> None:
    volume.clone("alembic.ini")
    volume.program("alembic", f"exit {status}")
    assert volume.run(container(), shell, **CREDENTIALS) == Result(status, CODE)


@pytest.mark.parametrize(
    ("alembic", "message"),
    [
        (f"{WRITES}echo some log; exit 0", "position: 001 -> 002\n"),
        ("echo some log; exit 0", "position:  -> \n"),
        (f"{WRITES}echo some log; echo 'FAILED: why' >&2; exit 255", "position: 001 -> 002\nFAILED: why"),
        ("echo 'FAILED: why: 001 -> 002' >&2; exit 1", "position:  -> \nFAILED: why: 001 -> 002"),
        (
            ': >"$POSITION_FILE"; echo "FAILED: no space: 1 -> 2" >&2; exit 1',
            "position:  -> \nFAILED: no space: 1 -> 2",
        ),
        (
            f"{WRITES}kill -9 $$",
            "position: 001 -> 002\nFAILED: alembic was killed, most likely out of memory: raise "
            '"resources.limits.memory"',
        ),
        (
            f"{WRITES}printf 'Traceback (most recent call last):\\n  x\\nValueError: why\\n' >&2; exit 1",
            "position: 001 -> 002\nFAILED: alembic upgrade head: ValueError: why (exit status 1)",
        ),
        (f"{WRITES}exit 3", "position: 001 -> 002\n"),
    ],
)
def test_the_termination_message_begins_with_the_revisions_before_and_after(
    volume: Volume, pod: Callable, shell: str, alembic: str, message: str
) -> None:
    found = pod(alembic)
    assert found.stdout.startswith(f"{FIRST_LINE}{CODE}")
    assert volume.termination_log.read_text() == message


def test_a_long_reason_leaves_the_revisions_in_the_termination_message(
    volume: Volume, job: Callable, shell: str
) -> None:
    """Of a longer message, kubelet would keep the end."""
    volume.clone("alembic.ini")
    volume.program("alembic", f"{WRITES}head -c 9000 /dev/zero | tr '\\0' x; exit 1")
    of = job(KANO)
    volume.target(of, 0)
    volume.termination_log.touch()
    assert volume.start(containers(of)["migrate"], shell, **CREDENTIALS).wait().returncode == 1
    written = volume.termination_log.read_text()
    assert (len(written), written[:24]) == (4096, "position: 001 -> 002\nxxx")


def test_after_sigterm_the_revisions_are_those_that_the_runner_has_written(
    volume: Volume, job: Callable, shell: str
) -> None:
    volume.clone("alembic.ini")
    volume.program("alembic", f'{WRITES}touch "$HOME/running"; exec sleep 60')
    of = job(KANO)
    volume.target(of, 0)
    program = volume.start(containers(of)["migrate"], shell, **CREDENTIALS)
    volume.termination_log.touch()
    result = volume.stop(program)
    assert result == Result(143, f"target kano (1 of 1)\n{CODE}{SIGTERM}\n")
    assert volume.termination_log.read_text() == f"position: 001 -> 002\n{SIGTERM}"


def test_a_failed_clone_of_a_targets_pod_is_its_message(volume: Volume, job: Callable, shell: str) -> None:
    of = job(KANO)
    volume.target(of, 0)
    (volume.folder / "git-error").write_text("no route to host")
    no_checkout = 'FAILED: no checkout of "main" from "https://git.example.org/schema"'
    reason = f'{no_checkout}: no route to host ({README}, "Git access")'
    assert volume.run(containers(of)["migrate"], shell, **CREDENTIALS) == Result(1, f"target kano (1 of 1)\n{reason}\n")
    assert volume.termination_log.read_text() == f"position:  -> \n{reason}"


@pytest.mark.parametrize("status", [0, 254, 255])
def test_a_pod_with_a_report_prints_it_and_neither_clones_nor_migrates(
    volume: Volume, job: Callable, shell: str, status: int
) -> None:
    of = job(KANO)
    table = f"target  before  after  seconds  result\nkano    001     002    3        {'migrated' * 400}\n"
    last = 'FAILED: 1 of 2 targets; a "quoted" $(id) \\n `x`'
    (volume.folder / "report").write_text(f"{table}{last}\n")
    (volume.folder / "report-status").write_text(str(status))
    volume.program("git-sync", "echo cloned")
    volume.program("alembic", "echo migrated")
    assert volume.run(containers(of)["git-sync"], shell) == Result(0)
    assert volume.run(containers(of)["migrate"], shell) == Result(status, f"{table}{last}\n")  # no credential is needed
    assert volume.termination_log.read_text() == last


def test_a_variable_of_an_image_is_no_target(volume: Volume, container: Callable, shell: str) -> None:
    volume.clone("alembic.ini")
    volume.program("alembic", 'echo "$TARGET"; exit 254')
    theirs = {"TARGET": "production", "SOURCES": "DB_HOST x", "NUMBER": "1"}
    assert volume.run(container(), shell, **CREDENTIALS, **theirs) == Result(254, f"{CODE}production\n")
    assert volume.termination_log.read_text() == "production"


def test_a_missing_value_names_the_charts_source_whatever_an_image_sets(
    volume: Volume, container: Callable, shell: str
) -> None:
    volume.clone("alembic.ini")
    found = volume.run(container(), shell, **CREDENTIALS | {"DB_HOST": ""}, SOURCES="DB_HOST elsewhere", TARGET="x")
    assert 'no value for DB_HOST (key "db-host" of ConfigMap "egov-config"): ' in found.failure
    assert 'point "db" or "extraEnv" to it' in found.failure
