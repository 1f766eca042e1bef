"""The table of usage records, as the migrations make it."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Date, DateTime, Double, Index, Integer, MetaData, String, Table

from serve.records.row import MAX_TEXT

metadata = MetaData()
VERSION_TABLE = "trimaran_version"
"""Where Alembic notes which migrations have run."""

_text = String(MAX_TEXT)

usage = Table(
    "usage",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("day", Date, nullable=False),
    Column("received_at", DateTime(timezone=True), nullable=False),
    Column("request_id", _text, nullable=False),
    Column("caller", _text, nullable=False),
    Column("method", _text, nullable=False),
    Column("route", _text, nullable=False),
    Column("model", _text),
    Column("status", Integer, nullable=False),
    Column("error_code", _text),
    Column("finish_reason", _text),
    Column("is_stream", Boolean, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("queue_ms", Double),
    Column("ttft_ms", Double),
    Column("total_ms", Double, nullable=False),
    Column("machine_ms", Double),
    Column("cost_usd", Double),
    Index("usage_by_day", "day", "caller"),
)
