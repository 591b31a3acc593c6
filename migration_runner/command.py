"""The Alembic command, read from the options that env.py gets: the same for a program and for the command line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from alembic import context
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationStep
from alembic.script import ScriptDirectory
from alembic.util import CommandError, to_tuple


class Needs(Enum):
    """Which database access a command needs."""

    NOTHING = "nothing"  # revision, merge, history, show
    READ = "read"  # current, history -i, show current
    WRITE = "write"  # upgrade, downgrade, stamp


@dataclass(frozen=True)
class Command:
    """One Alembic command."""

    environment: EnvironmentContext
    plan: Callable[..., Iterable[MigrationStep]]  # Alembic's own: from the database's heads to the steps
    needs: Needs
    destination: tuple[str, ...]  # as given: `head`, `+1`, `002`
    shows_current: bool  # `alembic current`, whose `(head)` `helm test` looks for
    purges: bool

    @classmethod
    def from_context(cls) -> Command:
        """Read the command that env.py runs for; raise CommandError for one that is not supported."""
        context.configure(dialect_name="postgresql")
        migration = context.get_context()
        environment = migration.environment_context
        assert environment is not None
        opts = migration.opts
        if (revision := opts.get("revision_context")) and revision.command_args.get("autogenerate"):
            raise CommandError(
                "--autogenerate and check compare models with the database, and there are no models here; write the"
                ' revision yourself: alembic revision -m "what"'
            )
        return cls(
            environment,
            opts["fn"],
            _needs(opts, environment),
            to_tuple(opts.get("destination_rev"), default=()),
            shows_current=bool(opts.get("dont_mutate")),
            purges=bool(opts.get("purge")),
        )

    @property
    def script(self) -> ScriptDirectory:
        """The revision files."""
        return self.environment.script

    @property
    def targets_head(self) -> bool:
        """Whether there is nothing to do in a database that is at the head."""
        return self.destination in (("head",), ("heads",)) and not self.purges

    @property
    def is_relative(self) -> bool:
        """Whether the destination is relative to the current revision, as `+1` and `-1` are."""
        return any(re.search(r"(^|@)[+-]\d+$", target) for target in self.destination)


def _needs(opts: dict[str, Any], environment: EnvironmentContext) -> Needs:
    if "template_args" in opts:
        return Needs.NOTHING
    if "destination_rev" in opts:
        return Needs.WRITE
    options = environment.config.cmd_opts
    # Whether a program wants the current revision marked cannot be read from here, so it is.
    if options is not None and hasattr(options, "rev_range") and not options.indicate_current:
        return Needs.READ if "current" in (options.rev_range or "") else Needs.NOTHING
    return Needs.READ
