"""RESULTS.md from the raw lines: the latest run of each section, told with its command, device, date and commit."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .section import shown

ENVIRONMENT = ("device", "driver", "torch", "transformers", "python", "llama1m_ext", "commit", "dry_run")


def load(files: Iterable[Path]) -> dict[str, list[dict[str, Any]]]:
    """The records of each section's latest run, in order. A line that a kill cut short is left out."""
    latest: dict[str, list[dict[str, Any]]] = {}
    records = []
    for file in files:
        if not file.exists():
            continue
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    starts: dict[str, float] = {}
    for record in records:
        name = record["section"]
        if record["kind"] == "begin" and record["time"] >= starts.get(name, 0.0):
            starts[name] = record["time"]
            latest[name] = []
        if name in latest and record["time"] >= starts[name]:
            latest[name].append(record)
    return latest


def markdown(runs: dict[str, list[dict[str, Any]]], order: list[tuple[str, str]]) -> str:
    """The page. `order`: names and titles of all sections; those without a run are listed as not run."""
    begins = [records[0] for records in runs.values()]
    lines = ["# What the CUDA engine did on a GPU", ""]
    if any(begin.get("dry_run") for begin in begins):
        lines += ["**A dry run, without a GPU: the times below are of kernels emulated on a CPU and say nothing.**", ""]
    lines += ["Written by `python -m tests.gpu`; raw lines in raw.jsonl, all output in log.txt.", ""]
    lines += ["| section | verdict | seconds | date (UTC) | device |", "|---|---|---|---|---|"]
    for name, title in order:
        if name not in runs:
            lines.append(f"| {title} | not run |  |  |  |")
            continue
        begin, end = runs[name][0], next((r for r in runs[name] if r["kind"] == "end"), {})
        lines.append(
            f"| [{title}](#{name}) | {verdict(runs[name])} | {shown(end.get('seconds'))} | {begin.get('date', '')} | "
            f"{begin.get('device', '')} |"
        )
    for name, title in order:
        if name in runs:
            lines += ["", f'<a id="{name}"></a>', f"## {title}", *_section(runs[name])]
    return "\n".join(lines) + "\n"


def verdict(records: list[dict[str, Any]]) -> str:
    """One cell: what came of a section."""
    checks = [r["good"] for r in records if r["kind"] == "check"]
    end = next((r for r in records if r["kind"] == "end"), None)
    told = f"{sum(checks)} of {len(checks)} checks" if checks else "no checks"
    if end is None:
        return f"cut short; {told}"
    if end["status"] != "done":
        return f"{end['status']}; {told}"
    return f"ok, {told}" if all(checks) else f"FAILED, {told}"


def _section(records: list[dict[str, Any]]) -> list[str]:
    begin = records[0]
    facts = ", ".join(f"{key} {begin[key]}" for key in ENVIRONMENT if begin.get(key) not in (None, ""))
    lines = ["", f"`{begin.get('command', '')}`", "", f"{facts}", ""]
    tables: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["kind"] == "row":
            tables.setdefault(record["table"], []).append(record["columns"])
    for name, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        lines += [f"**{name}**", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(shown(row.get(column, "")) for column in columns) + " |" for row in rows]
        lines.append("")
    checks = [r for r in records if r["kind"] == "check"]
    bad = [r for r in checks if not r["good"]]
    lines += [f"- FAILED {r['name']}: {r['detail']}" for r in bad]
    lines += [f"- ok {r['name']}: {r['detail']}" for r in checks if r["good"] and ", wanted " in r["detail"]]
    lines += [f"- {r['text']}" for r in records if r["kind"] == "note"]
    for record in records:
        if record["kind"] == "end" and record["status"] != "done":
            lines += ["", f"Ended: {record['status']}.", "", "```", record.get("trace", "").strip(), "```"]
    return lines
