"""Why does this prompt score, and where in the picture does it pull?"""
