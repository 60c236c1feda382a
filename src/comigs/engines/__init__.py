"""Engines carry downloads to clients and uploads back; the round loop is one and the same over all
of them.
"""
