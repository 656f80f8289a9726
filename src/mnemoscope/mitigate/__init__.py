"""WHAT to do about it: methods that make a model copy less, while it samples. Import from the modules."""
