"""What the kit knows of each platform: its configuration, its API."""
