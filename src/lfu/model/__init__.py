"""The model's parts: finding, reading, loading and saving them."""
