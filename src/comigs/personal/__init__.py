"""What a client does with its own model afterwards."""
