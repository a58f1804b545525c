"""How much memory the pages of a cache may take, asked whenever a layer makes one."""

from __future__ import annotations

from typing import NamedTuple


class Limit(NamedTuple):
    """What the option `kv_memory` says of a cache whose pages go nowhere else. Its layers share it alike: they all have as
    many tokens, so the first one that wants a page knows it for all of them.

    Attributes:
        nbytes: of the pages of all layers, room for more tokens included.
        layers: so many.
    """

    nbytes: int
    layers: int

    def tokens(self, wanted: int, least: int, taken: int, token_bytes: float, step: int = 1) -> int:
        """Tokens of a layer's next page: as many as are wanted, or as there is room for.

        Args:
            least: that it must have.
            taken: bytes of what stays beside it.
            token_bytes: of a token in it.
            step: it has a multiple of so many.

        Raises:
            DoesNotFit: there is no room for `least`.
        """
        left = int((self.nbytes // self.layers - taken) / token_bytes) // step * step
        if left >= least:
            return min(wanted, left)
        from .plan_choice import DoesNotFit, gib

        needed = int(self.layers * (taken + least * token_bytes))
        ways = (
            f'set_options(model, kv_memory="{-(-needed >> 20)}MiB"), or more: so much for the next tokens alone',
            f'set_options(model, offload="disk"): {gib(needed - self.nbytes)} of the pages, and what comes, go to the disk',
        )
        text = "\n".join(f"  - {way}" for way in ways)
        raise DoesNotFit(
            f"kv_memory: with the next tokens the cache's pages take {gib(needed)}, and {gib(self.nbytes)} are allowed. The "
            f"cache is as it was before. Ways out:\n{text}",
            needed,
            self.nbytes,
            ways,
        )
