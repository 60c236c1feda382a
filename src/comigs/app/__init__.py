"""This room holds what a person does: the functions of `comigs`, and the command line."""
