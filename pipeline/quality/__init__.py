"""Quality of a run's negatives: figures per source, and warnings of what would make a training on them pointless."""
