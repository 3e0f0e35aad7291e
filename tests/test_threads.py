"""What is settled about threads before torch is imported."""

import os
import subprocess
import sys

import pytest

from mixtura import threads
from mixtura.threads import prepare_threads


def test_waiting_threads_sleep_soon():
    environment = {"OMP_NUM_THREADS": "2"}
    prepare_threads(environment)
    assert environment == {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "5000", "KMP_BLOCKTIME": "1"}


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_what_the_user_has_set_stays(name):
    environment = {name: "active", "OMP_NUM_THREADS": "4"}
    prepare_threads(environment)
    assert environment == {name: "active", "OMP_NUM_THREADS": "4"}


def test_a_container_starts_as_many_threads_as_it_may_run(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(threads, "usable_cores", lambda: 3)
    environment = {"OMP_WAIT_POLICY": "passive"}
    prepare_threads(environment)
    assert environment["OMP_NUM_THREADS"] == "3"


def test_a_whole_machine_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(threads, "usable_cores", lambda: 4)
    environment = {"OMP_WAIT_POLICY": "passive"}
    prepare_threads(environment)
    assert "OMP_NUM_THREADS" not in environment


def test_the_command_line_prepares_threads_before_torch_is_imported():
    program = (
        "import os, sys, mixtura.cli as cli\n"
        "assert 'torch' not in sys.modules\n"
        "cli.app = lambda: print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)\n"
        "sys.argv = ['mixtura', 'doctor']\ncli.main()"
    )
    environment = {key: value for key, value in os.environ.items() if key not in threads._WAITING}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert run.stdout.split() == ["5000", "False"], run.stderr
