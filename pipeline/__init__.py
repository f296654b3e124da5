"""The offline stages (prepare, generate-negatives, rank), the generation engines and the command line."""
