"""Readers of ground-truth data."""
