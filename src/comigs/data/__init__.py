"""Text to windows of tokens: sources -> documents -> splits of clients -> token stores on disk ->
batches.
"""
