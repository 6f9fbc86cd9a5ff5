"""The one part of the build that pyproject.toml cannot say: the small C library that lends kernels to the engines.

It is optional: where there is no C compiler the package installs without it, and everything runs through the ops' bodies and
references.
"""

import sys

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "actgraph.runtime.native.actgraph_native",
            sources=[f"runtime/native/{name}.c" for name in ("pool", "plugin", "convert", "infer")],
            depends=[f"runtime/native/{name}.h" for name in ("kernel", "ort_api", "plugin")],
            extra_compile_args=["-O2", "-fvisibility=hidden"],
            # Engines close the libraries of closed sessions; the threads and the memory of threads of this one outlive them.
            extra_link_args=["-pthread", *(["-Wl,-z,nodelete"] if sys.platform == "linux" else [])],
            optional=True,
        )
    ]
)
