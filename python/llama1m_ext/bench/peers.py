"""Peers other than torch, measured only where they are installed."""

from __future__ import annotations

from typing import Any

import torch

from llama1m_ext.bench.harness import Call


def onnxruntime_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, threads: int, work: float) -> Call:
    """ONNX Runtime's GroupQueryAttention (f32, causal, no history): the strongest f32 peer on CPUs.

    It takes `[batch, len, heads * head_dim]`; the conversion is outside the timer.

    Raises:
        ModuleNotFoundError: when `onnx` or `onnxruntime` is not installed.
    """
    import onnxruntime

    batch, q_heads, q_len, head_dim = q.shape
    kv_heads = k.shape[1]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    model = _group_query_attention_model(q_heads, kv_heads, head_dim)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {name: x.transpose(1, 2).reshape(batch, q_len, -1).numpy() for name, x in (("q", q), ("k", k), ("v", v))}
    nothing = torch.empty(batch, kv_heads, 0, head_dim).numpy()
    feed |= {"past_k": nothing, "past_v": nothing}
    feed["last"] = torch.full((batch,), q_len - 1, dtype=torch.int32).numpy()
    feed["total"] = torch.tensor(q_len, dtype=torch.int32).numpy()

    def to_heads(result: list[Any]) -> torch.Tensor:
        return torch.from_numpy(result[0]).reshape(batch, q_len, q_heads, head_dim).transpose(1, 2)

    name = "onnxruntime GroupQueryAttention"
    return Call(name, lambda: session.run(["out"], feed), work, yardstick=False, output=to_heads)


def _group_query_attention_model(q_heads: int, kv_heads: int, head_dim: int) -> bytes:
    """A model of one com.microsoft.GroupQueryAttention node, serialised."""
    from onnx import TensorProto, helper

    real, integer = TensorProto.FLOAT, TensorProto.INT32
    node = helper.make_node(
        "GroupQueryAttention",
        ["q", "k", "v", "past_k", "past_v", "last", "total"],
        ["out", "present_k", "present_v"],
        domain="com.microsoft",
        num_heads=q_heads,
        kv_num_heads=kv_heads,
    )
    info = helper.make_tensor_value_info
    past = ["batch", kv_heads, "past", head_dim]
    present = ["batch", kv_heads, "whole", head_dim]
    graph = helper.make_graph(
        [node],
        "group_query_attention",
        [
            info("q", real, ["batch", "len", q_heads * head_dim]),
            info("k", real, ["batch", "len", kv_heads * head_dim]),
            info("v", real, ["batch", "len", kv_heads * head_dim]),
            info("past_k", real, past),
            info("past_v", real, past),
            info("last", integer, ["batch"]),
            info("total", integer, []),
        ],
        [
            info("out", real, ["batch", "len", q_heads * head_dim]),
            info("present_k", real, present),
            info("present_v", real, present),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
