"""This room turns text into windows of tokens: sources, documents, splits, stores, batches."""
