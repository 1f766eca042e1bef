"""Usage records in a database: one row for each request, written beside the requests, never in their way.

Needs the extra ``records`` and ``SERVE_RECORDS_URL``; without them nothing here is imported.
"""
