"""What flows between the stages: schemas, the store, sources, models and tokenizers, execution."""
