"""The secrets of the tests, none of which may be printed anywhere."""

CANARY = "c4n4ry"
# With every character that has to be escaped somewhere.
PASSWORD = CANARY + "%@/: #'\"\\${X}%41ä€&?="

# tests/support/cluster.py adds the cluster's token.
SECRETS = {CANARY}


def assert_no_secret(text: str) -> None:
    for secret in SECRETS:
        assert secret not in text, text
