"""A model's text back to what it means: content, reasoning and tool calls."""
