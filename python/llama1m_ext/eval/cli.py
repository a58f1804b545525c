"""The commands `llama1m ppl`, `needle` and `ruler`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..report_file import JsonFile, has_a_place, makes_a_folder, write_json


def _file(path: Path | None) -> Path | None:
    if path is not None and not path.is_file():
        raise typer.BadParameter(f"expected a file, got {str(path)!r}")
    return path


def _can_draw(path: Path | None) -> Path | None:
    """Said before the work, too: whether it can be drawn."""
    if has_a_place(path) is not None:
        from llama1m_ext.eval import plot

        try:
            plot.require()
        except ModuleNotFoundError as error:
            raise typer.BadParameter(str(error)) from None
    return path


Model = Annotated[str, typer.Argument(help='A folder, a name on the hub, or "demo": the model that ships with it.')]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Results, as they come: a run that was killed goes on there.", callback=makes_a_folder
    ),
]
Hay = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A long text (UTF-8, .xz too). Default: the book shipped.", callback=_file),
]
Repeat = Annotated[bool, typer.Option("--repeat", help="A text that is too short begins again.")]
Chat = Annotated[bool | None, typer.Option("--chat/--no-chat", help="Default: where there is a chat template.")]
Seed = Annotated[int, typer.Option(help="Of all that is random.")]
Dtype = Annotated[str | None, typer.Option(help="bf16, f16 or f32. Default: the checkpoint's.")]
Kv = Annotated[str | None, typer.Option(help="Format of the KV cache: model, int8, fp8, int4, int8/int4.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Default: as torch has it.")]
PlotFile = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE.png", help="Draw the figures (matplotlib).", callback=_can_draw),
]


def register(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    app.command()(ppl)
    app.command()(needle)
    app.command()(ruler)


def ppl(
    model: Model,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="UTF-8, .xz too. Default: the book.", callback=_file)
    ] = None,
    length: Annotated[str, typer.Option(help="Tokens of a piece of the text: 16384, 64K, 1M.")] = "16384",
    pieces: Annotated[int, typer.Option(min=1, help="So many pieces of the text, one after the other.")] = 1,
    buckets: Annotated[int | None, typer.Option(min=1, help="About so many. Default: powers of two.")] = None,
    repeat: Repeat = False,
    dtype: Dtype = None,
    threads: Threads = None,
    json_file: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """Perplexity by position: does the model use what is far away? Exact, at any length."""
    with _told():
        from llama1m_ext.eval.load import load, numbers, read_text

        (n,) = _one(numbers("length", length))
        content = read_text(text)
        _use(threads)
        from llama1m_ext.eval import ppl as module
        from llama1m_ext.eval.haystack import Haystack
        from llama1m_ext.eval.load import pieces_of

        module.edges_for(n, buckets)
        loaded, tokenizer = load(model, dtype)
        ids = pieces_of(Haystack(content, tokenizer, repeat=repeat, name="text"), n, pieces)
        found = module.perplexity(loaded, ids, buckets=buckets)
    typer.echo(found.table())
    write_json(
        json_file, {"model": model, "text": text and str(text), "length": n, "pieces": pieces, **found.to_dict()}
    )
    if plot is not None:
        found.plot(plot)
        typer.echo(f"wrote {plot}", err=True)


def needle(
    model: Model,
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts: 4096,16384,64K,1M.")] = "4096,16384",
    depths: Annotated[str, typer.Option(help="So many, evenly spaced; or 0,0.5,1.")] = "11",
    kind: Annotated[str, typer.Option(help='passkey, kv, or sentence (the kind that "demo" knows).')] = "passkey",
    mode: Annotated[
        str, typer.Option(help="shared: all depths in one document, read once. alone: a document each.")
    ] = "shared",
    samples: Annotated[int, typer.Option(min=1, help="Of each cell.")] = 1,
    generate: Annotated[
        bool, typer.Option("--generate", help="Judge what is said, not the most probable tokens.")
    ] = False,
    hay: Hay = None,
    out: Out = None,
    repeat: Repeat = False,
    chat: Chat = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    kv: Kv = None,
    threads: Threads = None,
    json_file: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """Needles in a haystack: lengths by depths, with real text as hay. A heat map in DIR."""
    picture = plot or (out / "heat_map.png" if out is not None and _draws() else None)
    with _told():
        from llama1m_ext.eval.load import depths as parsed
        from llama1m_ext.eval.load import load, numbers, read_text

        sizes, places, content = numbers("lengths", lengths), parsed(depths), read_text(hay, "hay")
        _use(threads)
        from llama1m_ext.eval import kinds
        from llama1m_ext.eval import needle as module

        kinds.kind_of(kind)
        module.depths_for(places)
        loaded, tokenizer = load(model, dtype, kv)
        found = module.needle(
            loaded,
            tokenizer,
            lengths=sizes,
            depths=places,
            kind=kind,
            hay=content,
            samples=samples,
            seed=seed,
            out=out,
            mode=mode,
            chat="auto" if chat is None else chat,
            system=system,
            generate=generate,
            repeat=repeat,
        )
    typer.echo(found.table())
    write_json(json_file, {"model": model, **found.to_dict()})
    if picture is not None:
        found.plot(picture, f"{model}, {kind}: {100 * found.accuracy():.1f}% found")
        typer.echo(f"wrote {picture}", err=True)


def ruler(
    model: Model,
    lengths: Annotated[str, typer.Option(help="Tokens of prompt and answer together: 4096,8192,64K.")] = "4096,8192",
    tasks: Annotated[str, typer.Option(help="all, niah, or names with commas between.")] = "all",
    samples: Annotated[int, typer.Option(min=1, help="Of each task and length; RULER takes 500.")] = 10,
    hay: Hay = None,
    qa: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON in SQuAD's form, for the task qa.", callback=_file)
    ] = None,
    out: Out = None,
    repeat: Repeat = False,
    chat: Chat = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    kv: Kv = None,
    threads: Threads = None,
    json_file: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """RULER's synthetic tasks, scored as RULER does. Without --qa there are no questions about documents."""
    with _told():
        from llama1m_ext.eval.load import load, numbers, read_text

        sizes, content = numbers("lengths", lengths), read_text(hay, "hay")
        _use(threads)
        from llama1m_ext.eval import ruler as module

        names = [name.strip() for name in tasks.split(",")]
        module.tasks_for(names, qa is not None)
        loaded, tokenizer = load(model, dtype, kv)
        found = module.ruler(
            loaded,
            tokenizer,
            lengths=sizes,
            tasks=names,
            samples=samples,
            seed=seed,
            hay=content,
            qa=qa,
            out=out,
            chat="auto" if chat is None else chat,
            repeat=repeat,
        )
    typer.echo(found.table())
    if qa is None:
        typer.echo("without qa, which needs a data set: --qa FILE")
    write_json(json_file, {"model": model, **found.to_dict()})
    if plot is not None:
        found.plot(plot, f"{model}, RULER: {found.average():.1f} on average")
        typer.echo(f"wrote {plot}", err=True)


@contextmanager
def _told() -> Iterator[None]:
    """What is wrong, in one line."""
    try:
        yield
    except (OSError, ValueError, TypeError, ModuleNotFoundError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("interrupted; what was measured is in --out, where it was given", err=True)
        raise typer.Exit(130) from None


def _one(values: list[int]) -> list[int]:
    if len(values) != 1:
        raise ValueError(f"length: expected one number, got {len(values)}")
    return values


def _use(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _draws() -> bool:
    """Whether there is matplotlib: a heat map that nobody asked for is no reason to fail."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None
