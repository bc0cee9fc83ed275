"""`.ci/gpu`, as far as it comes without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import cupy_pagedkv.devices.backend as backend

SCRIPT = Path(__file__).parent.parent / ".ci" / "gpu"


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_it_wants_a_folder():
    for arguments in ((), ("a", "b")):
        refused = run(*arguments)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "usage: bash .ci/gpu OUT" in refused.stderr


def test_without_a_gpu_it_says_so(tmp_path):
    if backend._usable_gpus()[0]:
        pytest.skip("there is a GPU")
    refused = run(str(tmp_path / "out with a blank"))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(".ci/gpu needs a GPU: CuPy ")
    assert "numpy 2." in (tmp_path / "out with a blank" / "machine.txt").read_text()


def test_where_a_gpu_is_required_its_want_fails_a_test(tmp_path):
    if backend._usable_gpus()[0]:
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k",
               "test_the_number_of_a_gpu and cupy",
               "tests/test_rules.py"]  # fmt: skip
    for required, verdict in (("0", "1 skipped"), ("1", "1 error")):
        environment = {**os.environ, "CUPY_PAGEDKV_REQUIRE_GPU": required}
        suite = subprocess.run(command, cwd=SCRIPT.parent.parent, env=environment, capture_output=True, text=True,
                               check=False)  # fmt: skip
        assert verdict in suite.stdout
