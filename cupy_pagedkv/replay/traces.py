"""Traces of LLM requests: two published formats, and a synthetic one.

Azure's CSV (AzurePublicDataset, ``AzureLLMInferenceTrace_*.csv``) has the header
``TIMESTAMP,ContextTokens,GeneratedTokens``. Mooncake's JSONL (kvcache-ai/Mooncake, ``*_trace.jsonl``) has an object a
line: ``timestamp`` in milliseconds, ``input_length``, ``output_length`` and ``hash_ids``, one id for each 512 tokens of
the prompt: prompts with equal ids at their beginning have equal tokens there.
"""

import csv
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["HASHED_TOKENS", "Request", "TraceError", "read_trace", "synthetic_trace"]

_AZURE_HEADER = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
_AZURE_TIME = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(\.\d+)?(?:Z|\+00:00)?")
HASHED_TOKENS = 512
"""Tokens of a prompt for which there is one hash id."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request, in tokens and seconds."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = field(default=(), repr=False)
    """Of the prompt's tokens, :data:`HASHED_TOKENS` each; none where the trace says nothing of what prompts share."""
    line: int = field(default=0, compare=False, repr=False)
    """Of the file that it was read from, counted from 1; 0 for none."""


class TraceError(ValueError):
    """A trace that cannot be read: which file, which line (from 1), and why."""

    def __init__(self, path: str | Path, line: int, reason: str) -> None:
        super().__init__(path, line, reason)
        self.path = path
        self.line = line
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


def read_trace(path: str | Path) -> list[Request]:
    """The requests of a trace file in the order of their timestamps. The first line tells the format.

    Raises :class:`TraceError` for a line that is malformed, ``OSError`` for a file that cannot be opened.
    """
    requests = []
    number = 0
    parse: Callable[[str], Request] | None = None
    with Path(path).open("rb") as file:
        try:
            for number, raw in enumerate(file, 1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not line:
                    continue
                if parse is None:
                    if line.startswith("{"):
                        parse = _parse_mooncake
                    elif _fields(line) == _AZURE_HEADER:
                        parse = _parse_azure
                        continue
                    else:
                        expected = ",".join(_AZURE_HEADER)
                        raise ValueError(f"expected the header {expected} or a JSON object, got {line[:80]!r}")
                requests.append(replace(parse(line), line=number))
        except (ValueError, csv.Error, RecursionError) as error:  # RecursionError: of JSON nested without end
            raise TraceError(path, number, str(error)) from None
    if not requests:
        raise TraceError(path, max(1, number), "there is no request in this file")
    return sorted(requests, key=lambda request: request.timestamp)


def synthetic_trace(num_requests: int, seed: int = 0) -> list[Request]:
    """Poisson arrivals, four a second, and log-normal lengths: prompts of 512 tokens in the median, outputs of 32.

    >>> synthetic_trace(1)
    [Request(timestamp=0.17, input_length=568, output_length=20)]
    """
    # A generator each, so that a shorter trace is the beginning of a longer one.
    gaps, inputs, outputs = (np.random.default_rng([seed, i]) for i in range(3))
    times = np.cumsum(gaps.exponential(1 / 4, num_requests)).round(2).tolist()
    prompts = (inputs.lognormal(np.log(512), 1.0, num_requests).astype(int) + 1).tolist()
    generated = (outputs.lognormal(np.log(32), 0.8, num_requests).astype(int) + 1).tolist()
    return [Request(*row) for row in zip(times, prompts, generated, strict=True)]


def _fields(line: str) -> list[str]:
    return [field.strip() for field in next(csv.reader([line]))]


def _parse_azure(line: str) -> Request:
    fields = _fields(line)
    if len(fields) != len(_AZURE_HEADER):
        raise ValueError(f"expected {len(_AZURE_HEADER)} fields, got {len(fields)}")
    time = _AZURE_TIME.fullmatch(fields[0])
    if time is None:
        raise ValueError(f"TIMESTAMP must be like 2023-11-16 18:17:03.979, got {fields[0]!r}")
    # Seven digits of a second are more than `fromisoformat` takes before Python 3.11.
    seconds = datetime.fromisoformat(f"{time[1]} {time[2]}+00:00").timestamp() + float(time[3] or 0)
    lengths = dict(zip(_AZURE_HEADER[1:], fields[1:], strict=True))
    for name, text in lengths.items():
        if not (text.isascii() and text.isdigit()):
            raise ValueError(f"{name} must be a whole number of at least 0, got {text!r}")
    return Request(seconds, int(fields[1]), int(fields[2]))


def _parse_mooncake(line: str) -> Request:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"this is no JSON object: {error}") from None
    if not isinstance(record, dict):
        raise ValueError("expected a JSON object")
    timestamp = _number(record, "timestamp", (int, float))
    input_length = _number(record, "input_length", int)
    output_length = _number(record, "output_length", int)
    ids = record.get("hash_ids")
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise ValueError(f"hash_ids must be a list of whole numbers from 0 to 2**31 - 1, got {ids!r:.80}")
    if len(ids) != -(-input_length // HASHED_TOKENS):
        raise ValueError(f"hash_ids must have one id for each {HASHED_TOKENS} of {input_length} tokens, got {len(ids)}")
    return Request(timestamp / 1000, input_length, output_length, tuple(ids))


def _number(record: dict[str, Any], name: str, types: Any) -> Any:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, types) or not 0 <= value < 2**62:
        kind = "whole number" if types is int else "number"
        raise ValueError(f"{name} must be a {kind} of at least 0, got {value!r:.80}")
    return value
