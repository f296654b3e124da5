"""Judges: which of two outputs for one prompt is better. One module per judge; `registry` names them."""
