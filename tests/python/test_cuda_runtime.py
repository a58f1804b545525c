"""The core's ways to a GPU: the driver, the compiler, and the files of compiled kernels; and that both sides of a launch
agree on its parameters. Without a GPU, over the driver of tests/cuda, in processes of their own."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from pathlib import Path

import pytest

from test_cuda_driver import driver, needs_compiler, over, passed  # noqa: F401  (fixtures)

ROOT = Path(__file__).parents[2]
CXX = os.environ.get("CXX", "g++")


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_machine_code_from_everywhere(over):  # noqa: F811
    """20 processes at once, damaged files, folders that can't be written, packed kernels that fit or don't: see there."""
    said = over("-m", "pytest", "-q", "-p", "no:cacheprovider", "over_driver_cubins.py")
    assert passed(said) >= 20


@needs_compiler
def test_asking_about_devices_takes_none_of_them(driver, run_python):  # noqa: F811
    """A context is hundreds of megabytes on each card, and a card in exclusive mode refuses it: only what computes there has
    one. And what one card won't say is not said of the next."""
    said = run_python(
        f"import ctypes; driver = ctypes.CDLL({str(driver)!r}, mode=ctypes.RTLD_GLOBAL)\n"
        "import torch\n"
        "from llama1m_ext import cuda\n"
        "found = cuda.info()\n"
        "first, *others = found['devices']\n"
        "assert len(others) == 3 and all(capability == (9, 0) for _, capability, *_ in others), found\n"
        "assert 'cuDeviceGetAttribute' in first, first\n"
        "found['driver']['fake'] = False\n"
        "cuda.info = lambda: found\n"
        "print(cuda.missing(torch.device('cuda', 0)))\n"
        "print(cuda.missing(torch.device('cuda', 4)))\n"
        "print([driver.llama1m_fake_retained(i) for i in range(4)])\n",
        LLAMA1M_FAKE_DEVICES="4",
        LLAMA1M_FAKE_REFUSES="0",
    ).splitlines()
    assert said[0].startswith("the driver says nothing of it: ") and "cuDeviceGetAttribute" in said[0]
    assert said[1] == "the driver knows 4 devices, there is none of number 4"
    assert said[2] == "[0, 0, 0, 0]"


@needs_compiler
def test_a_stub_of_the_driver(tmp_path, run_python):
    """A libcuda.so.1 that lacks what we call: it is named, and nothing panics."""
    library = tmp_path / "libcuda.so.1"
    source = 'extern "C" int cuInit(unsigned) { return 0; }'
    command = [CXX, "-x", "c++", "-", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run(command, input=source, encoding="utf-8", check=True)
    said = run_python(
        f"import ctypes; ctypes.CDLL({str(library)!r}, mode=ctypes.RTLD_GLOBAL)\n"
        "import torch\n"
        "from llama1m_ext import cuda, _core\n"
        "found = cuda.info()['driver']\n"
        "assert not found['found'], found\n"
        "print(found['why'])\n"
        "try:\n    _core.cuda_merge_partials([], [], torch.zeros(1, 1, 1, 1))\n"
        "except RuntimeError as e:\n    print(e)\n"
    )
    first, second = said.splitlines()
    assert first == second and "libcuda.so.1" in first and first.endswith("has no cuDriverGetVersion")


def test_no_library_that_is_one(tmp_path, run_python):
    """What is no NVRTC is refused with its path, and the next is tried."""
    (tmp_path / "libnvrtc.so.13").write_bytes(b"not a library")
    said = run_python(
        "from llama1m_ext import _core\n"
        f"_core.cuda_set_up(None, None, [{str(tmp_path / 'libnvrtc.so.13')!r}, 'libc.so.6'])\n"
        "print(_core.cuda_info()['nvrtc']['why'])\n"
        "try:\n    _core.nvrtc_compile('merge.cu', 'sm_80')\n"
        "except RuntimeError as e:\n    print(e)\n"
    )
    for line in said.splitlines():
        assert str(tmp_path / "libnvrtc.so.13") in line and "libc.so.6" in line and "nvrtcVersion" in line, said


@pytest.mark.parametrize("arch", ["sm_1", "sm_80 --help", "", "compute_", "x" * 5000])
def test_no_such_architecture(run_python, arch):
    said = run_python(
        "from llama1m_ext import _core, cuda_files\n"
        "_core.cuda_set_up(None, None, cuda_files.nvrtc())\n"
        f"try:\n    _core.nvrtc_compile('merge.cu', {arch!r})\n"
        "except RuntimeError as e:\n    print(e)\n"
    )
    assert "merge.cu" in said and arch in said and "gpu-architecture" in said


# Parameters of kernels, as both sides lay them out.

RUST = {"u64": ctypes.c_uint64, "i64": ctypes.c_int64, "i32": ctypes.c_int32, "f32": ctypes.c_float}


def rust_structs():
    """The repr(C) structs of params.rs as ctypes lays them out, which is as C does."""
    text = (ROOT / "src/cuda/params.rs").read_text()
    sizes = {name: int(n.replace("_", "")) for name, n in re.findall(r"pub const (\w+): usize = ([\d_]+);", text)}
    made = {}

    def kind(name):
        array = re.fullmatch(r"\[(\w+); (\w+)\]", name)
        if array:
            return kind(array[1]) * (sizes[array[2]] if array[2] in sizes else int(array[2]))
        return RUST.get(name) or made[name]

    for name, body in re.findall(r"#\[repr\(C\)\].*?pub struct (\w+) \{(.*?)\n\}", text, re.S):
        fields = re.findall(r"pub (\w+): ([^\n]+),\n", body + "\n")
        made[name] = type(name, (ctypes.Structure,), {"_fields_": [(n, kind(k)) for n, k in fields]})
    return made, sizes


@needs_compiler
def test_both_sides_agree_on_parameters(tmp_path):
    """Each field of each struct of csrc/params.h lies where src/cuda/params.rs has it, under the same name."""
    structs, sizes = rust_structs()
    header = (ROOT / "csrc/params.h").read_text()
    assert set(structs) == set(re.findall(r"^struct (\w+)", header, re.M))
    asserts = [f"static_assert({name} == {n});" for name, n in sizes.items()]
    for name, layout in structs.items():
        asserts.append(f"static_assert(sizeof({name}) == {ctypes.sizeof(layout)});")
        for field, _ in layout._fields_:
            at = getattr(layout, field)
            asserts.append(f"static_assert(offsetof({name}, {field}) == {at.offset});")
            asserts.append(f"static_assert(sizeof({name}::{field}) == {at.size});")
    assert len(asserts) > 150
    program = '#include <cstddef>\n#include "params.h"\n' + "\n".join(asserts)
    command = [CXX, "-std=c++17", "-march=x86-64-v3", "-fsyntax-only", "-x", "c++", "-"]
    command += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/cuda'}"]
    said = subprocess.run(command, input=program, capture_output=True, encoding="utf-8")
    assert said.returncode == 0, said.stderr
    wrong = program.replace(f"== {ctypes.sizeof(structs['Attn'])}", "== 8", 1)
    assert subprocess.run(command, input=wrong, capture_output=True, encoding="utf-8").returncode != 0
