"""`llama1m extend`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("extend")(extend)


def extend(
    model: Annotated[str, typer.Argument(help="A folder, or a name on the hub.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run's folder: new or empty, unless it goes on.")
    ] = None,
    stages: Annotated[
        str | None, typer.Option(metavar="FILE.toml", help="Stages. Default: the model card's, gradient-1048k.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Rows, or a folder of rows for each stage, by its name or length."),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what it will take: memory, disk, time.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last checkpoint.")] = False,
    log: Annotated[str, typer.Option(help="Beside log.jsonl: tensorboard, wandb; comma-separated.")] = "",
    eval_text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="After each stage: perplexity of this text, by position.")
    ] = None,
    eval_tokens: Annotated[int, typer.Option(min=0, help="So many tokens of it. Default: the stage's length.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights: bfloat16 or float32. Default: as the stages say.")
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="What layers keep for backward: auto, all, attention, inputs.")
    ] = None,
    offload: Annotated[str | None, typer.Option(help="Where it waits: none, host, disk.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Default: a GPU, where there is one.")] = None,
    sequence_parallel: Annotated[int, typer.Option(min=1, help="Processes that share each row, under torchrun.")] = 1,
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1, help="With --plan: processes, each with memory of its own. Default: those that share a row."
        ),
    ] = None,
    progress: Annotated[bool | None, typer.Option("--progress/--no-progress", help="Default: on a terminal.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="With --plan: for a machine with so much memory, 80GiB. Default: this one.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the plan as JSON.")] = None,
) -> None:
    """Train a Llama on growing lengths, stage by stage: progressive training with a theta for each length."""
    from llama1m_ext.plan_choice import DoesNotFit

    given = {"dtype": dtype, "keep": keep, "offload": offload}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    try:
        if plan:
            settings |= {
                "devices": sequence_parallel if ranks is None else ranks,
                "sequence_parallel": sequence_parallel,
            }
            _plan(model, stages, settings, memory, json_file)
            return
        if ranks is not None:
            raise typer.BadParameter("expected it with --plan only: torchrun starts processes", param_hint="--ranks")
        if out is None:
            raise typer.BadParameter("expected a folder for the run", param_hint="--out")
        from llama1m_ext.train.loop import extend as train
        from llama1m_ext.train.signals import Interrupted

        try:
            made = train(
                model,
                stages,
                out,
                data=data,
                resume=resume,
                log=tuple(name for name in log.split(",") if name),
                progress="auto" if progress is None else progress,
                evaluate=None if eval_text is None else _perplexity(model, eval_text, eval_tokens),
                device=device,
                sequence_parallel=sequence_parallel,
                **settings,
            )
        except Interrupted as e:
            typer.echo(str(e), err=True)
            raise typer.Exit(128 + e.signal) from None
    except (OSError, ValueError, TypeError, ImportError, FloatingPointError, NotImplementedError, DoesNotFit) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    for stage in made.stages:
        typer.echo(
            f"{stage.folder}: {stage.length} tokens, theta {stage.theta:.0f}, {stage.steps} steps, loss {stage.loss:.4f}"
        )


def _plan(model: str, stages: str | None, settings: dict[str, Any], memory: str | None, json_file: Path | None) -> None:
    from llama1m_ext.train import plan as make

    made = make(model, stages, memory=memory, **settings)
    typer.echo(str(made))
    if json_file is not None:
        json_file.write_text(json.dumps(made.to_dict(), indent=2) + "\n", encoding="utf-8")


def _perplexity(model: str, file: Path, tokens: int) -> Any:
    from transformers import AutoTokenizer

    if tokens == 1:
        raise ValueError("eval_tokens: expected 0 or at least 2, got 1")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"eval_text: expected text in UTF-8 in {file}, got {e}") from None
    ids = AutoTokenizer.from_pretrained(model)(text, return_tensors="pt").input_ids
    if ids.shape[1] < 2:
        raise ValueError(f"eval_text: expected at least 2 tokens in {file}, got {ids.shape[1]}")

    def evaluate(model: Any, stage: Any, folder: Path) -> dict[str, Any]:
        from llama1m_ext.eval.ppl import perplexity

        n = min(tokens or stage.length, ids.shape[1])
        found = perplexity(model, ids[:, :n].to(model.device))
        typer.echo(f"{folder}: perplexity {found.perplexity:.3f} over {n} tokens of {file}", err=True)
        return {
            "perplexity": found.perplexity,
            "nll": found.nll,
            "tokens": found.tokens,
            "buckets": [[b.start, b.end, b.nll, b.tokens] for b in found.buckets],
        }

    return evaluate
