"""The stage `rank`: groups of candidates, ordered by a scorer."""
