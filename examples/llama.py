"""A Llama that serves many prompts at once over a paged KV cache, by NumPy or CuPy and nothing else.

    python examples/llama.py [--device cuda]      a small random model, and eight prompts that begin alike
    python examples/llama.py FOLDER --prompt 128000,9906,1917 --prompt 128000,791      a model from Hugging Face

Prompts are token ids, and so is what comes out; a folder's files are read by examples/huggingface.py.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np

from cupy_pagedkv import Batch, BlockTable, CachedSequence, KVCacheManager, LayeredPagedKVCache, OutOfBlocksError

SMALL = SimpleNamespace(  # names of config.json; how far each pair of a head's elements turns a position; ends of texts
    vocab_size=1024, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, max_position_embeddings=2048, tie_word_embeddings=False,
    rope_frequencies=10000.0 ** (-np.arange(0, 16, 2) / 16), ends=(),
)  # fmt: skip


class Llama:
    def __init__(self, config: SimpleNamespace, weights: dict[str, Any] | None, cache: LayeredPagedKVCache) -> None:
        self.config, self.cache, rng = config, cache, np.random.default_rng(0)
        self.xp = np if cache[0].device == "cpu" else import_module("cupy")
        self.frequencies = self.xp.asarray(config.rope_frequencies)
        vocab, d, mlp = config.vocab_size, config.hidden_size, config.intermediate_size
        q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))

        def take(name: str, *shape: int) -> Any:  # where the cache is, and transposed, as x @ weight wants it
            if weights is None:
                weight = rng.normal(len(shape) == 1, d**-0.5, shape)  # around 1 in norms, around 0 elsewhere
            elif (weight := weights.pop(f"{name}.weight", None)) is None or weight.shape != shape:
                raise ValueError(f"weight {name} must be {shape}, got {'none' if weight is None else weight.shape}")
            return self.xp.asarray(weight.astype(cache[0].dtype)).T

        shapes = {"input_layernorm": (d,), "post_attention_layernorm": (d,), "self_attn.q_proj": (q, d),
                  "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, q),
                  "mlp.gate_proj": (mlp, d), "mlp.up_proj": (mlp, d), "mlp.down_proj": (d, mlp)}  # fmt: skip
        self.layers = [{name: take(f"model.layers.{i}.{name}", *shapes[name]) for name in shapes}
                       for i in range(config.num_hidden_layers)]  # fmt: skip
        self.embedding, self.last_norm = take("model.embed_tokens", vocab, d).T, take("model.norm", d)
        self.head = self.embedding.T if config.tie_word_embeddings else take("lm_head", vocab, d)

    def norm(self, x: Any, weight: Any) -> Any:
        """RMSNorm, in float32."""
        wide = x.astype(np.float32)
        wide /= self.xp.sqrt((wide * wide).mean(-1, keepdims=True) + self.config.rms_norm_eps)
        return wide.astype(x.dtype) * weight

    def __call__(self, tokens: list[int], batch: Batch) -> Any:
        """Puts K and V of a batch's tokens into the cache. Returns the logits behind each sequence's last token."""
        xp, dim = self.xp, self.config.head_dim
        angles = batch.positions[:, None, None] * self.frequencies  # [num_tokens, 1, head_dim / 2]
        x = self.embedding[xp.asarray(tokens)]
        cos, sin = xp.cos(angles).astype(x.dtype), xp.sin(angles).astype(x.dtype)
        for w, cache in zip(self.layers, self.cache, strict=True):
            y = self.norm(x, w["input_layernorm"])
            q, k, v = ((y @ w[f"self_attn.{name}_proj"]).reshape(len(x), -1, dim) for name in "qkv")
            halves = (xp.split(heads, 2, axis=2) for heads in (q, k))  # element i of a head turns with i + head_dim / 2
            q, k = (xp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2) for a, b in halves)
            cache.update(k, v, batch.slot_mapping)
            attended = cache.attend(q, batch.block_tables, batch.seq_lens, batch.cu_seqlens,
                                    max_seqlen_q=batch.max_seqlen_q)  # fmt: skip
            x = x + attended.reshape(len(x), -1) @ w["self_attn.o_proj"]
            y = self.norm(x, w["post_attention_layernorm"])
            gate, up = y @ w["mlp.gate_proj"], y @ w["mlp.up_proj"]
            with np.errstate(over="ignore"):  # what is divided by inf is 0, as it should be
                x = x + (gate / (1 + xp.exp(-gate)) * up) @ w["mlp.down_proj"]
        return self.norm(x[batch.cu_seqlens[1:] - 1], self.last_norm) @ self.head


@dataclass(eq=False)
class Request:
    tokens: list[int]  # of its prompt, and then those that were sampled
    num_prompt: int
    end: int  # how many tokens there are going to be, at most
    sequence: Any = None  # the CachedSequence, while it runs
    computed: int = 0  # tokens of its prompt that went through the model
    life: str = ""  # a letter for each step


class Server:
    """Continuous batching: a step lets in who has room, computes the next tokens of all, and lets go who is done."""

    def __init__(self, model: Llama, tokens_per_step: int) -> None:
        if tokens_per_step < 1:
            raise ValueError(f"a step must have at least one token, got {tokens_per_step}")
        self.model, self.manager, self.tokens_per_step = model, KVCacheManager(model.cache), tokens_per_step
        self.waiting, self.running = list[Request](), list[Request]()  # the oldest first
        self.preempted = self.most_blocks = self.most_unshared = 0

    def submit(self, prompt: list[int], max_new: int) -> None:
        config, cache, end = self.model.config, self.model.cache, len(prompt) + max_new
        if not prompt or min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(f"a prompt must be tokens from 0 to {config.vocab_size - 1}, got {prompt}")
        if end > (room := min(config.max_position_embeddings, cache.num_blocks * cache.block_size)) or max_new < 1:
            raise ValueError(f"{len(prompt)} tokens must grow, to {room} at most in this pool and model, got {end}")
        self.waiting.append(Request(list(prompt), len(prompt), end))

    def admit(self) -> bool:
        """Let in the first that waits, if blocks suffice, and if nobody is just computing one that it could share."""
        request, size = self.waiting[0], self.model.cache.block_size
        sequence = self.manager.add(request.tokens)
        end = sequence.num_cached_tokens + size  # of the first block that was not found
        soon = end < len(request.tokens) and any(r.tokens[:end] == request.tokens[:end] for r in self.running)
        taken = sum(r.sequence.num_tokens % size == 0 for r in self.running)  # blocks that others begin in this step
        if soon or taken + BlockTable.blocks_needed(len(sequence.remaining), size) > self.manager.num_available_blocks:
            self.manager.free(sequence)
            return False
        request.sequence = sequence
        self.running.append(self.waiting.pop(0))
        return True

    def step(self) -> list[Request]:
        """Returns the requests that are done with it."""
        new, left = dict[CachedSequence, list[int]](), self.tokens_per_step
        while left and (len(new) < len(self.running) or (self.waiting and self.admit())):
            sequence, tokens = self.running[len(new)].sequence, self.running[len(new)].tokens
            new[sequence] = tokens[sequence.num_tokens :][:left]  # a piece of its prompt, or the token sampled last
            left -= len(new[sequence])
        batch = None
        while batch is None:
            try:
                batch = self.manager.prepare(new)
            except OutOfBlocksError:  # the youngest gives its blocks to the others, and waits to be let in again
                self.waiting.insert(0, youngest := self.running.pop())
                new.pop(youngest.sequence, None)
                self.manager.free(youngest.sequence)
                self.preempted += 1
        for r in self.running + self.waiting:
            of_prompt = r.sequence in new and len(r.sequence.remaining)
            r.computed += len(new[r.sequence]) if of_prompt else 0
            r.life += "P" if of_prompt else "d" if r.sequence in new else "."
        self.most_blocks = max(self.most_blocks, self.manager.stats().live_blocks)
        self.most_unshared = max(self.most_unshared, sum(len(r.sequence.block_table) for r in self.running))
        with batch:  # committed at its end, rolled back by an exception
            sampled = self.model([token for piece in new.values() for token in piece], batch).argmax(1).tolist()
        done = []
        for r, token in zip(list(self.running), sampled, strict=False):  # who found no room is behind the others
            if r.sequence.num_tokens == len(r.tokens):  # else the rest of its prompt comes first
                r.tokens.append(token)
                if token in self.model.config.ends or len(r.tokens) == r.end:
                    self.manager.free(r.sequence)
                    self.running.remove(r)
                    done.append(r)
        return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", nargs="?", help="with config.json and model*.safetensors")
    add("--prompt", action="append", metavar="IDS", help="tokens with commas between them; as often as you like")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--dtype", choices=["float32", "float16"], default="float32")
    add("--max-new-tokens", type=int, default=16, metavar="N", help="that each prompt is continued by (%(default)s)")
    add("--tokens-per-step", type=int, default=32, metavar="N", help="that go through the model at once (%(default)s)")
    add("--blocks", type=int, default=17, metavar="N", help="of 16 tokens, in the pool (%(default)s)")
    options = parser.parse_args()
    try:
        config, weights = import_module("huggingface").read(options.folder) if options.folder else (SMALL, None)
        cache = LayeredPagedKVCache(config.num_hidden_layers, options.blocks, 16, config.num_key_value_heads,
                                    config.head_dim, options.dtype, options.device)  # fmt: skip
        server = Server(Llama(config, weights, cache), options.tokens_per_step)
        rng = np.random.default_rng(1)
        system = rng.integers(config.vocab_size, size=48).tolist()
        random = [system + rng.integers(config.vocab_size, size=size).tolist() for size in (3, 12, 5, 9, 4, 17, 8, 6)]
        for prompt in [list(map(int, ids.split(","))) for ids in options.prompt or ()] or random:
            server.submit(prompt, options.max_new_tokens)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        parser.error(str(error))
    requests, start = server.waiting.copy(), time.perf_counter()
    print("request  prompt  computed  sampled  each step: . waits, P is at its prompt, d decodes")
    try:
        while server.waiting or server.running:
            for r in server.step():
                sampled = r.tokens[r.num_prompt :]
                row = f"{requests.index(r):7}  {r.num_prompt:6}  {r.computed:8}  {len(sampled):7}  {r.life}"
                print(row, *sampled if options.folder else ())
    except KeyboardInterrupt:
        print("interrupted")
    seconds, stats = time.perf_counter() - start, server.manager.stats()
    computed, total = sum(r.computed for r in requests), sum(len(r.tokens) - r.num_prompt for r in requests)
    print(f"""
{max(len(r.life) for r in requests)} steps, {seconds:.2f} s: {total} tokens sampled, {total / seconds:.0f} a second
{stats.tokens_saved} of {stats.prompt_tokens} tokens of prompts were in the cache, {computed} were computed
{server.most_blocks} of {cache.num_blocks} blocks were in use at most, {server.most_unshared} if none were shared
times that blocks ran out, and the youngest waited for them: {server.preempted}""")
    return 130 if server.waiting or server.running else 0


if __name__ == "__main__":
    sys.exit(main())
