"""The kernels' sources, as compilers get them: parameters ahead, and what they include put in.

CuPy's disk cache takes no notice of edits to files that a source includes; what is part of the source, it sees.
"""

import re
from pathlib import Path
from typing import TypeAlias

__all__ = ["Defines", "source_of"]

Defines: TypeAlias = tuple[tuple[str, str | int], ...]

_INCLUDE = re.compile(r'\s*#\s*include\s+"([^"]*)"\s*')


def source_of(name: str, defines: Defines) -> str:
    """``kernels/name.cu`` behind its parameters, each file that it includes put in once, at its first place.

    ``#line`` makes a compile error name file and line. Raises ``FileNotFoundError`` for an include that is not there.
    """
    return "\n".join([*(f"#define {key} {value}" for key, value in defines), *_lines_of(f"{name}.cu", [])])


def _lines_of(file: str, included: list[str]) -> list[str]:
    included.append(file)
    lines = [f'#line 1 "kernels/{file}"']
    for number, line in enumerate((_folder() / file).read_text().splitlines(), 1):
        include = _INCLUDE.fullmatch(line)
        if include is None:
            lines.append(line)
            continue
        if not (_folder() / include[1]).is_file():
            raise FileNotFoundError(f"kernels/{file}:{number}: there is no kernels/{include[1]} to #include")
        if include[1] not in included:
            lines += _lines_of(include[1], included)
        lines.append(f'#line {number + 1} "kernels/{file}"')
    return lines


def _folder() -> Path:
    # In a wheel `kernels` lies inside the package, in a checkout beside it.
    package = Path(__file__).parent.parent
    return next(folder for folder in (package / "kernels", package.parent / "kernels") if folder.is_dir())
