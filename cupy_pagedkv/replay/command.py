"""``python -m cupy_pagedkv [TRACE]``: replay a trace of LLM requests through the cache, and check every byte."""

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np

from ..bookkeeping.allocator import BlockAllocator
from ..bookkeeping.dtypes import as_dtype
from . import plot
from .replay import MismatchError, OversizedRequestError, replay
from .report import Step, as_text
from .traces import read_trace, synthetic_trace

_DEFAULT_POOL_TOKENS = 2**18
_DEFAULT_SYNTHETIC_REQUESTS = 500


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a size like 512MiB, 2GB or 1000000, got {text!r}")
    power = " kmgt".index(match[2] or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not (math.isfinite(seconds) and seconds >= 0):
        raise argparse.ArgumentTypeError(f"expected a number of seconds of at least 0, got {text!r}")
    return seconds


def _dtype(text: str) -> np.dtype[Any]:
    try:
        return as_dtype(text)
    except TypeError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cupy_pagedkv",
        description="Replay a trace of LLM requests through a paged KV cache with continuous batching, check every "
        "byte that comes out, and report how much memory the traffic needs.",
        epilog="Without --step-time and --step-time-per-token the replay is saturated: a request starts as soon as "
        "blocks are free, whatever its timestamp.",
    )
    parser.add_argument(
        "trace",
        nargs="?",
        help="Azure's CSV (TIMESTAMP,ContextTokens,GeneratedTokens) or Mooncake's JSONL, told apart by their content; "
        "without it, a synthetic trace",
    )
    pool = parser.add_mutually_exclusive_group()
    pool.add_argument(
        "--num-blocks", type=_positive, help=f"blocks in the pool; by default for {_DEFAULT_POOL_TOKENS} tokens"
    )
    pool.add_argument("--memory", type=_size, help="memory for K and V of all layers instead, such as 512MiB or 2GB")
    parser.add_argument(
        "--host-blocks", type=_count, default=0, metavar="N",
        help="room for so many more blocks in host memory: evicted ones are found there, and what is preempted is "
        "parked there instead of computed again (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--block-size", type=_positive, default=16, help="tokens in a block (%(default)s)")
    parser.add_argument("--layers", type=_positive, default=2, help="layers (%(default)s)")
    parser.add_argument("--heads", type=_positive, default=2, help="KV heads (%(default)s)")
    parser.add_argument("--head-dim", type=_positive, default=16, help="elements of a head (%(default)s)")
    parser.add_argument(
        "--dtype", type=_dtype, default="float16", help="of K and V; bfloat16 and float8_* too (%(default)s)"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N; by default a GPU where there is one")
    parser.add_argument(
        "--max-num-seqs", type=_positive, default=256, help="requests that run at once, at most (%(default)s)"
    )
    parser.add_argument(
        "--limit",
        type=_positive,
        help=f"replay only the first so many requests; a synthetic trace has {_DEFAULT_SYNTHETIC_REQUESTS}",
    )
    parser.add_argument(
        "--skip-oversized", action="store_true", help="leave out requests that can never fit the pool, and count them"
    )
    parser.add_argument(
        "--no-prefix-caching", action="store_true", help="let no prompt share the blocks of another that begins alike"
    )
    parser.add_argument(
        "--step-time", type=_seconds, default=0.0, metavar="SECONDS",
        help="simulated time that a step takes; then requests wait for their timestamps and for each other",
    )  # fmt: skip
    parser.add_argument(
        "--step-time-per-token", type=_seconds, default=0.0, metavar="SECONDS", help="and for each token it computes"
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="draw pool use, running requests and hit rate over the steps, as a PNG, PDF or SVG",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _progress_bar(total: int) -> Any:
    """A bar on a terminal, if tqdm is there; nothing in a pipe."""
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            return tqdm(total=total, unit="request", leave=False)
    return nullcontext()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 for bytes that differ, 2 for input that cannot be used."""
    parser = _parser()
    options = parser.parse_args(arguments)
    steps: list[Step] = []
    try:
        if options.plot is not None:
            plot.check(options.plot)  # better known now than when all has run
        if options.trace is None:
            trace = "synthetic"
            requests = synthetic_trace(options.limit or _DEFAULT_SYNTHETIC_REQUESTS)
        else:
            trace = options.trace
            requests = read_trace(trace)[: options.limit]
        if options.memory is not None:
            one_block = BlockAllocator(1, options.block_size)
            block = options.layers * one_block.block_memory_size(options.heads, options.head_dim, options.dtype)
            num_blocks = options.memory // block
            if num_blocks == 0:
                raise ValueError(f"a block takes {block} bytes in all layers, but --memory is {options.memory}")
        else:
            num_blocks = options.num_blocks or max(1, _DEFAULT_POOL_TOKENS // options.block_size)
        with _progress_bar(len(requests)) as bar:
            report = replay(
                requests,
                num_blocks=num_blocks,
                block_size=options.block_size,
                num_layers=options.layers,
                num_heads=options.heads,
                head_dim=options.head_dim,
                dtype=options.dtype,
                device=options.device,
                prefix_caching=not options.no_prefix_caching,
                host_blocks=options.host_blocks,
                max_num_seqs=options.max_num_seqs,
                skip_oversized=options.skip_oversized,
                step_time=options.step_time,
                step_time_per_token=options.step_time_per_token,
                on_step=steps.append,
                **({"on_progress": bar.update} if bar is not None else {}),
            )
        if options.plot is not None:
            plot.draw(steps, report, options.plot)
    except MismatchError as mismatch:
        print(f"{parser.prog}: wrong bytes: {mismatch}", file=sys.stderr)
        return 1
    except OversizedRequestError as error:
        where = f"{options.trace}:{error.request.line}: " if options.trace else ""
        print(f"{parser.prog}: error: {where}{error} (--skip-oversized)", file=sys.stderr)
        return 2
    except (OSError, ValueError, TypeError, RuntimeError, MemoryError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    print(json.dumps(asdict(report), indent=2) if options.json else as_text(trace, report))
    return 0
