"""What the plugin needs besides images: exports, parameters, threads."""
