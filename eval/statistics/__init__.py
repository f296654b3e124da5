"""Intervals, tests, agreement of raters, length control and power."""
