"""Trying prompts by hand: a score, the words behind it, pictures, and what an edit does to them."""
