"""Many devices: attention over a sequence that is spread over the ranks of a process group.

`ring_attention` takes each rank's shard of q, k and v, a `Layout` says who holds what; `torch.distributed` carries everything (NCCL
between GPUs, gloo between CPUs).
"""

from .agreement import DisagreementError
from .attention import ring_attention
from .layout import Layout
from .schedule import Bytes, predicted
from .transfer import LinkError

__all__ = ["Bytes", "DisagreementError", "Layout", "LinkError", "predicted", "ring_attention"]
