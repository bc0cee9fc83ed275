"""What a replay found out: as numbers, and as text for people."""

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Report", "Step", "as_text"]


class Step(NamedTuple):
    """What a step of a replay leaves."""

    seconds: float
    """Simulated, at its end; 0 without a clock."""
    live_blocks: int
    cached_blocks: int
    running: int
    waiting: int
    """Requests that have arrived and do not run; without a clock all of them have arrived."""
    prompt_tokens: int
    """Of all prompts so far, each counted once."""
    tokens_saved: int
    """Those of them that were in the pool, or in host memory."""
    host_blocks: int
    """In host memory: of parked requests, and those that are found there and not in the pool."""


@dataclass
class Report:
    """What a replay did. Shares are of tokens' places, from 0 to 1; bytes are of K and V of all layers."""

    device: str
    backend: str
    num_blocks: int
    block_size: int
    pool_bytes: int
    requests: int = 0
    skipped: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    steps: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    """Tokens that were in the cache before a preemption that freed them, and were not found after it."""
    tokens_found_again: int = 0
    """Those that were, when the request was admitted again."""
    prefix_caching: bool = True
    hits: int = 0
    """Requests that found a part of their prompt, in the pool or in host memory, when they were first admitted."""
    tokens_saved: int = 0
    """Tokens of these parts."""
    hit_rate: float = 0.0
    """The share of all prompts' tokens that they are."""
    evictions: int = 0
    copies: int = 0
    host_blocks: int = 0
    """That host memory has room for; bytes as of the pool's. 0 here, and in what follows, without a second tier."""
    host_bytes: int = 0
    offloads: int = 0
    """Preemptions that parked a request in host memory, so that none of its tokens was computed again."""
    offloaded_blocks: int = 0
    """Copied to host memory: of parked requests, and cached ones that were evicted."""
    offloaded_bytes: int = 0
    restored_blocks: int = 0
    """Copied back to the pool."""
    restored_bytes: int = 0
    peak_blocks: int = 0
    peak_running: int = 0
    pool_share: float = 0.0
    """Mean over the steps of the share of the pool that held tokens of running sequences, each token counted once."""
    pool_share_contiguous: float = 0.0
    """The same, had the pool been cut into one buffer of the longest request's length for each running request: the
    tokens of as many of the oldest running sequences as there would have been buffers."""
    taken_share: float = 0.0
    """Mean share of the blocks of running sequences that held tokens: what is missing to 1 is the unused part of last
    blocks."""
    taken_share_contiguous: float = 0.0
    """The same with one buffer of the longest request's length for each running sequence, and nothing shared."""
    scattered_bytes: int = 0
    scatter_seconds: float = 0.0
    gathered_bytes: int = 0
    gather_seconds: float = 0.0
    verified_bytes: int = 0
    seconds: float = 0.0
    simulated_seconds: float | None = None
    """Of the clock, from the first arrival to the end of the last step. This and what follows: None without a clock."""
    first_token_mean: float | None = None
    """Simulated seconds from a request's arrival to the end of the step that first computed its prompt, over all
    requests with an output."""
    first_token_median: float | None = None
    first_token_p99: float | None = None
    first_token_max: float | None = None
    queue_mean: float | None = None
    """Requests that had arrived and did not run, as a mean over the steps."""
    queue_max: int | None = None


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


def _host(report: Report) -> dict[str, str]:
    if not report.host_blocks:
        return {}
    return {
        "host memory": f"{report.host_blocks:,} blocks, {_bytes(report.host_bytes)}; "
        f"{report.offloads:,} of the preempted requests parked there",
        "copied": f"{report.offloaded_blocks:,} blocks to the host, {_bytes(report.offloaded_bytes)}; "
        f"{report.restored_blocks:,} back, {_bytes(report.restored_bytes)}",
    }


def as_text(trace: str, report: Report) -> str:
    """The report on a trace of this name, a fact a line."""
    rows = {
        "trace": trace,
        "device": f"{report.device} ({report.backend} backend)",
        "requests": f"{report.requests:,} completed, {report.skipped:,} skipped",
        "tokens": f"{report.tokens_in:,} in, {report.tokens_out:,} out",
        "steps": f"{report.steps:,}, at most {report.peak_running:,} requests running",
        "preemptions": f"{report.preemptions:,}, {report.recomputed_tokens:,} tokens recomputed, "
        f"{report.tokens_found_again:,} found again",
        "prefix cache": _prefix_cache(report),
        "pool": f"{report.num_blocks:,} blocks of {report.block_size} tokens, {_bytes(report.pool_bytes)}",
        **_host(report),
        "peak blocks": f"{report.peak_blocks:,} ({report.peak_blocks / report.num_blocks:.1%} of the pool)",
        "pool holds tokens": f"{report.pool_share:.1%} paged; {report.pool_share_contiguous:.1%} if each request had "
        "a contiguous buffer for the longest",
        "taken holds tokens": f"{report.taken_share:.1%} paged; {report.taken_share_contiguous:.1%} with such buffers",
        "scattered": _rate(report.scattered_bytes, report.scatter_seconds),
        "gathered": _rate(report.gathered_bytes, report.gather_seconds),
        "verified": f"{report.verified_bytes:,} bytes, all as written, in {report.seconds:.1f} s",
    }
    if report.simulated_seconds is not None:
        rows["simulated"] = f"{report.simulated_seconds:,.1f} s"
        rows["first token"] = (
            f"after {report.first_token_mean:.2f} s in the mean; median {report.first_token_median:.2f} s, "
            f"99% {report.first_token_p99:.2f} s, at most {report.first_token_max:.2f} s"
        )
        rows["queue"] = f"{report.queue_mean:.1f} requests in the mean, at most {report.queue_max:,}"
    return "\n".join(f"{name:<19} {text}" for name, text in rows.items())
