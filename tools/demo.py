"""`make demo`: upgrade an empty database and downgrade it again, with the code and the script that the Job runs."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tools import checkout
from tools.network import SETTINGS
from tools.paths import CHART
from tools.postgres import Postgres
from tools.steps import run

SCRIPT = CHART / "files" / "migrate.sh"

UPGRADE = 'op.add_column("hcm_report_metadata", sa.Column("demo", sa.Text(), nullable=True))'
DOWNGRADE = 'op.drop_column("hcm_report_metadata", "demo")'
AUTHOR = dict.fromkeys(("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME"), "demo") | dict.fromkeys(
    ("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"), "demo@localhost"
)

BOLD, GREEN = 1, 32  # of a terminal's SGR codes

interrupted = threading.Event()  # by Ctrl-C


def main() -> None:
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hcm-demo-") as folder:
        tell("An empty PostgreSQL starts, on loopback and in a temporary folder.")
        with Postgres() as server:
            print(server.execute("SELECT version()")[0][0].split(" on ")[0])
            Demo(Path(folder), server).run()
    seconds = time.monotonic() - start
    tell(
        f"That took {seconds:.0f} s, and everything is removed again. Your database is next: 'Deploying' in README.md."
    )


class Demo:
    """A pod's volume in `folder`, and the commands that run in it."""

    def __init__(self, folder: Path, server: Postgres) -> None:
        self.folder, self.server = folder, server
        self.code = folder / "git" / "code"
        self.checkout = folder / "checkout"
        self.repository, self.path = checkout.location()
        url = server.url
        others = {
            name: value for name, value in os.environ.items() if not name.startswith(("DATABASE_URL", "DB_", "PG"))
        }
        self.environment = (
            others
            | AUTHOR
            | {
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "DB_HOST": str(url.host),
                "DB_PORT": str(url.port),
                "DB_NAME": str(url.database),
                "DB_USER": str(url.username),
                "DB_PASSWORD": server.password,
                # The chart's other variables for the script.
                "NAMESPACE": "health",
                "GIT_REF": "HEAD",
                "GIT_PATH": self.path or ".",
                "REQUIRED": "DB_HOST the demo",
                "REQUIREMENTS": "requirements.txt",
            }
        )

    def run(self) -> None:
        tell("Helm starts the Job. Its first container clones this repository: the last commit, without history.")
        self.clone(self.repository)

        tell("The second container installs the pinned requirements, checks their hashes, and migrates the database.")
        try:
            self.migrate("upgrade", "head")
        except RuntimeError as error:
            if (self.folder / "venv/bin/alembic").exists():
                raise
            raise RuntimeError(f"{str(error).strip()}; for pip's settings on this machine, see {SETTINGS}") from None
        # Later runs use the installed requirements, as an image with pre-installed dependencies does.
        self.environment |= {"REQUIREMENTS": "", "PATH": f"{self.folder}/venv/bin:{self.environment['PATH']}"}

        tell("This is what it made: the table of HCM Reports.")
        self.psql(r"\d hcm_report_metadata")

        tell("You upgrade the release again: the Job finds nothing to do, and changes nothing.")
        self.migrate("upgrade", "head")

        tell("You need another column. In your checkout, a new revision gets the next number:")
        self.stream(["git", "clone", "--quiet", "--depth=1", f"file://{self.repository}", self.checkout])
        project = self.checkout / self.path
        self.alembic("revision", "-m", "add_demo_column", cwd=project)
        file = next(project.glob("migrations/versions/*_add_demo_column.py"))
        file.write_text(
            file.read_text().replace("    pass", f"    {UPGRADE}", 1).replace("    pass", f"    {DOWNGRADE}", 1)
        )
        tell(f"You write one line in it, {UPGRADE}, commit, push and deploy:")
        self.stream(["git", "add", "migrations"], cwd=project)
        self.stream(["git", "commit", "--quiet", "--message=add a column"], cwd=self.checkout)
        self.clone(self.checkout)
        self.migrate("upgrade", "head")

        tell("The database knows what was applied: when, by whom and from which commit.")
        self.alembic("current", "--verbose")

        tell("It was the wrong column. You fix forward with a new revision or, as nothing uses it yet, undo it:")
        self.migrate("downgrade", "-1")

    def clone(self, repository: Path) -> None:
        """Lay out the volume as git-sync does: worktrees by commit, and a link to the current one."""
        worktree = self.folder / "git" / ".worktrees" / checkout.commit(repository)
        command = ["git", "clone", "--quiet", "--depth=1", f"file://{repository}"]
        show_command(*command)
        self.stream([*command, worktree])
        self.code.unlink(missing_ok=True)
        self.code.symlink_to(worktree.relative_to(self.code.parent))
        self.environment["GIT_REPO"] = f"file://{repository}"

    def migrate(self, *arguments: str) -> None:
        show_command("migrate.sh", *arguments)
        self.stream(["sh", SCRIPT, *arguments])

    def alembic(self, *arguments: str, cwd: Path | None = None) -> None:
        show_command("alembic", *arguments)
        self.stream(["alembic", *arguments], cwd=cwd or self.code / self.path)

    def psql(self, command: str) -> None:
        show_command("psql", "--command", command)
        url = self.server.url
        server = ["--host", str(url.host), "--port", str(url.port), "--username", str(url.username), str(url.database)]
        arguments = ["--no-psqlrc", "--pset=format=wrapped", *server, "--command", command]
        self.stream([self.server.bin / "psql", *arguments], PGPASSWORD=self.server.password, PAGER="")

    def stream(self, command: Sequence[str | Path], cwd: Path | None = None, **variables: str) -> None:
        run(command, cwd=cwd or self.folder, env=self.environment | variables, stream=True, stop=interrupted)


def styled(code: int, text: str) -> str:
    """The text in a style of the terminal, if it has any and NO_COLOR (no-color.org) is not set."""
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\033[{code}m{text}\033[0m"


def tell(sentence: str) -> None:
    print(f"\n{styled(BOLD, '▶ ' + sentence)}", flush=True)


def show_command(*arguments: str) -> None:
    print(styled(GREEN, f"$ {' '.join(arguments)}"), flush=True)


if __name__ == "__main__":
    # An exception while a process is being started would leave it running.
    signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        if interrupted.is_set():
            sys.exit("\ninterrupted; everything that was started is stopped")
        if isinstance(error, RuntimeError):
            sys.exit(f"\nthe demo failed: {error}")
        raise
