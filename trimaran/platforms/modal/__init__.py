"""What the kit knows of Modal: where the adapter is, and how to ask Modal's own command."""
