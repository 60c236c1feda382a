"""A run folder is written and read here: its lines, tensors, summary, and the report made of it."""
