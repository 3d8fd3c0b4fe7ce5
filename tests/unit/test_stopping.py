"""Signals: remembered before the run, acted on in it, ignored after it."""

from __future__ import annotations

import subprocess
import sys

import pytest

PREAMBLE = """
import argparse, math, os, signal, sys, time
from moa_megatron import stopping
stopping.install()
args = argparse.Namespace(exit_duration_in_mins=None, exit_signal_handler=True)
upstream = argparse.Namespace(signals_received=None)
def me(name): os.kill(os.getpid(), getattr(signal, name)); time.sleep(0.05)
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + code], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"])
def test_a_signal_moves_the_limit(name: str) -> None:
    done = run(f"""
stopping.bind(args, upstream)
assert args.exit_duration_in_mins == math.inf and upstream.signals_received() == [False]
me({name!r})
assert args.exit_duration_in_mins == -1 and stopping.requested() == {name!r}
me("SIGTERM"); me("SIGUSR1")
assert stopping.requested() == {name!r}
""")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("saving and stopping") == 1


def test_a_signal_during_set_up_is_remembered() -> None:
    done = run("me('SIGUSR1'); stopping.bind(args, upstream); print(args.exit_duration_in_mins)")
    assert done.stdout.strip() == "-1.0", done.stderr


def test_a_limit_of_the_users_own_stays() -> None:
    code = "args.exit_duration_in_mins = 30; stopping.bind(args, upstream)"
    assert run(code + "; print(args.exit_duration_in_mins)").stdout.strip() == "30"


def test_ctrl_c_twice_quits_at_once() -> None:
    assert "KeyboardInterrupt" in run("me('SIGINT'); me('SIGINT')").stderr
    assert "KeyboardInterrupt" not in run("me('SIGTERM'); me('SIGINT')").stderr


def test_forked_children_go_on() -> None:
    done = run("""
stopping.bind(args, upstream)
child = os.fork()
if child == 0:
    time.sleep(0.5); os._exit(7 if args.exit_duration_in_mins == math.inf else 8)
time.sleep(0.1); os.kill(child, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")
    assert done.stdout.strip() == "7", done.stderr


def test_processes_started_shielded_survive_and_the_signal_is_not_lost() -> None:
    done = run("""
import subprocess
stopping.bind(args, upstream)
def start():
    global child
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"])
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stopping.requested() is None
stopping.start_shielded(start)
assert stopping.requested() == "SIGUSR1" and args.exit_duration_in_mins == -1
for name in (signal.SIGUSR1, signal.SIGTERM):
    os.kill(child.pid, name)
print(child.wait())
""")
    assert done.stdout.strip() == "0", done.stderr


def test_late_signals_cannot_kill_a_process_that_is_done() -> None:
    done = run("""
class Late:
    def __del__(self): me("SIGUSR1")
late = Late(); stopping.deafen()
import atexit; atexit.register(me, "SIGTERM")
""")
    assert done.returncode == 0, done.stderr


def test_not_installed_leaves_upstream_alone() -> None:
    done = run("stopping._process = 0; stopping.bind(args, upstream); print(args, upstream)")
    assert "exit_duration_in_mins=None" in done.stdout and "signals_received=None" in done.stdout
