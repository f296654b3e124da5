"""Strategies that make negatives, one file each."""
