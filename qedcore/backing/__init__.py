"""Backing files: what their names mean, what their format is, and what may be opened."""
