"""The same policy on a virtual clock."""
