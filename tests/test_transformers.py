"""Hugging Face models on a PagedCache, against the same models with transformers' own cache and eager attention.

Models are tiny and random, but with weights so large that attention is sharp: what is masked wrongly, or stands at a
wrong position, changes the tokens.
"""

import copy
import doctest
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the models are PyTorch's: pip install -e '.[hf]'")
transformers = pytest.importorskip(
    "transformers", "5.23", reason="the models are transformers': pip install -e '.[hf]'"
)

import cupy_pagedkv.transformers  # noqa: E402
from cupy_pagedkv import OutOfBlocksError  # noqa: E402
from cupy_pagedkv import transformers as adapter  # noqa: E402
from cupy_pagedkv.transformers import _KEYWORD, PagedCache, _tell_ids  # noqa: E402

torch.set_num_threads(1)

BLOCK_SIZE = 8
WINDOW = 24
OURS = "cupy_pagedkv"
SMALL: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None, "initializer_range": 0.2,
}  # fmt: skip
ALTERNATING: dict[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "head_dim": 16,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 20, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "gemma2": ("Gemma2", {**ALTERNATING, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3", {**ALTERNATING, "query_pre_attn_scalar": 16}),
    "gpt_oss": ("GptOss", {**ALTERNATING, **EXPERTS, **PLAIN_ROPE}),
    "phi3": ("Phi3", {"sliding_window": WINDOW}),
    "deepseek_v3": ("DeepseekV3", LATENT),
}


@functools.cache
def models(name: str, dtype: Any = torch.float32) -> tuple[Any, Any]:
    """The model with eager attention, and the same with ours."""
    family, options = MODELS[name]
    config_class = getattr(transformers, f"{family}{'Text' if name == 'gemma3' else ''}Config")
    torch.manual_seed(len(name))
    model = getattr(transformers, f"{family}ForCausalLM")(config_class(**{**SMALL, **options}))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("sinks"):
                parameter.normal_()
    model = model.to(dtype).eval()
    ours = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    ours.set_attn_implementation(OURS)
    return model, ours


def prompts(*lengths: int, seed: int = 0) -> dict[str, Any]:
    """Random prompts, padded on the left."""
    ids = torch.randint(
        2, SMALL["vocab_size"], (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed)
    )
    mask = torch.stack([(torch.arange(max(lengths)) >= max(lengths) - length).long() for length in lengths])
    return {"input_ids": ids * mask, "attention_mask": mask}


def theirs(model: Any) -> Any:
    return transformers.DynamicCache(config=model.config)


def paged(model: Any, num_blocks: int = 64, **options: Any) -> PagedCache:
    return PagedCache(model, num_blocks, BLOCK_SIZE, **options)


def generate(model: Any, cache: Any, inputs: dict[str, Any], num_tokens: int = 64, **options: Any) -> Any:
    return model.generate(
        **inputs, max_new_tokens=num_tokens, return_dict_in_generate=True, output_logits=True,
        **{_KEYWORD: cache, "do_sample": False, **options},
    )  # fmt: skip


def assert_alike(out: Any, expected: Any) -> None:
    assert out.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), rtol=0, atol=1e-4)


@contextmanager
def computed(model: Any) -> Iterator[list[tuple[int, int]]]:
    """The shapes of what goes through the model meanwhile."""
    shapes: list[tuple[int, int]] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))

    hook = model.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield shapes
    finally:
        hook.remove()


def num_blocks(lengths: Any) -> int:
    return int(sum(-(-length // BLOCK_SIZE) for length in lengths))


# Models.


@pytest.mark.parametrize("name", MODELS)
def test_64_greedy_tokens_and_their_logits(name):
    eager, ours = models(name)
    inputs = prompts(41, 34, 9)
    cache = paged(ours)
    out = generate(ours, cache, inputs)
    assert_alike(out, generate(eager, theirs(eager), inputs))
    assert len({tuple(row[-32:]) for row in out.sequences.tolist()}) == 3, "the rows say the same: a weak test"
    assert cache.get_seq_length() == 41 + 63
    # Padding takes no place, and no row has more than the block that it has begun
    assert cache.manager.stats().live_blocks == num_blocks([41 + 63, 34 + 63, 9 + 63])
    cache.manager.check_integrity()
    assert out[_KEYWORD] is cache


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_as_close_to_float32_as_eager_attention_is(name):
    eager, ours = models(name, torch.bfloat16)
    inputs = prompts(41, 34, 9)
    exact = copy.deepcopy(eager).float()
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected, of_eager, of_ours = (
            model(**inputs, **{_KEYWORD: cache}).logits.float()[real]
            for model, cache in ((exact, theirs(exact)), (eager, theirs(eager)), (ours, paged(ours)))
        )
    errors = [(logits - expected).abs().mean().item() for logits in (of_ours, of_eager)]
    assert 0 < errors[0] <= 1.1 * errors[1]
    cache = paged(ours)
    generate(ours, cache, inputs, 16)
    assert cache.manager.stats().live_blocks == num_blocks([41 + 15, 34 + 15, 9 + 15])


def test_latents_are_stored_as_they_are_and_not_twice():
    _, ours = models("deepseek_v3")
    cache = paged(ours, num_blocks=10)
    pools = cache.manager._cache
    numbers = pools.num_layers * (pools[0].k_cache.size + pools[0].v_cache.size)
    assert numbers == 4 * 10 * BLOCK_SIZE * (24 + 8)  # of three layers; a fourth one has the place beside the third


# Ways to generate.


@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 3}, {"top_p": 0.8, "repetition_penalty": 1.3}])
def test_sampling_with_a_seed(options):
    eager, ours = models("llama")
    inputs = prompts(30, 21)
    outs = []
    for model, cache in ((ours, paged(ours)), (eager, theirs(eager))):
        torch.manual_seed(5)
        outs.append(generate(model, cache, inputs, 32, do_sample=True, temperature=1.5, **options))
    assert_alike(*outs)


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3"])
def test_beam_search(name):
    eager, ours = models(name)
    inputs = prompts(30, 21)
    cache = paged(ours)
    options = {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5, "output_scores": True}
    out = generate(ours, cache, inputs, 32, **options)
    expected = generate(eager, theirs(eager), inputs, 32, **options)
    assert out.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(out.sequences_scores, expected.sequences_scores, rtol=0, atol=1e-4)
    cache.manager.check_integrity()
    assert cache.batch_size == 8
    cache.reset()
    assert cache.manager.stats().live_blocks == 0


def test_to_reorder_copies_nothing_but_blocks_that_are_begun_and_shared():
    _, ours = models("llama")
    cache = paged(ours)
    with torch.no_grad():
        ours(**prompts(*[2 * BLOCK_SIZE + 3] * 3), **{_KEYWORD: cache})
        cache.reorder_cache(torch.tensor([1, 1, 1]))
        assert (cache.manager.stats().live_blocks, cache.manager.stats().copies) == (3, 0)
        ours(torch.tensor([[5], [6], [7]]), **{_KEYWORD: cache})
        assert (cache.manager.stats().live_blocks, cache.manager.stats().copies) == (2 + 3, 2)
        ours(torch.randint(2, 9, (3, BLOCK_SIZE - 4)), **{_KEYWORD: cache})  # to the end of the block
        cache.reorder_cache(torch.tensor([0, 0, 2]))
        ours(torch.tensor([[5], [6], [7]]), **{_KEYWORD: cache})
    assert (cache.manager.stats().live_blocks, cache.manager.stats().copies) == (2 + 2 + 3, 2)
    cache.manager.check_integrity()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("draft", ["a model", "the prompt"])
def test_assisted_decoding(name, draft):
    eager, ours = models(name)
    inputs = prompts(20)
    inputs = {key: values.repeat(1, 2) for key, values in inputs.items()}  # so that to look up finds something
    assistant, _ = models("qwen3")
    options = {"assistant_model": assistant} if draft == "a model" else {"prompt_lookup_num_tokens": 3}
    cache = paged(ours)
    out = generate(ours, cache, inputs, 40, **options)
    expected = generate(eager, theirs(eager), inputs, 40)
    assert out.sequences.tolist() == expected.sequences.tolist()
    assert cache.manager.stats().live_blocks == num_blocks([cache.get_seq_length()])
    assert cache.get_seq_length() == 40 + 39
    cache.manager.check_integrity()


def test_contrastive_search_is_refused_by_transformers_itself():
    """It is code from the Hub now, that calls batch_repeat_interleave and batch_select_indices."""
    _, ours = models("llama")
    with pytest.raises(ValueError, match="trust_remote_code"):
        generate(ours, paged(ours), prompts(9), penalty_alpha=0.6, top_k=4)


def test_prefill_in_chunks():
    eager, ours = models("mistral")
    inputs = prompts(41, 34, 3)  # of the last nothing is in the first chunks
    out = generate(ours, paged(ours), inputs, 32, prefill_chunk_size=7)
    assert_alike(out, generate(eager, theirs(eager), inputs, 32))


def test_generate_again_on_a_longer_chat_computes_what_is_new():
    eager, ours = models("gemma3")
    cache, inputs = paged(ours), prompts(20, 13)
    for turn in range(3):
        with computed(ours) as shapes:
            out = generate(ours, cache, inputs, 16)
        assert_alike(out, generate(eager, theirs(eager), inputs, 16))
        assert shapes[0] == ((2, 20) if turn == 0 else (2, 1 + 5))  # the token sampled last, and the next question
        question = torch.randint(2, 128, (2, 5), generator=torch.Generator().manual_seed(turn))
        ids = torch.cat([out.sequences, question], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 16 + 5, dtype=torch.long)], dim=1)
        inputs = {"input_ids": ids, "attention_mask": mask}


def test_a_cache_is_used_for_batch_after_batch():
    eager, ours = models("llama")
    cache = paged(ours, num_blocks=16)
    for lengths in ((41, 34), (9,), (7, 30, 12)):
        inputs = prompts(*lengths)
        assert_alike(generate(ours, cache, inputs, 16), generate(eager, theirs(eager), inputs, 16))
        cache.reset()
        assert (cache.get_seq_length(), cache.batch_size, cache.manager.stats().live_blocks) == (0, -1, 0)


# Prefixes.


def test_a_common_prefix_is_computed_and_stored_once():
    eager, ours = models("llama")
    lengths = [160 + n for n in (5, 19, 8, 30, 2, 13, 26, 11)]
    inputs = prompts(*lengths)
    prefix = torch.randint(2, 128, (160,), generator=torch.Generator().manual_seed(3))
    for row, length in zip(inputs["input_ids"], lengths, strict=True):
        row[-length : 160 - length or None] = prefix
    cache = paged(ours, num_blocks=160, prefix_caching=True)
    with computed(ours) as shapes:
        columns = cache.begin(**inputs)
        out = generate(ours, cache, inputs, 16)
    assert columns == 160  # of the longest row, which has no padding
    assert shapes[:2] == [(1, 160), (8, 30)]
    assert_alike(out, generate(eager, theirs(eager), inputs, 16))
    # A row with padding computes as many tokens of the prefix again, and has them for itself
    shared = [(160 - (190 - length)) // BLOCK_SIZE for length in lengths]
    assert cache.manager.stats().live_blocks == 20 + num_blocks(n + 15 for n in lengths) - sum(shared)
    cache.manager.check_integrity()
    with computed(ours) as shapes:
        assert cache.begin(**inputs) > 160  # what was computed is found, the rest of the prompts, too
    assert shapes == []


def test_a_longer_chat_is_found_by_its_tokens():
    eager, ours = models("qwen3")
    cache, inputs = paged(ours, prefix_caching=True), prompts(20)
    out = generate(ours, cache, inputs, 16)
    cache.reset()
    generate(ours, cache, prompts(30, 21, seed=9), 16)  # somebody else's
    longer = {"input_ids": torch.cat([out.sequences, torch.tensor([[4, 5, 6]])], dim=1)}
    assert cache.begin(**longer) == (20 + 15) // BLOCK_SIZE * BLOCK_SIZE
    with computed(ours) as shapes:
        out = generate(ours, cache, longer, 16)
    assert shapes[0] == (1, 39 - 32)
    assert_alike(out, generate(eager, theirs(eager), longer, 16))
    assert cache.manager.stats().tokens_saved == 32


def test_beams_begin_as_forks_of_what_was_found():
    eager, ours = models("llama")
    cache, inputs = paged(ours, prefix_caching=True), prompts(30, 30)
    generate(ours, cache, inputs, 2)
    assert cache.begin(**inputs) == 24
    cache.batch_repeat_interleave(3)
    assert cache.manager.stats().live_blocks == 2 * 3
    out = generate(ours, cache, inputs, 16, num_beams=3)
    assert out.sequences.tolist() == generate(eager, theirs(eager), inputs, 16, num_beams=3).sequences.tolist()


def test_what_nobody_said_the_tokens_of_is_not_found():
    _, ours = models("llama")
    cache, inputs = paged(ours, prefix_caching=True), prompts(40)
    with torch.no_grad():
        ours.model(input_ids=inputs["input_ids"], **{_KEYWORD: cache})  # past the hook
        cache.reset()
        assert cache.begin(**inputs) == 0
        ours(inputs_embeds=ours.model.embed_tokens(inputs["input_ids"]), **{_KEYWORD: cache})
        assert cache.begin(**inputs) == 0
        ours(inputs["input_ids"], **{_KEYWORD: cache})
        assert cache.begin(**inputs) == 32


def test_tokens_at_other_positions_or_beside_images_are_not_found():
    _, ours = models("llama")
    cache, one, two = paged(ours, prefix_caching=True), prompts(40), prompts(40, 30, seed=1)
    ids, alone = one["input_ids"], {"input_ids": two["input_ids"][1:, 10:]}
    with torch.no_grad():
        ours(ids, position_ids=3 * torch.arange(40)[None], **{_KEYWORD: cache})
        assert cache.begin(ids) == 0
        ours(**two, **{_KEYWORD: cache})  # whose second row counts its padding
        assert cache.begin(**alone) == 0
        kwargs = {"input_ids": ids, "pixel_values": torch.zeros(1), _KEYWORD: cache}
        _tell_ids(ours, (), kwargs)
        ours.model(ids, **{_KEYWORD: cache})
        assert cache.begin(ids) == 0
        positions = (two["attention_mask"].cumsum(1) - 1).clamp(min=0)
        ours(**two, position_ids=positions, **{_KEYWORD: cache})
        assert cache.begin(**alone) == 24


def test_a_prefix_is_not_shared_where_its_keys_depend_on_the_length():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = transformers.LlamaConfig(**SMALL, rope_parameters=rope, attn_implementation=OURS)
    model = transformers.LlamaForCausalLM(config)
    paged(model)
    with pytest.raises(ValueError, match="rope_type 'dynamic' makes other K of a prefix .*: prefix_caching=False"):
        paged(model, prefix_caching=True)


def test_a_refused_mask_leaves_a_fresh_cache_as_it_was():
    _, ours = models("llama")
    cache = paged(ours)
    with pytest.raises(ValueError, match="or cache.reset\\(\\) begins anew"), torch.no_grad():
        ours(torch.ones(2, 9, dtype=torch.long), attention_mask=torch.ones(2, 8), **{_KEYWORD: cache})
    assert (cache.batch_size, cache.get_seq_length(), cache.manager.sequences) == (-1, 0, ())


def test_the_model_tells_tokens_once_however_many_caches_there_are():
    _, ours = models("phi3")
    for _ in range(3):
        paged(ours, prefix_caching=True)
    assert len(ours._forward_pre_hooks) == len(ours._forward_hooks) == 1
    assert not models("phi3")[0]._forward_pre_hooks


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prefix_in_common_is_attended_to_once_for_all_rows(monkeypatch, name, dtype):
    """With softcap, with sinks, of latents; layers with a window have their own way."""
    eager, ours = models(name, dtype)
    exact = copy.deepcopy(eager).float()
    calls = []
    merge = adapter.merge_attention_states
    monkeypatch.setattr(adapter, "merge_attention_states", lambda *states: calls.append(1) or merge(*states))
    errors = []
    start, ends = prompts(40)["input_ids"], torch.tensor([[3, 9], [7, 4], [8, 8], [5, 2]])
    for worth in (1, 10**6):
        monkeypatch.setattr(adapter, "_WORTH", worth)
        logits = []
        for model, cache in ((ours, paged(ours)), (exact, theirs(exact))):
            step(model, cache, start)
            cache.batch_repeat_interleave(4)
            logits.append(step(model, cache, ends).float())
        errors.append((logits[0] - logits[1]).abs().mean().item())
        assert len(calls) == {"mistral": 0, "phi3": 0}.get(name, 1 if "sliding_window" in MODELS[name][1] else 3)
    if dtype == torch.float32:
        assert max(errors) < 1e-5
    else:
        assert 0 < errors[0] < 1.3 * errors[1]


# The cache's own methods, by hand.


def step(model: Any, cache: Any, ids: Any, mask: Any = None) -> Any:
    """The logits behind the last column."""
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=positions, logits_to_keep=1, **{_KEYWORD: cache}).logits[
            :, -1
        ]


actions = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.integers(1, 12)),
        st.tuples(st.just("crop"), st.integers(0, 10)),
        st.tuples(st.just("reorder"), st.integers(0, 2**30)),
        st.tuples(st.just("select"), st.integers(0, 2**30)),
        st.tuples(st.just("repeat"), st.integers(2, 3)),
    ),
    min_size=4,
    max_size=14,
)


@pytest.mark.parametrize("worth", [1, 10**6])
@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(actions=actions, lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4), prefix_caching=st.booleans())
def test_any_history_gives_the_logits_of_a_dynamic_cache(monkeypatch, name, worth, actions, lengths, prefix_caching):
    monkeypatch.setattr(adapter, "_WORTH", worth)  # a common prefix is attended to by a call of its own, or never
    eager, ours = models(name)
    caches = paged(ours, num_blocks=400, prefix_caching=prefix_caching), transformers.DynamicCache()
    rng = np.random.default_rng(len(actions))
    ids, mask = prompts(*lengths).values()
    for action, n in [("step", 0), *actions, ("step", 1)]:
        rows, columns = mask.shape
        if action == "step":
            if n:
                ids = torch.as_tensor(rng.integers(2, 128, (rows, n)))
                mask = torch.cat([mask, torch.ones(rows, n, dtype=torch.long)], dim=1)
            of_ours, expected = (
                step(model, cache, ids, mask) for model, cache in zip((ours, eager), caches, strict=True)
            )
            torch.testing.assert_close(of_ours, expected, rtol=0, atol=1e-4)
        elif action == "crop":
            removed = min(n, columns - max(lengths))
            mask = mask[:, : columns - removed]
            for cache in caches:
                cache.crop(-removed)
        else:
            if action == "repeat" and rows > 4:
                continue
            some = np.random.default_rng(n)
            if action == "reorder":
                chosen = some.integers(0, rows, rows)
            elif action == "select":
                chosen = some.permutation(rows)[: some.integers(1, rows + 1)]
            else:
                chosen = np.repeat(np.arange(rows), n)
            mask = mask[torch.as_tensor(chosen)]
            for cache in caches:
                if action == "repeat":
                    cache.batch_repeat_interleave(n)
                else:
                    (cache.reorder_cache if action == "reorder" else cache.batch_select_indices)(
                        torch.as_tensor(chosen)
                    )
        caches[0].manager.check_integrity()
        assert caches[0].get_seq_length() == caches[1].get_seq_length()
        assert caches[0].manager.stats().live_blocks <= num_blocks(mask.sum(1).tolist())


def test_rows_are_selected_by_bools_too():
    eager, ours = models("llama")
    logits = []
    for model, cache in ((ours, paged(ours)), (eager, theirs(eager))):
        step(model, cache, prompts(9, 9, 9)["input_ids"])
        cache.batch_select_indices(torch.tensor([True, False, True]))
        logits.append(step(model, cache, torch.tensor([[3], [4]])))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("amount", [-3, -17, -100, 0])
def test_crop_is_transformers_own(amount):
    eager, ours = models("llama")
    caches = paged(ours), theirs(eager)
    logits = []
    for model, cache in zip((ours, eager), caches, strict=True):
        step(model, cache, prompts(17, 17)["input_ids"])
        cache.crop(amount)
        logits.append(step(model, cache, torch.tensor([[3], [4]])))
        with pytest.raises(ValueError, match="negative"):
            cache.crop(4)
    assert caches[0].get_seq_length() == caches[1].get_seq_length()
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


def test_padding_on_the_right_and_in_between_takes_no_place():
    eager, ours = models("llama")
    ids, mask = prompts(20, 20).values()
    mask[0, 14:] = 0
    mask[1, 5:9] = 0
    caches = paged(ours), theirs(eager)
    for n in (0, 1, 3):
        ids = ids if n == 0 else torch.full((2, n), 9)
        mask = torch.cat([mask, torch.ones(2, n, dtype=torch.long)], dim=1)
        of_ours, expected = (step(model, cache, ids, mask) for model, cache in zip((ours, eager), caches, strict=True))
        real = mask[:, -1].bool()
        torch.testing.assert_close(of_ours[real], expected[real], rtol=0, atol=1e-4)
    assert caches[0].manager.stats().live_blocks == num_blocks([14 + 4, 16 + 4])


# What fails.


def failing_once(model: Any, layer: int, error: BaseException) -> Callable[..., Any]:
    """The MLP of a layer raises, once."""
    mlp = model.model.layers[layer].mlp

    def fail(*args: Any) -> None:
        hook.remove()
        raise error

    hook = mlp.register_forward_pre_hook(fail)
    return hook


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("then", ["step", "crop", "reorder", "reset"])
def test_after_an_exception_the_cache_is_as_it_was(layer, then):
    eager, ours = models("llama")
    cache, other = paged(ours, prefix_caching=True), theirs(eager)
    ids = prompts(17, 17)["input_ids"]
    for model, each in ((ours, cache), (eager, other)):
        step(model, each, ids)
    failing_once(ours, layer, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        step(ours, cache, torch.tensor([[3], [4]]))
    committed = layer == 2  # the last layer had attended, and K and V of all layers were written
    assert cache.get_seq_length() == 17 + committed
    for each in (cache, other):
        if then == "crop":
            each.crop(-2 - (committed and each is cache))
        elif then == "reorder":
            each.reorder_cache(torch.tensor([1, 1]))
        elif then == "reset":
            each.reset()
    if committed and then == "step":
        cache.crop(-1)
    if committed and then == "reorder":
        cache.crop(-1)
    new = torch.tensor([[5, 6], [7, 8]])
    torch.testing.assert_close(step(ours, cache, new), step(eager, other, new), rtol=0, atol=1e-4)
    cache.manager.check_integrity()
    assert not cache.manager.open_batches


def test_an_exhausted_pool_leaves_what_there_was():
    eager, ours = models("llama")
    cache, inputs = paged(ours, num_blocks=6), prompts(20, 13)
    with pytest.raises(OutOfBlocksError, match="1 blocks wanted, 0 of 6 are free.* make the pool larger"):
        generate(ours, cache, inputs)
    assert cache.get_seq_length() == 24  # both rows have three blocks, of which the second has 17 tokens
    assert cache.manager.stats().live_blocks == 6
    cache.crop(19 - 24)  # and on from there
    expected = generate(eager, theirs(eager), inputs, 4)
    assert_alike(generate(ours, cache, inputs, 4), expected)
    cache.reset()
    with pytest.raises(OutOfBlocksError):
        generate(ours, cache, prompts(49, 3))
    assert (cache.get_seq_length(), cache.manager.stats().live_blocks) == (0, 0)
    assert_alike(generate(ours, cache, inputs, 4), expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_another_attention_is_refused(implementation):
    _, ours = models("llama")
    model = copy.deepcopy(ours)
    cache = paged(model)
    model.set_attn_implementation(implementation)
    with pytest.raises(
        ValueError, match=rf"model has '{implementation}': call model.set_attn_implementation\('cupy_pagedkv'\)"
    ):
        generate(model, cache, prompts(9))
    model.set_attn_implementation(OURS)
    generate(model, cache, prompts(9), 4)


@pytest.mark.parametrize("cache", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {_KEYWORD: "dynamic"}])
def test_our_attention_without_our_cache_is_refused(cache):
    _, ours = models("llama")
    if _KEYWORD in cache:
        cache = {_KEYWORD: theirs(ours)}
    with pytest.raises(ValueError, match=rf"give the model one, {_KEYWORD}=PagedCache\(model, num_blocks\), or call"):
        ours.generate(**prompts(9), max_new_tokens=2, **cache)


def test_what_update_took_is_not_attended_to_by_another_model():
    eager, ours = models("llama")
    other = copy.deepcopy(ours)
    for model in (other, models("gemma2")[1], models("deepseek_v3")[1]):
        with pytest.raises(
            ValueError, match=r"made for another model, of 3 layers with 2 KV heads of 16: make a PagedC"
        ):
            step(model, paged(ours), prompts(9)["input_ids"])
    with pytest.raises(ValueError, match=r"made for another model, of 3 layers with 1 KV heads of 24: make a PagedC"):
        step(ours, paged(models("deepseek_v3")[1]), prompts(9)["input_ids"])
    with pytest.raises(ValueError, match=r"layer 1 came, but layer 0 has not attended over this cache"):
        step(eager, paged(ours), prompts(9)["input_ids"])


def test_another_device_and_another_dtype_are_refused():
    _, ours = models("llama")
    cache = paged(ours)
    cache._device = torch.device("cuda:0")
    with pytest.raises(
        ValueError, match=r"cache is on cuda:0, .* tensors are on cpu: make a PagedCache after model.to"
    ):
        step(ours, cache, prompts(9)["input_ids"])
    model = copy.deepcopy(ours)
    cache = paged(model)
    with pytest.raises(ValueError, match=r"cache has torch.float32 K of 2 heads of 16, .* layer 0 has torch.bfloat16"):
        step(model.to(torch.bfloat16), cache, prompts(9)["input_ids"])


def test_layers_that_do_not_fit_are_refused():
    config = transformers.Llama4TextConfig(**SMALL, num_local_experts=2, intermediate_size_mlp=64)
    with pytest.raises(ValueError, match="this model has chunked_attention"):
        PagedCache(transformers.Llama4ForCausalLM(config), 8)


def test_layers_that_read_an_encoder_are_refused():
    config = transformers.T5Config(vocab_size=16, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="this model has cross-attention"):
        PagedCache(transformers.T5ForConditionalGeneration(config), 8)


def test_masks_that_do_not_fit_are_refused():
    _, ours = models("llama")
    ids, mask = prompts(9, 5).values()
    cache = paged(ours)
    with pytest.raises(ValueError, match=r"\(2, 9\), those in the cache among them, got \(2, 8\)"), torch.no_grad():
        ours(ids, attention_mask=mask[:, 1:], **{_KEYWORD: cache})
    with (
        pytest.raises(ValueError, match=r"attention_mask must be \[rows, columns\].* got \(2, 1, 9, 9\)"),
        torch.no_grad(),
    ):
        ours(ids, attention_mask=torch.zeros(2, 1, 9, 9), **{_KEYWORD: cache})
    step(ours, cache, ids, mask)
    with pytest.raises(ValueError, match="takes for padding what the cache has for tokens, or"):
        step(ours, cache, torch.tensor([[3], [4]]))
    with pytest.raises(ValueError, match="takes for padding what the cache has for tokens, or"):
        step(ours, cache, torch.tensor([[3], [4]]), torch.tensor([[0] + 9 * [1], 4 * [0] + 6 * [1]]))
    with pytest.raises(ValueError, match="a batch of 2 rows, but got 3: cache.reset"):
        step(ours, cache, torch.tensor([[3], [4], [5]]))
    assert cache.get_seq_length() == 9


def test_gradients_and_dropout_are_refused():
    _, ours = models("llama")
    with pytest.raises(RuntimeError, match="no gradient: call the model under torch.no_grad"):
        ours(prompts(9)["input_ids"], **{_KEYWORD: paged(ours)})
    model = copy.deepcopy(ours).train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with pytest.raises(ValueError, match=r"no dropout, got 0.5: call model.eval"):
        step(model, paged(model), prompts(9)["input_ids"])


def test_bidirectional_attention_is_refused():
    _, ours = models("gemma3")
    model = copy.deepcopy(ours)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(ValueError, match="is causal"):
        step(model, paged(model), prompts(9)["input_ids"])


def test_begin_says_what_it_needs():
    _, ours = models("llama")
    with pytest.raises(ValueError, match=r"PagedCache\(…, prefix_caching=True\)"):
        paged(ours).begin(**prompts(9))
    with pytest.raises(ValueError, match="padded on the left"):
        paged(ours, prefix_caching=True).begin(torch.ones(1, 3, dtype=torch.long), torch.tensor([[1, 1, 0]]))


def test_latents_need_the_weight_itself():
    model = copy.deepcopy(models("deepseek_v3")[1])
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = torch.nn.Sequential(layer.self_attn.kv_b_proj)
    with pytest.raises(ValueError, match=r"must be a torch.nn.Linear, got Sequential: merge an adapter, or dequantize"):
        step(model, paged(model), prompts(9)["input_ids"])


@pytest.mark.skipif(_KEYWORD != "cache", reason="the name past_key_values is not an old one yet")
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_the_old_name_of_the_argument_is_taken_too(prefix_caching):
    eager, ours = models("llama")
    inputs, cache = prompts(20, 13), paged(ours, prefix_caching=prefix_caching)
    with pytest.warns(FutureWarning, match="`past_key_values` is deprecated"):
        out = ours.generate(**inputs, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert out.tolist() == generate(eager, theirs(eager), inputs, 8).sequences.tolist()
    if prefix_caching:
        cache.reset()
        with pytest.warns(FutureWarning, match="`past_key_values` is deprecated"), torch.no_grad():
            ours(prompts(30)["input_ids"], past_key_values=cache)
        assert cache.begin(prompts(30)["input_ids"]) == 24


def test_a_cache_is_not_copied():
    _, ours = models("llama")
    with pytest.raises(TypeError, match=r"batch_repeat_interleave\(n\) forks its rows"):
        copy.deepcopy(paged(ours))
    assert repr(paged(ours)) == "PagedCache(3 layers, 0 rows of 0 columns, 64 blocks of 8 tokens, float32 on cpu)"


# Elsewhere.


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_model_breaks_its_graph_at_each_attention(fullgraph):
    eager, ours = models("llama")
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(ours), backend="eager", fullgraph=fullgraph)
    cache, other = paged(compiled), theirs(eager)
    for n in (12, 1):
        ids = torch.arange(2 * n).view(2, n) + 5
        if fullgraph:
            with pytest.raises(torch._dynamo.exc.Unsupported, match="K and V are written by NumPy or CuPy"):
                step(compiled, cache, ids)
        else:
            torch.testing.assert_close(step(compiled, cache, ids), step(eager, other, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_under_inference_mode(dtype):
    eager, ours = (copy.deepcopy(model).to(dtype) for model in models("llama"))
    ids = prompts(9)["input_ids"]
    with torch.inference_mode():
        of_ours, expected = (step(model, make(model), ids) for model, make in ((ours, paged), (eager, theirs)))
    assert (of_ours - expected).abs().max() <= 32 * torch.finfo(dtype).eps * expected.abs().max()


def test_the_benchmark_compares_what_is_alike(monkeypatch):
    from benchmarks import hf

    monkeypatch.setattr(hf, "a_model", lambda: copy.deepcopy(models("llama")[1]))
    monkeypatch.setattr(hf, "PREFIX", 8 * 40)
    runs = list(hf.generations(quick=True))
    assert [run.label for run in runs] == ["1 x 32", "8 x 32", "1 x 256", "8 x 256", "8 x 72, 40 in common"]
    assert set(runs[-1].seconds) == {hf.OURS, hf.DYNAMIC, hf.STATIC, hf.BY_HAND}
    assert len(list(hf.generation_lines(runs))) == 6
    assert [line.split()[0] in ("met", "MISSED") for line in hf.generation_bars(runs)] == [True] * 3


def test_the_example_of_the_module():
    failed, tried = doctest.testmod(cupy_pagedkv.transformers)
    assert (failed, tried) == (0, 7)


def test_nothing_else_imports_pytorch():
    code = "import sys, cupy_pagedkv; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
