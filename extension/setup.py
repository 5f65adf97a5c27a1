"""The C module, which pyproject.toml can describe only experimentally."""

from setuptools import Extension, setup

setup(ext_modules=[Extension("radix_compile_native", ["radix_compile_native.c"])])
