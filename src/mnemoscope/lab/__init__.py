"""The laboratory: studies on models whose training data are known. ``python -m mnemoscope.lab --help`` lists them."""
