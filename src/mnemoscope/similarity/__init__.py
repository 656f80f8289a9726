"""Is the output a copy? Descriptors and reference sets."""
