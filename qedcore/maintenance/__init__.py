"""What changes an image as a whole, while nobody else uses it."""
