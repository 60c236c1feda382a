"""One client is trained here on two levels, and measured; nothing here knows of a server."""
