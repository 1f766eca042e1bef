"""``trimaran doctor``: what would go wrong on a platform, found on this machine before it costs minutes or money."""
