"""Messages to token ids.  Knows no HTTP, no engine, no platform."""
