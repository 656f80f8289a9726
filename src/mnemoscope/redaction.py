"""Secrets stay out of records, command lines and messages: tokens, passwords, keys, and who logs in to an address.

A value is secret by the name it is given under (``token``, ``api_key``, ``Authorization``, …) or by its place in an address
(``https://user:password@host``, ``?token=…``). In running text, secrets that this process was given are found by their value as
well. No torch, and nothing else of mnemoscope but its readers.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import quote, unquote

from .parsing import ParseError, parse_yaml

__all__ = [
    "NOT_KEPT", "cleaned", "command_line", "is_complete", "is_secret", "remember", "text", "without_secrets",
]  # fmt: skip

NOT_KEPT = "(not kept)"
"""What stands where a secret stood."""

SHORTEST = 8
"""Characters from which a secret is looked for by its value: shorter ones are parts of ordinary words."""

_WORDS = (
    "token", "password", "passwd", "passphrase", "secret", "credential", "credentials", "authorization", "auth", "cookie",
)  # fmt: skip
_KEYS = ("api", "access", "secret", "private", "account", "openai", "hf")
_NAMES = (*_WORDS, *(f"{kind}key" for kind in _KEYS))
"""Ends of names, in small letters and without signs, whose values are secret."""
_SHORT_NAMES = ("pat", "pwd", "jwt", "bearer")
"""Last words of names whose values are secret."""
_SHAPES = re.compile(r"\b(?:hf_|gh[pousr]_|github_pat_|sk-)[A-Za-z0-9_-]{16,}")
"""Tokens of hosts that are known by how they look."""

_LOGIN = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]{0,20}://)([^\s/?#\"'<>]+)@")
_QUERY = re.compile(r"([?&]([\w.-]+)=)(?!…|\(not kept\))([^&#\s\"'<>]+)")
_GIVEN = re.compile(
    rf"""((?:{"|".join(_WORDS)}|(?:{"|".join(_KEYS)})[_-]?key)(?:["']\s*[:=]|=|(?<=authorization):)\s*)
    ("[^"]*"|'[^']*'|(?:(?:basic|bearer)\s+)?[^\s"'…,;&)}}\]]+)""",
    re.IGNORECASE | re.VERBOSE,
)
"""A secret beside its name in running text: ``token=…``, ``'token': '…'``, ``Authorization: Bearer …``."""

_BYTES = re.compile("[\udc80-\udcff]")
"""What Python has in the place of a byte of the command line that is no UTF-8."""

_known: set[str] = set()


def is_secret(name: str) -> bool:
    """Whether what has this name is secret, which its end says: ``token``, ``HF_TOKEN``, ``--api-keys``, ``GITHUB_PAT``, …"""
    words = re.findall(r"[a-z0-9]+", name.lower())
    end = "".join(words)
    if end == "pwd":  # the shell's name for the working directory
        return False
    return end.endswith(_NAMES) or end.removesuffix("s").endswith(_NAMES) or (bool(words) and words[-1] in _SHORT_NAMES)


def cleaned(value: Any) -> Any:
    """Plain values with :data:`NOT_KEPT` in the place of secrets. Switches (``token: true``) stay, for they tell nothing."""
    return _without(value, "", [])


def remember(value: Any) -> None:
    """Note the secrets among plain values, for instance a loader's options, so that :func:`text` finds them by their value."""
    secrets: list[str] = []
    _without(value, "", secrets)
    _known.update(_spellings(secrets))


def text(words: str) -> str:
    """Running text with :data:`NOT_KEPT` in the place of secrets: by their value, in addresses, and beside a secret's name."""
    words = _without_logins(words, [])  # before values are replaced, because a login may hold one beside a user's name
    for secret in sorted(_known.union(_of_environment(tuple(os.environ.items()))), key=len, reverse=True):
        words = words.replace(secret, NOT_KEPT)
    return _GIVEN.sub(_without_given, _SHAPES.sub(NOT_KEPT, words))


def command_line(words: Sequence[str]) -> str:
    """A command as a shell reads it, with :data:`NOT_KEPT` in the place of secrets: ``--token X``, ``--model-option token=X``."""
    kept: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        valued = before.startswith("-") and "=" not in before and is_secret(before)
        kept.append(NOT_KEPT if valued else _argument(word))
    return " ".join(map(_quoted, kept))


def _quoted(word: str) -> str:
    r"""A word as a shell reads it; bytes that are no UTF-8, which no record could keep, become ``$'\xNN'``."""
    if not _BYTES.search(word):
        return shlex.quote(word)
    plain = word.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return "$'" + _BYTES.sub(_escaped_byte, plain) + "'"


def _escaped_byte(match: re.Match[str]) -> str:
    return f"\\x{ord(match[0]) - 0xDC00:02x}"


def is_complete(value: Any) -> bool:
    """Whether plain values of a record are those that were given: nothing was taken out of them."""
    if isinstance(value, Mapping):
        return all(is_complete(part) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple):
        return all(is_complete(part) for part in value)
    return not isinstance(value, str) or NOT_KEPT not in value


def without_secrets(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are no secrets and hold none: those that a result may depend on."""
    return {k: v for k, v in options.items() if not is_secret(k) and cleaned({k: v}) == {k: v}}


# Values -------------------------------------------------------------------------------------------------------------------


def _without(value: Any, name: str, secrets: list[str]) -> Any:
    """A value that has this name, without its secrets, which are added to the list."""
    if value is None or isinstance(value, bool):
        return value
    if name.lower().endswith("s"):  # of several secrets each is judged; how many tokens there are is none
        if isinstance(value, int | float):
            return value
        if isinstance(value, list):
            return [_without(part, name, secrets) for part in value]
    if is_secret(name) or (_is_headers(name) and not isinstance(value, Mapping)):
        secrets.extend(_leaves(value))
        return NOT_KEPT
    if isinstance(value, Mapping):
        # Headers have names of their server's choice, and proxies those of schemes.
        inherited = name if _is_headers(name) or _is_proxy(name) else None
        return {
            _without_logins(k, secrets) if isinstance(k, str) else k: _without(v, inherited or str(k), secrets)
            for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        parts = [_without(part, name, secrets) for part in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    if not isinstance(value, str):
        return value
    if _is_proxy(name) and "://" not in value and "@" in value:
        login, _, host = value.rpartition("@")
        secrets.append(_password(login))
        return f"{NOT_KEPT}@{host}"
    secrets.extend(_SHAPES.findall(value))
    return _SHAPES.sub(NOT_KEPT, _without_logins(value, secrets))


def _is_headers(name: str) -> bool:
    return name.lower().endswith("headers")


def _is_proxy(name: str) -> bool:
    return name.lower().endswith(("proxy", "proxies"))


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    elif value is not None and not isinstance(value, bool):
        yield str(value)


def _without_logins(words: str, secrets: list[str]) -> str:
    """A text without the logins and the secret parameters of the addresses in it; passwords are added to the list."""
    if "://" in words:
        secrets.extend(_password(login[2]) for login in _LOGIN.finditer(words))
        words = _LOGIN.sub(rf"\1{NOT_KEPT}@", words)
    if "=" not in words:
        return words
    secrets.extend(parameter[3] for parameter in _QUERY.finditer(words) if _is_secret_parameter(parameter[2]))
    return _QUERY.sub(_without_parameter, words)


def _without_parameter(parameter: re.Match[str]) -> str:
    return parameter[1] + NOT_KEPT if _is_secret_parameter(parameter[2]) else parameter[0]


def _is_secret_parameter(name: str) -> bool:
    return is_secret(name) or name.lower() in ("key", "sig") or name.lower().endswith("signature")


def _password(login: str) -> str:
    """Of ``user:password``; a login without a user is all password."""
    user, colon, password = login.partition(":")
    return password if colon else user


def _without_given(found: re.Match[str]) -> str:
    value = found[2].strip("\"'")
    if value == NOT_KEPT or value.lower() in ("true", "false", "none", "null", "(not"):
        return found[0]
    return found[1] + NOT_KEPT


@lru_cache(maxsize=1)
def _of_environment(variables: tuple[tuple[str, str], ...]) -> set[str]:
    """Secrets in the environment: ``HF_TOKEN``, the password of ``HTTPS_PROXY``, …"""
    secrets: list[str] = []
    for name, value in variables:
        _without(value, name, secrets)
    return _spellings(secrets)


def _spellings(secrets: Iterable[str]) -> set[str]:
    """Secrets that are long enough to be looked for, also as they stand in an address."""
    written = {spelling for s in secrets for spelling in (s, quote(s, safe="", errors="surrogateescape"), unquote(s))}
    return {s for s in written if len(s) >= SHORTEST and s != NOT_KEPT}


# Words of a command -------------------------------------------------------------------------------------------------------


def _argument(word: str) -> str:
    """One word of a command; what follows an equals sign may be such a word itself."""
    name, equals, value = word.partition("=")
    if not equals or not re.fullmatch(r"[\w.-]+", name):
        return text(word)
    try:
        given = parse_yaml(value)
    except ParseError:
        given = value
    kept = _without(given, name, [])
    if kept == given:
        return f"{name}={_argument(value)}"
    return f"{name}={kept if isinstance(kept, str) else json.dumps(kept, ensure_ascii=False)}"
