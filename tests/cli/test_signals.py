"""Ctrl-C and a polite kill end the command with a line and a status of their own, whatever it is doing."""

import signal
import subprocess
import sys
import threading

import pytest

from lazyjax.cli.signals import Interrupted, interrupting

DRIVER = """
import os, signal, sys, time
number = signal.Signals(int(sys.argv[1]))
def send():
    os.kill(os.getpid(), number)

class DuringImports:
    def find_spec(name, *_):
        if name == "lazyjax.cli.command":
            send()

def during_work(options, command):
    send()
    time.sleep(60)

def in_a_compiled_program(options, command):
    import threading, jax, jax.numpy as jnp
    from lazyjax.cli import signals
    signals.PATIENCE_SECONDS = 0.1
    forever = jax.jit(lambda x: jax.lax.fori_loop(0, 2 * 10**9, lambda _, x: jnp.sin(x) + 1, x))
    threading.Timer(1.0, send).start()
    forever(jnp.ones(())).block_until_ready()

import lazyjax.cli
if sys.argv[2] == "DuringImports":
    sys.meta_path.insert(0, DuringImports)
else:
    from lazyjax.cli import command
    command.run = globals()[sys.argv[2]]
sys.argv[1:] = ["info"]
lazyjax.cli.run()
"""


@pytest.mark.parametrize(
    ("when", "number", "left"),
    [
        ("DuringImports", signal.SIGINT, "nothing written"),
        ("DuringImports", signal.SIGTERM, "nothing written"),
        ("during_work", signal.SIGTERM, "nothing written"),
        ("in_a_compiled_program", signal.SIGINT, "what was finished is kept: the same command continues from there"),
    ],
)
def test_a_signal_is_one_line_and_an_exit_status(when, number, left):
    command = [sys.executable, "-c", DRIVER, str(int(number)), when]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    what = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number]
    assert ended.stderr.strip() == f"lazyjax: {what}, {left}"
    assert ended.stdout == ""
    assert ended.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]


def test_signals_are_as_before_when_the_command_has_ended():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(Interrupted), interrupting():
        signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)
    assert {number: signal.getsignal(number) for number in before} == before
    assert signal.set_wakeup_fd(-1) == -1


def test_another_thread_leaves_signals_alone():
    found = []

    def work():
        with interrupting():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]
