"""What is installed: a wheel that works in an empty folder, with every module and every YAML file in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lab import compiler
from lab.ops import native

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The content of the wheel, as pip would lay it out."""
    folder = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    quick = folder / "quick"  # kernels that nobody times
    quick.write_text(f'#!/bin/sh\nexec {compiler.compiler()} "$@" -O0\n')
    quick.chmod(0o755)
    done = subprocess.run(build, env=os.environ | {"CXX": str(quick)}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_every_file(installed):
    wanted = {path.relative_to(ROOT) for path in (ROOT / "lab").rglob("*.py")} | {Path("lab/py.typed")}
    wanted |= {Path("lab/analysis/page") / name for name in ("page.css", "page.js")}
    for folder in ("configs", "experiments"):
        wanted |= {Path("lab") / path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.yaml")}
    got = {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()}
    assert wanted == {path for path in got if path.parts[0] == "lab" and path.suffix != ".so"}


@pytest.mark.skipif(native.LIBRARY is None, reason="there is no compiler")
def test_the_wheel_holds_the_kernels_for_any_python(installed):
    assert {path.stem for path in (installed / "lab/ops").glob("*.so")} >= {f"cpu_{native.SAYS}"}
    (metadata,) = installed.glob("*.dist-info/WHEEL")
    assert "Tag: py3-none-" in metadata.read_text()


def test_the_wheel_trains_in_an_empty_folder(installed, tmp_path):
    (tmp_path / "mine.py").write_text(
        "class Data:\n    def __len__(self):\n        return 8\n    def __getitem__(self, i):\n        return [i], [i]\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    words = ["model=transformer", "task=dataset", "+task.train._target_=mine.Data", "+task.val._target_=mine.Data", "task.vocab_size=8"]
    words += ["task.seq_len=1", "model.d_model=8", "model.n_layers=1", "trainer.max_steps=1", "trainer.batch_size=4", "run_dir=run"]
    code = "import sys, lab.cli.train; print(lab.__file__); sys.exit(lab.cli.train.main())"
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(installed)) and (tmp_path / "run" / "metrics.json").exists()


def test_importing_lab_does_not_import_torch():
    code = "import sys, lab; assert lab.__version__; assert not {'torch', 'hydra', 'yaml'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_version_is_stated_once(installed):
    import lab

    (metadata,) = installed.glob("*.dist-info/METADATA")
    assert f"\nVersion: {lab.__version__}\n" in metadata.read_text()
