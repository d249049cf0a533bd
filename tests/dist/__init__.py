"""What is published: wheel, sdist, metadata, and an environment with nothing else."""
