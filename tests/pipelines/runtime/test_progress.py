"""Messages and progress bars."""

import errno
import io

import pytest

from pipelines.runtime.progress import duration, progress, say, set_quiet, warn


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (5400, "1.5 h"), (180_000, "2.1 days")],
)
def test_durations_are_said_in_a_fitting_unit(seconds, text):
    assert duration(seconds) == text


def test_quiet_silences_what_is_said_but_no_warning(capsys):
    set_quiet(True)
    try:
        say("hidden")
        warn("seen")
        assert list(progress(range(3), description="count", unit="step")) == [0, 1, 2]
    finally:
        set_quiet(False)
    say("y")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("y\n", "warning: seen\n")


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO], ids=["pipe", "disk", "terminal"])
def test_a_stream_that_takes_no_more_ends_no_work(number, monkeypatch):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(number, "no more")

    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{stream}", Full())
    say("lost")
    warn("lost")
