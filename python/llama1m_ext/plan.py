"""The plan of a long prompt before it starts: bytes by part, what fits where, what "auto" will choose, how long it may take.

`plan()` is for people and programs; `plan_call` makes the same reckoning before each prefill. Nothing here imports torch
until it is asked for something.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .plan_bytes import Parts, Peak, Work
    from .plan_shape import Shape
    from .plan_speed import Machine, Speed

_NAMES = {
    "weights": "weights",
    "kv": "KV cache in memory",
    "room": "room in its pages (address space)",
    "file": "KV cache on the disk",
    "hidden": "hidden states",
    "scratch": "one layer's K and V, dense",
    "activations": "activations of a chunk",
    "keys_only": "the same in the last layer",
    "workspace": "workspace of the kernels",
    "logits": "logits",
    "ids": "token ids, positions",
    "ring": "a layer's shard, and blocks under way",
}


@dataclass(frozen=True)
class Format:
    """A format of the cache beside the others.

    Attributes:
        name: as the option `kv` takes it.
        token_bytes: of one token in all layers, scales included.
        kv_bytes: of all tokens, the dense ones at both ends included.
        peak_bytes: of everything at the worst moment, all pages in memory.
        fits: whether that fits; None: nobody knows how much memory there is.
    """

    name: str
    token_bytes: float
    kv_bytes: int
    peak_bytes: int
    fits: bool | None


@dataclass(frozen=True)
class Memory:
    """A place that things must fit into.

    Attributes:
        where: "host" or "gpu".
        bytes: what there is of it; None: nobody knows.
        given: whether somebody said so; else it was measured: what is free.
    """

    where: str
    bytes: int | None
    given: bool


@dataclass(frozen=True)
class Plan:
    """What a prompt will take. `str(plan)` is a table, `to_dict()` what JSON can hold.

    Attributes:
        model: its name.
        shape: its sizes.
        work: tokens, rows, chunk, threads.
        memory: what it must fit into, the nearest first.
        kv: the format chosen.
        offload: where pages go that don't fit: None, "host" or "disk".
        fits: whether it all fits that way.
        why: how the choice came about.
        parts: bytes by part.
        peak: the worst moment, weights included.
        phases: every moment that was reckoned, the worst first.
        formats: all formats side by side.
        speed: estimates from rates, measured or given, or None.
        ways: where it does not fit, the cheapest ways out, in words.
    """

    model: str
    shape: Shape
    work: Work
    memory: tuple[Memory, ...]
    kv: str
    offload: str | None
    fits: bool
    why: str
    parts: Parts
    peak: Peak
    phases: tuple[Peak, ...]
    formats: tuple[Format, ...]
    speed: Speed | None
    ways: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything, in what JSON can hold. Bytes are ints, times seconds."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def plan(
    model_or_config: Any,
    tokens: int,
    *,
    batch: int = 1,
    new_tokens: int = 256,
    dtype: Any = None,
    kv: str = "auto",
    offload: str | None = "auto",
    kv_memory: int | str = "auto",
    chunk: int | str = "auto",
    gpu: int | str | None = None,
    host: int | str | None = None,
    threads: int | None = None,
    measure: bool = True,
    gpu_flops: float | None = None,
    gpu_read: int | str | None = None,
    ranks: int = 1,
) -> Plan:
    """What a prompt of a Llama will take, without running it, and what "auto" will choose for it.

    Args:
        model_or_config: a model (or what holds one), a `LlamaConfig`, a folder with a config.json, or a name; the model
            card's needs no network.
        tokens: of the prompt, in each row.
        batch: rows.
        new_tokens: to be generated afterwards.
        dtype: of weights and cache; None: the model's.
        kv, offload, kv_memory, chunk: as in `Options`.
        gpu: bytes of one GPU's memory, as an int or "80GiB": a plan for another machine, by arithmetic. None: what is free
            on the model's GPUs, where it is on any.
        host: bytes of main memory, likewise; None: what is free now.
        threads: of the kernels; None: as torch has it.
        measure: measure this machine for half a second, or the model's GPU, to estimate times.
        gpu_flops, gpu_read: FLOP/s of matrix products and bytes/s ("3350GB") of memory that a GPU reaches, for estimates
            by arithmetic: both or none. None: no estimate for a GPU that is not there.
        ranks: processes that share the model (`distributed`): everything but `tokens` and `new_tokens` is then of one of them, which
            has memory of its own.

    Raises:
        ValueError, TypeError: an argument that makes no sense, or no Llama; the message names it.
    """
    from . import plan_bytes, plan_choice, plan_speed
    from .formats import KvFormat
    from .memory import available_bytes
    from .options import Options, parse_bytes
    from .plan_shape import shape_of

    for name, value, least in (
        ("tokens", tokens, 1),
        ("batch", batch, 1),
        ("new_tokens", new_tokens, 0),
        ("ranks", ranks, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {value!r}")
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    Options(kv=kv, offload=offload, kv_memory=kv_memory, chunk=chunk)  # type: ignore[arg-type]  # which checks them
    if kv != "auto":
        kv = KvFormat.parse(kv).name
    name, shape = shape_of(model_or_config, dtype)
    loaded = shape.loaded is not None
    if threads is None:
        import torch

        threads = torch.get_num_threads()
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads: expected an int from 1 on, got {threads!r}")

    here = available_bytes() if host is None else parse_bytes("host", host)
    memory = [Memory("host", here, host is not None)]
    if gpu is not None:
        memory.insert(0, Memory("gpu", parse_bytes("gpu", gpu), True))
    elif host is None and loaded:
        found = _free_on_gpus(model_or_config)
        if found is not None:
            memory.insert(0, Memory("gpu", found, False))
    limit, on_gpu = memory[0].bytes, memory[0].where == "gpu"
    rates = _rates(gpu_flops, gpu_read)
    if rates is not None and not on_gpu:
        raise ValueError("gpu_flops, gpu_read: expected a GPU, but the plan is for none: gpu=")
    # What is free now has no room for weights that are loaded already, and needs none.
    used = shape.resident_bytes if loaded and not memory[0].given else 0
    work = plan_bytes.Work(tokens, new=new_tokens, batch=batch, threads=threads, gpu=on_gpu)
    if ranks > 1:
        share, new = -(-tokens // ranks), -(-new_tokens // ranks)
        work = dataclasses.replace(work, tokens=share, new=new, ranks=ranks, whole=tokens)
    work = dataclasses.replace(work, chunk=_chunk(shape, batch, limit, on_gpu) if chunk == "auto" else int(chunk))
    pages = None if kv_memory == "auto" else parse_bytes("kv_memory", kv_memory)
    if not on_gpu:
        choice = plan_choice.choose(shape, work, limit, kv, offload, pages, used)
    else:
        choice = plan_choice.choose_on_gpu(shape, work, limit, here, kv, offload, pages, used)
    storage = choice.storage
    ways: tuple[str, ...] = ()
    if not choice.fits and limit is not None:
        try:
            plan_choice.check(shape, work, storage, limit, used, offload)
            if pages is not None and storage.offload is None:
                plan_choice.check_pages(shape, work, storage, pages)
        except plan_choice.DoesNotFit as error:
            ways = error.ways
    formats = []
    for each in plan_bytes.SIDE_BY_SIDE:
        worst = plan_bytes.peak(shape, work, plan_bytes.Storage(each))
        size = KvFormat.parse(each).token_bytes(shape.kv_heads, shape.head_dim, shape.size) * shape.layers
        all_of_it = plan_bytes.kv_bytes(shape, each, work.tokens + work.new, batch)
        fits = None if limit is None else worst.bytes - used <= limit
        formats.append(Format(each, size, all_of_it, worst.bytes, fits))
    counted = storage if storage.kv_memory is not None else plan_bytes.Storage(storage.kv)
    moments = plan_bytes.peaks(shape, work, counted)
    machine = rates
    if machine is None and measure and not on_gpu:
        machine = plan_speed.measure(shape, threads)
    elif machine is None and measure and not memory[0].given and (limit or 0) >= plan_speed.GPU_ROOM:
        machine = plan_speed.measure_gpu(shape, min(_gpus_of(model_or_config), key=str))
    speed = None
    if machine is not None:
        in_all = plan_bytes.kv_bytes(shape, storage.kv, work.tokens + work.new, batch)
        speed = plan_speed.estimate(shape, machine, tokens, batch, in_all, ranks)
    return Plan(
        model=name,
        shape=shape,
        work=work,
        memory=tuple(memory),
        kv=storage.kv,
        offload=storage.offload,
        fits=choice.fits,
        why=choice.why,
        parts=plan_bytes.parts(shape, work, counted),
        peak=moments[0],
        phases=tuple(moments),
        formats=tuple(formats),
        speed=speed,
        ways=ways,
    )


def _free_on_gpus(model: Any) -> int | None:
    """What is free on all GPUs that a model is on, together; None: it is on none."""
    from .memory import free_bytes

    gpus = _gpus_of(model)
    return sum(free_bytes(device) or 0 for device in gpus) if gpus else None


def _gpus_of(model: Any) -> set[Any]:
    root: Any = model if hasattr(model, "parameters") else getattr(model, "model", None)
    return {p.device for p in root.parameters() if p.device.type == "cuda"} if hasattr(root, "parameters") else set()


def _rates(flops: Any, read: Any) -> Machine | None:
    """What somebody says of a GPU.

    Raises:
        ValueError, TypeError: no rate, or one of the two alone.
    """
    from .options import parse_bytes
    from .plan_speed import Machine

    if flops is None and read is None:
        return None
    if flops is None or read is None:
        raise ValueError(f"gpu_flops, gpu_read: expected both or none, got {flops!r} and {read!r}")
    if isinstance(flops, bool) or not isinstance(flops, (int, float)):
        raise TypeError(f"gpu_flops: expected a number, got {flops!r}")
    if not 0 < flops < float("inf"):
        raise ValueError(f"gpu_flops: expected a number above 0, got {flops!r}")
    return Machine(0, float(flops), float(flops), float(parse_bytes("gpu_read", read)), "gpu", True)


def _chunk(shape: Shape, batch: int, limit: int | None, gpu: bool) -> int:
    from .memory import chunk_len

    config = SimpleNamespace(
        head_dim=shape.head_dim,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
    )
    return chunk_len(config, batch, shape.size, limit, gpu)


def _lines(p: Plan) -> list[str]:
    from .plan_choice import gib

    rows = f" x {p.work.batch} rows" if p.work.batch > 1 else ""
    if p.work.ranks > 1:
        rows += f" over {p.work.ranks} ranks; each has {p.work.tokens:,}"
    lines = [
        f"{p.model}: {p.work.prompt:,} tokens{rows}, then {p.work.new:,} new ones, in {p.shape.dtype}",
        *(f"{_place(m)}" for m in p.memory),
        "",
    ]
    alive = p.peak.parts
    names = dict(_NAMES)
    if p.work.gpu:
        names["room"] = "room in its pages"
        names["file"] = f"KV cache on the {p.offload or 'host'}"
    for name, label in names.items():
        n = getattr(p.parts, name)
        if not n and name not in alive:
            continue
        now = alive.get(name, 0)
        note = "" if gib(now) == gib(n) else f"   ({gib(now)} at the peak)" if now else "   (not at the peak)"
        lines.append(f"  {label:<36}{gib(n):>12}{note}")
    lines += [f"  {'peak: ' + p.peak.phase:<36}{gib(p.peak.bytes):>12}", ""]
    lines.append(f"  {'kv':<12}{'a token':>12}{'KV cache':>12}{'peak':>12}  fits")
    for f in p.formats:
        mark = "?" if f.fits is None else "yes" if f.fits else "no"
        chosen = "   <- chosen" if f.name == p.kv else ""
        lines.append(
            f"  {f.name:<12}{gib(f.token_bytes):>12}{gib(f.kv_bytes):>12}{gib(f.peak_bytes):>12}  {mark}{chosen}"
        )
    lines += ["", f'kv="{p.kv}", offload={p.offload and chr(34) + p.offload + chr(34)}, chunk={p.work.chunk}: {p.why}.']
    if not p.fits:
        lines.append("It does not fit that way: a prefill would stop with an error before its first token. Ways out:")
        lines += [f"  - {way}" for way in p.ways] or ["  - none: not even the weights' own work fits"]
    flops = p.work.batch * (p.shape.attention_flops(p.work.prompt) + p.shape.linear_flops(p.work.prompt))
    share = p.work.batch * p.shape.attention_flops(p.work.prompt) / flops
    each = f", a share of {1 / p.work.ranks:.1%} on each rank" if p.work.ranks > 1 else ""
    lines.append(f"The prefill is {flops:.1e} floating-point operations, {share:.0%} of them attention{each}.")
    if p.speed is not None:
        m, s = p.speed.machine, p.speed
        where = f"this machine ({m.threads} threads; measured: {m.flops / 1e9:.0f} GFLOP/s in registers"
        if m.where == "gpu":
            how = "given" if m.given else "measured"
            where = f"the GPU ({how}: {m.flops / 1e12:.1f} TFLOP/s{'' if m.given else ' of attention'}"
        more = "" if m.given else f", {m.matmul / 1e9:.0f} GFLOP/s in matrix products"
        lines.append(f"Estimates for {where}{more}, {m.read / 2**30:.0f} GiB/s of reading):")
        place = "the disk" if p.offload == "disk" else "the host"
        disk = f", without bringing {gib(p.parts.file)} from {place} for each" if p.parts.file else ""
        disk += ", without the time of the links" if p.work.ranks > 1 else ""
        lines.append(
            f"  prefill about {_seconds(s.prefill_seconds)}, a decoded token about {_seconds(s.token_seconds)}{disk}"
        )
    return lines


def _place(m: Memory) -> str:
    from .plan_choice import gib

    name = "GPU memory" if m.where == "gpu" else "main memory"
    known = "unknown" if m.bytes is None else gib(m.bytes)
    how = "as given" if m.given else "free now"
    more = ": by arithmetic" if m.where == "gpu" and m.given else ""
    return f"{name}: {known} {how}{more}"


def _seconds(n: float) -> str:
    if n < 0.1:
        return f"{n * 1000:.1f} ms"
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if n >= 2 * size:
            return f"{n / size:.1f} {unit}"
    return f"{n:.1f} s"
