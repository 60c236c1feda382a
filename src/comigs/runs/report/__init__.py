"""From run folders to pages and tables: reads what a run left behind, trains nothing, needs no
torch.
"""
