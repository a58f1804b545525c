"""One forward call of a `LlamaModel`: can we serve it exactly, and what its layers need to know if so."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from . import _compat, cuda, offload, ops, plan_call, window
from .cache import PagedLayer, cache_layers
from .dense import Scratch
from .families import Classes, classes_of
from .formats import KvFormat
from .intervals import ALL, Intervals, ends, from_mask, judged, misfit
from .options import read as read_options
from .placement import device_of, spread
from .questions import Questions
from .rope import Rope, Still
from .window import SlidingLayer

if TYPE_CHECKING:
    from .ring.inside import RingCall

MARK = "_llama1m"
"""Our functions carry it, so that a module whose forward is another one is seen."""
KEEP = "_llama1m_keep"
"""Keyword from `LlamaForCausalLM.forward` to `LlamaModel.forward`: only the last so many positions will be looked at and
get logits; 0: all."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KNOWN = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    _compat.cache_name(),
    "inputs_embeds",
    "use_cache",
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "tokenizer",  # of generate's stop_strings and of an assistant's, which transformers 5 passes on: for nobody
    "assistant_tokenizer",
    "num_items_in_batch",  # the Trainer's, for the loss
    "token_type_ids",  # which tokenizers make for pipelines of 4.57, and Llama's layers ignore
}


class NotServed(Exception):
    """A reason to take the stock path that shows only on the way."""


class Call:
    """What travels to the attention layers as `attention_mask`.

    Attributes:
        model: the `LlamaModel`, or that of another family.
        kind: the family's classes.
        layers: its decoder layers.
        windows: how many keys a query sees, of each layer; None: all before it.
        batch, q_len, past_len: shape of the call; `past_len` tokens are in the cache already.
        cache: what the layers get as `past_key_values` (`cache`), or None.
        gradients: whether they are wanted. Then keys and values are those of the call alone, and an empty cache of
            transformers' own gets them, as it does in stock.
        cache_layers: what each layer's keys and values go to, or None.
        pages: those of them that keep all of it in pages, or None.
        intervals: visible keys of each batch row.
        position_ids: int64 `[batch, q_len]` or `[1, q_len]`.
        ordinary: whether these are what they are by default; None: not looked at yet.
        rope: the rotation; set when the embeddings are known.
        logits: whether the positions wanted will get logits.
        ring: what several ranks make of the call, or None: this process has all of it.
        scratch: memory for the new keys and values of one layer, as long as it is computed.
        served: attention calls that our kernel computed.
    """

    __slots__ = (
        "_bounds",
        "_devices",
        "batch",
        "cache",
        "cache_layers",
        "gradients",
        "intervals",
        "kind",
        "layers",
        "logits",
        "model",
        "options",
        "ordinary",
        "pages",
        "past_len",
        "position_ids",
        "q_len",
        "ring",
        "rope",
        "scratch",
        "served",
        "snapshots",
        "windows",
    )

    def __init__(self, model: Any, kind: Classes, batch: int, q_len: int) -> None:
        self.model, self.kind, self.batch, self.q_len = model, kind, batch, q_len
        self.past_len = self.served = 0
        self.layers: list[Any] = []
        self.cache: Any = None
        self.ring: RingCall | None = None
        self.cache_layers: list[PagedLayer | SlidingLayer] | None = None
        self.pages: list[PagedLayer] | None = None
        self.windows: list[int | None] = []
        self.snapshots: list[dict[str, Any]] = []
        self.scratch = Scratch()
        self.logits = self.gradients = False
        self.intervals: Intervals = ALL
        self.ordinary: bool | None = None
        self._bounds: dict[torch.device, Intervals] = {}
        self._devices: dict[torch.device, int] = {}
        self.options = read_options(model)
        self.position_ids: Tensor = None  # type: ignore[assignment]  # open_call sets it
        self.rope: Rope = None  # type: ignore[assignment]  # begin sets it

    def begin(self, embeds: Tensor) -> None:
        """The embeddings, or the first of them, `[batch, n, hidden]`, are there.

        Raises:
            NotServed: a device or dtype that the kernel does not know.
        """
        why = cuda.unserved(embeds.device)
        if why is not None:
            raise NotServed(why)
        if embeds.dtype not in DTYPES:
            raise NotServed(f"dtype {embeds.dtype}")
        if type(embeds) is not Tensor:
            raise NotServed(f"a tensor of type {type(embeds).__name__}")
        decide_format(self if self.ring is None else self.ring.local)
        head_dim = self.layers[0].self_attn.head_dim
        self.rope = Rope(self.kind.module, self.model.rotary_emb, embeds, self.position_ids, head_dim)

    def rope_of(self, attn: Any) -> Rope | Still:
        """The rotation of an attention layer."""
        return self.rope if getattr(attn, "use_rope", True) else Still()

    @property
    def slides(self) -> bool:
        """Whether some of the cache's layers keep no more than a window."""
        return self.cache_layers is not None and self.pages is not None and len(self.pages) < len(self.cache_layers)

    def skip(self, n: int) -> None:
        """The first n tokens of the call are in the cache already."""
        self.past_len += n
        self.q_len -= n
        self.position_ids = self.position_ids[:, n:]

    @property
    def is_plain(self) -> bool:
        """Whether nothing is padded, and positions are what they are by default: then keys and values are those of the
        tokens alone."""
        if self.intervals is not ALL:
            return False
        if self.ordinary is None:
            self.ordinary = bool(_are_ordinary(self.position_ids, self.past_len))
        return self.ordinary

    @property
    def devices(self) -> dict[torch.device, int]:
        """Which devices layers are on, and how many on each."""
        if not self._devices:
            self._devices = spread(self.layers, self.position_ids.device)
        return self._devices

    def bounds(self, device: torch.device) -> Intervals:
        """The intervals on a layer's device."""
        if self.intervals is ALL:
            return ALL
        found = self._bounds.get(device)
        if found is None:
            found = self._bounds[device] = self.intervals.on(device)
        return found

    def matrix(self, device: torch.device, layer_idx: int) -> Tensor | None:
        """The mask as a matrix, for a layer that must take the stock path after all."""
        kv_len, width = self.past_len + self.q_len, self.windows[layer_idx]
        mask = self.intervals.matrix(self.q_len, kv_len, self.past_len, device)
        if width is None or kv_len <= width:
            return mask
        mask = window.matrix(mask, self.q_len, kv_len, self.past_len, width, device)
        kept = self.cache_layers is not None and isinstance(self.cache_layers[layer_idx], SlidingLayer)
        return mask[..., -(width - 1 + self.q_len) :] if kept else mask

    def rewind(self) -> None:
        """The call failed: the cache is what it was before."""
        for layer, snapshot in zip(self.cache_layers or (), self.snapshots, strict=True):
            layer.restore(snapshot)


def decide_format(call: Call) -> None:
    """Sets the format of layers that have none yet: that of the cache's other layers, or of the cache, or the option's.
    Where pages go to a disk, the layers get a store."""
    layers = call.pages or []
    undecided = [layer for layer in layers if not layer.decided]
    storage = None
    if undecided or (
        layers and layers[0].store is None and (not call.past_len or call.q_len > 1 or call.options.offload == "disk")
    ):
        storage = plan_call.storage_of(call)
        found = next((layer.format for layer in layers if layer.decided), None) or KvFormat.parse(storage.kv)
        for layer in undecided:
            layer.decide(found)
    if storage is not None and storage.offload == "disk":
        budget = storage.kv_memory
        assert budget is not None
        _keep_in(layers, lambda: offload.Store(budget, call.options.offload_dir, len(layers)))
    elif storage is not None and storage.offload == "host":
        for device, count in call.devices.items():  # on the CPU that is where they are
            if device.type == "cuda":
                share = (storage.kv_memory or 0) * count // len(layers)
                mine = [
                    page
                    for page, layer in zip(call.cache_layers or (), call.layers, strict=True)
                    if isinstance(page, PagedLayer) and device_of(layer, device) == device
                ]
                _keep_in(mine, functools.partial(_host_store, share, count))
    if call.q_len > 1 and layers and layers[0].store is not None:
        heads, head_dim = call.model.config.num_key_value_heads, call.layers[0].self_attn.head_dim
        token = call.batch * layers[0].format.token_bytes(heads, head_dim, call.model.dtype.itemsize)
        for store in {id(layer.store): layer.store for layer in layers}.values():
            if store is not None:
                store.check_room(token, call.past_len + call.q_len)


def _host_store(budget: int, layers: int) -> offload.Store:
    from .pinned import HostStore

    return HostStore(budget, layers)


def _keep_in(layers: Sequence[PagedLayer], make: Callable[[], offload.Store]) -> None:
    """Gives a store to the layers that have none: that of the others, or a new one."""
    waiting = [layer for layer in layers if layer.store is None]
    if waiting:
        store = next((layer.store for layer in layers if layer.store is not None), None) or make()
        for layer in waiting:
            layer.keep_in(store)


def open_call(model: Any, given: Mapping[str, Any]) -> Call | str:
    """A call that we can serve, or why it takes the stock path.

    Args:
        model: a `LlamaModel`.
        given: its forward's arguments by name.
    """
    config, kind = model.config, classes_of(model)
    if kind is None:
        return f"a {type(model).__name__}"
    implementation = config._attn_implementation
    if implementation != "sdpa":
        return f"attn_implementation={implementation!r}"
    foreign = _compat.foreign_attention(kind.module)
    if foreign is not None:
        return foreign
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    source = ids if embeds is None else embeds
    if (
        (ids is None) == (embeds is None)
        or not isinstance(source, Tensor)
        or source.dim() != (2 if embeds is None else 3)
    ):
        return "input_ids and inputs_embeds"
    batch, q_len = source.shape[:2]
    if not batch or not q_len:
        return "an empty input"
    why = cuda.unserved(source.device)
    if why is not None:
        return why
    call = Call(model, kind, batch, q_len)
    if _compat.EXPLICIT in config.__dict__ and not call.options.replace_sdpa:
        return "attn_implementation='sdpa' was asked for by name"
    call.gradients = _gradients(model, embeds)
    checkpointing = model.training and getattr(model, "gradient_checkpointing", False)
    if checkpointing and not call.gradients:
        return "training"
    reason = _arguments(model, given) or _layers(call)
    if reason:
        return reason

    # The order of transformers: make a cache, look at its length, then at positions and the mask.
    cache = _compat.given_cache(given)
    use_cache = given.get("use_cache")
    if cache is None and not checkpointing and (config.use_cache if use_cache is None else use_cache):
        cache = DynamicCache(config=config)
    if cache is not None and call.gradients:
        stocks = type(cache) is DynamicCache and not any(type(layer) is PagedLayer for layer in cache.layers)
        if not stocks or checkpointing or cache.get_seq_length():
            return "gradients over a cache"
        call.cache = cache
    elif cache is not None:
        layers = _layers_of(cache, call)
        if isinstance(layers, str):
            return layers
        call.cache, call.cache_layers, call.past_len = cache, layers, layers[0].get_seq_length()
        call.pages = [layer for layer in layers if isinstance(layer, PagedLayer)]
        call.snapshots = [layer.snapshot() for layer in layers]
    return _positions_and_mask(call, given, source.device) or call


def _layers_of(cache: Any, call: Call) -> list[PagedLayer | SlidingLayer] | str:
    """The layers of a cache as pages, or why it must be left alone."""
    if call.options.ring is None:
        return cache_layers(cache, call.windows, call.options.page_size)
    from .ring import membership, shard_layer  # only where several ranks share a model

    layout = membership.layout_of(call.model, call.options)
    assert layout is not None
    found = shard_layer.shard_layers(cache, len(call.windows), call.options.page_size, layout.rank, layout.world_size)
    return found if isinstance(found, str) else [*found]


def _arguments(model: Any, given: Mapping[str, Any]) -> str | None:
    config = model.config
    for name, value in given.items():
        if name not in _KNOWN and value is not None:
            return f"argument {name}"
    attentions = given.get("output_attentions")
    if config.output_attentions if attentions is None else attentions:
        return "output_attentions"
    hidden = given.get("output_hidden_states")
    if hidden is not None and not isinstance(hidden, bool):
        return "output_hidden_states picks layers"
    if not getattr(config, "is_causal", True):
        return "the config says is_causal=False"
    if torch.jit.is_tracing():
        return "tracing"
    return ops.transform()


def _gradients(model: Any, embeds: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    return (embeds is not None and embeds.requires_grad) or any(p.requires_grad for p in model.parameters())


def _layers(call: Call) -> str | None:
    stack = call.model.layers
    if type(stack) is not torch.nn.ModuleList:
        return f"the layers are a {type(stack).__name__}"
    layers: list[Any] = list(stack._modules.values())[: call.model.config.num_hidden_layers]
    if not layers:
        return "there are no layers"
    for layer in layers:
        if type(layer) is not call.kind.decoder_layer:
            return f"a layer is a {type(layer).__name__}"
        if layer._compiled_call_impl is not None:
            return "a compiled layer"
        attn: Any = layer.self_attn
        if not is_ours(attn):
            return f"the forward of a {type(attn).__name__} is not ours"
        if attn.training and (attn.attention_dropout or getattr(attn, "residual_dropout", 0)):
            return "training with dropout"
    if not 8 <= layers[0].self_attn.head_dim <= 256:
        return f"head_dim {layers[0].self_attn.head_dim}"
    try:
        call.windows = [call.kind.window(call.model.config, i) for i in range(len(layers))]
    except ValueError as e:
        return str(e)
    if any(width is not None and width < 2 for width in call.windows):
        return f"a sliding window of {min(width for width in call.windows if width is not None)}"
    call.layers = layers
    return None


def own_forward(module: Any) -> Any:
    """A forward that hides the class's: the module's own attribute, or None.

    transformers 4 leaves one behind after `output_hidden_states=True`, which does what the class's does: it is ignored,
    also where it is of a time when our patch was off, or was put on before it was taken off and put on again.
    """
    own = module.__dict__.get("forward")
    if own is None or getattr(own, "__self__", None) is not module:
        return own
    return None if _bare(own.__func__) is _bare(getattr(type(module), "forward", None)) else own


def _bare(forward: Any) -> Any:
    """What ours was put in the place of; anything else is itself."""
    return _bare(forward.__wrapped__) if hasattr(forward, MARK) else forward


def is_ours(module: Any) -> bool:
    """Whether calling the module ends in our forward: by its class, or through accelerate's hook."""
    own = own_forward(module)
    if own is not None:
        return "_hf_hook" in module.__dict__ and hasattr(module.__dict__.get("_old_forward"), MARK)
    if not hasattr(type(module).forward, MARK):
        return False
    left = module.__dict__.get("forward")
    if left is not None and not hasattr(left, MARK):
        module.__dict__.pop("forward", None)  # transformers' own would be called
    return True


def _positions_and_mask(call: Call, given: Mapping[str, Any], device: torch.device) -> str | None:
    """Reads positions and mask, or says why they are none of ours. On a GPU all that is asked of them is asked at once."""
    questions = Questions()
    reasons = _positions(call, given, device, questions)
    if isinstance(reasons, str):
        return reasons
    mask, kv_len = given.get("attention_mask"), call.past_len + call.q_len
    if mask is not None and cuda.waits(device):
        wrong = misfit(mask, call.batch, kv_len)
        if wrong is not None:
            return wrong
        start, end, facts = ends(mask)
        questions.ask(facts)
    answers = questions.answers()
    for is_so, reason in zip(answers, reasons, strict=False):  # what is left of the answers is the mask's
        if reason is None:
            call.ordinary = is_so
        elif is_so:
            return reason
    if mask is None or not cuda.waits(device):
        found = from_mask(mask, call.batch, kv_len)
    else:
        found = judged(start, end, answers[len(reasons) :])
    if isinstance(found, str):
        return found
    call.intervals = found
    return None


def _positions(
    call: Call, given: Mapping[str, Any], device: torch.device, questions: Questions
) -> str | list[str | None]:
    """Sets the call's positions, and asks what must not be so of them.

    Returns:
        A reason for each question; None: the question is whether they are ordinary. Or one reason that shows at once.
    """
    past, n = call.past_len, call.q_len
    reasons: list[str | None] = []
    places = given.get("cache_position")  # transformers 4
    if places is not None:
        # The causal mask goes by these: they must be what they are by default.
        if places.shape != (n,):
            return "cache_position is not the cache's length"
        questions.ask(~_are_ordinary(places, past))
        reasons.append("cache_position is not the cache's length")
    ids = given.get("position_ids")
    if ids is None:
        call.position_ids = torch.arange(past, past + n, device=device).unsqueeze(0)
        call.ordinary = True
        return reasons
    if ids.dim() != 2 or ids.shape[1] != n or ids.shape[0] not in (1, call.batch):
        return f"position_ids of shape {tuple(ids.shape)}"
    if ids.is_floating_point() or ids.dtype == torch.bool or cuda.unserved(ids.device) is not None:
        return f"position_ids of dtype {ids.dtype} on {ids.device.type}"
    ids = ids.to(device, torch.long)
    questions.ask((ids < 0).any())
    reasons.append("position_ids are negative")
    # Where transformers looks for packed sequences: a jump in the positions begins another one.
    if call.cache is None and given.get("attention_mask") is None and n > 1:
        questions.ask((ids.diff(dim=-1) != 1).any())
        reasons.append("position_ids are packed sequences")
    if cuda.waits(device):
        questions.ask(_are_ordinary(ids, past))
        reasons.append(None)
    call.position_ids = ids
    return reasons


def _are_ordinary(ids: Tensor, past: int) -> Tensor:
    """Whether positions `[..., n]` are those that follow `past` tokens, a bool on their device."""
    n = ids.shape[-1]
    if n == 1:
        return (ids == past).all()  # every decoded token
    return (ids == torch.arange(past, past + n, device=ids.device)).all()
