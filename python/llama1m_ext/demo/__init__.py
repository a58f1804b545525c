"""`llama1m demo`: a small model that the project trained, a real book, and a needle that has to be found in it."""

from __future__ import annotations

from .run import MODEL_PATH, DemoResult, run_demo

__all__ = ["MODEL_PATH", "DemoResult", "run_demo"]
