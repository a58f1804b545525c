"""The console script `llama1m`: what it offers, and nothing of how it is done.

Every command imports what it needs when it runs, so that `llama1m --help` answers at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import plan_cli
from .data import cli as data_cli
from .eval import cli as eval_cli
from .report_file import JsonFile, has_a_place, write_json
from .train import cli as train_cli
from .train import theta_cli

app = typer.Typer(
    name="llama1m",
    help="Exact attention at 1,048,576 tokens for Llama in transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Our attention beside torch's, in one process, alternated.", no_args_is_help=True)
app.add_typer(bench, name="bench")
cache = typer.Typer(help="Saved caches: what is in a file, and whether it is whole.", no_args_is_help=True)
app.add_typer(cache, name="cache")
plan_cli.register(app)
train_cli.register(app)
theta_cli.register(app)


PlotFile = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE.png", help="Draw the figures (matplotlib).", callback=has_a_place),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads for both sides. Default: as torch has it.")]
Rounds = Annotated[int, typer.Option(min=1, help="Alternated rounds; figures are medians.")]
Dtypes = Annotated[str, typer.Option(help="Comma-separated: bf16, f32, f16.")]
ClockName = Annotated[str, typer.Option("--clock", help="wall, or cpu: for one thread on a busy machine.")]
Quick = Annotated[bool, typer.Option("--quick", help="Small shapes, few rounds: shows that it runs, not how fast.")]


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(min=256, max=1_048_576, help="Length of the prompt, in tokens.")] = 131072,
    text: Annotated[Path | None, typer.Option(help="Hide the needle in this text, not in the book shipped.")] = None,
    depth: Annotated[float | None, typer.Option(min=0, max=1, help="Where in the text: 0 start, 1 end.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses the needle, and its place unless --depth does.")] = 0,
    stock: Annotated[bool, typer.Option("--stock/--no-stock", help="Run stock transformers too.")] = True,
    json_file: JsonFile = None,
) -> None:
    """Hide a needle in a long book and let the model card's pipeline find it."""
    if text is not None and not text.is_file():
        raise typer.BadParameter(f"expected a text file, got {str(text)!r}", param_hint="--text")
    from llama1m_ext.demo import run_demo

    result = run_demo(tokens=tokens, text=text, depth=depth, seed=seed, stock=stock)
    write_json(json_file, result)
    raise typer.Exit(0 if result["correct"] else 1)


@bench.command("attention")
def bench_attention(
    dtypes: Dtypes = "bf16,f32",
    squares: Annotated[str, typer.Option(help="Causal squares: lengths, comma-separated.")] = "4096,8192,16384",
    chunks: Annotated[str, typer.Option(help="Query chunks q_len x kv_len, comma-separated.")] = "512x32768,2048x32768",
    heads: Annotated[str, typer.Option(help="q_heads x kv_heads x head_dim.")] = "4x1x128",
    peers: Annotated[str, typer.Option(help="Other peers, comma-separated: onnxruntime (f32 squares).")] = "",
    threads: Threads = None,
    rounds: Rounds = 7,
    quick: Quick = False,
    clock: ClockName = "wall",
    json_file: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """Prefill: causal squares, and chunks of queries against a long history."""
    from llama1m_ext.bench import attention

    try:
        plan = attention.plan(dtypes, squares, chunks, heads, peers, threads, rounds, quick, clock)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    _write_report(attention.run(plan), json_file, plot)


@bench.command("backward")
def bench_backward(
    dtypes: Dtypes = "bf16,f32",
    squares: Annotated[str, typer.Option(help="Causal squares: lengths, comma-separated.")] = "2048,4096,8192,16384",
    heads: Annotated[str, typer.Option(help="q_heads x kv_heads x head_dim.")] = "4x1x128",
    threads: Threads = None,
    rounds: Rounds = 5,
    quick: Quick = False,
    clock: ClockName = "wall",
    json_file: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """Gradients of attention: the backward pass of causal squares."""
    from llama1m_ext.bench import backward

    try:
        plan = backward.plan(dtypes, squares, heads, threads, rounds, quick, clock)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    _write_report(backward.run(plan), json_file, plot)


@bench.command("decode")
def bench_decode(
    dtypes: Dtypes = "bf16",
    kv_len: Annotated[str, typer.Option(help="Lengths of the history, comma-separated.")] = "131072",
    heads: Annotated[str, typer.Option(help="q_heads x kv_heads x head_dim.")] = "32x8x128",
    batch: Annotated[int, typer.Option(min=1)] = 1,
    page_size: Annotated[int, typer.Option(min=0, help="Also measure ours over pages of this size. 0: no.")] = 0,
    threads: Threads = None,
    rounds: Rounds = 9,
    quick: Quick = False,
    clock: ClockName = "wall",
    json_file: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """Decode: one query against a long history, bound by memory bandwidth."""
    from llama1m_ext.bench import decode

    try:
        plan = decode.plan(dtypes, kv_len, heads, batch, page_size, threads, rounds, quick, clock)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    _write_report(decode.run(plan), json_file, plot)


@bench.command("ring")
def bench_ring(
    nodes: Annotated[str, typer.Option(help="Nodes x ranks of each: network namespaces, and processes.")] = "4x2",
    rails: Annotated[int, typer.Option(min=1, help="Links of a node to other nodes.")] = 2,
    inter: Annotated[
        str, typer.Option(help="What a link carries, comma-separated: bits (Mb, Gb) or bytes (MB, GB).")
    ] = "1Gb,300Mb,100Mb,30Mb,10Mb",
    length: Annotated[int, typer.Option(min=1, help="Tokens of the sequence.")] = 4096,
    heads: Annotated[str, typer.Option(help="q_heads x kv_heads x head_dim.")] = "32x8x128",
    dtype: Annotated[str, typer.Option(help="bf16, f32 or f16.")] = "bf16",
    kv_format: Annotated[
        str, typer.Option(help="Of blocks on their way: model, int8, fp8, int4, int8/int4.")
    ] = "model",
    backward: Annotated[bool, typer.Option("--backward", help="The backward pass, too.")] = False,
    rounds: Rounds = 3,
    quick: Quick = False,
    json_file: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """Ring attention as links between nodes slow down: the planner's layout beside others (Linux, network namespaces)."""
    from llama1m_ext.bench import namespaces, ring

    try:
        plan = ring.plan(nodes, rails, inter, length, heads, dtype, kv_format, backward, rounds, quick)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    try:
        report = ring.run(plan)
    except namespaces.Unavailable as error:
        print(f"this machine can't make nodes of network namespaces: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    write_json(json_file, report)
    if plot is not None:
        from llama1m_ext.bench.ring_plot import draw

        draw(report, plot)
        print(f"wrote {plot}", file=sys.stderr)


@bench.command("kv")
def bench_kv(
    formats: Annotated[str, typer.Option(help="KV formats, comma-separated, model first.")] = (
        "model,int8,fp8,int8/int4,int4"
    ),
    dtype: Annotated[str, typer.Option(help="The model's dtype: bf16, f32 or f16.")] = "bf16",
    kv_len: Annotated[str, typer.Option(help="Lengths of the history, comma-separated.")] = "131072",
    heads: Annotated[str, typer.Option(help="q_heads x kv_heads x head_dim.")] = "32x8x128",
    peers: Annotated[str, typer.Option(help="Backends of transformers' QuantizedCache: quanto, hqq.")] = "",
    peer_len: Annotated[int, typer.Option(min=64, help="Length of the history for these.")] = 4096,
    quality: Annotated[bool, typer.Option("--quality", help="Answers instead of speed, on the demo model.")] = False,
    tokens: Annotated[int, typer.Option(min=1024, help="With --quality: length of the text.")] = 16384,
    threads: Threads = None,
    rounds: Rounds = 9,
    quick: Quick = False,
    clock: ClockName = "wall",
    json_file: JsonFile = None,
) -> None:
    """KV formats: bytes, errors, decode and writing speed; with --quality needles and perplexity."""
    if quality:
        from llama1m_ext.bench import kv_quality

        print(kv_quality.HEADER)
        rows = kv_quality.quality(tokens, *((4, 128) if quick else ()))
        write_json(json_file, {"bench": "kv quality", "tokens": tokens, "rows": rows})
        return
    from llama1m_ext.bench import kv

    try:
        plan = kv.plan(formats, dtype, kv_len, heads, peers, peer_len, threads, rounds, quick, clock)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    write_json(json_file, kv.run(plan))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A folder with params.json, or with original/.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to make; it must not be there.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Default: tokenizer.model in SRC.")] = None,
    max_len: Annotated[int | None, typer.Option(min=1, help="Positions. Default: what it was trained for.")] = None,
    theta: Annotated[float | None, typer.Option(help="Of the rotary embedding. Default: as in params.json.")] = None,
    rope_factor: Annotated[float | None, typer.Option(help="Of scaled frequencies. Llama 3.1: 8, 3.2: 32.")] = None,
    instruct: Annotated[bool, typer.Option("--instruct/--base", help="Trained to chat, or not.")] = True,
    tied: Annotated[bool, typer.Option("--tied", help="The output is the embedding (Llama 3.2's small ones).")] = False,
    shard_size: Annotated[str, typer.Option(help="Of a file of weights, about: 5GB.")] = "5GB",
) -> None:
    """An original Llama 3 checkpoint (consolidated.00.pth, params.json, tokenizer.model) to a folder of transformers'."""
    from llama1m_ext import convert as converting

    try:
        made = converting.convert(
            source,
            destination,
            tokenizer=tokenizer,
            max_len=max_len,
            theta=theta,
            rope_factor=rope_factor,
            instruct=instruct,
            tied=tied,
            shard_size=shard_size,
        )
    except (OSError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    config = made.config
    typer.echo(
        f"{destination}: {config['num_hidden_layers']} layers, {made.nbytes} bytes of {config['torch_dtype']} in "
        f"{made.files} files, {config['max_position_embeddings']} positions, theta {config['rope_theta']:.0f}"
    )


CacheFile = Annotated[Path, typer.Argument(metavar="FILE", help="A file that LongCache.save wrote.")]


@cache.command("info")
def cache_info(
    file: CacheFile, as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False
) -> None:
    """What a saved cache is: tokens, format, the model it belongs to. Reads the header only."""
    from llama1m_ext import saved_file

    facts = _of_file(saved_file.info, file)
    typer.echo(json.dumps(facts.as_dict(), indent=2) if as_json else facts.render())


@cache.command("verify")
def cache_verify(file: CacheFile) -> None:
    """Read all of a saved cache and compare its checksums. Ends with 1 if it is damaged."""
    from llama1m_ext import saved_file

    facts = _of_file(saved_file.verified_with_bar, file)
    typer.echo(f"{file}: {facts.nbytes} bytes, {facts.pages} pages: as they were written")


def _of_file(read: Any, file: Path) -> Any:
    try:
        return read(file)
    except (OSError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


@app.command()
def env(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    isa_levels: Annotated[bool, typer.Option("--isa-levels", help="Only the ISA levels, best first.")] = False,
) -> None:
    """Versions, CPU level, memory, GPU, NVRTC: what a bug report needs."""
    from llama1m_ext import env as environment

    if isa_levels:
        typer.echo("\n".join(environment.isa_levels()))
        return
    facts = environment.collect()
    typer.echo(json.dumps(facts, indent=2) if as_json else environment.render(facts))


data_cli.register(app)
eval_cli.register(app)


def main() -> None:
    """Entry point of the console script."""
    app()


def _write_report(report: dict[str, Any], json_file: Path | None, plot: Path | None) -> None:
    write_json(json_file, report)
    if plot is not None:
        from llama1m_ext.bench.plot import draw

        draw(report, plot)
        print(f"wrote {plot}", file=sys.stderr)
