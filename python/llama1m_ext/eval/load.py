"""A model and its tokenizer for a command, and what a command is told in words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from .haystack import Haystack

DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
DEMO = "demo"
"""The name of the model that ships with the package."""


def load(model: str, dtype: str | None = None, kv: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) from a folder or a name on the hub, on the GPUs where there are some; "demo" is the model that
    ships with the package. Other families than Llama are served, where this package can.

    Args:
        dtype: "bf16", "f16" or "f32"; None: that of the checkpoint.
        kv: the format of the KV cache, as the option of that name; None: as it is.

    Raises:
        ValueError, OSError: no such dtype, no such model.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if model == DEMO and not Path(DEMO).exists():
        from llama1m_ext.demo import MODEL_PATH

        model = str(MODEL_PATH)
    elif Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise ValueError(f"model: expected a folder with a config.json, got {model!r}")
    elif not Path(model).exists() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise ValueError(f'model: expected a folder, a name on the hub, or "{DEMO}", got {model!r}')
    import torch
    import transformers

    import llama1m_ext
    from llama1m_ext import families

    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(model)
        if config.model_type in families.FAMILIES and config.model_type != "llama":
            llama1m_ext.enable(families=config.model_type)
        if model.endswith(str(Path("demo") / "model")):
            transformers.logging.disable_progress_bar()
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        found = transformers.AutoModelForCausalLM.from_pretrained(
            model,
            torch_dtype="auto" if dtype is None else getattr(torch, DTYPES[dtype]),
            device_map="auto" if torch.cuda.is_available() else None,
        )
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
    if kv is not None:
        llama1m_ext.set_options(found, kv=kv)
    return found.eval(), tokenizer


def read_text(path: Path | None, name: str = "text") -> str | None:
    """A text file's content; None stays None. Errors begin with `name`."""
    if path is None:
        return None
    from llama1m_ext.demo.book import load_text

    return load_text(path, name)


def numbers(name: str, text: str) -> list[int]:
    """Whole numbers from "4096,16384", "64K,1M" (1024s).

    Raises:
        ValueError: something else.
    """
    found = []
    for word in text.split(","):
        word = word.strip().upper()
        scale = {"K": 1024, "M": 1024**2}.get(word[-1:], 1)
        digits = word[:-1] if scale > 1 else word
        if not digits.isdecimal() or int(digits) < 1:
            raise ValueError(f'{name}: expected numbers such as "4096,64K", got {text!r}')
        found.append(int(digits) * scale)
    return found


def depths(text: str) -> int | list[float]:
    """A number of depths from "11", or depths from "0,0.5,1".

    Raises:
        ValueError: something else.
    """
    if text.strip().isdecimal() and int(text) > 0:
        return int(text)
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f'depths: expected a number of them, or "0,0.5,1", got {text!r}') from None


def pieces_of(stack: Haystack, length: int, pieces: int) -> Tensor:
    """`pieces` runs of a text one after the other, each with the tokenizer's first token before it: int64
    `[pieces, length]`.

    Raises:
        ValueError: the text is too short.
    """
    import torch

    from .frame import first_ids

    first = first_ids(stack.tokenizer)
    if length < 2 + len(first):
        raise ValueError(f"length: expected at least {2 + len(first)} tokens, got {length}")
    ids = torch.from_numpy(stack.tokens(pieces * (length - len(first))).copy()).view(pieces, -1)
    return torch.cat([torch.tensor(first, dtype=torch.long).expand(pieces, -1), ids], 1)
