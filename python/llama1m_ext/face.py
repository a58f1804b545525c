"""A `Transformer` of Meta's `llama` package with the face of a `LlamaModel`, so that one path serves both.

The face owns no weights: its decoder layers hold the modules of the Transformer. Meta rotates the pairs (2i, 2i + 1) of a
head, transformers (i, i + head_dim / 2): q and k are put into the latter order when they leave their projections, which
changes no score.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama

from . import _compat, memory
from .cache import LongCache
from .call import KEEP
from .meta_llama import FACE
from .options import ATTRIBUTE as OPTIONS
from .options import Options, read

_ROWS = 256 << 20
"""Bytes of logits that are made at a time."""


class Turned(nn.Module):
    """A projection to q or k, whose heads come out in the order of transformers.

    Args:
        inner: `[..., dim]` to `[..., heads * head_dim]`.
        head_dim: even.
    """

    def __init__(self, inner: nn.Module, head_dim: int) -> None:
        super().__init__()
        self.inner, self.head_dim = inner, head_dim

    def forward(self, x: Tensor) -> Tensor:
        return turned(self.inner(x).unflatten(-1, (-1, self.head_dim))).flatten(-2)


def turned(x: Tensor) -> Tensor:
    """Channels `[..., head_dim]` from Meta's order to transformers'."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def turned_back(x: Tensor) -> Tensor:
    """And the other way."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


class Unmade:
    """Stands where a large tensor was to be, until somebody needs it: Meta's code calls `.to` before anything else.

    Attributes:
        shape: of the tensor.
    """

    def __init__(self, shape: tuple[int, ...], make: Callable[[Any], Tensor]) -> None:
        self.shape, self._make = torch.Size(shape), make

    def to(self, like: Any) -> Tensor:
        """The tensor, on the device of `like` (and in its dtype if it is a tensor)."""
        return self._make(like)


class Face:
    """What serves a Transformer.

    Args:
        transformer: it.

    Attributes:
        model: a `LlamaModel` of its modules.
        cache: keys and values of the tokens so far.
    """

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer
        params, attention = transformer.params, transformer.layers[0].attention
        self.head_dim = int(attention.head_dim)
        config = LlamaConfig(
            vocab_size=params.vocab_size,
            hidden_size=params.dim,
            intermediate_size=_height(transformer.layers[0].feed_forward.w1, 4 * params.dim),
            num_hidden_layers=len(transformer.layers),
            num_attention_heads=attention.n_local_heads,
            num_key_value_heads=attention.n_local_kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=params.max_seq_len,
            rms_norm_eps=params.norm_eps,
            rope_theta=float(params.rope_theta),
        )
        with torch.inference_mode(False), torch.no_grad():
            with torch.device("meta"):
                self.model = modeling_llama.LlamaModel(config).eval()
            with torch.device("cpu"):
                self.model.rotary_emb = modeling_llama.LlamaRotaryEmbedding(config)
        self.cache: LongCache | None = None
        self.connect()

    def connect(self) -> None:
        """Holds the modules that the Transformer has now: adapters and quantisers put others there at any time."""
        theirs = self.transformer._modules
        _link(self.model, "embed_tokens", theirs["tok_embeddings"])
        _link(self.model, "norm", theirs["norm"])
        for ours, layer in zip(self.model.layers, theirs["layers"], strict=True):
            parts = layer._modules
            attention, feed_forward = parts["attention"]._modules, parts["feed_forward"]._modules
            for name, there in (("q_proj", "wq"), ("k_proj", "wk")):
                held: Any = ours.self_attn._modules[name]
                if type(held) is not Turned or held._modules["inner"] is not attention[there]:
                    setattr(ours.self_attn, name, Turned(attention[there], self.head_dim))
            _link(ours.self_attn, "v_proj", attention["wv"])
            _link(ours.self_attn, "o_proj", attention["wo"])
            for name, there in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
                _link(ours.mlp, name, feed_forward[there])
            _link(ours, "input_layernorm", parts["attention_norm"])
            _link(ours, "post_attention_layernorm", parts["ffn_norm"])

    def forward(self, tokens: Tensor, start_pos: int, last_only: bool) -> Tensor:
        """Logits, float32 `[batch, n, vocab]`, or `[batch, 1, vocab]` of the last position.

        Args:
            tokens: int64 `[batch, n]`.
            start_pos: how many tokens were before.

        Raises:
            ValueError: tokens beyond max_seq_len, rows beyond max_batch_size, or a gap.
        """
        batch, n = tokens.shape
        params = self.transformer.params
        if batch > params.max_batch_size:
            raise ValueError(f"tokens: expected at most max_batch_size={params.max_batch_size} rows, got {batch}")
        if start_pos < 0 or start_pos + n > params.max_seq_len:
            raise ValueError(
                f"tokens: expected at most max_seq_len={params.max_seq_len}, got {n} from start_pos={start_pos} on"
            )
        self.connect()
        agreed = self._agreed(batch, tokens.device)
        cache = self._cache(batch, start_pos)
        more: dict[str, Any] = {KEEP: 1 if last_only else 0}
        with _with_options(self.model, agreed):
            more[_compat.cache_name()] = cache
            hidden = self.model(input_ids=tokens, use_cache=True, **more).last_hidden_state
        return self._logits(hidden[:, -1:] if last_only else hidden)

    def _agreed(self, batch: int, device: torch.device) -> Options:
        """Options of a call. The ranks of a model that is cut in parts wait for each other in every projection: they must
        go through the same chunks, whatever is free on each.

        Raises:
            ValueError: options that let one rank skip what another computes.
        """
        given = read(self.model)
        if self.model.config.num_attention_heads == self.transformer.params.n_heads:
            return given
        for name in ("checkpoint", "remember"):
            if getattr(given, name) is not None:
                raise ValueError(f"{name}: expected None for a model in parts, got {getattr(given, name)!r}")
        chunk, progress = given.chunk, given.progress
        if chunk == "auto":
            size = next(self.transformer.parameters()).element_size()
            chunk = memory.chunk_len(self.model.config, batch, size, 1 << 62, gpu=device.type == "cuda")
        if progress == "auto" and torch.distributed.is_initialized() and torch.distributed.get_rank():
            progress = False
        return dataclasses.replace(given, chunk=chunk, progress=progress)

    def _logits(self, hidden: Tensor) -> Tensor:
        """In float32, a part at a time: in the model's dtype they would take half as much again."""
        output = self.transformer.output
        batch, n = hidden.shape[:2]
        rows = max(1, _ROWS // (batch * self.transformer.vocab_size * hidden.element_size()))
        if n <= rows:
            return output(hidden).float()
        made: Tensor | None = None
        for a in range(0, n, rows):
            part = output(hidden[:, a : a + rows])
            if made is None:
                made = part.new_empty((batch, n, part.shape[-1]), dtype=torch.float32)
            made[:, a : a + rows] = part
        assert made is not None
        return made

    # -- what was before ----------------------------------------------------------------------------------------------

    def _cache(self, batch: int, start_pos: int) -> LongCache:
        if start_pos == 0:
            self.cache = None  # its memory first
            self.cache = LongCache()
            self._release()
            return self.cache
        if any(isinstance(layer.attention.cache_k, Tensor) for layer in self.transformer.layers):
            self._adopt(batch, start_pos)  # Meta's own code wrote there meanwhile
        cache = self.cache
        length = 0 if cache is None else cache.get_seq_length()
        if cache is None or start_pos > length:
            raise ValueError(f"start_pos: expected at most {length}, the tokens so far, got {start_pos}")
        rows = cache.layers[0].kind.batch
        if batch > rows:
            raise ValueError(f"tokens: expected at most {rows} rows, as before start_pos={start_pos}, got {batch}")
        if start_pos < length:
            cache.crop(start_pos - length)
        if batch < rows:
            cache.batch_select_indices(torch.arange(batch, device=cache.layers[0].device))
        return cache

    def _adopt(self, batch: int, length: int) -> None:
        cache = LongCache()
        for i, layer in enumerate(self.transformer.layers):
            attention = layer.attention
            made = [getattr(attention, name) for name in ("cache_k", "cache_v")]
            if not isinstance(made[0], Tensor):  # their forward did not come as far
                made = [unmade.to(attention.wk.weight) for unmade in made]
            keys, values = (buffer[:batch, :length] for buffer in made)
            cache.update(turned(keys).transpose(1, 2), values.transpose(1, 2).contiguous(), i)
        self.cache = cache
        self._release()

    def _release(self) -> None:
        """Meta's buffers go, and come back with what is in the pages when Meta's code needs them."""
        for i, layer in enumerate(self.transformer.layers):
            attention = layer.attention
            for name in ("cache_k", "cache_v"):
                if isinstance(getattr(attention, name), Tensor):
                    setattr(attention, name, buffer(self.transformer, i, name, tuple(getattr(attention, name).shape)))


def _link(owner: nn.Module, name: str, module: nn.Module) -> None:
    if owner._modules[name] is not module:
        setattr(owner, name, module)


def _height(linear: Any, default: int) -> int:
    """Rows of a projection, from which memory is reckoned."""
    weight = getattr(linear, "weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else default


@contextlib.contextmanager
def _with_options(model: Any, options: Options) -> Iterator[None]:
    given = model.__dict__.get(OPTIONS)
    if options == read(model):
        yield
        return
    model.__dict__[OPTIONS] = dataclasses.asdict(options)
    try:
        yield
    finally:
        model.__dict__.pop(OPTIONS)
        if given is not None:
            model.__dict__[OPTIONS] = given


class _Buffer:
    """Makes an attention layer's cache as Meta's code has it. A class, because a function of a function can't be pickled."""

    def __init__(self, transformer: Any, layer: int, name: str, shape: tuple[int, ...]) -> None:
        self.transformer, self.layer, self.name, self.shape = transformer, layer, name, shape

    def __call__(self, like: Any) -> Tensor:
        made = torch.zeros(self.shape, dtype=getattr(like, "dtype", None), device=getattr(like, "device", like))
        face = self.transformer.__dict__.get(FACE)
        cache = None if face is None else face.cache
        if cache is not None and len(cache.layers) > self.layer and cache.layers[self.layer].length:
            keys, values = cache.layers[self.layer].dense()
            held = (turned_back(keys) if self.name == "cache_k" else values).transpose(1, 2)
            made[: held.shape[0], : held.shape[1]] = held
        return made


def buffer(transformer: Any, layer: int, name: str, shape: tuple[int, ...]) -> Unmade:
    """A layer's cache_k or cache_v, `[max_batch, max_seq_len, kv_heads, head_dim]`, that takes no memory yet."""
    return Unmade(shape, _Buffer(transformer, layer, name, shape))


class _Table:
    """Makes the table of rotations."""

    def __init__(self, module: str, *args: Any) -> None:
        self.module, self.args = module, args

    def __call__(self, device: Any) -> Tensor:
        return sys.modules[self.module].precompute_freqs_cis(*self.args).to(device)  # type: ignore[attr-defined]


def table(module: str, head_dim: int, end: int, theta: float) -> Unmade:
    """`freqs_cis`, complex64 `[end, head_dim / 2]`, that takes no memory yet: a GiB for a million tokens."""
    return Unmade((end, head_dim // 2), _Table(module, head_dim, end, theta))
