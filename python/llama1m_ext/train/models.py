"""The model of a run: loaded, given adapters, and saved as a folder that stock transformers loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import folders
from ..stored import as_bytes, checksum
from .devices import Devices
from .forward import causal_of
from .stages import Lora, Settings

_BESIDE = ("tokenizer*", "special_tokens_map.json", "chat_template*", "added_tokens.json", "vocab.json", "merges.txt")


def load(model: Any, settings: Settings, device: torch.device) -> Any:
    """A model of a run: a folder or name is loaded, a model taken as it is; weights in `settings.dtype`, on the device.

    Raises:
        OSError, ValueError, TypeError: it can't be, or is none that we train.
    """
    dtype = getattr(torch, settings.dtype)
    if isinstance(model, (str, os.PathLike)):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    causal_of(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.data = p.data.to(device, dtype)
    # Not `.to(dtype)`: it would round the rotary module's inv_freq as well.
    return model.to(device)


def with_adapters(model: Any, lora: Lora) -> Any:
    """The model in PEFT's wrapper.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: targets that the model does not have.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ImportError("lora: needs the package peft: pip install peft") from None
    if hasattr(model, "get_base_model"):
        raise ValueError(
            "lora: expected a model without adapters, got one that has some: leave lora out to train those"
        )
    names = [name for name, _ in model.named_modules()]
    for field, words in (("targets", lora.targets), ("also", lora.also)):
        for word in words:  # PEFT passes over those that it does not find, if it finds one
            if not any(f".{name}".endswith(f".{word}" if field == "targets" else word) for name in names):
                raise ValueError(f"lora: {field}: expected names of modules that the model has, got {word!r}")
            if model.config.tie_word_embeddings and word.rpartition(".")[2] in ("embed_tokens", "lm_head"):
                # PEFT trains a copy of one of them; the folder, which has both as one tensor, would be another model.
                raise ValueError(f"lora: {field}: expected none of the tied embed_tokens and lm_head, got {word!r}")
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        modules_to_save=list(lora.also) or None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def trained(model: Any) -> list[tuple[str, Any]]:
    """Names and parameters that need gradients, each once."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def fill(model: Any, read: Callable[[str], Tensor | None]) -> None:
    """Gives the model the weights of a checkpoint.

    Args:
        read: gives the tensor of a name, or None.
    """
    with torch.no_grad():
        for name, p in trained(model):
            value = read(f"weight.{name}")
            if value is None or value.shape != local(p).shape:
                raise ValueError(
                    f"checkpoint: expected a weight {name} of shape {tuple(local(p).shape)}, got none such"
                )
            local(p).copy_(value)


def local(x: Any) -> Tensor:
    """This rank's share of a tensor."""
    return x.to_local() if hasattr(x, "to_local") else x


def identity(model: Any) -> dict[str, Any]:
    """What a run's checkpoints belong to: the config, and a checksum of all weights."""
    config = causal_of(model).config.to_dict()
    for name in ("_name_or_path", "transformers_version", "torch_dtype", "dtype"):
        config.pop(name, None)
    digest = 0
    for _, p in model.named_parameters():
        value = checksum(as_bytes(p.detach().contiguous().cpu()))
        digest = (digest * 0x9E3779B97F4A7C15 + value) % (1 << 64)
    return {"config": json.loads(json.dumps(config, default=str, sort_keys=True)), "weights": f"{digest:016x}"}


def save(
    model: Any, target: Path, settings: Settings, devices: Devices, source: str | None, tokenizer: Any, max_len: int
) -> None:
    """Makes a folder of the model, adapters merged into the weights, beside `adapter/` with them alone. All ranks call it.

    Args:
        source: the folder that it came from: its tokenizer's files come along.
        tokenizer: one to be saved instead.
        max_len: its positions.

    Raises:
        OSError: there is no room. Nothing is left of it.
    """
    dtype = getattr(torch, settings.save_dtype or settings.dtype)
    state = dict(_merged(model, dtype, devices.is_first))

    def write() -> None:
        causal = causal_of(model)
        with folders.becoming(target) as made:
            own = {k: v for k, v in state.items() if not _is_tied(causal, k)}
            causal.save_pretrained(made, state_dict=own)
            _set_json(made / "config.json", dtype=settings.save_dtype or settings.dtype, torch_dtype=None)
            if hasattr(model, "peft_config"):
                model.save_pretrained(made / "adapter")
            if tokenizer is not None:
                tokenizer.save_pretrained(made)
            elif source is not None and Path(source).is_dir():
                for pattern in _BESIDE:
                    for file in Path(source).glob(pattern):
                        if file.is_file():
                            shutil.copy2(file, made / file.name)
            described = made / "tokenizer_config.json"
            if described.is_file():
                _set_json(described, model_max_length=max_len)

    devices.each(f"saving {target.name}", write if devices.is_first else lambda: None)


def _merged(model: Any, dtype: torch.dtype, wanted: bool) -> Iterator[tuple[str, Tensor]]:
    """The state of the model inside, adapters merged, whole tensors on the CPU; on ranks where it is not wanted, nothing, but
    they take part."""
    causal = causal_of(model)
    deltas: dict[str, Any] = {}
    for name, module in causal.named_modules():
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer"):
            deltas[f"{name}.weight"] = module
    for key, value in causal.state_dict().items():
        if ".lora_" in key or ".original_module." in key:
            continue
        key = key.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        if not wanted:
            continue
        layer = deltas.get(key)
        if layer is not None:
            with torch.no_grad():
                for adapter in layer.active_adapters:
                    whole = whole.float() + layer.get_delta_weight(adapter).float()
        yield key, whole.detach().to("cpu", dtype if whole.is_floating_point() else whole.dtype)


def _is_tied(causal: Any, key: str) -> bool:
    return bool(getattr(causal.config, "tie_word_embeddings", False)) and key == "lm_head.weight"


def _set_json(path: Path, **changes: Any) -> None:
    """Sets fields that are there."""
    body = json.loads(path.read_text(encoding="utf-8"))
    for name, value in changes.items():
        if name in body:
            if value is None and name == "torch_dtype":
                value = changes["dtype"]
            body[name] = value
    path.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
