"""The source archive and the wheels have all that they need, and work where the checkout is not. No network is used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def run(*command: str | Path, cwd: Path) -> str:
    """What the command prints. It does not get the path on which this process finds the package."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{command}:\n{ran.stdout}{ran.stderr}"
    return ran.stdout


def built_wheel(source: Path, folder: Path) -> Path:
    run(*PIP, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def environment(folder: Path, *wheels: Path) -> Path:
    """The ``bin`` of a new environment that has these wheels; torch and the like it finds where this process does."""
    venv.create(folder)
    run(*PIP, "--python", folder / "bin/python", "install", "--no-index", "--no-deps", *wheels, cwd=folder)
    (site_packages,) = folder.glob("lib/*/site-packages")
    (site_packages / "needed.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return folder / "bin"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout without what builds and tools leave there."""
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "*.so")
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("tree") / "tree", ignore=left_out)


@pytest.fixture(scope="module")
def unpacked(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    program = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", program, cwd=tree)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder)
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_wheel(unpacked, tmp_path_factory.mktemp("wheel"))


def test_numpy_does_the_work_where_the_extension_cannot_be_imported() -> None:
    """Because it is not installed, or of a version without the function."""
    for module in ("None", "types.ModuleType('radix_compile_native')"):
        program = f"import sys, types; sys.modules['radix_compile_native'] = {module}\n"
        program += "from radix_compile.plan import fold_and_scatter; assert fold_and_scatter.extension is None"
        subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow  # it builds the archives
def test_one_wheel_for_all_has_every_file_of_the_package(tree: Path, wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {str(file.relative_to(tree)) for file in (tree / "radix_compile").rglob("*") if file.is_file()}


@pytest.mark.slow  # it builds and installs the archives
def test_the_wheel_works_by_itself(wheel: Path, tmp_path: Path) -> None:
    scripts = environment(tmp_path / "environment", wheel)
    found = "import radix_compile.testing, torch; print(radix_compile.__file__, *torch._dynamo.list_backends())"
    place, *backends = run(scripts / "python", "-I", "-c", found, cwd=tmp_path).split()
    assert Path(place).is_relative_to(tmp_path)
    assert "radix" in backends
    assert "estimate" in run(scripts / "python", "-I", "-m", "radix_compile", "--help", cwd=tmp_path)
    said = run(scripts / "radix-compile", "doctor", cwd=tmp_path)
    assert "a fold by eager: 40 rows -> 22" in said
    assert "compute_fold_and_scatter: in NumPy;" in said


@pytest.mark.slow  # it builds and installs the archives
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_tests_run_from_the_source_archive_with_the_extension(unpacked: Path, wheel: Path, tmp_path: Path) -> None:
    extension = built_wheel(unpacked / "extension", tmp_path)
    python = environment(tmp_path / "environment", wheel, extension) / "python"
    run(python, "-m", "pytest", "--collect-only", "-q", cwd=unpacked)
    quick = ["tests/plan", "tests/test_docs.py::test_links_lead_somewhere"]
    assert "skipped" not in run(python, "-m", "pytest", "-q", *quick, cwd=unpacked)
