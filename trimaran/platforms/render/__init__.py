"""Render: Blueprints and the API."""
