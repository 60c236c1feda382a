"""This room is the operator's side of a federation: its folder, its server, and its runs."""
