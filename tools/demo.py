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

from tools.paths import CHART, ROOT
from tools.postgres import Postgres
from tools.steps import run

SCRIPT = CHART / "files" / "migrate.sh"

UPGRADE = 'op.add_column("hcm_report_metadata", sa.Column("status", sa.String(50), nullable=True))'
DOWNGRADE = 'op.drop_column("hcm_report_metadata", "status")'

interrupted = threading.Event()  # by Ctrl-C


def main() -> None:
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hcm-demo-") as folder:
        heading("An empty PostgreSQL, on loopback and in a temporary folder")
        with Postgres() as server:
            show(server.execute("SELECT version()")[0][0].split(" on ")[0])
            Demo(Path(folder), server).run()
    seconds = time.monotonic() - start
    heading(f"Everything is removed again. {seconds:.0f} s; your database is next: see 'Deploying' in README.md")


class Demo:
    """A pod's volume in `folder`, and the commands that run in it."""

    def __init__(self, folder: Path, server: Postgres) -> None:
        self.folder, self.server = folder, server
        self.code = folder / "git" / "code"
        url = server.url
        others = {
            name: value for name, value in os.environ.items() if not name.startswith(("DATABASE_URL", "DB_", "PG"))
        }
        self.environment = others | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DB_HOST": str(url.host),
            "DB_PORT": str(url.port),
            "DB_NAME": str(url.database),
            "DB_USER": str(url.username),
            "DB_PASSWORD": server.password,
            # The chart's other variables for the script.
            "NAMESPACE": "health",
            "GIT_REPO": f"file://{ROOT}",
            "GIT_REF": "HEAD",
            "GIT_PATH": ".",
            "REQUIRED": "DB_HOST the demo",
            "REQUIREMENTS": "requirements.txt",
        }

    def run(self) -> None:
        heading("The hook clones this repository: the last commit, without history")
        self.clone()

        heading("The Job's script installs the pinned requirements and migrates")
        self.migrate("upgrade", "head")
        # Later runs use the installed requirements, as an image with pre-installed dependencies does.
        self.environment |= {"REQUIREMENTS": "", "PATH": f"{self.folder}/venv/bin:{self.environment['PATH']}"}

        heading("The table and its indexes")
        self.psql(r"\d hcm_report_metadata")

        heading("Again: nothing to do")
        self.migrate("upgrade", "head")

        heading("A new revision: its number is assigned automatically")
        self.alembic("revision", "-m", "add_status_column")
        file = next(self.code.glob("migrations/versions/*_002_add_status_column.py"))
        file.write_text(
            file.read_text().replace("    pass", f"    {UPGRADE}", 1).replace("    pass", f"    {DOWNGRADE}", 1)
        )
        show(f"{file.name}: {UPGRADE}")
        self.migrate("upgrade", "head")
        self.alembic("history")

        heading("And the downgrade, to revision 001")
        self.migrate("downgrade", "001")
        self.alembic("current")

    def clone(self) -> None:
        """Lay out the volume as git-sync does: worktrees by commit, and a link to the current one."""
        worktree = self.folder / "git" / ".worktrees" / run(["git", "rev-parse", "HEAD"], cwd=ROOT).strip()
        command = ["git", "clone", "--quiet", "--depth=1", f"file://{ROOT}"]
        show_command(*command)
        self.stream([*command, worktree])
        self.code.symlink_to(worktree.relative_to(self.code.parent))

    def migrate(self, *arguments: str) -> None:
        show_command("migrate.sh", *arguments)
        self.stream(["sh", SCRIPT, *arguments])

    def alembic(self, *arguments: str) -> None:
        show_command("alembic", *arguments)
        self.stream(["alembic", *arguments], cwd=self.code)

    def psql(self, command: str) -> None:
        show_command("psql", "--command", command)
        url = self.server.url
        server = ["--host", str(url.host), "--port", str(url.port), "--username", str(url.username), str(url.database)]
        arguments = ["--no-psqlrc", *server, "--command", command]
        self.stream([self.server.bin / "psql", *arguments], PGPASSWORD=self.server.password, PAGER="")

    def stream(self, command: Sequence[str | Path], cwd: Path | None = None, **variables: str) -> None:
        run(command, cwd=cwd or self.folder, env=self.environment | variables, stream=True, stop=interrupted)


def bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text


def heading(text: str) -> None:
    print(f"\n{bold('▶ ' + text)}", flush=True)


def show(text: str) -> None:
    print(f"  {text}", flush=True)


def show_command(*arguments: str) -> None:
    print(bold(f"  $ {' '.join(arguments)}"), flush=True)


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
