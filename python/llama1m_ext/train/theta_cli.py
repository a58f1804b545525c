"""`llama1m theta-search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..report_file import makes_a_folder

INTERRUPTED = 130


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("theta-search")(theta_search)


def theta_search(
    model: Annotated[str, typer.Argument(help='A folder, a name on the hub, or "demo": the model that ships with it.')],
    lengths: Annotated[str, typer.Option(help="Tokens: 4096,65536,256K,1M.")],
    text: Annotated[Path, typer.Option(help="A text that the model was not trained on (UTF-8; .xz too).")],
    needles: Annotated[int, typer.Option(min=0, help="Hidden for each theta. 0: the text alone decides.")] = 8,
    kind: Annotated[str, typer.Option(help="Of the needles: passkey, kv, sentence.")] = "passkey",
    windows: Annotated[int, typer.Option(min=1, help="Pieces of the text read for each theta.")] = 1,
    out: Annotated[
        Path, typer.Option(help="A folder for evaluations, JSON and picture.", callback=makes_a_folder)
    ] = Path("theta-search"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in that folder.")] = False,
    span: Annotated[str, typer.Option(help="The grid's ends, as multiples of the critical base.")] = "0.5,2",
    points: Annotated[int, typer.Option(min=2, help="Of the grid.")] = 5,
    widen: Annotated[int, typer.Option(min=0, help="How often the grid may grow at its edge.")] = 3,
    refine: Annotated[int, typer.Option(min=0, help="Evaluations around the best, at most.")] = 5,
    needle_weight: Annotated[float, typer.Option(min=0, help="Nats that all needles together are worth.")] = 1.0,
    original_max_len: Annotated[
        int | None, typer.Option(help="Tokens it was trained for. Default: as in config.")
    ] = None,
    original_theta: Annotated[float | None, typer.Option(help="Theta of that training. Default: as in config.")] = None,
    repeat: Annotated[bool, typer.Option("--repeat", help="A text that is too short begins again.")] = False,
    seed: Annotated[int, typer.Option(help="Of the needles.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="bf16, f16 or f32. Default: the checkpoint's.")] = None,
    kv: Annotated[str | None, typer.Option(help="Format of the KV cache: model, int8, fp8, int4, int8/int4.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: as torch has it.")] = None,
) -> None:
    """Find the theta that suits a model at a length: perplexity of held-out text, and needles. Nothing is trained."""
    try:
        from ..eval.load import load, numbers, read_text
        from .theta_trials import Search

        sizes = numbers("lengths", lengths)
        search = Search(_pair(span), points, widen, refine, needle_weight=needle_weight)
        content = read_text(text)
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        from .theta_search import theta_search as searching

        loaded, tokenizer = load(model, dtype, kv)
        found = searching(
            loaded,
            tokenizer,
            content or "",
            sizes,
            needles=needles,
            kind=kind,
            windows=windows,
            seed=seed,
            search=search,
            original_max_len=original_max_len,
            original_theta=original_theta,
            repeat=repeat,
            out=out,
            resume=resume,
            progress=True,
        )
    except KeyboardInterrupt:
        typer.echo(f"stopped; what was evaluated is in {out}: --resume goes on with it", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except (ImportError, OSError, TypeError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(found.table())
    for one in found.lengths:
        typer.echo(f"llama1m_ext.extend(model, {one.length}, theta={one.best.theta:.0f})")
    typer.echo(f"wrote {out / 'theta-search.json'} and {out / 'theta-search.png'}", err=True)


def _pair(span: str) -> tuple[float, float]:
    try:
        low, high = (float(word) for word in span.split(","))
    except ValueError:
        raise ValueError(f'span: expected two numbers such as "0.5,2", got {span!r}') from None
    return low, high
