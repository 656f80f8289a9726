"""IN FRONT of a model: detect, decide and act while a pipeline serves. Import from the modules."""
