"""IS this prompt memorized? Detectors, and thresholds from ordinary prompts (``calibrate``)."""
