<%!
quoted = lambda text: text.replace("\\", "\\\\").replace('"', '\\"')
literal = lambda value: repr(value).replace("'", '"')  # as ruff formats it
%>\
"""${(message or "") | quoted}

Revision ID: ${up_revision}
Revises: ${down_revision | comma,n}
Create Date: ${create_date}
"""

import sqlalchemy as sa
from alembic import op

revision = ${literal(up_revision)}
down_revision = ${literal(down_revision)}
% if branch_labels:
branch_labels = ${literal(branch_labels)}
% endif
% if depends_on:
depends_on = ${literal(depends_on)}
% endif

# A safe revision (delete these lines when they hold):
# - imports nothing of this project, so that it still runs in ten years;
# - is backward compatible with the running release (expand/contract): a new column is nullable or has a constant
#   default, and what is dropped or renamed is no longer used by that release;
# - has a downgrade() that undoes all of upgrade(), or raises an error that says why that is impossible;
# - indexes a filled table with postgresql_concurrently=True inside `with op.get_context().autocommit_block():`, in a
#   dedicated revision and without IF NOT EXISTS;
# - adds NOT NULL, a foreign key or a check as NOT VALID, and validates it in the next revision;
# - changes many rows in batches, in a dedicated revision;
# - leaves transactions to the runner: no COMMIT, no ROLLBACK, no second connection;
# - holds no lock for long: a statement waits 3 s for one, then the revision is retried;
#   op.execute("SET LOCAL lock_timeout = '10s'") raises that limit for one revision;
# - is never edited after its release: fix forward, in the next revision.


def upgrade() -> None:
    pass


def downgrade() -> None:
    pass
