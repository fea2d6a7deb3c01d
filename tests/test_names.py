"""The folder kernels/ shares its name with a package of Hugging Face's on PyPI."""

import os
import subprocess
import sys

from experiments.system.files import PROJECT_ROOT


def python(code: str, path: str = "") -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, env=env, capture_output=True, text=True)


def test_libraries_that_look_for_a_package_named_kernels_go_on_without_it():
    done = python("import transformers.integrations.hub_kernels, bitsandbytes, peft, kernels; kernels.quantize_4bit")
    assert done.returncode == 0, done.stderr


def test_an_installed_kernels_package_is_answered_in_one_line(tmp_path):
    metadata = tmp_path / "kernels-0.18.2.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")  # a version that transformers uses
    done = python("import experiments.run", str(tmp_path))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: the PyPI package `kernels` (0.18.2) is installed" in done.stderr
    assert "pip uninstall kernels" in done.stderr
