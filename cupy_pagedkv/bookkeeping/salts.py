"""What keeps sequences from sharing blocks, and how it is told in JSON.

>>> as_text(b"tenant"), from_text(["bytes", "74656e616e74"])
(['bytes', '74656e616e74'], b'tenant')
"""

from collections.abc import Callable
from typing import Any, TypeAlias

__all__ = ["Salt", "as_text", "from_text"]

Salt: TypeAlias = str | bytes | int | None


def as_text(salt: Salt) -> list[str]:
    """A salt as JSON has it: its type, and its value. Raises ``TypeError`` for one of a subclass, which is another salt
    than one of its type, and cannot be made anew."""
    kind = type(salt)
    if salt is None:
        return ["None", ""]
    if kind is str:
        return ["str", str(salt)]
    if isinstance(salt, bytes) and kind is bytes:
        return ["bytes", salt.hex()]
    if isinstance(salt, int) and kind in (int, bool):
        return [kind.__name__, hex(salt)]  # decimal digits have a limit, and JSON's numbers have another
    raise TypeError(f"the salt {salt!r} is of {kind}, and only str, bytes, int, bool and None can be saved or sent")


_SALTS: dict[str, Callable[[str], Salt]] = {
    "None": lambda value: None,
    "str": str,
    "bytes": bytes.fromhex,
    "int": lambda value: int(value, 16),
    "bool": lambda value: bool(int(value, 16)),
}


def from_text(text: Any) -> Salt:
    """The salt of which :func:`as_text` gave this. Raises ``ValueError`` where it never does."""
    try:
        kind, value = text
        salt = _SALTS[kind](value)
        if as_text(salt) == text:
            return salt
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"there is no salt {text!r:.99}")
