"""Quality of a run's negatives: figures per source, and warnings of what would make a training on them pointless.

- `schema`: the columns of `quality.parquet`.
- `measure`: `measure_quality`, which reads negatives and groups and computes the figures.
- `warnings`: `quality_warnings`, which says what the figures mean for a training and what to change.
"""
