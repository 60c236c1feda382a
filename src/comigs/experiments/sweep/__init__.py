"""`comigs sweep`: every combination of an experiment's axes and seeds, each a run of its own
(docs/sweep.md).

file (what is written) -> plan (the runs, all of them checked) -> run (processes of `comigs run` and
`comigs resume`).
"""
