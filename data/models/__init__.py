"""Models and tokenizers: locating, loading, templates, end tokens, adapters, embeddings."""
