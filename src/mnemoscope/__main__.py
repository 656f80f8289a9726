"""``python -m mnemoscope``: the command, for launchers that start modules."""

import os
import sys

# Python looks for modules in the working directory first then, which may be a stranger's folder with a ``torch.py``.
if sys.path and sys.path[0] == os.getcwd():
    del sys.path[0]

from .cli.main import main

main()
