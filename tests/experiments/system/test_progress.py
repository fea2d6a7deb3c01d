"""What work of minutes says in a log file."""

import itertools

from experiments.system import progress


def test_a_log_file_gets_a_line_now_and_then(monkeypatch, capsys):
    clock = itertools.count(0, 10)  # each item takes ten seconds
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    assert list(progress.bar("profiling")(list("abcdefgh"))) == list("abcdefgh")
    lines = ["profiling 3/8  50 s left", "profiling 6/8  20 s left"]
    assert capsys.readouterr().err.splitlines() == lines
    assert list(progress.bar("reading")(iter("ab"))) == ["a", "b"]
    assert capsys.readouterr().err == ""
