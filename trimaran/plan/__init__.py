"""``trimaran plan``: does a model fit, what does it cost under a load, and how often does a user wait for a boot."""
