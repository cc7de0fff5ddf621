"""Data for fine-tuning and its measurements: built-in sets and generators."""
