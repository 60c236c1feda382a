"""Many runs as tables with spread, paired differences and plots.

discover (runs on disk) -> settings (what is compared with what, and against which baseline) ->
statistics (one tidy frame, and the figures over it) -> caveats, tables, plots -> page, export.
"""
