"""The QED format: geometry, header and tables, and the making of a new image."""
