"""Executors that do a stage's work: in this process or on Ray."""
