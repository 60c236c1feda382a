"""This room is a device's side of a federation: it joins, holds the base and its own model, and
answers.
"""
