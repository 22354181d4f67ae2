"""Benchmarks of the library against what its users would otherwise run, in one process and one run.

`views.bench_views` times loaders: `cases` says which views, `peers` who makes them, `race` how turns are taken and
timed, `cores` what everybody may use, `step` how long a training step waits, `table` and `plot` show the result.
"""
