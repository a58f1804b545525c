"""`llama1m data`: documents to packed rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Gives the app its command."""
    app.command("data")(data)


def data(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Files (.jsonl, .json, also .gz .xz .bz2 .zst; .parquet), folders of them, folders that `datasets` saved "
            "(FOLDER@SPLIT), names on the hub (NAME:CONFIG@SPLIT).",
        ),
    ],
    tokenizer: Annotated[str, typer.Option(metavar="MODEL", help="A folder, or a name on the hub.")],
    length: Annotated[int, typer.Option(min=1, help="Tokens of a row.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to make; it must not be there.")],
    tokens: Annotated[int | None, typer.Option(min=1, help="Of all rows. Default: all that there is.")] = None,
    mixture: Annotated[
        str, typer.Option(help="Shares by source: slimpajama, a file (JSON, TOML), NAME=SHARE,..., or none.")
    ] = "none",
    seed: Annotated[int, typer.Option(help="Of the order and of chance.")] = 42,
    upsample_below: Annotated[int, typer.Option(min=0, help="Documents of fewer tokens are short.")] = 4096,
    keep: Annotated[float, typer.Option(min=0, max=1, help="The share of short ones that is taken.")] = 0.1,
    chars_per_token: Annotated[
        float | None, typer.Option(help="Estimate lengths with it (Fu et al.: 3.68). Default: count tokens.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="The field with the text; a.b: field b in field a.")] = "text",
    source_field: Annotated[
        str, typer.Option(help="The field with the source's name; none: a source is a file.")
    ] = "meta.redpajama_set_name",
    separator: Annotated[
        str, typer.Option(help="auto: BOS and EOS around each document; none; or a text after each.")
    ] = "auto",
    packing: Annotated[
        str, typer.Option(help="whole: documents that fit a row stay whole; stream: cut where a row ends.")
    ] = "whole",
    tails: Annotated[
        str, typer.Option(help="Of documents longer than a row: keep (they go on in the next), or drop.")
    ] = "keep",
    cross_document: Annotated[
        bool,
        typer.Option(
            "--cross-document/--no-cross-document",
            help="Whether tokens see the documents before theirs; if not, rows come with position ids that begin anew.",
        ),
    ] = True,
    needles: Annotated[
        float, typer.Option(min=0, max=1, help="The share of rows with hidden facts and questions for them.")
    ] = 0.0,
    needles_per_row: Annotated[int, typer.Option(min=1, help="Facts in such a row.")] = 8,
    shuffle: Annotated[int, typer.Option(min=0, help="Documents among which the next is drawn; 0: no.")] = 1000,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that tokenise. Default: one a CPU.")] = None,
    bad_rows: Annotated[str, typer.Option(help="Without text or source, or not JSON: error or skip.")] = "error",
    shortfall: Annotated[str, typer.Option(help="Too few tokens: keep what there is, or error.")] = "keep",
    tolerance: Annotated[float, typer.Option(help="A share that is further from the mixture is warned of.")] = 0.02,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where it was ended; begin if it wasn't.")] = False,
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Draw the documents' lengths: lengths.png.")] = True,
) -> None:
    """Documents to packed rows of any length: long ones upsampled and whole, sources mixed; `datasets` reads them."""
    import warnings

    from llama1m_ext import data as rows
    from llama1m_ext.data.builder import Note

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Note)  # they are in what is printed at the end
            warnings.showwarning = lambda message, *_: typer.echo(f"warning: {message}", err=True)  # type: ignore
            made: Any = rows.build(
                sources,
                out,
                tokenizer=tokenizer,
                length=length,
                tokens=tokens,
                mixture=mixture,
                seed=seed,
                text_field=text_field,
                source_field=None if source_field == "none" else source_field,
                upsample_below=upsample_below,
                keep=keep,
                chars_per_token=chars_per_token,
                separator=separator,
                packing=packing,  # type: ignore[arg-type]
                tails=tails,  # type: ignore[arg-type]
                cross_document=cross_document,
                needles=needles,
                needles_per_row=needles_per_row,
                shuffle=shuffle,
                workers=workers or len(os.sched_getaffinity(0)),
                bad_rows=bad_rows,  # type: ignore[arg-type]
                shortfall=shortfall,  # type: ignore[arg-type]
                tolerance=tolerance,
                resume=resume,
                plot=plot,
            )
    except (OSError, RuntimeError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo(f"ended; what is finished is in {out}.partial: --resume goes on", err=True)
        raise typer.Exit(130) from None
    typer.echo(str(made))
