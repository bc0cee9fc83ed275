"""What is printed and drawn: tables, bars that are met or missed, the machine, and a plot."""

import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from itertools import product
from typing import Any

import numpy as np

from .attention import DTYPES, READ, TWO_EMPTY, best_torch
from .cases import FLOOR, OPERATIONS, OURS, torch, triton
from .chores import Chore
from .timing import BARE, EMPTY, Row


def table(rows: Iterable[Row]) -> Iterable[str]:
    """A header, and a line for each row as it comes."""
    rivals: list[str] = []
    for row in rows:
        if not rivals:
            rivals = [name for name in row.seconds if name not in (OURS, FLOOR)]
            titles = ["µs", "GB/s", "of copy", *(f"x {name}" for name in rivals)]
            titles += ["eager µs", "bare µs"] if row.eager else []
            yield f"{'operation':<15}{'shape':<16}{'tokens':>7}" + "".join(f"{title:>12}" for title in titles)
        case, seconds = row.case, row.seconds[OURS]
        cells = [f"{seconds * 1e6:.1f}", f"{2 * case.bytes / seconds / 1e9:.1f}", f"{row.share_of_copy():.2f}"]
        cells += [f"{row.ratio_to(name):.2f}" if name in row.seconds else "" for name in rivals]
        cells += [f"{time * 1e6:.1f}" for time in row.eager.values()]
        yield f"{case.operation:<15}{case.shape:<16}{case.tokens:>7}" + "".join(f"{cell:>12}" for cell in cells)


def chore_lines(measured: Iterable[Chore]) -> Iterator[str]:
    yield f"{'many sequences, on the host':<58}{'µs':>9}   times as fast as"
    for chore in measured:
        cells = [f"{name} {chore.ratio_to(name):.2f}" for name in chore.seconds if name != OURS]
        if chore.at_least and not cells:
            cells = ["nothing that is installed"]
        if chore.note:
            cells.append(chore.note)
        yield f"{chore.label:<58}{chore.seconds[OURS] * 1e6:>9.1f}   {', '.join(cells)}".rstrip()


def bar(text: str, at_least: float, measured: Iterable[tuple[float, str]]) -> Iterable[str]:
    results = sorted(measured)
    if results:
        met = sum(value >= at_least for value, _ in results)
        verdict = "met   " if met == len(results) else "MISSED"
        worst, label = results[0]
        yield f"{verdict} {text}: in {met} of {len(results)}; the least is {worst:.2f}, {label}"


def chore_bars(measured: Sequence[Chore]) -> Iterator[str]:
    for chore in measured:
        for name, at_least in chore.at_least.items():
            if name in chore.seconds:
                text = f"{chore.label} >= {at_least:.2g} of {name}"
                yield from bar(text, at_least, [(chore.ratio_to(name), chore.label)])


def bars(rows: Sequence[Row], on_gpu: bool) -> Iterable[str]:
    """What this package sets itself, and by how much it is met or missed."""

    def rivals(row: Row, *names: str) -> list[tuple[float, str]]:
        """Against each of those that took part."""
        times = {name: row.ratio_to(name) for name in names if name in row.seconds}
        return [(ratio, f"{row.case.label} against {name}") for name, ratio in times.items()]

    if on_gpu:
        large = [row for row in rows if row.case.tokens >= 16384 and row.case.shape == "8x128 float16"]
        yield from bar(">= 0.95 of a device copy from 16k tokens, 8x128 float16", 0.95,
                       [(row.share_of_copy(), row.case.label) for row in large])  # fmt: skip
        yield from bar("ahead of indexing, PyTorch and Triton", 1.0,
                       [r for row in rows for r in rivals(row, "indexing", "torch", "triton")])  # fmt: skip
        yield from bar("a graph of one append of 64 tokens within 1.3 of an empty kernel's (as its inverse)", 1 / 1.3,
                       [(row.alone[EMPTY] / row.alone[OURS], row.case.label) for row in rows
                        if row.case.tokens == 64 and row.alone])  # fmt: skip
        yield from bar("an eager call within 2.0 of a bare launch (as its inverse)", 1 / 2.0,
                       [(row.eager[BARE] / row.eager[OURS], row.case.label) for row in rows])  # fmt: skip
        return
    in_blocks = [row for row in rows if row.case.bytes >= 4e6 and row.case.operation in ("scatter blocks", "gather")]
    yield from bar(">= 0.85 of np.copyto from 4 MB, gather and slots through whole blocks", 0.85,
                   [(row.share_of_copy(), row.case.label) for row in in_blocks])  # fmt: skip
    for kernel, text in (("reshape_and_cache", "scatter"), ("gather_cache", "gather")):
        of_kernel = [row for row in rows if OPERATIONS[row.case.operation] == kernel]
        yield from bar(f"{text} >= 1.0 of NumPy indexing from 512 tokens", 1.0,
                       [r for row in of_kernel if row.case.tokens >= 512 for r in rivals(row, "indexing")])  # fmt: skip
        yield from bar(f"{text} >= 1.0 of PyTorch from 512 tokens", 1.0,
                       [r for row in of_kernel if row.case.tokens >= 512 for r in rivals(row, "torch")])  # fmt: skip
        yield from bar(f"{text} >= 1.0 of PyTorch below 512 tokens", 1.0,
                       [r for row in of_kernel if row.case.tokens < 512 for r in rivals(row, "torch")])  # fmt: skip
    single = [row for row in rows if row.case.tokens == 1 and row.case.operation.startswith("scatter")]
    yield from bar("update of one token >= 1.0 of two index_copy_", 1.0,
                   [r for row in single for r in rivals(row, "torch")])  # fmt: skip


def attention_lines(rows: Iterable[Row]) -> Iterator[str]:
    """A header, and a line for each row as it comes."""
    floor = None
    for row in rows:
        if floor is None:
            floor = FLOOR if FLOOR in row.seconds else READ
            yield f"{'attention':<60}{'µs':>10}{'GB/s':>8}   of {floor}, x the best of PyTorch"
        seconds, best = row.seconds[OURS], best_torch(row)
        cells = [f"{row.seconds[floor] / seconds:.2f}", *([f"{row.ratio_to(best):.2f} {best}"] if best else [])]
        yield (f"{row.case.label:<60}{seconds * 1e6:>10.1f}{row.case.bytes / seconds / 1e9:>8.1f}   {', '.join(cells)}")


def attention_bars(rows: Sequence[Row], on_gpu: bool) -> Iterator[str]:
    """What this package sets itself: see bars()."""

    def against_torch(name: str, dtype: str | None = None) -> list[tuple[Row, float]]:
        """Rows of a name and dtype, and how many times as fast as PyTorch they are."""
        of_name = [row for row in rows if row.case.name == name and dtype in (None, row.case.dtype)]
        return [(row, row.ratio_to(best)) for row in of_name if (best := best_torch(row))]

    if on_gpu:
        read = [row for row in rows if (row.case.batch, row.case.length) in ((64, 2048), (8, 16384))]
        yield from bar("decode >= 0.85 of a kernel that reads as much", 0.85,
                       [(row.ratio_to(READ), row.case.label) for row in read if row.case.name == "decode"])  # fmt: skip
        yield from bar("prefill >= 0.6 of PyTorch over K and V that lie in one piece", 0.6,
                       [(ratio, row.case.label) for row, ratio in against_torch("prefill")])  # fmt: skip
        short = [row for row in rows if row.case.name == "decode" and row.case.batch * row.case.length <= 128]
        yield from bar("decode of one short sequence within 2.0 of two empty kernels (as its inverse)", 1 / 2.0,
                       [(row.ratio_to(TWO_EMPTY), row.case.label) for row in short])  # fmt: skip
        return
    for name, dtype in product(("decode", "prefill", "MLA"), DTYPES):
        for text, at_least, longer in (("from", 1.3, True), ("below", 1.0, False)):
            yield from bar(
                f"{name}, {dtype}, >= {at_least} of PyTorch {text} 2,048 tokens in all", at_least,
                [(ratio, row.case.label) for row, ratio in against_torch(name, dtype)
                 if (row.case.batch * row.case.length >= 2048) == longer],
            )  # fmt: skip


def machine(name: str, xp: Any) -> dict[str, str]:
    facts = {
        "backend": name,
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    if torch is not None:
        facts["torch"] = f"{torch.__version__}, {torch.get_num_threads()} threads"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts["cpu"] = f"{cores} cores, {platform.machine()}"
    facts["load"] = f"{os.getloadavg()[0]:.1f}"  # of others, before anything is timed
    if xp is not np:
        properties = xp.cuda.runtime.getDeviceProperties(xp.cuda.Device().id)
        facts["gpu"] = properties["name"].decode()
        facts["driver"] = str(xp.cuda.runtime.driverGetVersion())
        facts["cupy"] = xp.__version__
        if triton is not None:
            facts["triton"] = triton.__version__
    return facts


def plot(rows: Sequence[Row], path: str) -> None:
    """Share of the floor against size: a panel for each operation and shape, a line for each contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    operations = list(dict.fromkeys(row.case.operation for row in rows))
    shapes = list(dict.fromkeys(row.case.shape for row in rows))
    figure, axes = pyplot.subplots(
        len(operations), len(shapes), figsize=(3.2 * len(shapes) + 1, 2.6 * len(operations) + 0.6),
        squeeze=False, sharex=True, sharey=True, layout="constrained",
    )  # fmt: skip
    for i, operation in enumerate(operations):
        for j, shape in enumerate(shapes):
            of_panel = [row for row in rows if (row.case.operation, row.case.shape) == (operation, shape)]
            panel = axes[i][j]
            for name in [OURS, *(n for n in rows[0].seconds if n not in (OURS, FLOOR))]:
                points = [(row.case.bytes, row.share_of_copy(name)) for row in of_panel if name in row.seconds]
                panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name,
                           linewidth=2 if name == OURS else 1)  # fmt: skip
            panel.axhline(1, color="grey", linewidth=0.8, linestyle="--")
            panel.set_xscale("log")
            panel.set_title(f"{operation}, {shape}", fontsize=9)
    figure.supxlabel("bytes of K and V")
    figure.supylabel("share of a copy of the same bytes")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
