"""Tokens a second of Hugging Face's ``generate`` on a PagedCache, against transformers' caches on PyTorch's attention.

One random Llama, greedy. Every cache is made anew for each run, and has to give the same tokens before it is timed. On
one core (``OMP_NUM_THREADS=1 taskset -c 0 python bench.py hf``) CPU time is what counts, which others leave alone.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from cupy_pagedkv.transformers import _KEYWORD, ATTENTION, PagedCache

from .cases import BLOCK_SIZE, OURS
from .output import bar
from .timing import in_turns

NEW_TOKENS, PREFIX, BEHIND_PREFIX = 128, 1500, 32
DYNAMIC, STATIC, BY_HAND = "DynamicCache", "StaticCache", "DynamicCache, prefix by hand"


@dataclass(frozen=True)
class Generation:
    """What was measured of a batch of prompts; seconds are medians, of one call of ``generate``."""

    label: str
    num_tokens: int
    """That are generated, in all rows."""
    seconds: dict[str, float]
    at_least: float | None
    """How many times as fast as the better of transformers' two caches the package sets itself to be."""

    def ratio_to_best(self) -> float:
        return min(self.seconds[DYNAMIC], self.seconds[STATIC]) / self.seconds[OURS]


def generations(quick: bool) -> Iterator[Generation]:
    model, new_tokens, rounds = a_model(), NEW_TOKENS // 8 if quick else NEW_TOKENS, 1 if quick else 3
    shapes = {(1, 32): 0.8, (8, 32): None, (1, 2048): None, (8, 2048): 1.0}
    for (rows, columns), at_least in shapes.items():
        prompts = torch.randint(2, model.config.vocab_size, (rows, columns // 8 if quick and columns > 32 else columns))
        seconds = measured(contenders(model, prompts, new_tokens), rounds)
        yield Generation(f"{rows} x {prompts.shape[1]}", rows * new_tokens, seconds, at_least)
    prefix = PREFIX // 8 if quick else PREFIX
    prompts = torch.randint(2, model.config.vocab_size, (8, prefix + BEHIND_PREFIX))
    prompts[:, :prefix] = prompts[0, :prefix]
    seconds = measured(contenders(model, prompts, new_tokens, prefix), rounds)
    yield Generation(f"8 x {prompts.shape[1]}, {prefix} in common", 8 * new_tokens, seconds, 1.5)


def a_model() -> Any:
    config = LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=4096, initializer_range=0.05, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def contenders(model: Any, prompts: Any, new_tokens: int, prefix: int = 0) -> dict[str, Callable[[], Any]]:
    """By name what makes a cache and generates with it; ``prefix`` tokens are common to all rows."""
    rows, columns = prompts.shape
    mask = torch.ones_like(prompts)

    def generate(implementation: str, cache: Any) -> Any:
        model.set_attn_implementation(implementation)
        return model.generate(
            prompts, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **{_KEYWORD: cache}
        )

    def ours() -> Any:
        num_blocks = rows * -(-(columns + new_tokens) // BLOCK_SIZE)
        cache = PagedCache(model, num_blocks, BLOCK_SIZE, prefix_caching=prefix > 0)
        if prefix:
            model.set_attn_implementation(ATTENTION)
            cache.begin(prompts)
        return generate(ATTENTION, cache)

    def by_hand() -> Any:
        model.set_attn_implementation("sdpa")
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model.model(prompts[:1, :prefix], **{_KEYWORD: cache})
        cache.batch_repeat_interleave(rows)
        return generate("sdpa", cache)

    calls = {
        OURS: ours,
        DYNAMIC: lambda: generate("sdpa", DynamicCache(config=model.config)),
        STATIC: lambda: generate("sdpa", StaticCache(model.config, columns + new_tokens)),
    }
    return {**calls, BY_HAND: by_hand} if prefix else calls


def measured(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    tokens = {name: call().tolist() for name, call in calls.items()}  # warms up, too
    for name, of_name in tokens.items():
        if of_name != tokens[DYNAMIC]:
            raise SystemExit(f"{name} and {DYNAMIC} generate other tokens")

    alone = hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) == 1
    clock = time.process_time if alone else time.perf_counter

    def timed(call: Callable[[], Any]) -> Callable[[], float]:
        def run() -> float:
            start = clock()
            call()
            return clock() - start

        return run

    return in_turns({name: timed(call) for name, call in calls.items()}, rounds)


def generation_lines(runs: Iterable[Generation]) -> Iterator[str]:
    yield f"{'prompts x tokens':<28}{'tokens/s':>9}   times as fast as"
    for run in runs:
        others = [f"{name} {run.seconds[name] / run.seconds[OURS]:.2f}" for name in run.seconds if name != OURS]
        yield f"{run.label:<28}{run.num_tokens / run.seconds[OURS]:>9.1f}   {', '.join(others)}"


def generation_bars(runs: Sequence[Generation]) -> Iterator[str]:
    for run in runs:
        if run.at_least is not None:
            yield from bar(
                f"{run.label} >= {run.at_least} of the better of {DYNAMIC} and {STATIC}", run.at_least,
                [(run.ratio_to_best(), run.label)],
            )  # fmt: skip
