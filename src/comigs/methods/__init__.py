"""Methods: who shares what, how the server merges, which level learns from what. One small file
each, found by name.
"""
