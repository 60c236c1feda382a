"""This room carries downloads to clients and uploads back, for the round loop that is one and the
same over all engines.
"""
