"""examples/llama.py: its logits against a full recompute in float64, a folder's weights, what it prints and refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface
import llama
import ml_dtypes
import numpy as np
import pytest

from cupy_pagedkv import LayeredPagedKVCache
from cupy_pagedkv.devices import backend

EXAMPLE = Path(llama.__file__)

# Logits of these models reach 2 to 4. Measured against float64, they are off by up to 3e-6 in float32 and 0.009 in
# float16: some roundings of numbers of that size, of 6e-8 and 5e-4 each.
TOLERANCES = {"float32": 2e-5, "float16": 0.03}


def recompute(config: Any, weights: dict[str, np.ndarray], tokens: list[int], positions: Any = None) -> np.ndarray:
    """The logits behind the last token, in float64: no cache, no batch, a loop over heads and positions."""
    heads, group = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    dim = config.head_dim
    positions = np.arange(len(tokens)) if positions is None else positions

    def weight(name: str) -> np.ndarray:
        return weights[f"{name}.weight"].astype(np.float64)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(1, keepdims=True) + config.rms_norm_eps) * weight(name)

    def turned(x: np.ndarray) -> np.ndarray:
        pairs = x.reshape(len(x), -1, 2, dim // 2)
        turns = np.exp(1j * np.outer(positions, config.rope_frequencies))[:, None]
        turned = (pairs[:, :, 0] + 1j * pairs[:, :, 1]) * turns
        return np.concatenate([turned.real, turned.imag], axis=2)

    x = weight("model.embed_tokens")[tokens]
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        y = norm(x, f"{at}.input_layernorm")
        q, k, v = (y @ weight(f"{at}.self_attn.{name}_proj").T for name in "qkv")
        q, k, v = turned(q), turned(k), v.reshape(len(x), -1, dim)
        attended = np.zeros((len(x), heads, dim))
        for t in range(len(x)):
            for head in range(heads):
                scores = k[: t + 1, head // group] @ q[t, head] / np.sqrt(dim)
                exponentials = np.exp(scores - scores.max())
                attended[t, head] = exponentials @ v[: t + 1, head // group] / exponentials.sum()
        x = x + attended.reshape(len(x), -1) @ weight(f"{at}.self_attn.o_proj").T
        y = norm(x, f"{at}.post_attention_layernorm")
        gate, up = y @ weight(f"{at}.mlp.gate_proj").T, y @ weight(f"{at}.mlp.up_proj").T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weight(f"{at}.mlp.down_proj").T
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    return norm(x[-1:], "model.norm")[0] @ weight(head).T


def weights_of(model: Any) -> dict[str, np.ndarray]:
    """A model's weights on the host, by the names and in the order of axes that Hugging Face's files have."""
    host = (lambda array: array) if model.xp is np else model.xp.asnumpy
    weights = {f"model.layers.{i}.{name}": w.T for i, layer in enumerate(model.layers) for name, w in layer.items()}
    weights |= {"model.embed_tokens": model.embedding, "model.norm": model.last_norm, "lm_head": model.head.T}
    return {f"{name}.weight": host(weight) for name, weight in weights.items()}


def config_of(**changes: Any) -> Any:
    """A model that is smaller than the example's, but for ``changes``."""
    small = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
             "num_attention_heads": 4}  # fmt: skip
    return SimpleNamespace(**vars(llama.SMALL) | small | changes)


class Recording(llama.Llama):
    """A model that keeps what it returned last, on the host."""

    def __call__(self, tokens: list[int], batch: Any) -> Any:
        logits = super().__call__(tokens, batch)
        self.batch, self.logits = batch, (logits if self.xp is np else self.xp.asnumpy(logits))
        return logits


def serve(
    model: Recording, prompts: list[list[int]], tokens_per_step: int, max_new_tokens: int
) -> tuple[Any, Any, Any]:
    """The server when all is done, its requests, and (request, tokens, logits) of each sequence in each step."""
    server = llama.Server(model, tokens_per_step)
    for prompt in prompts:
        server.submit(prompt, max_new_tokens)
    requests, rows = list(server.waiting), []
    while server.waiting or server.running:
        server.step()
        server.manager.check_integrity()
        request_of = {request.sequence: request for request in requests}
        lens = model.batch.host_seq_lens.tolist()
        assert model.batch.num_tokens <= tokens_per_step
        for sequence, length, logits in zip(model.batch.sequences, lens, model.logits, strict=True):
            rows.append((request_of[sequence], request_of[sequence].tokens[:length], logits))
    assert server.manager.stats().live_blocks == 0
    return server, requests, rows


def prompts_of(rng: np.random.Generator, vocab_size: int, *sizes: int) -> list[list[int]]:
    """A system prompt of 40 tokens, and behind it others."""
    system = rng.integers(vocab_size, size=40).tolist()
    return [system + rng.integers(vocab_size, size=size).tolist() for size in sizes]


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 2, "head_dim": 16},  # more than hidden_size in all heads together
        {"num_key_value_heads": 1, "head_dim": 6, "num_hidden_layers": 3, "tie_word_embeddings": True},
        {"num_key_value_heads": 4, "head_dim": 12, "rms_norm_eps": 0.1},
    ],
    ids=["grouped", "one KV head, tied", "no groups"],
)
def test_logits_are_those_of_a_full_recompute(device, rng, changes, dtype):
    """Of every sequence at every step, with shared blocks, prompts in pieces, and blocks that run out."""
    if device.name == "emulated" and dtype == "float16" and changes["head_dim"] != 16:
        pytest.skip("thinned: one model in float16 is enough of the emulated device's time")
    frequencies = 100.0 ** (-np.arange(0, changes["head_dim"], 2) / changes["head_dim"])
    config = config_of(**changes, rope_frequencies=frequencies)
    cache = LayeredPagedKVCache(config.num_hidden_layers, 14, 8, config.num_key_value_heads, config.head_dim, dtype,
                                device.of_caches)  # fmt: skip
    model = Recording(config, None, cache)
    weights = weights_of(model)
    prompts = prompts_of(rng, config.vocab_size, 3, 20, 5, 9, 1, 14)
    server, requests, rows = serve(model, prompts, 24, 10)
    assert [len(request.tokens) for request in requests] == [len(prompt) + 10 for prompt in prompts]
    assert server.preempted > 0
    assert server.manager.stats().tokens_saved >= 5 * 40
    assert any("PP" in request.life for request in requests)
    expected: dict[tuple[int, ...], np.ndarray] = {}
    for request, tokens, logits in rows:
        key = tuple(tokens)
        if key not in expected:
            expected[key] = recompute(config, weights, tokens)
        assert abs(logits - expected[key]).max() <= TOLERANCES[dtype], (len(tokens), request)
        if len(tokens) >= request.num_prompt:  # the most likely token was sampled
            sampled = request.tokens[len(tokens)]
            assert expected[key][sampled] >= expected[key].max() - 2 * TOLERANCES[dtype]


def test_the_tolerances_tell_what_is_wrong(rng):
    """One of 60 tokens left out moves logits by more than 0.2, one at its neighbour's place by more than 0.03."""
    config = config_of()
    weights = weights_of(llama.Llama(config, None, LayeredPagedKVCache(2, 1, 1, 2, 16, "float32", "cpu")))
    [tokens] = prompts_of(rng, config.vocab_size, 20)
    right = recompute(config, weights, tokens)
    for at in (0, 30, 57):
        positions = np.delete(np.arange(60), at)
        without = recompute(config, weights, [tokens[i] for i in positions], positions)
        assert abs(without - right).max() > 0.2 > 2 * TOLERANCES["float16"]
        positions = np.arange(60)
        positions[at] += 1
        assert abs(recompute(config, weights, tokens, positions) - right).max() > 0.03 > 1000 * TOLERANCES["float32"]


# A folder


def write_folder(
    folder: Path, dtypes: tuple[Any, ...], said: dict[str, Any], rng: np.random.Generator
) -> dict[str, Any]:
    """Random weights in two files, of these dtypes in turns, and config.json. Returns the weights in float64."""
    from safetensors.numpy import save_file

    cache = LayeredPagedKVCache(2, 1, 1, 2, 16, "float32", "cpu")
    shapes = {name: weight.shape for name, weight in weights_of(llama.Llama(config_of(), None, cache)).items()}
    if said.get("tie_word_embeddings"):
        del shapes["lm_head.weight"]
    weights = {
        name: rng.normal(len(shape) == 1, 48**-0.5, shape).astype(dtypes[i % len(dtypes)])
        for i, (name, shape) in enumerate(shapes.items())
    }
    folder.mkdir()
    for i in range(2):
        part = {name: weights[name] for name in list(weights)[i::2]}
        save_file(part, folder / f"model-0000{i + 1}-of-00002.safetensors")
    config = {name: getattr(config_of(), name) for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings",
    )}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"} | said))
    return {name: weight.astype(np.float64) for name, weight in weights.items()}


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip


def llama3_frequencies() -> np.ndarray:
    """As Llama 3's own code has them, one by one."""
    frequencies = []
    for i in range(8):
        frequency = 1000.0 ** (-i / 8)
        wavelength = 2 * np.pi / frequency
        if wavelength > 64 / 1.0:
            frequency /= 8
        elif wavelength >= 64 / 4.0:
            smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
            frequency = (1 - smooth) * frequency / 8 + smooth * frequency
        frequencies.append(frequency)
    return np.array(frequencies)


PLAIN = 10000.0 ** (-np.arange(8) / 8)


@pytest.mark.parametrize(
    ("dtypes", "said", "frequencies"),
    [
        ((np.float32,), {"eos_token_id": 70}, PLAIN),
        ((ml_dtypes.bfloat16,), {"tie_word_embeddings": True, "rope_parameters": LLAMA3}, llama3_frequencies()),
        ((np.float16, np.float32, ml_dtypes.bfloat16), {"rope_scaling": {"type": "linear", "factor": 2.0}}, PLAIN / 2),
        ((ml_dtypes.bfloat16,), {"rope_theta": 500.0, "rope_scaling": None}, 500.0 ** (-np.arange(8) / 8)),
    ],
    ids=["float32", "bfloat16, tied, llama3", "mixed, linear", "theta"],
)
def test_a_folder_of_weights(tmp_path, rng, dtypes, said, frequencies):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    weights = write_folder(tmp_path / "folder", dtypes, said, rng)
    config, read = huggingface.read(str(tmp_path / "folder"))
    expected = config_of(rope_frequencies=frequencies, tie_word_embeddings="lm_head.weight" not in weights)
    model = Recording(config, read, LayeredPagedKVCache(2, 40, 8, 2, 16, "float32", "cpu"))
    assert not read
    _, _, rows = serve(model, prompts_of(rng, 64, 5, 9), 32, 4)
    assert len(rows) >= 8
    for _, tokens, logits in rows:
        assert abs(logits - recompute(expected, weights, tokens)).max() <= TOLERANCES["float32"]


def test_a_sequence_ends_where_the_folder_says(tmp_path, rng, monkeypatch, capsys):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    write_folder(tmp_path / "folder", (np.float32,), {}, rng)
    lines = run(monkeypatch, capsys, str(tmp_path / "folder"), "--prompt", "1,2,3")
    sampled = lines[1].split()[5:]
    assert len(sampled) == 16
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config | {"eos_token_id": [99, int(sampled[5])]}))
    lines = run(monkeypatch, capsys, str(tmp_path / "folder"), "--prompt", "1,2,3")
    assert lines[1].split()[5:] == sampled[: sampled.index(sampled[5]) + 1]


# What it prints


def run(monkeypatch: Any, capsys: Any, *arguments: str, status: int = 0) -> list[str]:
    """The lines that the command prints."""
    monkeypatch.setattr(sys, "argv", ["llama.py", *arguments])
    assert llama.main() == status
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--blocks", "9"),
        ("--blocks", "200", "--tokens-per-step", "1000"),
        ("--tokens-per-step", "1"),
        ("--max-new-tokens", "1"),
    ],
)
def test_what_it_prints_adds_up(monkeypatch, capsys, arguments):
    asked = {"--max-new-tokens": 16, "--blocks": 17, "--tokens-per-step": 32}
    asked |= {name: int(value) for name, value in zip(arguments[::2], arguments[1::2], strict=True)}
    new_tokens = asked["--max-new-tokens"]
    head, *rows, _, steps, prompts, blocks, waits = run(monkeypatch, capsys, *arguments)
    assert head.split()[:4] == ["request", "prompt", "computed", "sampled"]
    numbers, lengths, computed, sampled, lives = zip(*(row.split() for row in rows), strict=True)
    assert sorted(numbers) == list("01234567")
    assert {int(count) for count in sampled} == {new_tokens}
    in_all, seconds, total, rate = re.fullmatch(
        r"(\d+) steps, (\d+\.\d\d) s: (\d+) tokens sampled, (\d+) a second", steps
    ).groups()
    assert int(in_all) == max(map(len, lives))
    assert int(total) == 8 * new_tokens
    slowest, fastest = (int(total) / max(1e-6, float(seconds) + rounding) for rounding in (0.005, -0.005))
    assert slowest - 0.5 <= int(rate) <= fastest + 0.5
    found, given, computed_in_all = map(int, re.findall(r"\d+", prompts))
    assert computed_in_all == sum(map(int, computed))
    in_use, pool, unshared = map(int, re.findall(r"\d+", blocks))
    assert in_use <= pool == asked["--blocks"]
    assert in_use <= unshared
    assert arguments or (in_use, unshared) == (17, 37)
    preempted = int(waits.rpartition(": ")[2])
    assert (preempted > 0) == (asked["--blocks"] < 20 and asked["--tokens-per-step"] > 1 and new_tokens > 1)
    if not preempted:
        assert found + computed_in_all == given == sum(map(int, lengths))
        assert found == 7 * 48  # the system prompt fills three blocks, and all but the first find them
        assert all(re.fullmatch(f"P+d{{{new_tokens - 1}}}", life.replace(".", "")) for life in lives)
    for step in range(int(in_all)):
        letters = "".join(life[step : step + 1] for life in lives)
        assert set(letters) & {"P", "d"}, f"nothing was done in step {step}"
        assert len(letters.replace(".", "")) <= asked["--tokens-per-step"]


def test_it_runs_as_a_command(tmp_path):
    check_command(tmp_path, "cpu")


def test_it_runs_on_a_gpu(gpu, tmp_path):
    check_command(tmp_path, "cuda")


def check_command(folder: Path, device: str) -> None:
    command = [sys.executable, "-W", "error", str(EXAMPLE), "--max-new-tokens", "2", "--device", device]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 14


def test_it_is_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 200


def test_interrupted_it_says_how_far_it_came(monkeypatch, capsys):
    managers, call = [], llama.Llama.__call__

    def interrupted(self: Any, tokens: list[int], batch: Any) -> Any:
        managers.append(batch._manager)
        if len(managers) == 6:
            raise KeyboardInterrupt
        return call(self, tokens, batch)

    monkeypatch.setattr(llama.Llama, "__call__", interrupted)
    lines = run(monkeypatch, capsys, status=130)
    assert lines[1:3] == ["interrupted", ""]
    assert lines[3].startswith("6 steps, ")
    assert not managers[0].open_batches
    managers[0].check_integrity()


def refuses(monkeypatch: Any, capsys: Any, arguments: list[str], error: str) -> None:
    monkeypatch.setattr(sys, "argv", ["llama.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        llama.main()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert error in printed.err


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--prompt", "1,x"], "invalid literal for int"),
        (["--prompt", "1,1024"], "a prompt must be tokens from 0 to 1023, got [1, 1024]"),
        (["--prompt", "3,-1"], "a prompt must be tokens from 0 to 1023, got [3, -1]"),
        (["--blocks", "4"], "51 tokens must grow, to 64 at most in this pool and model, got 67"),
        (["--max-new-tokens", "0"], "51 tokens must grow, to 272 at most in this pool and model, got 51"),
        (["--max-new-tokens", "2000", "--blocks", "500"], "to 2048 at most in this pool and model, got 2051"),
        (["--tokens-per-step", "0"], "a step must have at least one token, got 0"),
        (["--blocks", "0"], "num_blocks must be at least 1, got 0"),
        (["no folder"], "No such file or directory: 'no folder/config.json'"),
    ],
)
def test_what_it_refuses(monkeypatch, capsys, arguments, error):
    refuses(monkeypatch, capsys, arguments, error)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    if backend._usable_gpus()[0]:
        pytest.skip("there is a GPU")
    refuses(monkeypatch, capsys, ["--device", "cuda"], "device 'cuda' was asked for")


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({"model_type": "qwen2"}, "model_type must be llama, got qwen2"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu, got gelu"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type must be default, linear or llama3, got yarn"),
        ({"rope_scaling": {"type": "linear"}}, "config.json does not say factor"),
        ({"hidden_size": 32}, "weight model.layers.0.input_layernorm must be (32,), got (48,)"),
        ({"num_hidden_layers": 3}, "weight model.layers.2.input_layernorm must be (48,), got none"),
    ],
)
def test_folders_it_refuses(tmp_path, monkeypatch, capsys, rng, said, error):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    write_folder(tmp_path / "folder", (np.float32,), said, rng)
    refuses(monkeypatch, capsys, [str(tmp_path / "folder")], error)


def test_files_it_refuses(tmp_path, monkeypatch, capsys, rng):
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    folder = tmp_path / "folder"
    write_folder(folder, (np.float32,), {}, rng)
    more, bias = folder / "model-more.safetensors", "model.layers.0.self_attn.q_proj.bias"
    safetensors.save_file({bias: np.zeros(64, np.float32)}, more)
    refuses(monkeypatch, capsys, [str(folder)], f"model-more.safetensors: a Llama has no weight {bias}")
    safetensors.save_file({"model.norm.weight": np.zeros(48, np.int8)}, more)
    refuses(monkeypatch, capsys, [str(folder)], "model.norm.weight must be F32 or F16 or BF16, got I8")
    more.write_bytes(b"nonsense")
    refuses(monkeypatch, capsys, [str(folder)], "model-more.safetensors: ")
    for path in folder.glob("model*"):
        path.unlink()
    refuses(monkeypatch, capsys, [str(folder)], f"there is no model*.safetensors in {folder}")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    refuses(monkeypatch, capsys, [str(folder)], "pip install 'cupy_pagedkv[files]'")


@pytest.mark.parametrize(("text", "error"), [("[]", "is no config"), ("{", "is no config"),
                                             ("{}", "does not say num_attention_heads")])  # fmt: skip
def test_configs_it_refuses(tmp_path, monkeypatch, capsys, text, error):
    (tmp_path / "config.json").write_text(text)
    refuses(monkeypatch, capsys, [str(tmp_path)], f"config.json {error}")
