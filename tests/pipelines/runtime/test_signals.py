"""The first signal asks, the second leaves."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipelines.runtime.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_only_sets_the_flag(number, capfd):
    with StopRequest() as stop:
        assert not stop
        for _ in range(2):  # `make` and `timeout` pass it on
            os.kill(os.getpid(), number)
        assert stop
        assert stop.signal_number == number
    assert f"{signal.Signals(number).name}: saving after this step" in capfd.readouterr().err


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_handlers_are_as_before_afterwards(error):
    def mine(*_):
        raise AssertionError("nobody sent a signal")

    before = signal.signal(signal.SIGTERM, mine), signal.getsignal(signal.SIGINT)
    try:
        if error is None:
            with StopRequest():
                assert signal.getsignal(signal.SIGTERM) is not mine
        else:
            with pytest.raises(error), StopRequest():
                raise error
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGINT) is before[1]
    finally:
        signal.signal(signal.SIGTERM, before[0])


def test_a_lost_terminal_is_nothing_to_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not stop
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_import_is_ended_in_silence(tmp_path):
    (tmp_path / "slow.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nprint('never')")
    script = "from pipelines.runtime.signals import Interrupts\nwith Interrupts():\n    import slow\nprint('never')"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "", "")


def test_a_second_signal_leaves_at_once():
    script = (
        "import os, signal\nfrom pipelines.runtime import signals\nfrom pipelines.runtime.signals import StopRequest\n"
        "signals.SAME_REQUEST_SECONDS = 0\nwith StopRequest() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    assert stop\n    print('still here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    print('never', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM
    assert "still here" in done.stdout
    assert "never" not in done.stdout


def test_other_threads_leave_handlers_alone():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with StopRequest() as stop:
            seen.append((signal.getsignal(signal.SIGTERM) is before, bool(stop)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(True, False)]
