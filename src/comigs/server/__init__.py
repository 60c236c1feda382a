"""The server of a run: the round loop, what it asks and accepts, and what it says of the run.

Engines carry its messages; they are not part of it.
"""
