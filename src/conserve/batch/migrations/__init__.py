"""The store's history, one revision a file; alembic applies what is missing at start."""
