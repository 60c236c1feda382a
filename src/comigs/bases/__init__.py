"""Frozen base models: where their MLPs and attention linears are, and how to load them. Names only,
no forward pass.
"""
