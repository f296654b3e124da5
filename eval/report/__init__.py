"""The HTML report and its exports."""
