"""Small random models of the families that people serve, and real engines on them."""
