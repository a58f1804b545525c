"""What a compiled kernel must show before it is packed or merged: figures of ptxas and instructions, judged without a GPU."""

from __future__ import annotations

import re
from collections import Counter

from nvrtc import Entry, Program
from sass import count

REGISTER_FILE = 65536  # of a multiprocessor, in every architecture from sm_80 on
PARAM_LIMIT = 4096  # bytes; what every driver takes
UNTUNED = ("attention_any.cu", "attention_backward_any.cu")  # readable, for any GPU: local memory is no fault there


def figures(program: Program) -> list[str]:
    """Complaints about what the compiler said; none is what is wanted."""
    where = f"{program.source} for {program.arch}"
    complaints = [f"{where}: {line.strip()}" for line in program.log.splitlines() if re.search(r"\(C7\d\d\d\)", line)]
    complaints += [f"{where}: {line.strip()}" for line in program.log.splitlines() if ": warning" in line]
    if not program.entries:
        complaints.append(f"{where}: expected kernels, got none")
    for name, entry in program.entries.items():
        complaints += [f"{where}: {name}: {complaint}" for complaint in _entry(entry, program.source not in UNTUNED)]
    return complaints


def _entry(entry: Entry, tuned: bool) -> list[str]:
    complaints = []
    if tuned and (entry.spill_stores or entry.spill_loads or entry.stack):
        complaints.append(
            f"expected no local memory, got {entry.spill_stores} bytes of spill stores, {entry.spill_loads} of spill loads, "
            f"{entry.stack} of stack"
        )
    if entry.param_bytes >= PARAM_LIMIT:
        complaints.append(f"expected parameters under {PARAM_LIMIT} bytes, got {entry.param_bytes}")
    if entry.max_threads == 0:
        complaints.append("expected __launch_bounds__, got none")
        return complaints
    held = (entry.registers + 7) // 8 * 8 * entry.max_threads * max(entry.min_blocks, 1)
    if entry.registers == 0 or held > REGISTER_FILE:
        complaints.append(
            f"expected at most {REGISTER_FILE} registers of {entry.max_threads} threads x {max(entry.min_blocks, 1)} blocks, "
            f"got {entry.registers} each"
        )
    if entry.setmaxnreg:
        # Producers give registers up, consumers take them; what they hold together must be there, or the taking waits for ever.
        warpgroups = entry.max_threads // 128
        wanted = 128 * (entry.setmaxnreg[0] + (warpgroups - 1) * entry.setmaxnreg[-1])
        had = 128 * warpgroups * entry.registers
        if len(entry.setmaxnreg) != 2 or wanted > had:
            complaints.append(
                f"setmaxnreg {entry.setmaxnreg}: expected one decrease and one increase within {had} registers, got {wanted}"
            )
    return complaints


def instructions(program: Program, kernels: dict[str, Counter]) -> list[str]:
    """Complaints about the machine code: what must be there and what must not."""
    where = f"{program.source} for {program.arch}"
    missing = set(program.entries) - set(kernels)
    complaints = [f"{where}: no machine code of {name}" for name in sorted(missing)]
    for name in sorted(set(program.entries) - missing):
        counts = kernels[name]
        for what, there, wanted in _instructions(program.source, counts):
            if (there > 0) != wanted:
                complaints.append(f"{where}: {name}: expected {'' if wanted else 'no '}{what}, got {there}")
    return complaints


def _instructions(source: str, counts: Counter) -> list[tuple[str, int, bool]]:
    """(what, how many there are, whether it is wanted)"""
    rules = []
    if source not in UNTUNED:
        rules.append(("STL or LDL (local memory)", count(counts, "STL", "LDL"), False))
    if source in ("attention_sm90.cu", "attention_backward_sm90.cu"):
        rules.append(("HGMMA (wgmma)", count(counts, "HGMMA"), True))
        rules.append(("UTMALDG (tensor loads)", count(counts, "UTMALDG"), True))
        rules.append(("USETMAXREG (setmaxnreg)", count(counts, "USETMAXREG"), True))
        rules.append(("HMMA (mma.sync)", count(counts, "HMMA"), False))
    if source in ("attention_sm80.cu", "attention_backward_sm80.cu", "decode.cu"):
        rules.append(("HMMA (mma.sync)", count(counts, "HMMA"), True))
    if source in ("attention_sm80.cu", "attention_backward_sm80.cu"):
        rules.append(("LDSM (ldmatrix)", count(counts, "LDSM"), True))
        rules.append(("16-byte LDGSTS (cp.async)", count(counts, "LDGSTS", modifier="128"), True))
    if source == "decode.cu":
        rules.append(("16-byte LDG or LDGSTS", count(counts, "LDG", "LDGSTS", modifier="128"), True))
    return rules
