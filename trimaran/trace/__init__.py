"""``trimaran trace``: what a cold start spent its seconds on, up to the first token."""
