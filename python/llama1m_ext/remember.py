"""`remember` and `forget`: a book is read once, whatever is asked about it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .options import options, set_options

SUFFIX = ".prompt.safetensors"
"""Files with this name are ours to remove."""


def remember(model: Any, path: str | os.PathLike[str] | None, *, limit: int | str | None = None) -> None:
    """Keeps prompts that the model reads, and lets a prompt that begins as a kept one go on from it: ten questions about a
    book read the book once, also in other processes.

    A prompt takes the longest beginning that it has in common with a kept one, token by token, if that is 256 tokens
    or more; only what follows is computed. This concerns calls for the last positions of one prompt without padding, with
    an empty cache: as `generate()` and pipelines make them. Kept is what the prompt was, not the answer. In the model's
    own format (option `kv`) the answer is the same up to the rounding of another division into chunks; in a compact
    format what was taken from the cache is rounded as that format does it.

    Args:
        model: a Llama of transformers, or a pipeline with one.
        path: a folder, which is made if it is not there, and which processes may share; None: remember nothing
            any more (what is in the folder stays there).
        limit: bytes that the folder's files may take, as an int or "100GiB"; those not used for the longest time
            are removed for new ones. "auto": half of what is free on the disk and what they take already. Default: as it is.

    Raises:
        TypeError, ValueError: no Llama inside, no path, or no size.
    """
    changes: dict[str, Any] = {"remember": path}
    if limit is not None:
        changes["remember_bytes"] = limit
    set_options(model, **changes)


def forget(where: Any) -> int:
    """Removes all prompts that were remembered in a folder, whichever model read them. Who uses one just now keeps it until
    he is done.

    Args:
        where: the folder, or a model or pipeline whose option says which.

    Returns:
        The number of prompts removed.

    Raises:
        TypeError: neither.
        OSError: a file can't be removed.
    """
    folder = where if isinstance(where, (str, os.PathLike)) else options(where).remember
    removed = 0
    if folder is not None:
        for path in Path(folder).expanduser().glob(f"*{SUFFIX}"):
            try:
                path.unlink()
            except FileNotFoundError:
                continue  # somebody else was faster
            removed += 1
    return removed
