"""Many runs into tables with spread, paired differences and plots.

find (runs on disk) -> groups (datasets and settings) -> figures (with stats, baseline, costs) ->
tables, points, notes -> compared (all of it) -> page, texts, plots -> write.
"""
