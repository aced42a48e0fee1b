"""What only makes pages of docs/ again: run from a clone of the repository, left out of the wheel (pyproject.toml)."""
