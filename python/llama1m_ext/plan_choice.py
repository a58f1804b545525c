"""What "auto" chooses, and what to say where nothing fits.

The rule, for the formats: the first of model, int8, int8/int4 and int4 with which the predicted peak and 5% fit into the
memory that is free, and the pages into `kv_memory` where it is given. Where none does, and `offload` allows it: int4,
with pages on the disk. A user who names `offload="disk"` needs no smaller format for room: it is "model" then. So with
less memory, or more tokens, the choice only ever moves on in that list.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from .plan_bytes import LADDER, Offload, Peak, Storage, Work, least_bytes, parts, peak
from .plan_shape import Shape

MARGIN = 1.05
"""The prediction is within 5% of what is measured."""
DISK_SHARE = 2
"""With pages on the disk and no `kv_memory` given, pages may take one part in so many of what is left."""
_MIB = 1 << 20
KvFrom = Literal["options", "cache"] | None
"""What says the format of a cache: the options, or the cache itself; None: it has tokens already, and keeps its own."""


class DoesNotFit(MemoryError):
    """A call that can't fit into memory, found out before any work was done.

    Attributes:
        needed, available: bytes.
        ways: the cheapest ways out, in words.
    """

    def __init__(self, message: str, needed: int = 0, available: int = 0, ways: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.needed, self.available, self.ways = needed, available, ways

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.needed, self.available, self.ways)


@dataclass(frozen=True)
class Choice:
    """What "auto" became.

    Attributes:
        storage: format, offload, and bytes of pages in memory.
        peak: the worst moment with it.
        fits: whether that fits.
        why: in words.
    """

    storage: Storage
    peak: Peak
    fits: bool
    why: str


def gib(n: float) -> str:
    """Bytes for people."""
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", _MIB)):
        if abs(n) >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n / 1024:.1f} KiB"


def choose(
    shape: Shape,
    work: Work,
    available: int | None,
    kv: str = "auto",
    offload: str | None = "auto",
    kv_memory: int | None = None,
    used: int = 0,
) -> Choice:
    """Resolves `kv="auto"` and `offload="auto"`.

    Args:
        available: bytes of memory that all of it may take; None: nobody knows, and everything fits.
        kv_memory: bytes that pages may take; None: what is free.
        used: bytes of what the peak counts that are taken already, and so are not in `available`: the weights, pages.
    """
    disk = offload == "disk"

    def try_one(name: str, where: Offload) -> Choice:
        storage = Storage(name, where, None)
        if where == "disk":
            storage = dataclasses.replace(storage, kv_memory=_pages(shape, work, storage, available, kv_memory, used))
        worst = peak(shape, work, storage)
        fits = available is None or worst.bytes - used <= available
        return Choice(storage, worst, fits, "")

    tried: list[Choice] = []
    for name in LADDER if kv == "auto" else (kv,):
        found = try_one(name, None)
        pages = least_bytes(shape, name, work.past + work.tokens + work.new, work.batch)
        enough = available is None or (found.peak.bytes - used) * (MARGIN if kv == "auto" else 1) <= available
        if enough and (kv_memory is None or pages <= kv_memory) and not disk:
            return dataclasses.replace(found, fits=True, why=_why(kv, name, tried, found, available, used))
        tried.append(found)
        if disk and kv == "auto":
            break  # "model"
    smallest = tried[-1]
    if offload in ("auto", "disk"):
        found = try_one(smallest.storage.kv, "disk")
        if disk:
            why = 'offload="disk" was asked for' + (
                "; the disk has room for the model's own format" if kv == "auto" else ""
            )
        else:
            what = (
                "no format fits into memory with 5% to spare" if kv == "auto" else f'kv="{kv}" does not fit into memory'
            )
            why = f"{what}: pages go to the disk, {gib(found.storage.kv_memory or 0)} of them stay in memory"
        return dataclasses.replace(found, why=why)
    why = f"nothing fits: the smallest needs {gib(smallest.peak.bytes - used)}, {gib(available or 0)} are available"
    final = work.past + work.tokens + work.new
    over = kv_memory is not None and least_bytes(shape, smallest.storage.kv, final, work.batch) > kv_memory
    return dataclasses.replace(smallest, fits=smallest.fits and not over, why=why)


def choose_on_gpu(
    shape: Shape,
    work: Work,
    gpu: int | None,
    host: int | None,
    kv: str = "auto",
    offload: str | None = "auto",
    kv_memory: int | None = None,
    used: int = 0,
) -> Choice:
    """As `choose`, for a card with a host behind it, which is the nearest other place. Where pages go there, "auto" is the
    format with the fewest bytes on the host.

    Args:
        gpu, host: bytes of memory that there are, the host's for pages alone; None: nobody knows, and everything fits.
    """
    if offload != "disk":
        found = choose(shape, work, gpu, kv, None, kv_memory, used)
        if found.fits or offload is None:
            return found
        behind: dict[str, tuple[int, Choice]] = {}
        for name in LADDER if kv == "auto" else (kv,):
            storage = Storage(name, "host")
            pages = _pages(shape, work, storage, gpu, kv_memory, used)
            storage = dataclasses.replace(storage, kv_memory=pages)
            worst, far = peak(shape, work, storage), parts(shape, work, storage).file
            if (gpu is None or (worst.bytes - used) <= gpu) and (host is None or far <= host):
                behind[name] = far, Choice(storage, worst, True, "")
        if behind:
            # All of it comes to the GPU for each decoded token: the fewest bytes, not the first format that fits.
            name = min(behind, key=lambda name: behind[name][0])
            far, choice = behind[name]
            limit = (
                "kv_memory is less than the pages of any format"
                if found.peak.bytes - used <= (gpu or 0)
                else "no format fits on the GPU"
            )
            others = [f"{gib(n)} as {other}" for other, (n, _) in behind.items() if other != name]
            beside = f" (it would be {', '.join(others)})" if others else ""
            why = (
                f"{limit}: {gib(far)} of the pages live on the host, as {name}, and come for each decoded token{beside}"
            )
            return dataclasses.replace(choice, why=why)
        if offload == "host":
            return found
    return choose(shape, work, gpu, kv, offload, kv_memory, used)


def _pages(shape: Shape, work: Work, storage: Storage, available: int | None, kv_memory: int | None, used: int) -> int:
    """Bytes of pages in memory where the others are on the disk."""
    if kv_memory is not None:
        return kv_memory
    if available is None:
        return 2 << 30
    rest = peak(shape, work, dataclasses.replace(storage, kv_memory=0)).bytes
    left = int(available - (rest - used) * MARGIN)
    return max(_MIB, left * 9 // 10 if storage.offload == "host" else left // DISK_SHARE)


def _why(kv: str, name: str, tried: list[Choice], found: Choice, available: int | None, used: int) -> str:
    if kv != "auto":
        return f'kv="{kv}" was asked for, and fits'
    need = gib(found.peak.bytes - used)
    if available is None:
        return "nobody says how much memory there is: the model's own format"
    if not tried:
        return f"the model's own format fits: it needs {need} of {gib(available)}"
    more = ", ".join(f"{c.storage.kv} would need {gib(c.peak.bytes - used)}" for c in tried)
    return f"{name} is the first format that fits with 5% to spare: it needs {need} of {gib(available)}; {more}"


def need(shape: Shape, work: Work, storage: Storage, used: int = 0, mapped: bool = False) -> int:
    """Bytes that are taken at the peak beyond those in use; with `mapped`, the unused room of pages too."""
    return peak(shape, work, storage).bytes - used + (parts(shape, work, storage).room if mapped else 0)


def check(
    shape: Shape,
    work: Work,
    storage: Storage,
    available: int,
    used: int = 0,
    offload: str | None = "auto",
    room: int | None = None,
    kv_from: KvFrom = "options",
) -> None:
    """Before any work.

    Args:
        offload: what the user allows.
        room: bytes of address space that there are (`ulimit -v`); pages' unused room counts there too.
        kv_from: where another format can be asked for.

    Raises:
        DoesNotFit: with the three cheapest ways out.
    """
    mapped = room is not None and need(shape, work, storage, used, mapped=True) > room
    limit = min(room, available) if mapped and room is not None else available
    needed = need(shape, work, storage, used, mapped)
    if needed <= limit:
        return
    ways = tuple(
        way
        for way, _ in zip(_ways(shape, work, storage, limit, used, offload, kv_from, mapped), range(3), strict=False)
    )
    worst = peak(shape, work, storage)
    listed = ", ".join(f"{name} {gib(n)}" for name, n in list(worst.parts.items())[:4])
    text = "\n".join(f"  - {way}" for way in ways) or "  - none: not even the weights' own work fits"
    raise DoesNotFit(
        f"{_tokens(work)} need {gib(needed)} more memory, and "
        f"{gib(limit)} are available (the worst moment, {worst.phase}: {listed}). Nothing was computed. Ways out, the "
        f"cheapest first:\n{text}",
        needed,
        limit,
        ways,
    )


def _tokens(work: Work) -> str:
    rows = f" of {work.batch} rows" if work.batch > 1 else ""
    if work.ranks > 1:
        rows += f" (of {work.whole} that {work.ranks} ranks share)"
    return f"{work.tokens} tokens{rows}" + (f" and up to {work.new} that are generated" if work.new else "")


def check_pages(shape: Shape, work: Work, storage: Storage, most: int, kv_from: KvFrom = "options") -> None:
    """Whether pages fit into the `kv_memory` that the user gave, those of what is to be generated too.

    Raises:
        DoesNotFit: with the cheapest ways out.
    """

    def takes(kv: str, new: int) -> int:
        return least_bytes(shape, kv, work.past + work.tokens + new, work.batch)

    pages = takes(storage.kv, work.new)
    if pages <= most:
        return
    ways = []
    new = largest(lambda n: takes(storage.kv, n) <= most, work.new)
    if new:
        ways.append(f"max_new_tokens={new}: so many fit")
    for name in LADDER if kv_from else ():
        smaller = takes(name, work.new)
        if smaller <= most:
            asked = "LongCache" if kv_from == "cache" else "set_options"
            model = "" if kv_from == "cache" else "model, "
            ways.append(f'{asked}({model}kv="{name}"): its pages take {gib(smaller)}')
            break
    ways.append(f'set_options(model, kv_memory="{-(-pages // _MIB)}MiB")')
    ways.append(f'set_options(model, offload="disk"): {gib(pages - most)} of the pages go to the disk')
    text = "\n".join(f"  - {way}" for way in ways)
    more = f" and up to {work.new} that are generated" if work.new else ""
    raise DoesNotFit(
        f'kv_memory: {work.past + work.tokens} tokens{more} in kv="{storage.kv}" take {gib(pages)} of pages, and '
        f"{gib(most)} are allowed. Nothing was computed. Ways out, the cheapest first:\n{text}",
        pages,
        most,
        tuple(ways),
    )


def _ways(
    shape: Shape,
    work: Work,
    storage: Storage,
    limit: int,
    used: int,
    offload: str | None,
    kv_from: KvFrom,
    mapped: bool,
) -> Iterator[str]:
    """What would fit, the cheapest first: a smaller chunk costs nothing, a smaller format precision, a disk time."""

    def takes(work: Work, storage: Storage) -> int:
        return need(shape, work, storage, used, mapped)

    now = takes(work, storage)

    def saved(other: int) -> str:
        return f"saves {gib(now - other)}: {gib(other)} are needed"

    last = dataclasses.replace(work, keep=1)
    if work.logits and work.keep != 1 and takes(last, storage) <= limit:
        yield f"model(..., logits_to_keep=1), logits of the last position only, {saved(takes(last, storage))}"
    chunk = min(work.chunk, work.tokens)
    while chunk > 128:
        chunk //= 2
        smaller = dataclasses.replace(work, chunk=chunk)
        if takes(smaller, storage) <= limit:
            yield f"set_options(model, chunk={chunk}) {saved(takes(smaller, storage))}"
            break
    new = largest(lambda n: takes(dataclasses.replace(work, new=n), storage) <= limit, work.new)
    if new:
        yield f"max_new_tokens={new}: so many fit"
    own = LADDER.index(storage.kv) if storage.kv in LADDER else 1
    small = dataclasses.replace(work, chunk=min(work.chunk, 128))
    for name in LADDER[own + 1 :] if kv_from else ():
        for tried, extra in ((work, ""), (small, ", chunk=128")):
            other = takes(tried, Storage(name, storage.offload, storage.kv_memory))
            if other < now and other <= limit:
                asked = f'set_options(model, kv="{name}"{extra})'
                if kv_from == "cache":
                    asked = f'LongCache(kv="{name}")' + (" and set_options(model, chunk=128)" if extra else "")
                yield f"{asked} {saved(other)}"
                break
    if storage.offload != "disk":
        for tried, extra in ((work, ""), (small, ", chunk=128")):
            empty = Storage(storage.kv, "disk", 0)
            if takes(tried, empty) < limit:
                pages = (limit - takes(tried, empty)) // 2
                size, unit = (_MIB, "MiB") if pages >= _MIB else (1024, "KiB")
                pages = max(1, pages // size)
                held = Storage(storage.kv, "disk", pages * size)
                if takes(tried, held) > limit:
                    continue
                yield (
                    f'set_options(model, offload="disk", kv_memory="{pages}{unit}"{extra}) '
                    f"{saved(takes(tried, held))}, and decoding reads the rest from the disk"
                )
                break
    fewer = most_tokens(shape, work, storage, limit, used, mapped)
    if 0 < fewer < work.tokens:
        yield f"fewer tokens: {fewer * work.ranks} fit as it is"
    best = Storage(
        "int4" if kv_from == "options" else storage.kv, "disk" if offload in ("auto", "disk") else storage.offload, _MIB
    )
    fewest = most_tokens(shape, small, best, limit, used, mapped)
    if max(0, fewer) < fewest < work.tokens:
        where = ', offload="disk"' if best.offload == "disk" else ""
        kv = 'kv="int4", ' if kv_from == "options" else ""
        yield f"fewer tokens: {fewest * work.ranks} fit with set_options(model, {kv}chunk=128{where})"


def most_tokens(shape: Shape, work: Work, storage: Storage, limit: int, used: int = 0, mapped: bool = False) -> int:
    """How long a prompt may be, to 64 tokens; 0: none fits."""

    def fits(n: int) -> bool:
        return need(shape, dataclasses.replace(work, tokens=max(1, n)), storage, used, mapped) <= limit

    low, high = 0, max(1, work.tokens)
    if fits(high):
        while fits(2 * high) and high < 1 << 40:
            high *= 2
        low, high = high, 2 * high
    while high - low > 64:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low if low < 64 else low // 64 * 64


def largest(fits: Callable[[int], bool], end: int) -> int:
    """The largest number below `end` that fits, where all smaller ones do; 0: none does."""
    low, high = 0, end
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
