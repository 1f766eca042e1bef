"""What callers have used of the limits that all replicas share, and which replicas live.  PostgreSQL alone shares."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make the tables."""
    if not _is_postgresql():
        return
    op.create_table(
        "limit_caller",
        sa.Column("caller", sa.Text, primary_key=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("requests", sa.Double),
        sa.Column("tokens", sa.Double),
        sa.Column("day", sa.Date, nullable=False),
        sa.Column("day_tokens", sa.BigInteger, nullable=False),
        sa.Column("day_usd", sa.Double, nullable=False),
        sa.Column("running", postgresql.JSONB, nullable=False),
        sa.Column("granted", sa.Integer),
        postgresql_with={"fillfactor": 50},  # rows change all the time: their next version fits on the same page
    )
    op.create_table(
        "limit_replica",
        sa.Column("replica", sa.Text, primary_key=True),
        sa.Column("until", sa.DateTime(timezone=True), nullable=False),
    )


def downgrade() -> None:
    """Drop them."""
    if _is_postgresql():
        op.drop_table("limit_replica")
        op.drop_table("limit_caller")


def _is_postgresql() -> bool:
    return op.get_context().dialect.name == "postgresql"
