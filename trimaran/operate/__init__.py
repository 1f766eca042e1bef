"""``trimaran history``, ``rollback``, ``status`` and ``logs``: the same for every platform."""
