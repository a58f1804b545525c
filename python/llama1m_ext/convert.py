"""Original Llama-3 checkpoints (`consolidated.00.pth`, `params.json`, `tokenizer.model`) to a folder of transformers'.

Tensors stream from mapped files to safetensors files: memory does not grow with the model. All is checked before
anything is written, and the folder gets its name when it is whole.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import convert_tokenizer, folders, tensorfile
from .convert_params import ConvertError, Params, config, read
from .convert_weights import Weight, is_tied, open_shard, plan, shard_files
from .options import parse_bytes

__all__ = ["ConvertError", "Converted", "convert"]
SHARD = "5GB"
_SMALL_FILES = 64 << 20
"""Room for everything but the weights: tokenizer.json of Llama 3 takes 17 MB."""


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        folder: the new checkpoint.
        files: of weights.
        nbytes: of the tensors.
        config: the contents of config.json.
    """

    folder: Path
    files: int
    nbytes: int
    config: dict[str, Any]


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    max_len: int | None = None,
    theta: float | None = None,
    rope_factor: float | None = None,
    instruct: bool = True,
    tied: bool = False,
    shard_size: int | str = SHARD,
) -> Converted:
    """Makes a folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load.

    Args:
        source: a folder with params.json and consolidated.NN.pth, or one that has it as `original/`.
        destination: the folder to make. It must not be there; its parent must.
        tokenizer: the file in tiktoken's format. Default: tokenizer.model beside the weights, or a folder above.
        max_len: `max_position_embeddings`. Default: 8192, or 131072 if rotary frequencies are scaled as in Llama 3.1.
        theta: of the rotary embedding. Default: as in params.json.
        rope_factor: of Llama 3.1's scaling, where params.json asks for it. Default: as there, or 8; Llama 3.2 has 32.
        instruct: the model was trained to chat: an answer ends with <|eot_id|>, and there is a chat template.
        tied: the output layer is the embedding (Llama 3.2's small ones), which may be there twice. Default: where both
            are the same memory.
        shard_size: bytes of a file of weights, about.

    Raises:
        ConvertError: the checkpoint is not what it should be.
        FileExistsError: the destination is there.
        OSError: something can't be read or written, or there is no room. No destination is left behind.
    """
    limit = parse_bytes("shard_size", shard_size)
    for name, value in (("max_len", max_len), ("theta", theta), ("rope_factor", rope_factor)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name}: expected a number above 0, got {value}")
    target = Path(os.path.abspath(destination))
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "expected a folder that is not there yet", str(target))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "expected the new folder's parent to be there", str(target.parent))

    folder = _original(Path(source))
    params = read(folder / "params.json", theta, rope_factor)
    ranks = convert_tokenizer.read_ranks(_tokenizer(folder, tokenizer))
    vocab_size = len(ranks) + convert_tokenizer.N_SPECIAL
    if params.vocab_size not in (None, vocab_size):
        raise ConvertError(
            f"{folder / 'params.json'}: expected vocab_size={vocab_size}, as the tokenizer has {len(ranks)} tokens and "
            f"{convert_tokenizer.N_SPECIAL} special ones, got {params.vocab_size}"
        )
    paths = shard_files(folder)
    shards = [open_shard(path) for path in paths]
    tied = tied or is_tied(shards)
    weights = plan(paths, shards, params, vocab_size, tied)
    need, free = sum(weight.nbytes for weight in weights) + _SMALL_FILES, shutil.disk_usage(target.parent).free
    if need > free:
        raise OSError(errno.ENOSPC, f"it takes {need} bytes, and {free} are free", str(target.parent))

    with folders.becoming(target) as made:
        settings = _small_files(made, params, ranks, weights, max_len, instruct, tied)
        files = _groups(weights, limit)
        _write_weights(made, files)
    return Converted(target, len(files), need - _SMALL_FILES, settings)


def _small_files(
    made: Path,
    params: Params,
    ranks: dict[bytes, int],
    weights: list[Weight],
    max_len: int | None,
    instruct: bool,
    tied: bool,
) -> dict[str, Any]:
    v31 = params.rope_factor is not None
    special, base = convert_tokenizer.special_tokens(v31), len(ranks)
    ends = [convert_tokenizer.EOS, *(["<|eom_id|>"] if v31 else []), convert_tokenizer.EOT]
    stops = [base + special.index(token) for token in (ends if instruct else ends[:1])]
    # from_pretrained gives all weights the config's dtype: where they differ, one that rounds none of them.
    widest = functools.reduce(torch.promote_types, (weight.dtype for weight in weights))
    dtype = str(widest).removeprefix("torch.")
    settings = config(params, weights[0].shape[0], dtype, max_len, base, stops[-1], tied)
    _write_json(made / "config.json", settings)
    generation: dict[str, Any] = {
        "_from_model_config": True,
        "bos_token_id": base,
        "eos_token_id": stops if instruct else stops[0],
    }
    if instruct:  # as the model card's own
        generation |= {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
        del generation["_from_model_config"]
    _write_json(made / "generation_config.json", generation)
    longest = settings["max_position_embeddings"]
    convert_tokenizer.save(ranks, made, v31=v31, instruct=instruct, max_len=longest)
    return settings


def _groups(weights: list[Weight], limit: int) -> list[list[Weight]]:
    """Files of at most `limit` bytes, or of one tensor."""
    files: list[list[Weight]] = [[]]
    size = 0
    for weight in weights:
        if files[-1] and size + weight.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(weight)
        size += weight.nbytes
    return files


def _write_weights(made: Path, files: list[list[Weight]]) -> None:
    from tqdm.auto import tqdm

    total = sum(weight.nbytes for file in files for weight in file)
    where: dict[str, str] = {}
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="convert", dynamic_ncols=True) as bar:

        def parts(weight: Weight) -> Iterator[Any]:
            for part in weight.parts():
                yield part
                bar.update(part.nbytes)

        for i, file in enumerate(files, 1):
            name = "model.safetensors" if len(files) == 1 else f"model-{i:05}-of-{len(files):05}.safetensors"
            entries = [(weight.name, weight.dtype, weight.shape, parts(weight)) for weight in file]
            tensorfile.write(made / name, entries, {"format": "pt"}, align=False)
            where |= {weight.name: name for weight in file}
    if len(files) > 1:
        _write_json(made / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def _original(source: Path) -> Path:
    for folder in (source, source / "original"):
        if (folder / "params.json").is_file():
            return folder
    raise ConvertError(f"{source}: expected a folder with params.json, or one that has it in original/")


def _tokenizer(folder: Path, given: str | os.PathLike[str] | None) -> Path:
    candidates = [folder, folder.parent] if given is None else []
    for path in [Path(given)] if given is not None else [place / "tokenizer.model" for place in candidates]:
        if path.is_file():
            return path
    where = folder / "tokenizer.model" if given is None else given
    raise ConvertError(f"{where}: expected Llama 3's tokenizer, got no such file")


def _write_json(path: Path, body: dict[str, Any]) -> None:
    path.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
