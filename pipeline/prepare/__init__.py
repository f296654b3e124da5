"""Stage `prepare`: from ground-truth rows to tokenized, split examples."""
