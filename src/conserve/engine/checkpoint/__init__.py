"""Checkpoints of offline requests' KV: what is copied to the host, kept there, and brought back."""
