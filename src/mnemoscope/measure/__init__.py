"""HOW STRONGLY is this image stored? Measures of one picture, which need no prompt list. Import from the modules."""
