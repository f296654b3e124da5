"""Export of groups as preference data sets."""
