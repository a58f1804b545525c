"""What a model's weights are made of, and where they are.

A parameter is not always the memory that it seems to be: quantised tensors wrap others or carry scales beside them, and
what accelerate offloads (`device_map` with "cpu" or "disk") is empty until a hook brings it, for one call.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .families import FAMILIES

STOCK = (
    "torch.nn.modules.",
    "transformers.activations",
    *(f"{family.modeling.rpartition('.')[0]}." for family in FAMILIES.values()),
)
"""Modules that keep their weights in parameters and buffers, and nowhere else."""
_ALIGN = ("accelerate.hooks", "AlignDevicesHook")
_SEQUENCE = ("accelerate.hooks", "SequentialHook")


class Far(NamedTuple):
    """A weight that is elsewhere.

    Attributes:
        source: what accelerate's hook looks it up in.
        key: under which name.
        empty: the tensor in its place, on the meta device.
    """

    source: Mapping[str, Tensor]
    key: str
    empty: Tensor

    def load(self) -> Tensor:
        """The weight itself, as the hook would bring it."""
        return self.source[self.key]

    def file(self) -> str | None:
        """The file that it is in; None: it is in memory, or nobody knows."""
        source, key = self.source, self.key
        while hasattr(source, "prefix") and hasattr(source, "dataset"):
            source, key = source.dataset, f"{source.prefix}{key}"
        index = getattr(source, "index", None)
        if not isinstance(index, Mapping) or key in getattr(source, "state_dict", ()) or key not in index:
            return None
        return index[key].get("safetensors_file") or os.path.join(str(getattr(source, "save_folder", "")), f"{key}.dat")

    @property
    def nbytes(self) -> int:
        """Bytes that it takes where it is computed with."""
        return self.empty.numel() * self.empty.element_size()


# -- accelerate's hooks ---------------------------------------------------------------------------------------------


def hooks_of(module: Any) -> list[Any] | None:
    """accelerate's hooks around a module, where they are of the kind that only moves inputs and brings weights; None
    where there is another one."""
    hook = module.__dict__.get("_hf_hook")
    if hook is None:
        return []
    parts = hook.hooks if _kind(hook) == _SEQUENCE else [hook]
    return list(parts) if all(_kind(part) == _ALIGN for part in parts) else None


def _kind(hook: Any) -> tuple[str, str]:
    return type(hook).__module__, type(hook).__qualname__


def _loads(module: Any) -> bool:
    """Whether a hook brings the module's weights for each call, and takes them away after it."""
    return "forward" in module.__dict__ and any(hook.offload for hook in hooks_of(module) or ())


def only_brings(module: Any) -> bool:
    """Whether what accelerate put around a module does nothing but bring inputs to its device, and its weights: then its
    own parts can be called past it, where it is `loaded`."""
    return "_hf_hook" in module.__dict__ and hooks_of(module) is not None and _is_of_class(module)


def _is_of_class(module: Any) -> bool:
    """Whether what a hook calls is what the class would: ours may be one of a time before the patch was off."""
    from .call import MARK  # which needs transformers

    own, usual = getattr(module.__dict__.get("_old_forward"), "__func__", None), type(module).forward
    return own is usual or (hasattr(own, MARK) and hasattr(usual, MARK))


@contextlib.contextmanager
def loaded(*tops: Any) -> Iterator[None]:
    """While it lasts, weights inside these modules that hooks bring for each call are there, and stay: a layer that is
    called for one chunk after the other is read once."""
    taken: list[tuple[Any, Any]] = []
    try:
        for module in [module for top in tops for module in top.modules() if _loads(module)]:
            taken.append((module, module.__dict__["forward"]))
            module.__dict__["_hf_hook"].pre_forward(module)
            if _is_of_class(module):
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = module.__dict__["_old_forward"]
        yield
    finally:
        for module, forward in reversed(taken):
            module.__dict__["forward"] = forward
            module.__dict__["_hf_hook"].post_forward(module, None)


# -- what weights are made of -----------------------------------------------------------------------------------------


def parts(model: Any) -> Iterator[tuple[str, Any, str, Tensor | Far]]:
    """Parameters and buffers of a model, and tensors that modules of other packages keep elsewhere: (name, module, name in
    the module, weight). One that is on the meta device, and nobody would bring, is itself."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for at, module in modules.items():
        for name, tensor in [*module._parameters.items(), *module._buffers.items(), *_loose(module)]:
            if tensor is not None:
                whole = f"{at}.{name}" if at else name
                far = _far(modules, whole, tensor) if tensor.device.type == "meta" else None
                yield whole, module, name, tensor if far is None else far


def _loose(module: Any) -> Iterator[tuple[str, Tensor]]:
    if f"{type(module).__module__}.".startswith(STOCK):
        return
    for name, value in vars(module).items():
        if not name.startswith("_"):
            entries = value.items() if isinstance(value, dict) else [("", value)]
            yield from ((f"{name}.{key}" if key != "" else name, t) for key, t in entries if isinstance(t, Tensor))


def _far(modules: Mapping[str, Any], name: str, empty: Tensor) -> Far | None:
    at, key = name, ""
    while at:
        at, _, step = at.rpartition(".")
        key = f"{step}.{key}" if key else step
        for hook in hooks_of(modules[at]) or ():
            known = hook.offload and hook.weights_map is not None
            if known and (hook.place_submodules or "." not in key):
                return Far(hook.weights_map, key, empty)
    return None


def tensors(module: Any, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Plain tensors that hold a weight, with names of their own.

    Args:
        module, name: where the weight is a parameter or a buffer.
    """
    yield from _flat(weight, name)
    # bitsandbytes: scales beside the codes; of 8 bits, in another place after the first call.
    for at, scale in _beside(getattr(weight, "quant_state", None)):
        yield f"{name}.{at}", scale
    rows: Any = getattr(weight, "SCB", None)
    if rows is None and name == "weight":
        rows = getattr(getattr(module, "state", None), "SCB", None)
    if isinstance(rows, Tensor):
        yield f"{name}.SCB", rows


def _flat(tensor: Tensor, name: str) -> Iterator[tuple[str, Tensor]]:
    inner = getattr(tensor, "__tensor_flatten__", None)
    if inner is None:
        yield name, tensor
        return
    for each in inner()[0]:
        yield from _flat(getattr(tensor, each), f"{name}.{each}")


def _beside(state: Any) -> Iterator[tuple[str, Tensor]]:
    for at in ("absmax", "code", "offset"):
        if isinstance(getattr(state, at, None), Tensor):
            yield at, getattr(state, at)
    if getattr(state, "state2", None) is not None:
        yield from ((f"state2.{at}", tensor) for at, tensor in _beside(state.state2))


def words(weight: Tensor) -> str:
    """How a quantised tensor's parts are to be read, and a space; empty for plain ones."""
    inner = getattr(weight, "__tensor_flatten__", None)
    if inner is not None:
        found = f"{inner()[1]} "
        return "" if " at 0x" in found else found
    state = getattr(weight, "quant_state", None)
    return "" if state is None else f"{state.quant_type} {state.blocksize} {tuple(state.shape)} "


def canonical(module: Any, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """As `tensors`, but the same before and after the first call: bitsandbytes packs its 4-bit weights anew then, where
    the CPU has bfloat16, and rounds their scales to it.

    Raises:
        ValueError: packed in a way that this release of bitsandbytes does not undo.
    """
    state = getattr(weight, "quant_state", None)
    if state is None or not isinstance(getattr(state, "absmax", None), Tensor):
        yield from tensors(module, name, weight)
        return
    codes, absmax = weight.data.as_subclass(Tensor).view(torch.uint8), state.absmax
    if getattr(state, "packing_format_for_cpu", False):
        codes, absmax = _unpacked(codes, state), absmax.T
    elif getattr(state, "nested", False):
        from bitsandbytes.functional import dequantize_blockwise

        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    yield name, codes.reshape(-1)
    yield f"{name}.absmax", absmax.reshape(-1).to(torch.bfloat16)
    yield f"{name}.code", state.code.float()


def _unpacked(codes: Tensor, state: Any) -> Tensor:
    """bitsandbytes' 4-bit codes as they were before it packed them for the CPU: uint8 `[rows, columns / 2]`, the first of
    two in the high half.

    Raises:
        ValueError: this release packs them in a way that it can't undo.
    """
    try:
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as inverse
    except ImportError:
        raise ValueError(
            "model: expected weights that can be compared, but 4-bit ones are packed for this CPU, and this release of "
            "bitsandbytes does not undo it"
        ) from None

    def theirs(some: Tensor) -> Tensor:
        now = copy.copy(state)  # which it writes to
        now.original_nested, now.original_storage_type, now.original_qshape = False, None, some.shape
        return inverse(some, now)[0]

    # Theirs goes by way of int32, which takes ten times as long: a minute for a model of 8B.
    if codes.shape[0] % 32 == 0:
        found = _halves(codes)
        if torch.equal(found[:32], theirs(codes[:32])):
            return found
    return theirs(codes)


def _halves(codes: Tensor) -> Tensor:
    """Blocks of 32 rows: for each two columns, 32 bytes hold the rows' codes in turn, those of the first 16 rows in their
    low halves."""
    rows, half = codes.shape
    first, second = codes.reshape(-1, half, 16, 2).unbind(-1)
    low, high = (first & 15) << 4 | (second & 15), (first & 240) | (second >> 4)
    return torch.cat([low, high], -1).transpose(1, 2).reshape(rows, half)


# -- bytes ------------------------------------------------------------------------------------------------------------


class Bytes(NamedTuple):
    """Bytes of weights.

    Attributes:
        held: in memory, each once.
        brought: in files, and brought into memory for one layer (or table) at a time: of the largest.
    """

    held: int
    brought: int


def bytes_of(model: Any, stack: Iterable[Any] = ()) -> Bytes:
    """Bytes of a model's weights.

    Args:
        stack: its layers, each of which is loaded as a whole.
    """
    groups = {id(module): i for i, layer in enumerate(stack) for module in layer.modules()}
    held: dict[int, int] = {}
    brought: dict[Any, int] = {}
    for _, module, name, weight in parts(model):
        if isinstance(weight, Far):
            if weight.file() is not None:
                group = groups.get(id(module), id(module))
                brought[group] = brought.get(group, 0) + weight.nbytes
                continue
            weight = weight.load()
        for _, tensor in tensors(module, name, weight):
            at = tensor.data_ptr() if tensor.device.type != "meta" else id(tensor)
            held[at] = max(held.get(at, 0), tensor.numel() * tensor.element_size())
    return Bytes(sum(held.values()), max(brought.values(), default=0))


def brought_bytes(layers: Iterable[Any], gpu: bool = False) -> int:
    """Bytes of the weights that hooks bring into memory for one of these layers: of the one with the most.

    Args:
        gpu: whether they are brought to a GPU: then also those that are in main memory.
    """
    found = 0
    for layer in layers:
        if any(_loads(module) for module in layer.modules()):
            far = [weight for _, _, _, weight in parts(layer) if isinstance(weight, Far)]
            found = max(found, sum(weight.nbytes for weight in far if gpu or weight.file() is not None))
    return found


def unpacked_bytes(layers: Iterable[Any]) -> int:
    """Bytes in float32 of the largest quantised matrix of the first of these layers; 0: none is quantised."""
    for layer in layers:
        found = [
            4 * module.in_features * module.out_features
            for module in layer.modules()
            if hasattr(module, "in_features") and _is_quantised(module)
        ]
        return max(found, default=0)
    return 0


def _is_quantised(module: Any) -> bool:
    weight = module._parameters.get("weight")
    if weight is None:  # another package's, which keeps its numbers elsewhere
        return not list(module.children())
    return not weight.is_floating_point() or hasattr(weight, "__tensor_flatten__")
