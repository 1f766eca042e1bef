"""The kit: what runs on the user's machine.  Never imported by ``serve``."""
