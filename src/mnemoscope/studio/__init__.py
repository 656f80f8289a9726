"""Trying prompts by hand: a score, the words behind it, pictures, and what an edit does to them."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = (
    "False"  # read when gradio is imported and when it makes a page: it would call home
)
