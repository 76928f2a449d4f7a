"""Installation, imports and the layout of the repository."""
