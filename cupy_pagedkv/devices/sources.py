"""The kernels' sources, as compilers get them."""

from pathlib import Path
from typing import TypeAlias

__all__ = ["Defines", "source_of"]

Defines: TypeAlias = tuple[tuple[str, str | int], ...]


def source_of(name: str, defines: Defines) -> str:
    """``kernels/name.cu`` behind its parameters; the ``#line`` makes a compile error name the line in that file."""
    here = Path(__file__).parent.parent
    # In a wheel `kernels` lies inside the package, in a checkout beside it.
    folder = next(f for f in (here / "kernels", here.parent / "kernels") if f.is_dir())
    lines = [f"#define {key} {value}" for key, value in defines]
    return "\n".join([*lines, f'#line 1 "kernels/{name}.cu"', (folder / f"{name}.cu").read_text()])
