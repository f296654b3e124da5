"""Judges: which of two outputs for one prompt is the better."""
