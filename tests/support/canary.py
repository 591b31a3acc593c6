"""The secrets of the tests: nothing may print them."""

import base64

CANARY = "c4n4ry"
# With every character that has to be escaped somewhere; the canary is in each part of a URL that is split wrongly.
PASSWORD = CANARY + "%@/: #'\"\\${X}%41ä€&?=" + CANARY


def _base64(secret: str) -> set[str]:
    """The characters that the secret has in base64, at each of the three alignments."""
    size = len(secret.encode())
    coded = (base64.b64encode(b"\0" * at + secret.encode()).decode() for at in range(3))
    return {text[-(-at * 8 // 6) : (at + size) * 8 // 6] for at, text in enumerate(coded)}


# Fixtures add the passwords and the token of their servers.
SECRETS = {CANARY} | _base64(CANARY)


def assert_no_secret(text: str) -> None:
    for secret in SECRETS:
        assert secret not in text, text
