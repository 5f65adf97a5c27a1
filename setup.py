"""The C extension, which pyproject.toml cannot describe yet.  It is optional: without it, NumPy does its work."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension("radix_compile.plan._fold_and_scatter", ["radix_compile/plan/_fold_and_scatter.c"], optional=True),
    ]
)
