"""A Llama's files as Hugging Face lays them out: config.json, and the weights in model*.safetensors."""

import json
import re
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_LAYER = r"input_layernorm|post_attention_layernorm|self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj"
_WEIGHT = re.compile(rf"(model\.(embed_tokens|norm|layers\.\d+\.({_LAYER}))|lm_head)\.weight")


def read(folder: str) -> tuple[SimpleNamespace, dict[str, Any]]:
    """What examples/llama.py calls a config, and the weights by their names, float32 or float16.

    Raises ``ValueError`` for what is not a Llama, ``OSError`` for what is not there.
    """
    return read_config(Path(folder) / "config.json"), read_weights(Path(folder))


def read_config(path: Path) -> SimpleNamespace:
    said: dict[str, Any] = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-6}
    try:
        said |= {"tie_word_embeddings": False} | json.loads(path.read_text())
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no config: {error}") from None
    for name, known in (("model_type", "llama"), ("hidden_act", "silu")):
        if said[name] != known:
            raise ValueError(f"{path}: {name} must be {known}, got {said[name]}")
    try:
        heads, hidden, rope = said["num_attention_heads"], said["hidden_size"], said.get("rope_parameters")
        dim = said.get("head_dim") or hidden // heads
        rope = {"rope_theta": said.get("rope_theta", 10000.0)} | (rope or said.get("rope_scaling") or {})
        ends = said.get("eos_token_id")
        return SimpleNamespace(
            vocab_size=said["vocab_size"], hidden_size=hidden, intermediate_size=said["intermediate_size"],
            num_hidden_layers=said["num_hidden_layers"], num_attention_heads=heads,
            num_key_value_heads=said.get("num_key_value_heads") or heads, head_dim=dim,
            rms_norm_eps=said["rms_norm_eps"], max_position_embeddings=said["max_position_embeddings"],
            tie_word_embeddings=said["tie_word_embeddings"], rope_frequencies=rope_frequencies(dim, rope),
            ends=ends if isinstance(ends, list) else [ends],
        )  # fmt: skip
    except KeyError as error:
        raise ValueError(f"{path} does not say {error.args[0]}") from None


def rope_frequencies(head_dim: int, rope: dict[str, Any]) -> Any:
    """By how much each pair of a head's elements turns from one position to the next: float64 ``[head_dim / 2]``."""
    plain = rope["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
    kind = rope.get("rope_type", rope.get("type", "default"))  # "type" in older files
    if kind == "default":
        return plain
    if kind == "linear":
        return plain / rope["factor"]
    if kind != "llama3":
        raise ValueError(f"rope_type must be default, linear or llama3, got {kind}")
    turns = rope["original_max_position_embeddings"] * plain / (2 * np.pi)  # over the context that it was trained with
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)  # what turns often stays as it is, what hardly turns is slowed
    return plain * (kept + (1 - kept) / rope["factor"])


def read_weights(folder: Path) -> dict[str, Any]:
    """Those of all files, as they are, but bfloat16 as float32."""
    try:
        safetensors = import_module("safetensors")
    except ImportError as error:
        raise ImportError(f"weights are read by safetensors ({error}); pip install 'cupy_pagedkv[files]'") from None
    paths = sorted(folder.glob("model*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"there is no model*.safetensors in {folder}")
    weights = {}
    for path in paths:
        try:
            tensors = safetensors.deserialize(path.read_bytes())
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: {error}") from None
        for name, tensor in tensors:
            if name.endswith("rotary_emb.inv_freq"):  # in older files; it follows from the config
                continue
            if not _WEIGHT.fullmatch(name):
                raise ValueError(f"{path}: a Llama has no weight {name}")
            if tensor["dtype"] not in _DTYPES:
                raise ValueError(f"{path}: {name} must be {' or '.join(_DTYPES)}, got {tensor['dtype']}")
            weight = np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
            if tensor["dtype"] == "BF16":  # the upper half of a float32
                weight = (weight.astype("<u4") << 16).view("<f4")
            weights[name] = weight
    return weights
