"""Database address and credentials: missing, wrong, late, and with TLS."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import make_url

from tests.support.database import Database
from tests.support.documents import block
from tests.support.kubernetes import FIRST_JOB, Api, SwitchedService, contacted
from tests.support.release import Release
from tests.support.waiting import until
from tools.cluster import Cluster
from tools.postgres import execute

DATABASE = '(README.md of the chart, "Database")'


def _no_config_map(api: Api) -> str:
    api.core.delete_namespaced_config_map("egov-config", api.namespace)
    return 'DB_HOST (key "db-host" of ConfigMap "egov-config"), DB_NAME (key "db-name" of ConfigMap "egov-config")'


def _no_secret(api: Api) -> str:
    api.core.delete_namespaced_secret("db", api.namespace)
    return 'DB_USER (key "username" of Secret "db"), DB_PASSWORD (key "password" of Secret "db")'


def _no_key_in_the_config_map(api: Api) -> str:
    api.core.patch_namespaced_config_map("egov-config", api.namespace, {"data": {"db-name": None}})
    return 'DB_NAME (key "db-name" of ConfigMap "egov-config")'


def _no_key_in_the_secret(api: Api) -> str:
    api.core.patch_namespaced_secret("db", api.namespace, {"data": {"password": None}})
    return 'DB_PASSWORD (key "password" of Secret "db")'


@pytest.mark.fault(
    "Code and settings",
    fault="A ConfigMap, Secret or key is missing",
    sees='`FAILED: no value for <variable> (key "<key>" of ...): create it in namespace "...", or point "db" or'
    ' "extraEnv" to it ...`, within 30 s',
    state="The database is not contacted",
    do="Create it; the Job's next attempt uses it",
)
@pytest.mark.parametrize(
    "remove", [_no_config_map, _no_secret, _no_key_in_the_config_map, _no_key_in_the_secret], ids=lambda f: f.__name__
)
def test_a_missing_object_or_key_is_named_within_30_seconds(
    release: Release, api: Api, cluster: Cluster, database: Database, remove: Callable[[Api], str]
) -> None:
    missing = remove(api)
    result = release.upgrade()
    assert result.returncode == 1
    fix = f'create it in namespace "{api.namespace}", or point "db" or "extraEnv" to it'
    result.line(f"FAILED: no value for {missing}: {fix} {DATABASE}", times=2)  # of both attempts
    assert api.seconds_to_failure(FIRST_JOB) < 30
    assert api.conditions(FIRST_JOB)["Failed"] == "BackoffLimitExceeded"
    assert not contacted(cluster, database)


@pytest.mark.fault(
    "Code and settings",
    fault="The Secret is created after the Job",
    sees='`FAILED: no value for DB_USER (key "username" of Secret "db"), ...`, then recovers automatically',
    state="Complete",
    do="Nothing",
)
def test_a_secret_that_is_created_late_is_used_by_the_second_attempt(
    release: Release, api: Api, database: Database
) -> None:
    secret = api.core.read_namespaced_secret("db", api.namespace)
    api.core.delete_namespaced_secret("db", api.namespace)
    upgrade = release.start_upgrade()
    until(lambda: any("FAILED: no value for DB_USER" in log for log in api.logs(FIRST_JOB)))
    secret.metadata = {"name": "db"}
    api.core.create_namespaced_secret(api.namespace, secret)
    result = upgrade.wait()
    assert (result.returncode, database.at) == (0, ["001"]), result.text


def test_a_wrong_password_ends_the_job_at_once_and_is_not_shown(release: Release, api: Api, database: Database) -> None:
    api.core.patch_namespaced_secret("db", api.namespace, {"stringData": {"password": "c4n4ry-but-wrong"}})
    result = release.upgrade()
    assert result.returncode == 1
    result.line(
        f"FAILED: cannot connect to database {database.name} at postgres.hcm-fixtures:5432 as {database.role}: ",
        f'FATAL: password authentication failed for user "{database.role}"',
        "; check DB_USER and DB_PASSWORD",
    )
    assert (api.conditions(FIRST_JOB)["Failed"], len(api.pods(FIRST_JOB))) == ("PodFailurePolicy", 1)


@pytest.fixture
def service(api: Api) -> SwitchedService:
    """The database's host in the ConfigMap: a Service without an endpoint yet."""
    service = SwitchedService(api, 5432)
    api.core.patch_namespaced_config_map("egov-config", api.namespace, {"data": {"db-host": service.host}})
    return service


def test_a_database_that_is_not_up_yet_is_waited_for(
    release: Release, api: Api, database: Database, service: SwitchedService
) -> None:
    upgrade = release.start_upgrade()
    waiting = f'INFO waiting, up to 90 s more: connection to server at "{service.host}"'
    until(lambda: any(waiting in log for log in api.logs(FIRST_JOB)))
    service.route_to(api.fixture("postgres"), 5432)
    result = upgrade.wait()
    assert (result.returncode, database.at) == (0, ["001"]), result.text
    result.line(waiting, "Connection refused")


def test_waiting_for_a_database_that_stays_down_times_out(release: Release, api: Api, service: SwitchedService) -> None:
    wait = {"name": "MIGRATION_WAIT_SECONDS", "value": "2"}
    values = {"extraEnv": [*release.values["extraEnv"], wait], "job": {"backoffLimit": 0}}
    result = release.upgrade(values)
    assert (result.returncode, api.seconds_to_failure(FIRST_JOB) < 30) == (1, True)
    result.line(
        "FAILED: could not connect to database ",
        f" at {service.host}:5432 ",
        " within 2 s: ",
        "Connection refused",
        "; check that the server is up and DB_HOST, DB_PORT and the network, or raise MIGRATION_WAIT_SECONDS",
    )
    assert api.conditions(FIRST_JOB)["Failed"] == "BackoffLimitExceeded"


def _signed(cluster: Cluster, subject: str, *options: str) -> str:
    """A key and its certificate, signed by the CA of the fixtures (`ca.crt`)."""
    script = f"""set -e; cd $(mktemp -d); k=/srv/keys; openssl req -x509 -newkey rsa:2048 -nodes -days 30 \
        -subj /CN={subject} {" ".join(options)} -addext basicConstraints=critical,CA:FALSE \
        -CA $k/ca.crt -CAkey $k/ca.key -keyout key -out crt 2>/dev/null; cat key crt"""
    return cluster.kubectl("exec", "-n", "hcm-fixtures", "deploy/server", "--", "sh", "-c", script)


@pytest.fixture
def allow_only(cluster: Cluster, database: Database) -> Iterator[Callable[[str], None]]:
    """Turns TLS on in the server, and adds a rule for the test's role to its pg_hba.conf, before all others."""
    server = make_url(cluster.postgres_url())
    data = execute(server, "SHOW data_directory")[0][0]

    def in_pod(script: str, stdin: str = "") -> None:
        """Run a script in the server's folder; only one test at a time changes its files."""
        command = ("exec", "-i", "-n", "hcm-fixtures", "deploy/postgres", "--", "flock", data, "sh", "-ec")
        cluster.kubectl(*command, f"cd {data}; {script}", input=stdin)
        execute(server, "SELECT pg_reload_conf()")

    def allow(rule: str) -> None:
        pem = _signed(cluster, "postgres", "-addext subjectAltName=DNS:postgres.hcm-fixtures")
        owned = "chown postgres server.key; chmod 600 server.key"
        in_pod("cat > ca.crt", cluster.server_file("ca.crt"))
        in_pod(f"cat > server.crt; cp server.crt server.key; {owned}", pem)  # each is read from the same file
        execute(server, "ALTER SYSTEM SET ssl_ca_file = 'ca.crt'")
        execute(server, "ALTER SYSTEM SET ssl = on")
        in_pod(f"sed -i '1i {rule}' pg_hba.conf")
        until(lambda: execute(server, "SHOW ssl")[0][0] == "on")

    yield allow
    in_pod(f"sed -i '/ {database.role} /d' pg_hba.conf")


@pytest.mark.fault(
    "Code and settings",
    fault="The server requires TLS, or its certificate is not from the configured CA",
    sees="`cannot connect to database ...: ... no encryption; set PGSSLMODE=require ...` or `... certificate verify"
    " failed; set PGSSLROOTCERT to the CA's file ...`, at once, exit 255",
    state="Nothing was changed",
    do="Follow the message: [TLS to a managed database](operations.md#tls-to-a-managed-database)",
)
def test_tls_is_used_if_the_server_requires_it_and_verified_against_the_ca(
    release: Release, api: Api, cluster: Cluster, database: Database, allow_only: Callable[[str], None]
) -> None:
    allow_only(f"hostnossl all {database.role} all reject")
    without_tls = {"extraEnv": [*release.values["extraEnv"], {"name": "PGSSLMODE", "value": "disable"}]}
    refused = release.upgrade(without_tls)
    assert refused.returncode == 1
    refused.line("FAILED: cannot connect to database", "no encryption", "; set PGSSLMODE=require")
    verified = release.example(block("configMap: {name: database-ca}"))
    other = api.core.read_namespaced_config_map("kube-root-ca.crt", api.namespace)
    api.config_map("database-ca", **other.data)
    wrong_ca = release.upgrade(verified)
    assert wrong_ca.returncode == 1
    wrong_ca.line(
        "FAILED: cannot connect to database", "certificate verify failed", "; set PGSSLROOTCERT to the CA's file"
    )
    assert not contacted(cluster, database)
    right = {"data": {"ca.crt": cluster.server_file("ca.crt")}}
    api.core.patch_namespaced_config_map("database-ca", api.namespace, right)
    result = release.upgrade(verified)
    assert (result.returncode, database.at) == (0, ["001"]), result.text


def test_a_client_certificate_from_a_secret_replaces_the_password(
    release: Release, api: Api, cluster: Cluster, database: Database, allow_only: Callable[[str], None]
) -> None:
    allow_only(f"hostssl all {database.role} all cert")
    key, begin, certificate = _signed(cluster, database.role).partition("-----BEGIN CERTIFICATE-----")
    files = {"tls.key": key, "tls.crt": begin + certificate, "ca.crt": cluster.server_file("ca.crt")}
    secret = {"metadata": {"name": "database-tls"}, "type": "kubernetes.io/tls", "stringData": files}
    api.core.create_namespaced_secret(api.namespace, secret)
    api.core.patch_namespaced_secret("db", api.namespace, {"data": {"password": None}})
    values = block("PGSSLKEY")
    default_mode = release.upgrade(release.example(values.replace(", defaultMode: 0440", "")))
    assert default_mode.returncode == 1
    default_mode.line("FAILED: cannot connect to database", "has group or world access", "'defaultMode: 0440'")
    result = release.upgrade(release.example(values))
    assert (result.returncode, database.at) == (0, ["001"]), result.text


def test_a_url_that_refers_to_the_other_variables_can_add_a_parameter(
    release: Release, api: Api, database: Database
) -> None:
    password = "c4n4ry-._~"  # noqa: S105
    database.execute(f"ALTER ROLE {database.role} PASSWORD '{password}'")
    api.core.patch_namespaced_secret("db", api.namespace, {"stringData": {"password": password}})
    values = release.example(block("target_session_attrs"))
    database.execute(f"ALTER ROLE {database.role} SET default_transaction_read_only = on")
    at_once = {"name": "MIGRATION_WAIT_SECONDS", "value": "1"}
    refused = release.upgrade({"extraEnv": [*values["extraEnv"], at_once], "job": {"backoffLimit": 0}})
    assert refused.returncode == 1
    refused.line("FAILED: ", "session is read-only")
    database.execute(f"ALTER ROLE {database.role} RESET default_transaction_read_only")
    result = release.upgrade(values)
    assert (result.returncode, database.at) == (0, ["001"]), result.text
