"""The operator's side of a federation: its folder, its server, and its runs."""
