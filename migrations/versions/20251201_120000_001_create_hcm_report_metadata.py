"""create_hcm_report_metadata

Revision ID: 001
Revises:
Create Date: 2025-12-01 12:00:00+00:00
"""

import sqlalchemy as sa
from alembic import op

revision = "001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "hcm_report_metadata",
        sa.Column("id", sa.Integer, primary_key=True, comment="Primary key"),
        sa.Column("dag_run_id", sa.String(255), nullable=False, comment="Airflow DAG run ID"),
        sa.Column("dag_name", sa.String(100), nullable=False, comment="DAG name"),
        sa.Column("campaign_number", sa.String(100), nullable=False, comment="Campaign identifier"),
        sa.Column("report_name", sa.String(100), nullable=False, comment="Report type"),
        sa.Column("trigger_frequency", sa.String(50), nullable=False, comment="Daily, Weekly or Monthly"),
        sa.Column("trigger_date", sa.TIMESTAMP, nullable=False, comment="When the report was triggered"),
        sa.Column("filestore_id", sa.String(255), nullable=False, comment="UUID from filestore"),
        sa.Column("tenant_id", sa.String(50), nullable=True, comment="Tenant identifier"),
        sa.Column(
            "created_at",
            sa.TIMESTAMP,
            server_default=sa.text("now()"),
            nullable=False,
            comment="Record creation time",
        ),
    )
    op.create_index("idx_hcm_report_campaign", "hcm_report_metadata", ["campaign_number"])
    op.create_index("idx_hcm_report_name", "hcm_report_metadata", ["report_name"])
    op.create_index("idx_hcm_report_frequency", "hcm_report_metadata", ["trigger_frequency"])
    op.create_index("idx_hcm_report_trigger_date", "hcm_report_metadata", ["trigger_date"])
    op.create_index(
        "idx_hcm_report_campaign_report_freq",
        "hcm_report_metadata",
        ["campaign_number", "report_name", "trigger_frequency"],
    )


def downgrade() -> None:
    op.drop_table("hcm_report_metadata")
