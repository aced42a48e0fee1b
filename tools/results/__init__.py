"""What only makes docs/results.md again: run from a clone of the repository, left out of the wheel (pyproject.toml)."""
