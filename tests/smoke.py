"""Is an installed wheel whole? Run it outside of the source tree, by the Python that has the wheel: python smoke.py [--cubins]

Imports the package, looks where it lies and what it carries, and runs the model card's first snippet on a tiny checkpoint.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path


def main() -> None:
    import llama1m_ext

    at = Path(llama1m_ext.__file__).parent
    files = {str(f) for f in metadata.files("llama1m-ext") or ()}
    installed = Path(sysconfig.get_path("platlib"))
    assert at.parent.samefile(installed), f"expected the package installed in {installed}, got {at}"
    for name in ("llama1m_ext/py.typed", "llama1m_ext/_core.pyi", "llama1m_ext/demo/austen.txt.xz"):
        assert name in files, f"the wheel lacks {name}"
    licences = [name for name in files if "/licenses/" in name]
    for name in ("LICENSE", "LICENSE-THIRD-PARTY"):
        assert any(one.endswith(f"/{name}") for one in licences), f"the wheel lacks {name}: {licences}"
    cubins = [name for name in files if name.startswith("llama1m_ext/cubins/")]
    if "--cubins" in sys.argv[1:]:
        assert any(name.endswith("manifest.json") for name in cubins), f"the wheel lacks its cubins: {cubins}"
        assert sum("sm_90a" in name for name in cubins) and sum("sm_80" in name for name in cubins), cubins
    assert not [name for name in files if name.endswith((".rs", ".cu")) or "/tests/" in name], "sources in the wheel"

    import torch
    import transformers

    from llama1m_ext import testing

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = testing.tiny_checkpoint(folder)
        pipeline = transformers.pipeline(
            "text-generation", model=str(checkpoint), model_kwargs={"torch_dtype": torch.bfloat16}, device_map="auto"
        )
        said = pipeline("Who are you?", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert said.startswith("Who are you?")
    served = llama1m_ext.stats(pipeline).served
    assert served > 0, llama1m_ext.stats(pipeline)
    script = Path(sys.executable).with_name("llama1m")
    facts = subprocess.run([script, "env"], capture_output=True, encoding="utf-8", check=True).stdout
    assert metadata.version("llama1m-ext") in facts
    print(f"llama1m-ext {llama1m_ext.__version__} in {at}: {served} calls served, {len(cubins)} files of cubins")


if __name__ == "__main__":
    main()
