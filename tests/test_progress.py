"""The progress bar on a terminal, which is played by a pseudo-terminal, and its silence elsewhere."""

import os
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest

import noetherflow

pty = pytest.importorskip("pty", reason="there are no pseudo-terminals on this system")
# The package under test, in a process of its own.
SOURCE = str(Path(noetherflow.__file__).parents[1])


def on_a_terminal(code: str) -> tuple[int, str, str]:
    """Exit status and output of a program whose standard error is a terminal, and what that terminal was sent."""
    terminal, end = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120", "PYTHONPATH": SOURCE}
    environment = {name: value for name, value in environment.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", "from noetherflow._progress import track\n" + code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=end,
        env=environment,
    )
    os.close(end)
    sent = b""
    try:
        while select.select([terminal], [], [], 60)[0]:
            try:
                more = os.read(terminal, 2**16)
            except OSError:  # the other end is closed
                break
            if not more:
                break
            sent += more
    finally:
        os.close(terminal)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output.decode(), re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent.decode())


def test_a_bar_counts_what_it_hands_on() -> None:
    status, output, shown = on_a_terminal("print(list(track(range(3), 'counting sheep', total=3)))")
    assert (status, output) == (0, "[0, 1, 2]\n"), shown
    assert "counting sheep" in shown
    assert re.search(r"\b3/3\b", shown)


def test_a_bar_of_unknown_length() -> None:
    status, output, shown = on_a_terminal("print(list(track(iter('ab'), 'counting sheep')))")
    assert (status, output) == (0, "['a', 'b']\n"), shown
    assert "counting sheep" in shown


def test_a_bar_inside_another() -> None:
    code = """
import time
from noetherflow import _progress
found, bars = [], []
for outer in track(range(2), "outer sheep", total=2):
    for inner in track(range(2), "inner sheep", total=2):
        found.append((outer, inner))
        time.sleep(0.15)
    bars.append(len(_progress._shown[0].tasks))
print(found, bars)  # a bar that is done is gone
print(list(track(range(2), "later sheep", total=2)))
"""
    status, output, shown = on_a_terminal(code)
    assert status == 0, shown
    assert output.splitlines() == ["[(0, 0), (0, 1), (1, 0), (1, 1)] [1, 1]", "[0, 1]"]
    assert all(kind in shown for kind in ("outer sheep", "inner sheep", "later sheep"))


def test_a_bar_goes_with_what_is_raised_in_its_loop() -> None:
    code = """
from noetherflow import _progress
try:
    for _ in track(range(2), "lost sheep"):
        raise ZeroDivisionError
except ZeroDivisionError:
    print("raised")
import gc; gc.collect()
print(_progress._shown, list(track(range(2), "other sheep", total=2)))
"""
    status, output, shown = on_a_terminal(code)
    assert (status, output) == (0, "raised\n[] [0, 1]\n"), shown
    assert "other sheep" in shown


def test_nothing_is_shown_on_a_terminal_where_it_is_not_wanted() -> None:
    status, output, shown = on_a_terminal("print(list(track(range(3), 'counting sheep', shown=False)))")
    assert (status, output, shown) == (0, "[0, 1, 2]\n", "")


def test_worker_processes_show_nothing() -> None:
    """Several bars would write over each other."""
    code = """
import multiprocessing
def work():
    print(list(track(range(3), "hidden sheep", total=3)), flush=True)
worker = multiprocessing.get_context("fork").Process(target=work)
worker.start()
worker.join()
print(worker.exitcode)
"""
    status, output, shown = on_a_terminal(code)
    assert (status, output) == (0, "[0, 1, 2]\n0\n"), shown
    assert "sheep" not in shown


def test_the_measurement_of_noise_shows_its_progress_and_its_numbers_are_the_same() -> None:
    code = """
import torch, noetherflow as nf
torch.manual_seed(0)
net = torch.nn.Linear(3, 2).double()
batches = [(torch.randn(4, 3).double(), torch.randn(4, 2).double()) for _ in range(3)]
loss = lambda model, batch: (model(batch[0]) - batch[1]).square().sum(1)
found = [nf.estimate_noise(net, loss, batches, {}, progress=progress).trace for progress in (True, False)]
print(torch.equal(*found))
"""
    status, output, shown = on_a_terminal(code)
    assert (status, output) == (0, "True\n"), shown
    assert "gradient noise" in shown
    assert re.search(r"\b3/3\b|\b[012]/3\b", shown)
