"""`LlamaModel.forward` and `LlamaForCausalLM.forward` as they are put in the place of transformers' own.

Each is made by a function of (original, owner): the stock path is always at hand, and is taken, exactly as it stands,
for whatever `call.open_call` says we can't serve.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from . import _compat, families, patch, plan_call, stock_path
from .cache import LongCache
from .call import KEEP, MARK, Call, NotServed, is_ours, open_call
from .options import read
from .prefill import is_long, layer_major
from .stats import count

if TYPE_CHECKING:
    from .shelf import Shelf

Forward = Callable[..., Any]


def model_forward(original: Forward, owner: type) -> Forward:
    """`LlamaModel.forward`: a long prompt goes layer by layer, in chunks; anything else as transformers does it, with
    intervals in the place of a mask and a rotation in the place of tables."""
    names = _compat.positional_names(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            kwargs.pop(KEEP, None)
            return original(self, *args, **kwargs)
        keep = kwargs.pop(KEEP, None)
        if not patch.is_enabled():
            return original(self, *args, **kwargs)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        call = open_call(self, given) if read(self).ring is None else _shared(self, given, keep or 0)
        if isinstance(call, Call):
            try:
                call.logits = keep is not None
                return serve(call, given, keep or 0)
            except NotServed as why:
                call.rewind()
                if call.ring is not None:
                    raise RuntimeError(f"ring: expected a call that all ranks can serve together, got {why}") from why
                call = str(why)
            except BaseException:  # Ctrl-C too: the cache, which may be the user's, is as before the call
                call.rewind()
                raise
        stock_path.take(self, call, given)
        other = stock_path.repaired(self, given)
        return original(self, *args, **kwargs) if other is None else original(self, **other)

    setattr(forward, MARK, True)
    families.register(owner)
    return forward


def _shelf_of(call: Call, ids: Tensor | None) -> Shelf | None:
    from .shelf import shelf_of  # only who remembers needs what reads and writes files

    return shelf_of(call, ids)


def _shared(model: Any, given: dict[str, Any], keep: int) -> Call:
    """A call of a model that several ranks share. None of them takes the stock path: each would compute everything."""
    from .ring import inside, membership  # only who has several ranks needs torch.distributed

    layout = membership.layout_of(model)
    assert layout is not None
    return inside.enter(layout, model, lambda: open_call(model, given), given, keep, _wants_all(model.config, given))


def _wants_all(config: Any, given: dict[str, Any]) -> bool:
    """Whether the states after each layer are asked for."""
    wanted = given.get("output_hidden_states")
    return config.output_hidden_states if wanted is None else wanted


def serve(call: Call, given: dict[str, Any], keep: int) -> Any:
    """The model's output, or `NotServed`.

    Args:
        keep: only the last so many positions of the result will be read; 0: all.
    """
    model, config = call.model, call.model.config
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    want_all = _wants_all(config, given)
    states: tuple[Tensor, ...] | None = None
    shelf = None if call.options.remember is None or call.past_len or call.gradients else _shelf_of(call, ids)
    whole, taken, places = ids, 0, given.get("cache_position")
    if shelf is not None and keep > 0 and not want_all:
        assert ids is not None
        taken = shelf.take(call, ids, keep)
        ids, places = ids[:, taken:], None if places is None else places[taken:]
    if call.ring is not None and call.ring.sharded:
        from .ring.prefill import sharded

        hidden = sharded(call, ids, embeds, keep)
        count(model, layer_major=1)
    elif call.ring is None and not want_all and not call.gradients and is_long(call, embeds):
        hidden = layer_major(call, ids, embeds, keep)
        count(model, layer_major=1)
    else:
        if not call.gradients and call.ring is None:
            plan_call.check(call, keep, call.q_len)
        hidden = model.embed_tokens(ids) if embeds is None else embeds
        call.begin(hidden)
        for page in call.pages or ():
            if call.ring is None:
                page.expect(call.past_len + call.q_len, call.scratch)
            else:
                call.ring.expect(page, call.q_len if call.ring.is_owner else 0)
        more = {_compat.cache_name(): call.cache}
        if places is not None:
            more["cache_position"] = places
        seen = [hidden]
        for layer in call.layers:
            hidden = layer(
                hidden,
                attention_mask=call,
                position_ids=call.position_ids,
                use_cache=call.cache is not None,
                position_embeddings=call.rope,
                **more,
            )
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            if want_all:
                seen.append(hidden)
        hidden = model.norm(hidden)
        if want_all:
            states = (*seen[:-1], hidden)
    count(model, served=call.served, computed=call.batch * call.q_len, reused=taken)
    if isinstance(call.cache, LongCache):
        call.cache._made_by(model)
        call.cache._note(whole if call.is_plain else None, call.past_len - taken)
    if shelf is not None and whole is not None:
        shelf.keep(call, whole, taken)
    cache = call.cache
    if not call.kind.family.returns_unused_cache:
        used = given.get("use_cache")
        cache = cache if (config.use_cache if used is None else used) else None
    result = BaseModelOutputWithPast(last_hidden_state=hidden, hidden_states=states, **{_compat.cache_name(): cache})
    as_dict = given.get("return_dict")
    as_dict = getattr(config, "return_dict", True) if as_dict is None else as_dict
    return result if as_dict else result.to_tuple()


def causal_lm_forward(original: Forward, owner: type) -> Forward:
    """`LlamaForCausalLM.forward`: tells the model which positions will have logits, so that the last layer of a long
    prompt computes only those. What it returns is transformers' own; where several ranks share the model, with rank 0's logits."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        keep = kwargs.get("logits_to_keep", 0)
        if type(keep) is int and keep >= 0 and len(args) <= 1 and kwargs.get("labels") is None and patch.is_enabled():
            inner = self.model
            watched = inner._forward_hooks or torch.nn.modules.module._global_forward_hooks
            if not watched and is_ours(inner):
                kwargs[KEEP] = keep
        result = original(self, *args, **kwargs)
        if patch.is_enabled() and read(self.model).ring is not None and kwargs.get("labels") is None:
            from .ring import membership

            membership.share_logits(self.model, result)
        return result

    setattr(forward, MARK, True)
    return forward
