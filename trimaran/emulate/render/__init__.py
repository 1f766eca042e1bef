"""Render on this machine: the real server under its rules."""
