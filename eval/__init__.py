"""Decoding, judges, win-rate statistics, text measures and the report."""
