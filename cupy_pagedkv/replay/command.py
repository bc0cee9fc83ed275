"""``python -m cupy_pagedkv [TRACE]``: replay a trace of LLM requests through the cache, and check every byte."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np

from ..bookkeeping.allocator import BlockAllocator
from ..bookkeeping.dtypes import as_dtype
from .replay import MismatchError, OversizedRequestError, Report, replay
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
        epilog="The replay is saturated: a request starts as soon as blocks are free, whatever its timestamp.",
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


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            break
        count /= 1000
    else:
        unit = "TB"
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"


def _rate(count: int, seconds: float) -> str:
    return f"{_bytes(count)} at {count / 1e9 / seconds if seconds else 0:.2f} GB/s"


def _prefix_cache(report: Report) -> str:
    if not report.prefix_caching:
        return "off"
    return (
        f"{report.hits:,} prompts hit, {report.tokens_saved:,} tokens saved ({report.hit_rate:.1%}); "
        f"{report.evictions:,} evictions, {report.copies:,} copies"
    )


def _text(trace: str, report: Report) -> str:
    rows = {
        "trace": trace,
        "device": f"{report.device} ({report.backend} backend)",
        "requests": f"{report.requests:,} completed, {report.skipped:,} skipped",
        "tokens": f"{report.tokens_in:,} in, {report.tokens_out:,} out",
        "steps": f"{report.steps:,}, at most {report.peak_running:,} requests running",
        "preemptions": f"{report.preemptions:,}, {report.recomputed_tokens:,} tokens recomputed",
        "prefix cache": _prefix_cache(report),
        "pool": f"{report.num_blocks:,} blocks of {report.block_size} tokens, {_bytes(report.pool_bytes)}",
        "peak blocks": f"{report.peak_blocks:,} ({report.peak_blocks / report.num_blocks:.1%} of the pool)",
        "pool holds tokens": f"{report.pool_share:.1%} paged; {report.pool_share_contiguous:.1%} if each request had "
        "a contiguous buffer for the longest",
        "taken holds tokens": f"{report.taken_share:.1%} paged; {report.taken_share_contiguous:.1%} with such buffers",
        "scattered": _rate(report.scattered_bytes, report.scatter_seconds),
        "gathered": _rate(report.gathered_bytes, report.gather_seconds),
        "verified": f"{report.verified_bytes:,} bytes, all as written, in {report.seconds:.1f} s",
    }
    return "\n".join(f"{name:<19} {text}" for name, text in rows.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 for bytes that differ, 2 for input that cannot be used."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
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
                max_num_seqs=options.max_num_seqs,
                skip_oversized=options.skip_oversized,
                **({"on_progress": bar.update} if bar is not None else {}),
            )
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
    print(json.dumps(asdict(report), indent=2) if options.json else _text(trace, report))
    return 0
