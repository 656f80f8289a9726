"""Programs that the reader allows to run.

A TorchScript file is a program: whoever opens it runs it. No document (index, run, packet, configuration) can allow one, because the
hash that stands in a document is its author's. Only who starts the process can, and names the file and the hash himself:
``mnemoscope --allow-program FILE=SHA256 …``, or :func:`allow_program` in Python. A document that needs a program is then given
the allowed file with that hash, wherever the document says that it lies.
"""

from __future__ import annotations

from pathlib import Path

from .errors import UsageError
from .records.files import hash_file

__all__ = ["allow_program", "allowed_program", "how_to_allow"]

_ALLOWED: dict[str, Path] = {}
"""SHA-256 → file."""


def allow_program(file: str | Path, sha256: str) -> None:
    """Let documents use a program, for as long as this process lives.

    Args:
        file: A TorchScript file.
        sha256: Its SHA-256 as its publisher states it, in hexadecimal digits.

    Raises:
        UsageError: the file cannot be read, or has another hash.
    """
    path = Path(file).expanduser().resolve()
    try:
        digest = hash_file(path)
    except OSError as e:
        raise UsageError(f"the program {file} cannot be read ({e.strerror or e}); check the path.") from None
    if digest != sha256.strip().lower():
        raise UsageError(
            f"the program {file} has SHA-256 {digest}, and {sha256} was given; compare it with what its publisher states."
        )
    _ALLOWED[digest] = path


def allowed_program(sha256: str) -> Path | None:
    """The file with this hash that the reader has allowed; None: there is none."""
    return _ALLOWED.get(sha256.lower())


def how_to_allow(name: str) -> str:
    """What a reader has to do to let a program run that a document asks for, in words."""
    return (
        f"if you have {name} from its publisher, compare its SHA-256 with the one that is stated there, and allow it by "
        f"mnemoscope --allow-program FILE=SHA256 … (in Python: mnemoscope.allow_program)"
    )
