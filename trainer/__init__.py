"""Losses, log-probs, the training loop, checkpoints and weight-space merging."""
