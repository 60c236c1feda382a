"""LoRA experts, router and mixture, put on a frozen base from outside and taken off without a
trace.
"""
