"""Alembic runs this file.  The connection is given, with its transaction: serve.records.store opened it."""

from __future__ import annotations

from alembic import context

from serve.records.table import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, version_table=VERSION_TABLE
)
with context.begin_transaction():
    context.run_migrations()
