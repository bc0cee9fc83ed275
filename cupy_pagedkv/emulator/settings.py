"""What the emulated device is: whether it checks, in which order threads run, and which GPU's limits it has."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

from .architectures import ARCHITECTURES

__all__ = ["Settings", "emulate", "settings"]


@dataclass(frozen=True)
class Settings:
    check: bool = False
    order: str = ""
    """``""``: blocks side by side on the machine's cores; or one of those that :func:`emulate` names."""
    arch: int = 90

    def __post_init__(self) -> None:
        if not re.fullmatch(r"(forward|backward|shuffled:\d{1,18})?", self.order):
            raise ValueError(f"the order of threads must be forward, backward or shuffled:SEED, got {self.order!r}")
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"arch must be one of {', '.join(map(str, ARCHITECTURES))}, got {self.arch!r}")


_settings: ContextVar[Settings] = ContextVar(
    "settings",
    default=Settings(  # noqa: B039 (it is frozen)
        check=os.environ.get("CUPY_PAGEDKV_EMULATE") == "check", order=os.environ.get("CUPY_PAGEDKV_EMULATE_ORDER", "")
    ),
)


def settings() -> Settings:
    """What holds now."""
    return _settings.get()


@contextmanager
def emulate(*, check: bool | None = None, order: str | None = None, arch: int | None = None) -> Iterator[None]:
    """Within it, launches of this thread run on a device that is like this; what is not given stays as it was.

    check
        Every access is checked: a race, an access outside the arrays and the shared memory of the launch, or a read
        of what was not written raises :class:`KernelError`. Compiles the kernel anew, and takes 20 to 100 times as
        long.
    order
        In which order the threads of a block run, and the blocks of a grid, one after another: ``"forward"``,
        ``"backward"`` or ``"shuffled:7"`` with any seed. By default forward, and blocks side by side on the machine's
        cores.
    arch
        Whose limits of shared memory hold, and what ``__CUDA_ARCH__`` is, as ``90`` for sm_90.

    Raises ``ValueError`` for another order or architecture.
    """
    given = {name: value for name, value in (("check", check), ("order", order), ("arch", arch)) if value is not None}
    token = _settings.set(replace(_settings.get(), **given))  # type: ignore[arg-type]
    try:
        yield
    finally:
        _settings.reset(token)
