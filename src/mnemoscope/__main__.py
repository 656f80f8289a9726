"""The command, as installed and as ``python -m mnemoscope``: Ctrl-C is taken over before anything else is imported."""

import os
import sys

from .interrupts import take


def main() -> None:
    """Run the command."""
    take()
    from .cli.main import main as run

    run()


if __name__ == "__main__":
    # Python looks for modules in the working directory first then, which may be a stranger's folder with a ``torch.py``.
    if sys.path and sys.path[0] == os.getcwd():
        del sys.path[0]
    main()
