"""The `llama` package of the meta-llama/llama3 repository: what is put in the place of its functions.

Its `Llama.build` refuses more than 8192 tokens, and its model makes caches for `max_batch_size` rows of `max_seq_len`
tokens at once, masks and scores of N x N, and logits of every position. Here its `Transformer` is served as a
`LlamaModel` is (`face.py`).

A package of that name that is another one is left alone: names, arguments and fields must be what we know.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from . import patch

if TYPE_CHECKING:
    from .face import Face

MODULE = "llama.model"
LIMIT = 8192
"""What `Llama.build` takes."""
FACE = "_llama1m_face"
"""A Transformer's attribute."""
_WHY, _TABLE = "_llama1m_why", "_llama1m_freqs_cis"
_FIELDS = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta"}
_FIELDS |= {"max_batch_size", "max_seq_len"}
_STEP = ["self", "x", "start_pos", "freqs_cis", "mask"]
_ARGUMENTS = {
    ("Transformer", "__init__"): ["self", "params"],
    ("Transformer", "forward"): ["self", "tokens", "start_pos"],
    ("TransformerBlock", "forward"): _STEP,
    ("Attention", "forward"): _STEP,
    ("FeedForward", "forward"): ["self", "x"],
}
MARK = "_llama1m"
_PARTS = {
    "TransformerBlock": {"attention", "feed_forward", "attention_norm", "ffn_norm"},
    "Attention": {"wq", "wk", "wv", "wo"},
    "FeedForward": {"w1", "w2", "w3"},
}
_ours: dict[tuple[str, str], Any] = {}
"""Functions of theirs whose work we do, as they were when ours were put in their place."""
_max_seq_len: contextvars.ContextVar[int | None] = contextvars.ContextVar("llama1m_max_seq_len", default=None)
_last_only: contextvars.ContextVar[bool] = contextvars.ContextVar("llama1m_last_only", default=False)


def is_known(module: Any) -> bool:
    """Whether a module is the `llama.model` whose work we know."""
    try:
        if not {field.name for field in dataclasses.fields(module.ModelArgs)} >= _FIELDS:
            return False
        if list(inspect.signature(module.precompute_freqs_cis).parameters) != ["dim", "end", "theta"]:
            return False
        for (owner, name), names in _ARGUMENTS.items():
            function = getattr(module, owner).__dict__[name]
            if function.__module__ != module.__name__ or list(inspect.signature(function).parameters) != names:
                return False
        return True
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def transformer_init(original: Callable[..., None], owner: type) -> Callable[..., None]:
    """`Transformer.__init__`: caches and the table of rotations are not made before they are needed, which is when
    Meta's own code runs."""
    module: Any = sys.modules.get(getattr(owner, "__module__", ""))
    if not is_known(module):
        return original

    @functools.wraps(original)
    def init(self: Any, params: Any) -> None:
        asked = _max_seq_len.get()
        if asked is not None:
            params = dataclasses.replace(params, max_seq_len=asked)
        if not patch.is_enabled() or type(params) is not module.ModelArgs:
            original(self, params)
            return
        from . import face

        original(self, dataclasses.replace(params, max_seq_len=1))
        self.params = params
        head_dim = params.dim // params.n_heads
        self.freqs_cis = face.table(module.__name__, head_dim, 2 * params.max_seq_len, params.rope_theta)
        for i, layer in enumerate(self.layers):
            attention = layer.attention
            for name in ("cache_k", "cache_v"):
                rows, _, *rest = getattr(attention, name).shape
                setattr(attention, name, face.buffer(self, i, name, (rows, params.max_seq_len, *rest)))

    return init


def transformer_forward(original: Callable[..., Any], owner: type) -> Callable[..., Any]:
    """`Transformer.forward`: logits, float32 `[batch, n, vocab]`, as theirs; of the last position only where `generate`
    looks at no other."""
    module: Any = sys.modules.get(getattr(owner, "__module__", ""))
    if not is_known(module):
        return original
    import torch

    for key in _ARGUMENTS:
        if key[0] != "Transformer":
            _ours[key] = getattr(module, key[0]).__dict__[key[1]]

    @functools.wraps(original)
    def forward(self: Any, tokens: Any, start_pos: int) -> Any:
        if torch.compiler.is_compiling() or not patch.is_enabled():
            return original(self, tokens, start_pos)
        face = face_of(self)
        why = unserved(self, tokens) if face is not None else self.__dict__[_WHY]
        if face is None or why is not None:
            _note(self, face, str(why))
            return original(self, tokens, start_pos)
        with torch.inference_mode():  # as theirs
            return face.forward(tokens, int(start_pos), _last_only.get())

    setattr(forward, MARK, True)
    return forward


def build(original: Callable[..., Any], owner: type) -> Any:
    """`Llama.build`: takes any length."""
    if _names(original, owner)[2:3] != ["max_seq_len"]:
        return original
    signature = inspect.signature(original)

    @functools.wraps(original)
    def longer(*args: Any, **kwargs: Any) -> Any:
        from . import face  # noqa: F401  # before theirs changes torch's default dtype and device, for good

        given = signature.bind(*args, **kwargs)
        asked = given.arguments["max_seq_len"]
        if not patch.is_enabled() or not isinstance(asked, int) or asked <= LIMIT:
            return original(*args, **kwargs)
        given.arguments["max_seq_len"] = LIMIT
        with _set(_max_seq_len, asked):
            made = original(*given.args, **given.kwargs)
        got = made.model.params.max_seq_len
        if got != asked:
            raise RuntimeError(f"Llama.build: expected a model with max_seq_len={asked}, it made one with {got}")
        return made

    return staticmethod(longer)


def generate(original: Callable[..., Any], owner: type) -> Callable[..., Any]:
    """`Llama.generate`: tells the model when only the last position's logits are looked at."""
    names = _names(original, owner)
    if names[:3] != ["self", "prompt_tokens", "max_gen_len"] or "logprobs" not in names:
        return original
    signature = inspect.signature(original)

    @functools.wraps(original)
    def last_only(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        prompts, params = given.arguments["prompt_tokens"], given.arguments["self"].model.params
        lengths = [len(prompt) for prompt in prompts]
        # Where there is nothing to generate, its code takes the log-probabilities of the prompt, asked for or not.
        room = lengths and min(lengths) < min(params.max_seq_len, given.arguments["max_gen_len"] + max(lengths))
        with _set(_last_only, bool(room and not given.arguments["logprobs"])):
            return original(*args, **kwargs)

    return last_only


def _names(function: Any, owner: Any) -> list[str]:
    """Arguments of a function of `Llama`; none where that is not the one that we know."""
    model = sys.modules.get(MODULE)
    module = sys.modules.get(getattr(owner, "__module__", ""))
    if not is_known(model) or getattr(module, "Transformer", None) is not model.Transformer or not callable(function):  # type: ignore[union-attr]
        return []
    return list(inspect.signature(function).parameters)


@contextlib.contextmanager
def _set(variable: contextvars.ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


# -- a model ----------------------------------------------------------------------------------------------------------


def is_transformer(module: Any) -> bool:
    """Whether a module is a `Transformer` that we can serve."""
    theirs: Any = getattr(sys.modules.get(MODULE), "Transformer", None)
    if not (isinstance(theirs, type) and isinstance(module, theirs)):
        return False
    return hasattr(getattr(theirs, "forward", None), MARK) or is_known(sys.modules[MODULE])


def face_of(transformer: Any) -> Face | None:
    """Its face, made when first asked for; None where it is not what we know."""
    found = transformer.__dict__
    made = found.get(FACE)
    if FACE not in found or (made is not None and len(made.model.layers) != len(transformer.layers)):
        from .face import Face

        found[_WHY] = _unlike(transformer)
        found[FACE] = None if found[_WHY] else Face(transformer)
    return found[FACE]


def _unlike(transformer: Any) -> str | None:
    """Why a Transformer is none of ours."""

    params = transformer.params
    if getattr(params, "use_scaled_rope", False):
        return "its rotary frequencies are scaled"
    for layer in transformer.layers:
        for name, part in (("Attention", layer.attention), ("FeedForward", layer.feed_forward)):
            if not _PARTS[name] <= part._modules.keys():
                return f"a {name} without {', '.join(sorted(_PARTS[name] - part._modules.keys()))}"
    head_dim = int(transformer.layers[0].attention.head_dim)
    if not 8 <= head_dim <= 256 or head_dim % 2:
        return f"head_dim {head_dim}"
    return None


def _other_frequencies(transformer: Any) -> str | None:
    """Whether somebody has put other rotary frequencies there. At position 1 the angles are the frequencies."""
    import torch

    table, known = transformer.freqs_cis, transformer.__dict__.get(_TABLE)
    if known is not None and known[0] is table:
        return known[1]
    theta, head_dim = transformer.params.rope_theta, int(transformer.layers[0].attention.head_dim)
    rows = table
    if not isinstance(table, torch.Tensor):
        with torch.device("cpu"):
            rows = sys.modules[MODULE].precompute_freqs_cis(head_dim, 2, theta)  # type: ignore[attr-defined]
    freqs = 1.0 / theta ** (torch.arange(0, head_dim, 2, device="cpu").double() / head_dim)
    same = len(rows) > 1 and torch.allclose(rows[1].angle().cpu().double(), freqs, rtol=1e-5, atol=1e-7)
    why = None if same else f"freqs_cis is not that of rope_theta={theta}"
    transformer.__dict__[_TABLE] = (table, why)
    return why


def unserved(transformer: Any, tokens: Any) -> str | None:
    """Why a call takes Meta's own path."""
    import torch

    from . import cuda
    from .call import DTYPES

    if torch.jit.is_tracing():
        return "tracing"
    if tokens.dim() != 2 or not tokens.numel():
        return "an empty input"
    weight = next(transformer.tok_embeddings.parameters())
    if weight.dtype not in DTYPES:
        return f"dtype {weight.dtype}"
    why = cuda.unserved(tokens.device)
    if why is not None:
        return why
    for layer in transformer.layers:
        for name, part in (
            ("TransformerBlock", layer),
            ("Attention", layer.attention),
            ("FeedForward", layer.feed_forward),
        ):
            if type(part).forward is not _ours[name, "forward"] or "forward" in part.__dict__:
                return f"the forward of a {name} was replaced"
            if part._forward_hooks or part._forward_pre_hooks:
                return f"a hook on a {name}"
            if not _PARTS[name] <= part._modules.keys():
                return f"a {name} without {', '.join(sorted(_PARTS[name] - part._modules.keys()))}"
    return _other_frequencies(transformer)


def _note(transformer: Any, face: Face | None, why: str) -> None:
    from .stats import count

    if face is None:
        first = not transformer.__dict__.get("_llama1m_said")
        transformer.__dict__["_llama1m_said"] = True
    else:
        first = count(face.model, stock=why, calls=len(transformer.layers))
    if first and not why.startswith(("tracing", "dtype", "an empty")):
        warnings.warn(f"llama1m_ext: the llama package's own path is taken, because: {why}", stacklevel=3)
