"""The one part of the build that pyproject.toml cannot say: the small C library that lends kernels to the engines.

It is optional: where there is no C compiler the package installs without it, and everything runs through the ops' bodies and
references.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "actgraph.runtime.native.actgraph_native",
            sources=["runtime/native/pool.c", "runtime/native/plugin.c"],
            depends=["runtime/native/kernel.h", "runtime/native/ort_api.h"],
            extra_compile_args=["-O2", "-fvisibility=hidden"],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
