"""`make demo`: from an empty database to a migrated one and back, with the code and the script that the Job runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tools.paths import ROOT
from tools.postgres import Postgres

SCRIPT = ROOT / "charts" / "hcm-db-migrations" / "files" / "migrate.sh"

UPGRADE = 'op.add_column("hcm_report_metadata", sa.Column("status", sa.String(50), nullable=True))'
DOWNGRADE = 'op.drop_column("hcm_report_metadata", "status")'

stopped = threading.Event()  # by Ctrl-C


def main() -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hcm-demo-") as folder:
        say("An empty PostgreSQL, on loopback and in a temporary folder")
        with Postgres() as server:
            show(server.execute("SELECT version()")[0][0].split(" on ")[0])
            Demo(Path(folder), server).run()
    say(f"All gone again. {time.monotonic() - began:.0f} s; your database is next: see 'Deploying' in README.md")


class Demo:
    """A pod's volume in `folder`, and what happens in it."""

    def __init__(self, folder: Path, server: Postgres) -> None:
        self.folder, self.server = folder, server
        self.code = folder / "git" / "code"
        url = server.url
        others = {
            name: value for name, value in os.environ.items() if not name.startswith(("DATABASE_URL", "DB_", "PG"))
        }
        self.environment = others | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DB_HOST": url.host,
            "DB_PORT": str(url.port),
            "DB_NAME": url.database,
            "DB_USER": url.username,
            "DB_PASSWORD": server.password,
            # What the chart gives the script besides.
            "NAMESPACE": "health",
            "GIT_REPO": f"file://{ROOT}",
            "GIT_REF": "HEAD",
            "GIT_PATH": ".",
            "REQUIRED": "DB_HOST the demo",
            "REQUIREMENTS": "requirements.txt",
        }

    def run(self) -> None:
        say("The hook clones this repository: the last commit, one folder of files, no history")
        self.clone()

        say("The Job's script installs the pinned requirements and migrates")
        self.migrate("upgrade", "head")
        # The next runs use what is installed, as an image that brings its dependencies does.
        self.environment |= {"REQUIREMENTS": "", "PATH": f"{self.folder}/venv/bin:{self.environment['PATH']}"}

        say("The table and its indexes")
        self.psql(r"\d hcm_report_metadata")

        say("Again: nothing to do")
        self.migrate("upgrade", "head")

        say("A new revision: the number is found by itself")
        self.alembic("revision", "-m", "add_status_column")
        file = next(self.code.glob("migrations/versions/*_002_add_status_column.py"))
        file.write_text(
            file.read_text().replace("    pass", f"    {UPGRADE}", 1).replace("    pass", f"    {DOWNGRADE}", 1)
        )
        show(f"{file.name}: {UPGRADE}")
        self.migrate("upgrade", "head")
        self.alembic("history")

        say("And back, by name")
        self.migrate("downgrade", "001")
        self.alembic("current")

    def clone(self) -> None:
        """Lay out the volume as git-sync does: worktrees by commit, and a link to the current one."""
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
        worktree = self.folder / "git" / ".worktrees" / commit.strip()
        command = ["git", "clone", "--quiet", "--depth=1", f"file://{ROOT}"]
        show_command(*command)
        run([*command, worktree])
        self.code.symlink_to(worktree.relative_to(self.code.parent))

    def migrate(self, *arguments: str) -> None:
        show_command("migrate.sh", *arguments)
        run(["sh", SCRIPT, *arguments], cwd=self.folder, env=self.environment)

    def alembic(self, *arguments: str) -> None:
        show_command("alembic", *arguments)
        run(["alembic", *arguments], cwd=self.code, env=self.environment)

    def psql(self, command: str) -> None:
        show_command("psql", "--command", command)
        url = self.server.url
        environment = self.environment | {"PGPASSWORD": self.server.password, "PAGER": ""}
        server = ["--host", url.host, "--port", str(url.port), "--username", url.username, url.database]
        run([self.server.bin / "psql", "--no-psqlrc", *server, "--command", command], env=environment)


def run(command: list[str | Path], **options: Any) -> None:
    """Run a command to its end; when the demo is stopped, it and all that it started end first."""
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        while process.poll() is None:
            if stopped.wait(0.02):
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
    if stopped.is_set() or process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text


def say(text: str) -> None:
    print(f"\n{bold('▶ ' + text)}", flush=True)


def show(text: str) -> None:
    print(f"  {text}", flush=True)


def show_command(*words: str) -> None:
    print(bold(f"  $ {' '.join(words)}"), flush=True)


if __name__ == "__main__":
    # No exception in the midst of starting a process, which would go on unseen.
    signal.signal(signal.SIGINT, lambda *_: stopped.set())
    try:
        main()
    except Exception as error:
        if stopped.is_set():
            sys.exit("\nstopped; what was started is stopped, too")
        if isinstance(error, subprocess.CalledProcessError):
            sys.exit(f"\nthe demo failed at: {' '.join(map(str, error.cmd))}")
        raise
