"""Forgetting seen while it happens: what a model still knows, measured while any trainer trains it."""
