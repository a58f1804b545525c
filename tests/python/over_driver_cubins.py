"""Where kernels' machine code comes from, over the driver of tests/cuda. Run by test_cuda_runtime.py.

What is loaded stays loaded, so each case has a process of its own: forks of this one, which has asked the driver nothing yet.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import traceback

import pytest
import torch

from llama1m_ext import _core, cuda, cuda_files

torch.set_num_threads(1)
FORK = multiprocessing.get_context("fork")
ARCH = "sm_90a"


def _child(run, environment, answers, start, args):
    os.environ.update(environment)
    try:
        start.wait(60)
        answers.put((True, run(*args)))
    except BaseException:
        answers.put((False, traceback.format_exc()))


def in_processes(count, run, *args, **environment):
    """What `run(*args)` returns in so many new processes that begin at once."""
    answers, start = FORK.Queue(), FORK.Barrier(count)
    running = [FORK.Process(target=_child, args=(run, environment, answers, start, args)) for _ in range(count)]
    for process in running:
        process.start()
    got = [answers.get(timeout=500) for _ in running]
    for process in running:
        process.join(30)
        assert process.exitcode == 0
    for well, said in got:
        assert well, said
    return [said for _, said in got]


def in_a_process(run, *args, **environment):
    return in_processes(1, run, *args, **environment)[0]


def merged(cache, packed=None, nvrtc=None):
    """Two partials merged by the kernel of merge.cu, or what is said against it."""
    _core.cuda_set_up(packed and str(packed), cache and str(cache), cuda_files.nvrtc() if nvrtc is None else nvrtc)
    torch.manual_seed(1)
    outs, lses = torch.randn(2, 1, 2, 3, 64).unbind(0), torch.randn(2, 1, 2, 3).unbind(0)
    out = torch.full_like(outs[0], torch.nan)
    try:
        _core.cuda_merge_partials(list(outs), list(lses), out)
    except RuntimeError as e:
        return str(e)
    weights = torch.stack(lses).softmax(0)[..., None]
    torch.testing.assert_close(out, (torch.stack(outs) * weights).sum(0))
    return "right"


def kept(cache):
    """The one file of that folder; nothing else may lie there."""
    (file,) = cache.iterdir()
    assert file.suffix == ".cubin" and len(file.stem) == 64
    return file


def test_a_kernel_is_compiled_once(tmp_path):
    """The next process finds it, and writes none: the time that the file is given here stays."""
    cache = tmp_path / "not" / "there yet"
    assert in_a_process(merged, cache) == "right"
    file = kept(cache)
    assert file.read_bytes()[:5] == b"\x7fELF\x02"
    os.utime(file, (1, 1))
    assert in_a_process(merged, cache) == "right"
    assert kept(cache).stat().st_mtime == 1


@pytest.mark.timeout(600)
def test_twenty_processes_at_once(tmp_path):
    assert in_processes(20, merged, tmp_path / "cache") == ["right"] * 20
    kept(tmp_path / "cache")


@pytest.mark.parametrize("damage", ["a bit", "half", "empty", "short", "zeros"])
def test_a_damaged_file_is_made_anew(tmp_path, damage):
    assert in_a_process(merged, tmp_path) == "right"
    file = kept(tmp_path)
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes(
        {
            "a bit": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "half": whole[:middle],
            "empty": b"",
            "short": whole[:5],
            "zeros": bytes(len(whole)),
        }[damage]
    )
    assert in_a_process(merged, tmp_path) == "right"
    assert kept(tmp_path).read_bytes() == whole


def test_a_folder_that_cant_be_written(tmp_path):
    """A file stands where the folder should be, which stops even root: nothing is kept, and no more is lost. So too where
    there is no folder at all."""
    place = tmp_path / "file"
    place.write_text("here already")
    assert in_a_process(merged, place) == "right"
    assert in_a_process(merged, place / "below") == "right"
    assert in_a_process(merged, None) == "right"
    assert place.read_text() == "here already"


def test_another_gpu_has_a_file_of_its_own(tmp_path):
    assert in_a_process(merged, tmp_path) == "right"
    assert in_a_process(merged, tmp_path, LLAMA1M_FAKE_CAPABILITY="8.0") == "right"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_gpu_that_the_compiler_does_not_know(tmp_path):
    said = in_a_process(merged, tmp_path, LLAMA1M_FAKE_CAPABILITY="3.1")
    assert "merge.cu for sm_31" in said and "gpu-architecture" in said
    assert not list(tmp_path.iterdir())


def test_without_a_compiler(tmp_path):
    said = in_a_process(merged, tmp_path, None, [])
    assert "merge: this package has no kernels for fake driver, sm_90 (sm_90a)" in said and "libnvrtc" in said
    said = in_a_process(merged, tmp_path, None, [str(tmp_path / "libnvrtc.so.13")])
    assert str(tmp_path / "libnvrtc.so.13") in said


def image_of(source):
    _core.cuda_set_up(None, None, cuda_files.nvrtc())
    return _core.nvrtc_compile(source, ARCH)[0]


def carried(folder, image, **changes):
    """A package's folder with the kernel of merge.cu, as csrc/build.py makes it."""
    folder.mkdir()
    said = {"file": f"merge.{ARCH}.cubin", "of_source": _core.cuda_sources()["merge.cu"]}
    said |= {"of_cubin": hashlib.sha256(image).hexdigest()} | changes
    (folder / said["file"]).write_bytes(image)
    (folder / "hashes.txt").write_text("other.sm_80.cubin 0 0\n" + " ".join(said.values()) + "\n")
    return folder


def test_what_the_package_carries_needs_no_compiler(tmp_path):
    image = in_a_process(image_of, "merge.cu")
    fits = carried(tmp_path / "fits", image)
    assert in_a_process(merged, tmp_path / "cache", fits, []) == "right"
    assert not (tmp_path / "cache").exists()
    assert in_a_process(_archs, fits) == ["sm_80", ARCH]


def _archs(packed):
    _core.cuda_set_up(str(packed), None, [])
    return _core.cuda_info()["cubins"]


@pytest.mark.parametrize("change", ["source", "cubin", "capability", "gone"])
def test_what_the_package_carries_is_left_aside(tmp_path, change):
    """Of another source, changed on the way, for another GPU, or listed only."""
    image = in_a_process(image_of, "merge.cu")
    changes = {
        "source": {"of_source": "0" * 64},
        "cubin": {"of_cubin": "0" * 64},
        "capability": {"file": "merge.sm_80.cubin"},
        "gone": {},
    }[change]
    folder = carried(tmp_path / "packed", image, **changes)
    if change == "gone":
        (folder / f"merge.{ARCH}.cubin").unlink()
    said = in_a_process(merged, None, folder, [])
    assert "this package has no kernels for" in said, said
    assert in_a_process(merged, None, folder) == "right"


def test_what_the_driver_refuses(tmp_path):
    """No machine code at all; that of another kernel. The kernel is named, and what the driver calls it."""
    said = in_a_process(merged, None, carried(tmp_path / "none", b"no machine code" * 9), [])
    assert said.startswith("merge: cuModuleLoadData on fake driver, sm_90: CUDA_ERROR_INVALID_IMAGE"), said
    other = carried(tmp_path / "other", in_a_process(image_of, "rope.cu"))
    said = in_a_process(merged, None, other, [])
    assert said.startswith("merge: cuModuleGetFunction: CUDA_ERROR_NOT_FOUND"), said


def devices():
    cuda.set_up()
    return _core.cuda_info()


def test_no_gpu_several_gpus(tmp_path):
    none = in_a_process(devices, LLAMA1M_FAKE_DEVICES="0")
    assert none["driver"]["found"] and none["devices"] == []
    assert "expected a GPU" in in_a_process(merged, tmp_path, LLAMA1M_FAKE_DEVICES="0")
    three = in_a_process(devices, LLAMA1M_FAKE_DEVICES="3")["devices"]
    assert [(name, tuple(capability)) for name, capability, *_ in three] == [("fake driver, sm_90", (9, 0))] * 3


def threads(cache):
    """Many threads that need the same kernel first."""
    import concurrent.futures

    _core.cuda_set_up(None, str(cache), cuda_files.nvrtc())
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda _: _one(), range(64)))


def _one():
    outs, lses = torch.ones(1, 1, 5, 64), torch.zeros(1, 1, 5)
    out = torch.empty_like(outs)
    _core.cuda_merge_partials([outs, 3 * outs], [lses, lses], out)
    return bool((out == 2).all())


def test_many_threads(tmp_path):
    assert in_a_process(threads, tmp_path) == [True] * 64
    kept(tmp_path)


def test_unpacked_sources_compile_by_name():
    names = in_a_process(_sources)
    assert "merge.cu" in names and all(name.endswith(".cu") for name in names)
    said = in_a_process(_no_source)
    assert "nothing.cu" in said and "merge.cu" in said


def _sources():
    return sorted(_core.cuda_sources())


def _no_source():
    _core.cuda_set_up(None, None, cuda_files.nvrtc())
    with pytest.raises(ValueError) as refused:
        _core.nvrtc_compile("nothing.cu", ARCH)
    return str(refused.value)
