"""Sequences that travel, on MPI: each test is what ranks do in mpi_ranks.py, which are launched here."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mpi_ranks
import pytest

BESIDE = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
MPIEXEC = shutil.which("mpiexec", path=BESIDE)
ENVIRONMENT = {
    **os.environ,
    "OMPI_ALLOW_RUN_AS_ROOT": "1",  # Open MPI wants to be told twice that root may run it, as in a container
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",  # and of more ranks than cores: Open MPI 4, and then 5
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}

if importlib.util.find_spec("mpi4py") is None:
    pytest.skip("mpi4py is not installed: pip install -e '.[mpi]'", allow_module_level=True)
if MPIEXEC is None:
    pytest.skip("there is no mpiexec to launch ranks with: pip install -e '.[mpi]'", allow_module_level=True)


def launch(ranks: int, *names: str) -> str:
    """What the ranks say; on however few cores, and none of them longer than two minutes."""
    rank = [sys.executable, "-W", "error", mpi_ranks.__file__, *names]
    if names[0] in mpi_ranks.DEADLY:  # the launcher must not see a rank die, lest it ends the other
        rank = ["sh", "-c", '"$0" "$@"; sleep 3', *rank]
    command = [str(MPIEXEC), "-n", str(ranks), *rank]
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "1", "CUPY_PAGEDKV_DEBUG": "1"}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=120
    )
    return f"{done.stdout}\nstatus {done.returncode}"


@functools.cache
def said_by(ranks: int) -> str:
    return launch(ranks, *mpi_ranks.SCENARIOS[ranks])


def check(said: str, name: str) -> None:
    if f"[passed {name}]" not in said or f"[FAILED {name}]" in said:
        others = f"[FAILED {name}]" not in said and "[FAILED" in said
        pytest.fail("the ranks did not get here, since another test failed" if others else said[-6000:], pytrace=False)


@pytest.mark.parametrize(("ranks", "name"), [(n, name) for n, names in mpi_ranks.SCENARIOS.items() for name in names])
def test_ranks(ranks, name):
    check(said_by(ranks), name)


@pytest.mark.parametrize("name", mpi_ranks.DEADLY)
def test_a_rank_dies(name):
    check(launch(2, name), name)


@pytest.mark.parametrize("page", ["README.md", "docs/scale.md"])
def test_the_example_of_the_page_prints_what_stands_below_it(tmp_path, page):
    page = (Path(__file__).parents[1] / page).read_text()
    [(source, output)] = re.findall(r"^```text\n(.*?)^```\n\n```\n(.*?)^```$", page, re.M | re.S)
    script = tmp_path / "prefill_decode.py"
    script.write_text(source)
    command = [str(MPIEXEC), "-n", "2", sys.executable, "-W", "error", str(script)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == output
