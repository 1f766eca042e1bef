"""Limits that all replicas have together (``SERVE_LIMITS_SHARED``).

Each replica asks a database before it lets a request in, and goes by its own part while the database is away.  No SQL
here (``serve.records.limit_table`` has it) and no HTTP; all of it runs on the server's event loop.
"""
