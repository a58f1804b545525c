"""The demo: a needle in a long book, through the model card's pipeline snippet, checked and measured."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, TypedDict

from .book import BOOK_TITLE, load_book, load_text
from .measure import Clock, gib, peak_rss_bytes, reset_peak_rss
from .needle import draw_needles, find_value
from .prompt import build_prompt
from .stock import StockReport, measure_stock

MODEL_PATH = Path(__file__).with_name("model")
MAX_LEN = 1_048_576
MAX_NEW_TOKENS = 32


class DemoResult(TypedDict):
    """What the demo found out. Sizes in bytes, times in seconds."""

    answer: str
    expected: str
    correct: bool
    key: str
    depth: float
    prompt_tokens: int
    first_token_s: float  # the prefill: from the prompt to the first new token
    tokens_per_s: float  # prompt tokens over first_token_s
    new_tokens: int
    decode_tokens_per_s: float
    peak_rss_bytes: int
    prompt_bytes: int  # the peak above what was resident before the prompt: KV cache, hidden states, workspace
    threads: int
    versions: dict[str, str]
    stock: StockReport | None


def run_demo(
    tokens: int = 131_072,
    text: str | Path | None = None,
    depth: float | None = None,
    seed: int = 0,
    stock: bool = True,
    *,
    stock_limit_s: float = 45.0,
    stock_limit_bytes: int | None = None,
    chunk: int | None = None,
    progress: bool | None = None,
) -> DemoResult:
    """Hides a number in a long text, asks for it through the model card's pipeline, and checks the answer.

    Args:
        tokens: length of the prompt, 256 to 1,048,576. At 1,048,576 room is left for the answer.
        text: a UTF-8 text file (.xz too) to read instead of the novels that ship with the package. A text that is too
            short begins again, and the demo says so.
        depth: where in the text the needle is hidden, 0 (beginning) to 1 (end). Default: drawn.
        seed: draws key, number and depth, and seeds the sampling. The same seed gives the same demo.
        stock: also run stock transformers on the same prompt in another process, at growing lengths, as far as it gets
            within the limits; beyond that its need is extrapolated and called so.
        stock_limit_s: seconds that stock transformers gets.
        stock_limit_bytes: resident memory that it gets. Default: 80% of what is available.
        chunk: queries that go through a layer at a time. Default: as the options of llama1m_ext have it.
        progress: show the prefill's progress bar. Default: for long prompts.

    Returns:
        Everything that was printed, as one JSON-ready dict; `correct` says whether the number is right.

    Raises:
        ValueError: an argument out of range, or a file that is not text.
        FileNotFoundError: no such text file.
    """
    if not 256 <= tokens <= MAX_LEN:
        raise ValueError(f"tokens: expected 256 to {MAX_LEN}, got {tokens}")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth: expected 0 to 1, got {depth}")
    source, title = load_source(text)
    draw = random.Random(f"depth {seed}")
    depth = draw.random() if depth is None else depth
    needle = draw_needles(seed, 1)[0]

    import torch
    import transformers

    import llama1m_ext  # this is the whole integration

    threads = torch.get_num_threads()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(f"torch {versions['torch']}, transformers {versions['transformers']}, {threads} threads")
    pipeline = load_pipeline()
    options = {name: value for name, value in (("chunk", chunk), ("progress", progress)) if value is not None}
    if options:
        llama1m_ext.set_options(pipeline, **options)
    with _quiet():
        prompt = build_prompt(pipeline.tokenizer, source, needle, depth, min(tokens, MAX_LEN - MAX_NEW_TOKENS))
    again = "" if prompt.times_through <= 1 else f" (read {prompt.times_through:.1f} times: it is too short)"
    print(f"{prompt.tokens:,} tokens of {title}{again}")
    print(f'hidden {depth:.0%} of the way in: "{needle.sentence}"')
    print(f'asked: "{needle.question}"')
    if prompt.tokens > 200_000:
        minutes = _expected_s(pipeline.model.config, prompt.tokens) / 60
        print(f"this will take about {minutes:.1f} minutes, judged by this machine's speed just now", flush=True)

    torch.manual_seed(seed)
    reset_peak_rss()
    before, clock = peak_rss_bytes(), Clock()
    answer = ask(pipeline, prompt.chat, clock)
    peak = peak_rss_bytes()
    correct = find_value(answer) == needle.value
    new_tokens = len(clock.moments) - 1
    result: DemoResult = {
        "answer": answer,
        "expected": needle.value,
        "correct": correct,
        "key": needle.key,
        "depth": depth,
        "prompt_tokens": prompt.tokens,
        "first_token_s": clock.first_token_s,
        "tokens_per_s": prompt.tokens / clock.first_token_s,
        "new_tokens": new_tokens,
        "decode_tokens_per_s": (new_tokens - 1) / clock.decode_s if new_tokens > 1 else 0.0,
        "peak_rss_bytes": peak,
        "prompt_bytes": peak - before,
        "threads": threads,
        "versions": versions,
        "stock": None,
    }
    print(f'answer: "{answer}"  {"RIGHT" if correct else "WRONG, expected " + needle.value}')
    print(
        f"prefill {result['first_token_s']:.1f} s, {result['tokens_per_s']:,.0f} tokens/s; then "
        f"{result['decode_tokens_per_s']:.0f} tokens/s; peak memory {gib(peak)}, {gib(peak - before)} of it for the prompt",
        flush=True,
    )
    if stock:
        limit_bytes = stock_limit_bytes or int(0.8 * _available_bytes())
        print(
            f"stock transformers on the same prompt, at most {stock_limit_s:.0f} s and {gib(limit_bytes)}:", flush=True
        )
        report = measure_stock(
            text=text,
            key=needle.key,
            value=needle.value,
            depth=depth,
            tokens=tokens,
            limit_s=stock_limit_s,
            limit_bytes=limit_bytes,
        )
        result["stock"] = report
        _print_stock(report, result)
    return result


def load_source(text: str | Path | None) -> tuple[str, str]:
    """The text to read, and what to call it."""
    return (load_book(), BOOK_TITLE) if text is None else (load_text(text).strip(), str(text))


def load_pipeline() -> Any:
    """The model card's pipeline over the demo model. On the CPU, also where there is a GPU: that engine is the CPU's."""
    import torch
    import transformers

    with _quiet():
        return transformers.pipeline(
            "text-generation",
            model=str(MODEL_PATH),
            model_kwargs={"torch_dtype": torch.bfloat16},
            device_map="cpu" if torch.cuda.is_available() else "auto",
        )


def ask(pipeline: Any, messages: list[dict[str, str]], clock: Clock) -> str:
    """The rest of the model card's snippet, with a clock for a streamer."""
    prompt = pipeline.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    terminators = [pipeline.tokenizer.eos_token_id, pipeline.tokenizer.convert_tokens_to_ids("<|eot_id|>")]
    with _quiet():
        outputs = pipeline(
            prompt,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=terminators,
            do_sample=True,
            temperature=0.6,
            top_p=0.9,
            streamer=clock,
        )
    return outputs[0]["generated_text"][len(prompt) :]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' notes (a deprecated argument of the card's, the device) out of the demo's output."""
    import transformers

    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def _expected_s(config: Any, tokens: int) -> float:
    """Seconds of a prefill, from the speed of our attention on a small share of it, and a tenth for the rest.

    The last layer's queries count for nothing: only the last of them is asked for.
    """
    import torch

    from llama1m_ext import ops

    q_len, kv_len, heads, head_dim = 1024, 16_384, config.num_attention_heads, config.head_dim
    q = torch.randn(1, heads, q_len, head_dim, dtype=torch.bfloat16)
    k = torch.randn(1, config.num_key_value_heads, kv_len, head_dim, dtype=torch.bfloat16)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        ops.attention(q, k, k)
        seconds.append(time.perf_counter() - began)
    layers = config.num_hidden_layers - 1
    return 1.1 * median(seconds) * layers * tokens**2 / 2 / (q_len * (kv_len - q_len / 2))


def _available_bytes() -> int:
    """Memory that a new process can have."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _print_stock(stock: StockReport, ours: DemoResult) -> None:
    """The lengths that stock finished, and what the whole prompt takes beside ours."""
    for run in stock["runs"]:
        right = "right" if run["correct"] else "wrong"
        print(
            f"  {run['prompt_tokens']:>9,} tokens: prefill {run['first_token_s']:.1f} s, "
            f"{gib(run['peak_bytes'])} for the prompt, {right}"
        )
    if not stock["measured"]:
        print(f"  stopped: {stock['stopped']}")
    seconds, size = stock["first_token_s"], stock["peak_bytes"]
    if seconds is None or size is None:
        return
    how = "measured" if stock["measured"] else "EXTRAPOLATED from the lengths above"
    against = "" if stock["measured"] else ", against the extrapolation"
    print(f"  {ours['prompt_tokens']:>9,} tokens, {how}: prefill {seconds:.0f} s, {gib(size)} for the prompt")
    print(
        f"  {ours['prompt_tokens']:>9,} tokens, llama1m-ext: prefill {ours['first_token_s']:.1f} s, "
        f"{gib(ours['prompt_bytes'])} for the prompt: {seconds / ours['first_token_s']:.1f} times as fast{against}"
    )
