"""Low-bit weights."""
