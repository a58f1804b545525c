"""The kernels through torch's own compiler, on a machine without a GPU: do they compile everywhere, and into what they should?"""

from __future__ import annotations

import contextlib
import locale
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from llama1m_ext import _core

CSRC = Path(__file__).parents[2] / "csrc"
sys.path.insert(0, str(CSRC))
import gates  # noqa: E402
import sass  # noqa: E402
from nvrtc import CompileError, Entry, Nvrtc, Program, fits, installed, kernel_files, source_hash  # noqa: E402

ARCHS = ("sm_80", "sm_89", "sm_90a", "sm_100a")
TUNED_WITH = (12, 9)  # compilers before it may spill where the later ones don't; they have to compile all the same
# .ci/run sets it in the newest environment: there a missing compiler is a fault, and not a reason to skip.
REQUIRED = os.environ.get("LLAMA1M_CUDA_GATES") == "required"
COMPILED = [(path.name, arch) for path in kernel_files() for arch in ARCHS if fits(path.name, arch)]


def absent(what: str) -> None:
    """Skips, or fails where the gates are required."""
    if REQUIRED:
        pytest.fail(f"LLAMA1M_CUDA_GATES=required, but {what}")
    pytest.skip(what)


@pytest.fixture(scope="session")
def nvrtc(request: pytest.FixtureRequest) -> Nvrtc:
    library = installed()
    if library is None:
        absent("no NVRTC here: this torch comes without CUDA (LLAMA1M_CUDA_NVRTC names one)")
    found = Nvrtc(library)
    # What the tests to come will ask for, on all cores: one after the other it takes a minute and a half.
    mine = [item for item in request.session.items if item.path == Path(__file__) and hasattr(item, "callspec")]
    wanted = {tuple(item.callspec.params.values()) for item in mine}
    pairs = [pair for pair in COMPILED if pair in wanted and pair[1].rstrip("a") in found.archs()]
    with ThreadPoolExecutor(os.cpu_count()) as pool, contextlib.suppress(CompileError):
        list(pool.map(lambda pair: compiled(found.path, *pair), pairs))  # an error is its test's to tell
    return found


@pytest.fixture(scope="session")
def nvdisasm() -> Path:
    tool = sass.nvdisasm()
    if tool is None:
        absent(f"no nvdisasm here: pip install {sass.REQUIREMENT}")
    return tool


@cache
def compiled(library: Path, name: str, arch: str) -> Program:
    return Nvrtc(library).compile(CSRC / name, arch)


def compile_for(nvrtc: Nvrtc, name: str, arch: str) -> Program:
    if arch.rstrip("a") not in nvrtc.archs():
        absent(f"NVRTC {nvrtc.version} knows no {arch}")
    return compiled(nvrtc.path, name, arch)


def later_than_tuned(nvrtc: Nvrtc) -> bool:
    return tuple(map(int, nvrtc.version.split("."))) >= TUNED_WITH


def test_every_kernel_file_is_found():
    names = {name for name, _ in COMPILED}
    wanted = {"attention_any.cu", "attention_sm80.cu", "attention_sm90.cu", "decode.cu", "kv.cu", "rope.cu", "merge.cu"}
    assert wanted | {f"attention_backward_{kind}.cu" for kind in ("any", "sm80", "sm90")} <= names
    assert ("attention_sm90.cu", "sm_90a") in COMPILED and ("attention_sm90.cu", "sm_80") not in COMPILED


@pytest.mark.parametrize("name, arch", COMPILED)
def test_figures(nvrtc: Nvrtc, name: str, arch: str):
    program = compile_for(nvrtc, name, arch)
    assert program.cubin[:4] == b"\x7fELF"
    assert program.entries and all(name.isidentifier() for name in program.entries)
    if later_than_tuned(nvrtc):
        assert gates.figures(program) == []


@pytest.mark.parametrize("name, arch", COMPILED)
def test_instructions(nvrtc: Nvrtc, nvdisasm: Path, name: str, arch: str):
    program = compile_for(nvrtc, name, arch)
    if not later_than_tuned(nvrtc):
        pytest.skip(f"NVRTC {nvrtc.version} is older than the one that kernels are tuned with")
    assert gates.instructions(program, sass.opcodes(program.cubin, nvdisasm)) == []


def test_the_same_source_makes_the_same_cubin(nvrtc: Nvrtc):
    first = compile_for(nvrtc, "merge.cu", "sm_80")
    assert nvrtc.compile(CSRC / "merge.cu", "sm_80").cubin == first.cubin


def test_the_locale_is_left_alone(nvrtc: Nvrtc):
    """NVRTC 12.4 leaves its thread in the C locale; Python's files would be ASCII from then on."""
    before = locale.nl_langinfo(locale.CODESET)
    nvrtc.compile(CSRC / "merge.cu", "sm_80")
    assert locale.nl_langinfo(locale.CODESET) == before
    _core.nvrtc_compile("merge.cu", "sm_80", nvrtc=str(nvrtc.path))
    assert locale.nl_langinfo(locale.CODESET) == before


def test_every_file_has_entries_of_its_own(nvrtc: Nvrtc):
    owner: dict[str, str] = {}
    for name, arch in COMPILED:
        if arch == "sm_90a":
            for entry in compile_for(nvrtc, name, arch).entries:
                assert owner.setdefault(entry, name) == name, entry


def test_the_core_has_these_sources():
    """Under the very hashes that a package's cubins are known by: with others they would be left aside without a word. Where this
    fails, the core is older than csrc (build it again), or a header is missing in src/cuda/kernels.rs."""
    assert _core.cuda_sources() == {path.name: source_hash(path) for path in kernel_files()}


BAD = """
#include "params.h"
extern "C" __global__ void __launch_bounds__(1024) bad(const float* in, float* out, int n) {
    float kept[200];
    for (int i = 0; i < 200; ++i) kept[i] = in[i * n + threadIdx.x];
    for (int r = 0; r < n; ++r)
        for (int i = 0; i < 200; ++i) kept[i] = kept[i] * kept[(i + 7) % 200] + float(r);
    float sum = 0;
    for (int i = 0; i < 200; ++i) sum += kept[i];
    out[threadIdx.x] = sum;
}
"""
UNBOUNDED = 'extern "C" __global__ void unbounded(float* out) { out[threadIdx.x] = 1; }\n'


def test_gates_close(nvrtc: Nvrtc, nvdisasm: Path, tmp_path: Path):
    """Each gate on a kernel that must not pass."""
    types = "typedef unsigned long long uint64_t; typedef long long int64_t; typedef int int32_t;\n"
    (tmp_path / "params.h").write_text("#pragma once\n")
    (tmp_path / "decode.cu").write_text(types + BAD + UNBOUNDED)
    program = nvrtc.compile(tmp_path / "decode.cu", "sm_80")
    said = gates.figures(program)
    assert any("bad: expected no local memory" in line for line in said), said
    assert any("unbounded: expected __launch_bounds__, got none" in line for line in said), said
    said = gates.instructions(program, sass.opcodes(program.cubin, nvdisasm))
    for wanted in ("bad: expected no STL", "bad: expected HMMA", "bad: expected 16-byte LDG"):
        assert any(wanted in line for line in said), (wanted, said)
    program.source = "attention_sm90.cu"
    said = gates.instructions(program, sass.opcodes(program.cubin, nvdisasm))
    for wanted in ("HGMMA", "UTMALDG", "USETMAXREG"):
        assert any(f"expected {wanted}" in line for line in said), (wanted, said)


def test_gates_on_figures():
    def said(log: str = "", **figures: object) -> list[str]:
        entry = Entry(**{"registers": 128, "max_threads": 256, "min_blocks": 1, **figures})
        return gates.figures(Program("decode.cu", "sm_80", b"", "", log, {"k": entry}))

    assert said() == []
    assert said(registers=168, max_threads=384, setmaxnreg=(24, 240)) == []
    assert "parameters under 4096" in said(param_bytes=4096)[0]
    assert "at most 65536 registers" in said(registers=168, max_threads=512)[0]
    assert "setmaxnreg" in said(registers=168, max_threads=384, setmaxnreg=(40, 240))[0]
    assert "C7510" in said("ptxas info : (C7510) Potential Performance Loss: wgmma is serialised in function k")[0]
    assert "warning" in said('decode.cu(3): warning #177-D: variable "x" was declared but never referenced')[0]


def test_the_hash_is_of_names_bytes_headers_and_options(tmp_path: Path):
    (tmp_path / "a.cu").write_text("1")
    (tmp_path / "b.cuh").write_text("2")
    hashes = {source_hash(tmp_path / "a.cu")}
    (tmp_path / "other.cu").write_text("not of a.cu")
    assert source_hash(tmp_path / "a.cu") in hashes
    for name, text in (("b.cuh", "3"), ("a.cu", "4"), ("c.h", ""), ("b.cuh", "2")):
        (tmp_path / name).write_text(text)
        now = source_hash(tmp_path / "a.cu")
        assert now not in hashes, name
        hashes.add(now)
