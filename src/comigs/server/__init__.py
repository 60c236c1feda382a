"""The server of a run: the round loop, what it asks and accepts, and what it says of the run.
Carriers are engines.
"""
