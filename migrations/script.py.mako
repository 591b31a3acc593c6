<%! quoted = lambda text: text.replace("\\", "\\\\").replace('"', '\\"') %>\
"""${(message or "") | quoted}

Revision ID: ${up_revision}
Revises: ${down_revision | comma,n}
Create Date: ${create_date}
"""

import sqlalchemy as sa
from alembic import op

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
% if branch_labels:
branch_labels = ${repr(branch_labels)}
% endif
% if depends_on:
depends_on = ${repr(depends_on)}
% endif

# A safe revision (delete these lines when they hold):
# - imports nothing of this project, so that it still runs in ten years;
# - only adds what the running release does not mind: a new column is nullable or has a constant default, and what is
#   dropped or renamed is not used by the release before;
# - has a downgrade() that undoes all of upgrade(), or raises an error that says why nothing can;
# - indexes a filled table with postgresql_concurrently=True inside `with op.get_context().autocommit_block():`, alone
#   in its revision and without IF NOT EXISTS;
# - adds NOT NULL, a foreign key or a check as NOT VALID, and validates it in the next revision;
# - changes many rows in batches, in a revision of its own;
# - leaves transactions to the runner: no COMMIT, no ROLLBACK, no connection of its own;
# - needs no lock for long: a statement waits 3 s for one, then the revision is retried;
#   op.execute("SET LOCAL lock_timeout = '10s'") raises that for one revision;
# - is never edited after it was released: fix forward, in the next revision.


def upgrade() -> None:
    pass


def downgrade() -> None:
    pass
