"""``trimaran deploy``: create, update and look after what runs in a cloud."""
