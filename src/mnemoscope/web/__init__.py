"""Browsing runs: a small server that reads records and writes nothing. No torch.

``reading`` keeps runs in memory while they grow, ``listing`` filters and sorts, ``access`` says who may look, ``app`` makes pages.
"""
