"""An open image: reading, writing and allocating, by many threads at once."""
