"""The real `llama` package against ours, on a CPU: `python tests/python/check_real_llama.py CHECKOUT`.

CHECKOUT is a clone of meta-llama/llama3; fairscale must be installed. Makes a small checkpoint, builds it with the
package's own `Llama.build` (CUDA's names lead to the CPU meanwhile), and compares logits, generated tokens and
log-probabilities with and without us, and both with float64; then builds one of 9,000 tokens, which theirs refuses.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

import original


class OnCpu(TorchFunctionMode):
    """`device="cuda"` makes a tensor on the CPU."""

    def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def without_cuda(dtype: torch.dtype) -> None:
    torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]
    torch.cuda.set_device = lambda *a: None  # type: ignore[assignment]
    torch.cuda.is_bf16_supported = lambda *a: True  # type: ignore[assignment]
    torch.set_default_tensor_type = lambda kind: torch.set_default_dtype(dtype)  # type: ignore[assignment]


def main() -> None:
    checkout, dtype = sys.argv[1], torch.float32
    sys.path.insert(0, checkout)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29517", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    torch.distributed.init_process_group("gloo")
    without_cuda(dtype)
    import llama

    import llama1m_ext
    from llama1m_ext.testing import error

    with tempfile.TemporaryDirectory() as folder, OnCpu():
        whole = original.checkpoint(Path(folder), dtype=dtype)

        def build(n: int, rows: int) -> Any:
            return llama.Llama.build(folder, f"{folder}/tokenizer.model", n, rows, 1)

        prompts = [[384, *range(60, 60 + n)] for n in (40, 25, 33)]
        tokens = torch.tensor([p[:26] for p in prompts])
        truth = original.reference(whole, tokens)
        found = {}
        for name in ("theirs", "ours"):
            llama1m_ext.disable()
            if name == "ours":
                llama1m_ext.enable()
            built = build(512, 4)
            logits = torch.cat([built.model.forward(tokens[:, :20], 0), built.model.forward(tokens[:, 20:], 20)], 1)
            greedy = built.generate(prompts, 32, temperature=0)
            with_logprobs = built.generate(prompts, 32, temperature=0, logprobs=True, echo=True)
            chat = built.chat_completion([[{"role": "user", "content": "Hello"}]], temperature=0, max_gen_len=20)
            found[name] = greedy, with_logprobs[0], chat
            print(f"{name}: error of logits against float64 {error(logits, truth):.3e}")
            probabilities = torch.tensor([p[:20] for p in with_logprobs[1]])
            found[name + " logprobs"] = probabilities
        print("stats", llama1m_ext.stats(built))
        assert found["theirs"] == found["ours"], found
        torch.testing.assert_close(found["theirs logprobs"], found["ours logprobs"])
        long = [384, *torch.randint(0, 256, (9000,)).tolist()]
        llama1m_ext.disable()
        try:
            build(10_000, 2)
        except AssertionError as e:
            print("theirs:", e)
        llama1m_ext.enable()
        built = build(10_000, 2)
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        print(len(built.generate([long], 8, temperature=0)[0][0]), "tokens after 9,001")
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(f"{time.perf_counter() - began:.2f} s, {grown:.0f} MiB more at the peak; one mask would take 309 MiB")
        print("stats", llama1m_ext.stats(built))


if __name__ == "__main__":
    main()
