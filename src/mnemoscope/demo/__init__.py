"""The bundled world: data with planted duplicates, models trained on it, and the demonstration that runs them."""
