"""This room holds frozen base models: where experts go in a family, and how each is loaded."""
