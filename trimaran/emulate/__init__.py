"""Local stand-ins for the control planes of the clouds.  Nothing here is imported by the container."""
