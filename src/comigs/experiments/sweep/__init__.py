"""`comigs sweep` runs every combination of an experiment's axes and seeds (docs/sweep.md).

spec (what the file says) -> plan (the runs, all of them checked) -> run (processes of `comigs run`
and `comigs resume`).
"""
