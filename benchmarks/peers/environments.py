"""Makes the environments of the peers that do not live with the versions of actgraph.

    python benchmarks/peers/environments.py                     # all, in .benchmarks/
    python benchmarks/peers/environments.py llama --env FOLDER

Each is a virtual environment of the running Python; pip's own configuration (an index with the CPU build of torch, a folder of
wheels) applies. llama.cpp is built from source for the processor at hand: it needs a C++ compiler, and some minutes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

_TORCH = f"torch=={importlib.metadata.version('torch')}"
_TRANSFORMERS = f"transformers=={importlib.metadata.version('transformers')}"
#: What is installed into each, with the reason for which it is apart.
ENVIRONMENTS = {
    "llama": ["llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors"],  # built for this processor
    # transformers imports torchao wherever it is installed, and this is the last version with int4 for processors
    "torchao": ["torchao==0.16.0", _TORCH, _TRANSFORMERS],
    "openvino": ["optimum-intel==2.2.0", "openvino==2026.4.1", "nncf==3.4.0", _TORCH],  # another transformers
    "repeng": ["repeng==0.4.0", _TORCH, _TRANSFORMERS],  # numpy below 2
}
#: What comes with them and breaks beside a CPU build of torch.
UNWANTED = {"openvino": ["torchvision"]}
BUILD = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF", "CMAKE_BUILD_PARALLEL_LEVEL": "2"}


def make(name: str, folder: Path) -> None:
    path = folder / name
    python = path / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", path], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", *ENVIRONMENTS[name]], check=True, env={**BUILD, **os.environ})
    if name in UNWANTED:
        subprocess.run([*pip, "uninstall", "-y", *UNWANTED[name]], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(ENVIRONMENTS)}; default: all")
    parser.add_argument("--env", type=Path, default=Path(".benchmarks"), help="folder of the environments")
    args = parser.parse_args()
    unknown = set(args.names) - set(ENVIRONMENTS)
    if unknown:
        parser.error(f"no environment {min(unknown)}; choose {', '.join(ENVIRONMENTS)}")
    for name in args.names or ENVIRONMENTS:
        make(name, args.env)


if __name__ == "__main__":
    main()
