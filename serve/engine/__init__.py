"""Token ids in, token events out.  Knows no HTTP, JSON bodies, pydantic or platform."""
