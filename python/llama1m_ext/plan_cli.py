"""`llama1m plan`: a prompt on this machine or another, and a ring over many GPUs."""

from __future__ import annotations

from typing import Annotated

import typer

from .report_file import JsonFile, write_json

RING = "Many GPUs"


def register(app: typer.Typer) -> None:
    """Puts the command where `llama1m` finds it."""
    app.command()(plan)


def plan(
    model: Annotated[
        str | None,
        typer.Argument(help="A folder with a config.json, or a name on the hub. With --nodes: the model card's."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Length of the prompt, in tokens. With --nodes: 1048576.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=0, help="Tokens generated afterwards.")] = 256,
    dtype: Annotated[str | None, typer.Option(help="bf16, f32 or f16. Default: the model's.")] = None,
    kv: Annotated[str, typer.Option(help="Format of the cache: auto, model, int8, fp8, int4, int8/int4.")] = "auto",
    offload: Annotated[str, typer.Option(help="auto, host, disk or none.")] = "auto",
    kv_memory: Annotated[str, typer.Option(help="Bytes that pages may take: auto, 8GiB.")] = "auto",
    chunk: Annotated[str, typer.Option(help="Queries at a time: auto, or a number.")] = "auto",
    gpu: Annotated[str | None, typer.Option(help="One GPU's memory: 80GiB. By arithmetic.")] = None,
    host: Annotated[str | None, typer.Option(help="Main memory: 256GiB. Default: what is free now.")] = None,
    gpu_tflops: Annotated[
        float | None, typer.Option(help="What the GPU reaches in matrix products, for times. Default: no times.")
    ] = None,
    gpu_bandwidth: Annotated[
        str | None, typer.Option(help="Bytes that it reads in a second: 3350GB. Default: no times.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: as torch has it.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes that share the model: what each of them takes.")] = 1,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="A ring over many GPUs instead: nodes.", rich_help_panel=RING)
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of a node.", rich_help_panel=RING)] = 8,
    inter: Annotated[
        str, typer.Option(help="What a node's link to others carries, one way: 400Gb.", rich_help_panel=RING)
    ] = "400Gb",
    intra: Annotated[
        str, typer.Option(help="What a GPU sends within its node, one way: 900GB.", rich_help_panel=RING)
    ] = "900GB",
    rails: Annotated[int, typer.Option(min=1, help="Such links of a node.", rich_help_panel=RING)] = 1,
    latency: Annotated[float, typer.Option(min=0, help="Microseconds of a message.", rich_help_panel=RING)] = 20,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of a step.", rich_help_panel=RING)] = 1,
    training: Annotated[
        bool, typer.Option("--train", help="A training step, not a prefill.", rich_help_panel=RING)
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Before a long prompt: bytes by part, what fits where, what "auto" will choose, how long it may take. Ends with 1 where
    it does not fit. With --nodes: how to lay a sequence over many GPUs, how long it takes, what goes over which link, and why."""
    if nodes is not None:
        from llama1m_ext import plan_topology

        try:
            made_for = plan_topology.topology(
                nodes,
                gpus,
                inter=inter,
                intra=intra,
                model=plan_topology.CARD if model is None else model,
                tokens=1 << 20 if tokens is None else tokens,
                sequences=sequences,
                training=training,
                rails=rails,
                flops=None if gpu_tflops is None else gpu_tflops * 1e12,
                latency=latency * 1e-6,
                dtype=dtype,
            )
        except (TypeError, ValueError) as error:
            raise typer.BadParameter(str(error)) from None
        typer.echo(str(made_for))
        write_json(json_file, made_for.to_dict())
        return
    if model is None or tokens is None:
        raise typer.BadParameter("expected MODEL and --tokens, or --nodes for a plan of many GPUs")
    from llama1m_ext import plan as make

    try:
        made = make(
            model,
            tokens,
            batch=batch,
            new_tokens=new_tokens,
            dtype=dtype,
            kv=kv,
            offload=None if offload == "none" else offload,
            kv_memory=kv_memory,
            chunk=int(chunk) if chunk.isdigit() else chunk,
            gpu=gpu,
            host=host,
            threads=threads,
            gpu_flops=None if gpu_tflops is None else gpu_tflops * 1e12,
            gpu_read=gpu_bandwidth,
            ranks=ranks,
        )
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    typer.echo(str(made))
    write_json(json_file, made.to_dict())
    raise typer.Exit(0 if made.fits else 1)
