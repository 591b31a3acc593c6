"""The search for secrets after every test finds one if there is one."""

import secrets
import subprocess
import sys

from tests.conftest import SECRETS
from tests.migrations.helpers import until


def test_a_secret_in_a_process_list_is_found(secrets_in_process_lists: set[str]) -> None:
    secret = secrets.token_hex(16)
    SECRETS.add(secret)  # of this process: other workers do not search for it
    program = "import time; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program, secret]) as process:
        until(lambda: secrets_in_process_lists)
        process.kill()
    SECRETS.remove(secret)
    assert secrets_in_process_lists == {f"{sys.executable} -c {program} {secret} "}
    secrets_in_process_lists.clear()
