"""The steps of a replay as a picture. Needs the extra ``bench``, which brings matplotlib."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .report import Report, Step

__all__ = ["check", "draw"]


def check(path: str) -> None:
    """Raise what :func:`draw` would, as far as it can be known before: ``RuntimeError`` without matplotlib, ``OSError``
    and ``ValueError`` for a file that it could not write."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise RuntimeError(f"--plot needs matplotlib ({error}); pip install 'cupy_pagedkv[bench]'") from None
    if not Path(path).resolve().parent.is_dir():
        raise FileNotFoundError(f"there is no folder for {path}")
    known = FigureCanvasAgg.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in known:
        raise ValueError(f"--plot {path}: the name must end as a picture's does, such as .png, .pdf or .svg")


def draw(steps: Sequence[Step], report: Report, path: str) -> None:
    """Pool use, requests and the share of prompt tokens that were found, over the steps, or over simulated time."""
    from matplotlib.figure import Figure

    columns = np.array(steps, np.float64).reshape(-1, len(Step._fields)).T
    seconds, live, cached, running, waiting, prompt_tokens, saved, on_host = columns
    has_clock = report.simulated_seconds is not None
    x = seconds if has_clock else np.arange(1, len(steps) + 1)
    figure = Figure(figsize=(9, 7), layout="constrained")
    pool, requests, hits = figure.subplots(3, sharex=True)
    pool.stackplot(x, 100 * live / report.num_blocks, 100 * cached / report.num_blocks, labels=["live", "cached"],
                   colors=["C0", "#bcd4e6"])  # fmt: skip
    pool.set(ylabel="% of the pool's blocks", ylim=(0, 100))
    if report.host_blocks:
        pool.plot(x, 100 * on_host / report.host_blocks, label="host, % of its blocks", color="C3", linewidth=1)
    requests.plot(x, running, label="running", linewidth=1)
    if has_clock:
        requests.plot(x, waiting, label="waiting", linewidth=1)
    requests.set(ylabel="requests", ylim=(0, None))
    hits.plot(x, 100 * saved / np.maximum(1, prompt_tokens), label="so far", color="C2", linewidth=1)
    hits.set(ylabel="% of prompt tokens found", ylim=(0, None), xlabel="simulated seconds" if has_clock else "step")
    for axes in (pool, requests, hits):
        axes.legend(loc="upper left", fontsize=8)
        axes.margins(x=0)
        axes.grid(linewidth=0.3)
    figure.savefig(path, dpi=120)
