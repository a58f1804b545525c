"""`llama1m theta-search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

INTERRUPTED = 130


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("theta-search")(theta_search)


def theta_search(
    model: Annotated[str, typer.Argument(help="A folder of transformers', or a name on the hub.")],
    lengths: Annotated[str, typer.Option(help="Tokens, comma-separated: 65536,262144.")],
    text: Annotated[Path, typer.Option(help="A text that the model was not trained on (UTF-8; .xz too).")],
    needles: Annotated[int, typer.Option(min=0, help="Hidden for each theta. 0: the text alone decides.")] = 8,
    kind: Annotated[str, typer.Option(help="Of the needles: passkey, kv, sentence.")] = "passkey",
    windows: Annotated[int, typer.Option(min=1, help="Pieces of the text read for each theta.")] = 1,
    out: Annotated[Path, typer.Option(help="A folder for evaluations, JSON and picture.")] = Path("theta-search"),
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
    dtype: Annotated[str, typer.Option(help="bf16, f32, f16, or auto: that of the file.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda:0, or auto.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the needles.")] = 0,
) -> None:
    """Find the theta that suits a model at a length: perplexity of held-out text, and needles. Nothing is trained."""
    from .theta_trials import Search

    ends = _numbers("--span", span, float)
    if len(ends) != 2:
        raise typer.BadParameter(f"expected two numbers, got {span!r}", param_hint="--span")
    sizes = _numbers("--lengths", lengths, int)
    try:
        search = Search((ends[0], ends[1]), points, widen, refine, needle_weight=needle_weight)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    if not text.is_file():
        raise typer.BadParameter(f"expected a text file, got {str(text)!r}", param_hint="--text")
    try:
        loaded, tokenizer = _load(model, dtype, device)
        from ..demo.book import load_text
        from .theta_search import theta_search as searching

        found = searching(
            loaded,
            tokenizer,
            load_text(text),
            sizes,
            needles=needles,
            kind=kind,
            windows=windows,
            seed=seed,
            search=search,
            original_max_len=original_max_len,
            original_theta=original_theta,
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


def _numbers(option: str, words: str, kind: Any) -> list[Any]:
    try:
        return [kind(word) for word in words.split(",") if word.strip()]
    except ValueError:
        raise typer.BadParameter(f"expected numbers, comma-separated, got {words!r}", param_hint=option) from None


def _load(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    """(model, tokenizer), of any family that we serve.

    Raises:
        OSError, ValueError: there is none, or it can't be loaded so.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from .. import enable
    from ..families import FAMILIES, LLAMA

    kinds = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16, "auto": "auto"}
    if dtype not in kinds:
        raise ValueError(f"dtype: expected one of {', '.join(kinds)}; got {dtype!r}")
    family = AutoConfig.from_pretrained(name).model_type
    if family in FAMILIES and family != LLAMA.name:
        enable(families=family)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if device == "auto":
        more = {"device_map": "auto"} if torch.cuda.is_available() else {}
        return AutoModelForCausalLM.from_pretrained(name, dtype=kinds[dtype], **more).eval(), tokenizer
    model = AutoModelForCausalLM.from_pretrained(name, dtype=kinds[dtype]).eval()
    try:
        return model.to(torch.device(device)), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: expected one that is here, got {device!r} ({error})") from None
