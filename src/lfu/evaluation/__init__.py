"""What a model can do and what it has forgotten: scores of an in-memory model, and intervals for them."""
