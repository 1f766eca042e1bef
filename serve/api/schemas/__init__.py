"""Every wire field, named once."""
