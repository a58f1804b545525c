"""The real `llama` package against ours, on a CPU: `python tests/python/check_real_llama.py CHECKOUT`.

CHECKOUT is a clone of meta-llama/llama3; fairscale must be installed. Makes a small checkpoint, builds it with the
package's own `Llama.build` (CUDA's names lead to the CPU meanwhile), and compares logits, generated tokens and
log-probabilities with and without us, and both with float64; then builds one of 10,000 tokens, which theirs refuses.
`torchrun --nproc-per-node 2 tests/python/check_real_llama.py CHECKOUT` does it with the model cut in two.
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
    sys.path.insert(0, sys.argv[1])
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29517")
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo")
    without_cuda(torch.float32)
    import llama

    import llama1m_ext
    from llama1m_ext.testing import error

    said = sys.stdout  # theirs takes it from all ranks but the first
    with tempfile.TemporaryDirectory() as mine, OnCpu():
        folders: list[Any] = [mine] * ranks
        torch.distributed.all_gather_object(folders, mine)
        folder = Path(folders[0])
        if rank == 0:
            original.checkpoint(folder, ranks)
        torch.distributed.barrier()
        whole = original.weights()

        def build(n: int, rows: int) -> Any:
            return llama.Llama.build(str(folder), str(folder / "tokenizer.model"), n, rows, ranks)

        def say(*words: Any) -> None:
            if rank == 0:
                print(*words, file=said)

        prompts = [[384, *range(60, 60 + n)] for n in (40, 25, 33)]
        tokens = torch.tensor([prompt[:26] for prompt in prompts])
        truth = original.reference(whole, tokens)
        found, chances = {}, {}
        for name in ("theirs", "ours"):
            llama1m_ext.disable()
            if name == "ours":
                llama1m_ext.enable()
            built = build(512, 4)
            logits = torch.cat([built.model.forward(tokens[:, :20], 0), built.model.forward(tokens[:, 20:], 20)], 1)
            greedy = built.generate(prompts, 32, temperature=0)
            echoed, logprobs = built.generate(prompts, 32, temperature=0, logprobs=True, echo=True)
            chat = built.chat_completion([[{"role": "user", "content": "Hello"}]], temperature=0, max_gen_len=20)
            found[name], chances[name] = (greedy, echoed, chat), torch.tensor([row[:20] for row in logprobs])
            say(f"{name}: error of logits against float64 {error(logits, truth):.3e}")
        say(llama1m_ext.stats(built))
        assert llama1m_ext.stats(built).served > 100
        assert found["theirs"] == found["ours"], found
        torch.testing.assert_close(chances["theirs"], chances["ours"])

        n = 9001
        llama1m_ext.disable()
        try:
            build(10_000, 2)
        except AssertionError as e:
            say("theirs:", e)
        llama1m_ext.enable()
        built = build(10_000, 2)
        prompt = torch.randint(0, 256, (1, n), generator=torch.Generator().manual_seed(0))
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        made = built.generate(prompt.tolist(), 8, temperature=0)[0]
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        say(f"8 tokens after {n}: {time.perf_counter() - began:.2f} s, {grown:.0f} MiB; a mask takes {4 * n * n >> 20}")
        say(llama1m_ext.stats(built))
        expected = original.reference(whole, torch.cat([prompt, torch.tensor(made)], 1)[:, :-1], last=8).argmax(-1)
        assert made == expected.tolist(), (made, expected)
        torch.distributed.barrier()


if __name__ == "__main__":
    main()
