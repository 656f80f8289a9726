"""``python -m mnemoscope``: the command, for launchers that start modules."""

from .cli.main import main

main()
