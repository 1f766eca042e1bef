"""``trimaran init`` and ``trimaran config``: one short file, and what is in force."""
