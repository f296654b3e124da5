"""Conversion of models in other formats to safetensors."""
