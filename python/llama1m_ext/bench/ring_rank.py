"""A rank of `llama1m bench ring`: takes orders, a line of JSON each, from its input, and answers likewise."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from datetime import timedelta
from typing import Any

TIMEOUT = 600.0
"""Seconds that a silent rank is waited for."""


class Rank:
    """This process.

    Args:
        told: rank, world_size, ranks_per_node, store (a file), length, q_heads, kv_heads, head_dim, dtype.
    """

    def __init__(self, told: dict[str, Any]) -> None:
        import torch
        import torch.distributed as dist

        from llama1m_ext.ring import Layout

        torch.set_num_threads(1)
        self.told, self.rank, self.size = told, int(told["rank"]), int(told["world_size"])
        dist.init_process_group(
            "gloo",
            init_method=f"file://{told['store']}",
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=TIMEOUT),
        )
        self.dtype = getattr(torch, told["dtype"])
        self.plain = Layout(timeout=TIMEOUT, ranks_per_node=told["ranks_per_node"])

    def call(self, heads: int, inner: int, outer: int, kv_format: str, backward: bool) -> dict[str, Any]:
        """One attention call over the whole sequence, and its backward pass.

        Returns:
            begin, end: of a clock that all ranks have; waited: seconds; sent: bytes, by the other rank.

        Raises:
            RuntimeError: the bytes are not those that the schedule predicts.
        """
        import torch

        from llama1m_ext.ring import Layout, predicted, ring_attention

        t = self.told
        shape = {"heads": heads, "inner": inner, "outer": outer, "ranks_per_node": t["ranks_per_node"]}
        layout = Layout(timeout=TIMEOUT, kv_format=kv_format, **shape)
        kind = layout.links.kind
        layout.links.kind = lambda a, b: str(b)
        n = layout.lengths(t["length"])[self.rank]
        q, k, v = (
            torch.randn(1, h, n, t["head_dim"], dtype=self.dtype).requires_grad_(backward)
            for h in (t["q_heads"], t["kv_heads"], t["kv_heads"])
        )
        grad = torch.randn(1, t["q_heads"], n, t["head_dim"], dtype=self.dtype) if backward else None
        self._together()
        begin = time.monotonic()
        out = ring_attention(q, k, v, layout, length=t["length"])
        assert isinstance(out, torch.Tensor)
        if backward:
            out.backward(grad)
        end = time.monotonic()
        want = predicted(layout, t["length"], 1, t["q_heads"], t["kv_heads"], t["head_dim"], self.dtype)
        for name in ("within", "across"):
            got = sum(n for peer, n in layout.links.sent.items() if kind(self.rank, int(peer)) == name)
            expected = want.forward.get(name, 0) + (want.backward.get(name, 0) if backward else 0)
            if got != expected:
                raise RuntimeError(f"rank {self.rank}, {shape}: expected {expected} bytes {name} nodes, got {got}")
        return {"begin": begin, "end": end, "waited": layout.links.waited, "sent": layout.links.sent}

    def alone(self) -> dict[str, Any]:
        """This rank's share of the attention without any message, while the others compute theirs."""
        import torch

        from llama1m_ext import ops

        t, n = self.told, max(1, self.told["length"] // self.size)
        kv_len = max(1, t["length"] // 2)
        q, k, v = (
            torch.randn(1, h, m, t["head_dim"], dtype=self.dtype)
            for h, m in ((t["q_heads"], n), (t["kv_heads"], kv_len), (t["kv_heads"], kv_len))
        )
        self._together()
        begin = time.monotonic()
        ops.attention(q, k, v, causal=False)
        seconds = time.monotonic() - begin
        return {"flops": 4 * t["q_heads"] * t["head_dim"] * n * kv_len / seconds}

    def within(self, size: int) -> dict[str, Any]:
        """Bytes/s to the next rank of the node and from the last, at once, all ranks at the same time; (0: there is no other)."""
        import torch

        per_node = self.told["ranks_per_node"]
        if per_node == 1:
            return {"rate": 0.0}
        first = self.rank // per_node * per_node
        to, source = first + (self.rank - first + 1) % per_node, first + (self.rank - first - 1) % per_node
        mine, theirs = torch.zeros(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
        self._together()
        begin = time.monotonic()
        self.plain.links.exchange([(mine, to)], [(theirs, source)], "bench", control=True).wait()
        return {"rate": size / (time.monotonic() - begin)}

    def latency(self, rounds: int) -> dict[str, Any]:
        """Seconds of a message of one byte around the ring of all ranks."""
        import torch

        mine, theirs = torch.zeros(1, dtype=torch.uint8), torch.empty(1, dtype=torch.uint8)
        to, source = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        self._together()
        begin = time.monotonic()
        for _ in range(rounds):
            self.plain.links.exchange([(mine, to)], [(theirs, source)], "bench", control=True).wait()
        return {"latency": (time.monotonic() - begin) / rounds}

    def _together(self) -> None:
        import torch.distributed as dist

        dist.barrier()


def main() -> None:
    """Until its input ends: at once then, whatever it waits for."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    orders: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    rank: Rank | None = None
    while True:
        order = json.loads(orders.get())
        do = order.pop("do")
        try:
            if rank is None:
                rank, answer = Rank(order), {}
            else:
                answer = getattr(rank, do)(**order)
        except Exception as e:
            answer = {"error": f"{type(e).__name__}: {e}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _listen(orders: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        orders.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
