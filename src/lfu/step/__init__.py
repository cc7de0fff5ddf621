"""The method: one micro-batch of Learning from the Undesirable (Eq. 1 to 6)."""
