"""Layer-major prefill: the same numbers in chunks, little memory, a bar, and a clean retreat."""

from __future__ import annotations

import json

import pytest
import torch

import llama1m_ext
from conftest import stock
from llama1m_ext import testing


@pytest.fixture
def model():
    return testing.tiny_model()


def forward(model, *args, **kwargs):
    llama1m_ext.stats(model, reset=True)
    with torch.no_grad():
        return model(*args, **kwargs)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("past", [0, 1, 33])
@pytest.mark.parametrize("chunk", [3, 32, 33, 99])
def test_chunks_give_the_same_logits_and_cache(model, chunk, past):
    ids = testing.random_ids(2, past + 100)
    caches = [llama1m_ext.LongCache(config=model.config, page_size=size) for size in ("auto", 16)]
    for cache in caches:
        if past:
            llama1m_ext.set_options(model, chunk="auto")
            forward(model, ids[:, :past], past_key_values=cache)
        llama1m_ext.set_options(model, chunk=chunk)
        ours = forward(model, ids[:, past:], past_key_values=cache).logits
        assert llama1m_ext.stats(model).layer_major == 1
        assert not llama1m_ext.stats(model).stock
    with stock():
        theirs = forward(model, ids)
    close(ours, theirs.logits[:, past:])
    for cache in caches:
        for mine, layer in zip(cache.layers, theirs.past_key_values.layers, strict=True):
            close(mine.keys, layer.keys)
            close(mine.values, layer.values)


@pytest.mark.parametrize("side", ["left", "right", "both", "an empty row"])
@pytest.mark.parametrize("chunk", ["auto", 16])
def test_padding(model, side, chunk):
    llama1m_ext.set_options(model, chunk=chunk)
    ids = testing.random_ids(3, 70)
    mask = torch.ones_like(ids)
    if side in ("left", "both"):
        mask[0, :30] = mask[1, :1] = 0
    if side in ("right", "both"):
        mask[1, 60:] = mask[2, 17:] = 0
    if side == "an empty row":
        mask[1] = 0
    ours = forward(model, ids, attention_mask=mask).logits
    assert not llama1m_ext.stats(model).stock
    with stock():
        theirs = forward(model, ids, attention_mask=mask).logits
        blind = forward(model, ids).logits
    seen = mask.bool()
    close(ours[seen], theirs[seen])
    assert torch.isfinite(ours).all()
    if side in ("left", "both"):
        assert (theirs[seen] - blind[seen]).abs().max() > 0.1, "this checkpoint would not show that padding is ignored"


@pytest.mark.parametrize("keep", [1, 5, 40, 100, 1000])
def test_logits_to_keep_spares_the_rest_of_the_last_layer(model, keep):
    ids = testing.random_ids(2, 100)
    llama1m_ext.set_options(model, chunk=30)
    ours = forward(model, ids, logits_to_keep=keep)
    assert llama1m_ext.stats(model).served == 4 + -(-min(keep, 100) // 30)
    with stock():
        theirs = forward(model, ids, logits_to_keep=keep)
    assert ours.logits.shape == theirs.logits.shape
    close(ours.logits, theirs.logits)
    for mine, layer in zip(ours.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        close(mine.keys, layer.keys)
        close(mine.values, layer.values)


def test_without_logits_to_keep_there_are_all_logits(model):
    llama1m_ext.set_options(model, chunk=16)
    assert forward(model, testing.random_ids(1, 50)).logits.shape == (1, 50, testing.VOCAB_SIZE)
    assert forward(model.model, testing.random_ids(1, 50)).last_hidden_state.shape == (1, 50, 64)


def test_logits_to_keep_as_a_tensor(model):
    llama1m_ext.set_options(model, chunk=16)
    ids, places = testing.random_ids(1, 50), torch.tensor([0, 17, 49])
    ours = forward(model, ids, logits_to_keep=places).logits
    with stock():
        close(ours, forward(model, ids, logits_to_keep=places).logits)


def test_inputs_embeds_stay_as_they_are(model):
    llama1m_ext.set_options(model, chunk=16)
    embeds = model.model.embed_tokens(testing.random_ids(1, 50)).detach()
    before = embeds.clone()
    ours = forward(model, inputs_embeds=embeds).logits
    assert torch.equal(embeds, before)
    with stock():
        close(ours, forward(model, inputs_embeds=embeds).logits)


@pytest.mark.parametrize("use_cache", [True, False])
def test_hidden_states_and_tuples(model, use_cache):
    llama1m_ext.set_options(model, chunk=16)
    ids = testing.random_ids(1, 50)
    for more in ({"output_hidden_states": True}, {"return_dict": False}, {"use_cache": use_cache}):
        ours = forward(model.model, ids, use_cache=use_cache, **{k: v for k, v in more.items() if k != "use_cache"})
        with stock():
            theirs = forward(
                model.model, ids, use_cache=use_cache, **{k: v for k, v in more.items() if k != "use_cache"}
            )
        assert type(ours) is type(theirs)
        assert len(ours) == len(theirs)
        close(ours[0], theirs[0])
        if "output_hidden_states" in more:
            assert len(ours.hidden_states) == 3
            for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
                close(a, b)


@pytest.mark.parametrize(
    "where", ["model.layers.1", "model.layers.0.self_attn", "model.layers.0.mlp.up_proj", "model.norm"]
)
def test_a_hook_sees_what_it_would_see_in_stock(model, where):
    llama1m_ext.set_options(model, chunk=16)
    seen = []

    def look(module, args, output):
        seen.append((output[0] if isinstance(output, tuple) else output).clone())

    handle = model.get_submodule(where).register_forward_hook(look)
    ids = testing.random_ids(1, 50)
    forward(model, ids, logits_to_keep=1)
    assert llama1m_ext.stats(model).served == 2
    with stock():
        forward(model, ids, logits_to_keep=1)
    assert len(seen) == 2
    close(*seen)
    handle.remove()
    forward(model, ids)
    assert llama1m_ext.stats(model).layer_major == 1


def test_output_hidden_states_once_does_not_end_layer_major(model):
    llama1m_ext.set_options(model, chunk=16)
    with stock():  # transformers 5 installs hooks and leaves them
        forward(model, testing.random_ids(1, 20), output_hidden_states=True)
    forward(model, testing.random_ids(1, 50))
    assert llama1m_ext.stats(model).layer_major == 1


def test_min_layer_major_len(model):
    llama1m_ext.set_options(model, chunk=16, min_layer_major_len=60)
    forward(model, testing.random_ids(1, 59))
    assert llama1m_ext.stats(model).layer_major == 0
    forward(model, testing.random_ids(1, 60))
    assert llama1m_ext.stats(model).layer_major == 1


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop])
@pytest.mark.parametrize("chunk", [16, "auto"])
def test_an_interrupted_prefill_leaves_model_and_cache_as_they_were(model, error, chunk, monkeypatch):
    from llama1m_ext import llama

    llama1m_ext.set_options(model, chunk=chunk)
    ids = testing.random_ids(1, 90)
    cache = llama1m_ext.LongCache(config=model.config, page_size=16)
    forward(model, ids[:, :30], past_key_values=cache)
    keys = [layer.keys.clone() for layer in cache.layers]
    calls = 0
    attention = llama.ops.attention

    def interrupted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == (6 if chunk == 16 else 2):  # in the second layer
            raise error
        return attention(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(llama.ops, "attention", interrupted)
        with pytest.raises(error):
            forward(model, ids[:, 30:], past_key_values=cache)
    assert [layer.length for layer in cache.layers] == [30, 30]
    assert all(torch.equal(layer.keys, k) for layer, k in zip(cache.layers, keys, strict=True))
    ours = forward(model, ids[:, 30:], past_key_values=cache).logits
    with stock():
        close(ours, forward(model, ids).logits[:, 30:])


def test_a_widening_layer_is_left_to_stock():
    """float32 weights in a bfloat16 layer's MLP, as some quantisers leave them: hidden states become float32."""
    model = testing.tiny_model(dtype=torch.bfloat16)
    down = model.model.layers[0].mlp.down_proj

    class Wide(torch.nn.Module):
        def forward(self, x):
            return down(x).float()

    model.model.layers[0].mlp.down_proj = Wide()
    model.model.layers[1].float()
    model.model.norm.float()
    model.lm_head.float()
    llama1m_ext.set_options(model, chunk=16)
    ids = testing.random_ids(1, 50)
    with pytest.warns(UserWarning, match="gives torch.float32"):
        ours = forward(model, ids).logits
    with stock():
        assert torch.equal(ours, forward(model, ids).logits)


@pytest.mark.parametrize(
    ("show", "length", "visible"),
    [("auto", 50, False), (True, 50, True), (False, 20_000, False), ("auto", 20_000, True)],
)
def test_progress_bar(capsys, show, length, visible):
    model = testing.tiny_model(num_attention_heads=1, num_key_value_heads=1, hidden_size=16, intermediate_size=16)
    llama1m_ext.set_options(model, chunk=min(2048, length // 3), progress=show)
    forward(model, testing.random_ids(1, length), logits_to_keep=1)
    shown = capsys.readouterr().err
    assert ("prefill" in shown) == visible
    if visible:
        assert "100%" in shown
        assert f"{length:,}/{length:,} tokens" in shown
        assert "tokens/s" in shown


def test_progress_bar_obeys_tqdm_disable(run_python):
    script = """
import torch, llama1m_ext, sys
from llama1m_ext import testing
model = testing.tiny_model()
llama1m_ext.set_options(model, chunk=16, progress=True)
sys.stderr = sys.stdout
with torch.no_grad():
    model(testing.random_ids(1, 50))
print("layer-major:", llama1m_ext.stats(model).layer_major)
"""
    assert "prefill" in run_python(script)
    silent = run_python(script, TQDM_DISABLE="1")
    assert "prefill" not in silent
    assert "layer-major: 1" in silent


MEMORY = """
import json, torch, llama1m_ext
from llama1m_ext import testing
torch.set_grad_enabled(False)
model = testing.tiny_model(hidden_size=512, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=1)
llama1m_ext.set_options(model, chunk=128, progress=False)
model.model(testing.random_ids(1, 300))
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
found = []
for length in (2048, 6144):
    ids = testing.random_ids(1, length)
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    output = model.model(ids)
    found.append(peak() - before)
    del output
print(json.dumps({"growth": found, "layer_major": llama1m_ext.stats(model).layer_major}))
"""


def test_peak_memory_is_hidden_states_and_kv_and_a_chunk(run_python):
    """What 4096 more tokens cost is what hidden states and KV predict: everything else is a chunk's."""
    try:
        open("/proc/self/clear_refs", "w").close()
    except OSError:
        pytest.skip("needs Linux's /proc to measure a peak")
    # Blocks go back to the system when they are freed, so that one length's leftovers are not the next one's memory.
    found = json.loads(run_python(MEMORY, MALLOC_MMAP_THRESHOLD_="262144", MALLOC_TRIM_THRESHOLD_="262144"))
    assert found["layer_major"] == 3
    short, long = found["growth"]
    a_token = 512 * 4 + 2 * 2 * 64 * 4  # hidden states, and K and V of two layers, in float32
    # gate, up and product of 2048 each, and ten vectors of 512 (norms in float32, q, k, v, out): 5.6 MiB; twice, for slack
    chunk = 2 * 128 * 4 * (3 * 2048 + 10 * 512)
    assert abs(long - short - 4096 * a_token) <= 0.15 * 4096 * a_token, (long - short, 4096 * a_token)
    # One float32 copy of the hidden states would be 12 MiB more, one unchunked projection of the MLP 48 MiB.
    assert short <= 2048 * a_token * 1.07 + chunk
    assert long <= 6144 * a_token * 1.07 + chunk


def test_chunk_is_chosen_from_memory(monkeypatch):
    from llama1m_ext import memory

    class Llama8B:
        hidden_size, intermediate_size = 4096, 14336
        num_attention_heads, num_key_value_heads, head_dim = 32, 8, 128

    monkeypatch.setattr(memory, "available_bytes", lambda: 64 << 30)
    plenty = memory.chunk_len(Llama8B, 1, 2)
    assert plenty in (1024, 2048, 4096)
    assert memory.chunk_len(Llama8B, 8, 2) == plenty // 8
    monkeypatch.setattr(memory, "available_bytes", lambda: 2 << 30)
    assert memory.chunk_len(Llama8B, 1, 2) < plenty
    monkeypatch.setattr(memory, "available_bytes", lambda: 0)
    assert memory.chunk_len(Llama8B, 1, 2) == memory.MIN_CHUNK
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    assert memory.chunk_len(Llama8B, 1, 2) == plenty


def test_available_bytes_of_this_machine():
    from llama1m_ext import memory

    found = memory.available_bytes()
    assert found is None or 1 << 20 < found < 1 << 50
