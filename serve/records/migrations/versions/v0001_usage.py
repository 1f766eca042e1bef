"""The table of usage records."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the table and its index."""
    text = sa.String(200)
    op.create_table(
        "usage",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("day", sa.Date, nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False),
        *(sa.Column(name, text, nullable=False) for name in ("request_id", "caller", "method", "route")),
        sa.Column("model", text),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("error_code", text),
        sa.Column("finish_reason", text),
        sa.Column("is_stream", sa.Boolean, nullable=False),
        *(
            sa.Column(name, sa.BigInteger, nullable=False)
            for name in ("prompt_tokens", "cached_tokens", "completion_tokens")
        ),
        sa.Column("queue_ms", sa.Double),
        sa.Column("ttft_ms", sa.Double),
        sa.Column("total_ms", sa.Double, nullable=False),
        sa.Column("machine_ms", sa.Double),
        sa.Column("cost_usd", sa.Double),
    )
    op.create_index("usage_by_day", "usage", ["day", "caller"])


def downgrade() -> None:
    """Drop both."""
    op.drop_table("usage")
