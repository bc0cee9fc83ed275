"""The kernels' sources, as compilers get them: parameters ahead, and what they include put in.

CuPy's disk cache takes no notice of edits to files that a source includes; what is part of the source, it sees.
"""

import re
from pathlib import Path
from typing import TypeAlias

__all__ = ["Defines", "source_of", "with_includes"]

Defines: TypeAlias = tuple[tuple[str, str | int], ...]

_INCLUDE = re.compile(r'\s*#\s*include\s+"([^"]*)"\s*')


def source_of(name: str, defines: Defines) -> str:
    """``kernels/name.cu`` behind its parameters, each file that it includes put in once, at its first place.

    ``#line`` makes a compile error name file and line. Raises ``FileNotFoundError`` for an include that is not there.
    """
    file = f"{name}.cu"
    parameters = (f"#define {key} {value}" for key, value in defines)
    return "\n".join([*parameters, *_lines_of((_folder() / file).read_text(), f"kernels/{file}", [])])


def with_includes(code: str, file: str) -> str:
    """``code``, which errors will call ``file``, with what it includes of ``kernels/`` put in as for ours.

    Raises ``FileNotFoundError`` for an include that is not there.
    """
    return "\n".join(_lines_of(code, file, []))


def _lines_of(code: str, file: str, included: list[str]) -> list[str]:
    lines = [f'#line 1 "{file}"']
    for number, line in enumerate(code.splitlines(), 1):
        include = _INCLUDE.fullmatch(line)
        if include is None:
            lines.append(line)
            continue
        path = _folder() / include[1]
        if not path.is_file():
            raise FileNotFoundError(f"{file}:{number}: there is no kernels/{include[1]} to #include")
        if include[1] not in included:
            included.append(include[1])
            lines += _lines_of(path.read_text(), f"kernels/{include[1]}", included)
        lines.append(f'#line {number + 1} "{file}"')
    return lines


def _folder() -> Path:
    # In a wheel `kernels` lies inside the package, in a checkout beside it.
    package = Path(__file__).parent.parent
    return next(folder for folder in (package / "kernels", package.parent / "kernels") if folder.is_dir())
