"""The journal: what is read back is what was written, whatever happened to the process in between."""

import builtins
import json
import math

import pytest

from spade3d.faults import DataFault, Fault
from spade3d.training import journal as journal_module
from spade3d.training.journal import Journal, read_log


def row(step: int, **more) -> dict:
    return {
        "step": step,
        "losses": {"a": 1.5, "b": 0.5},
        "total": 2.0,
        "lr": 1e-3,
        "grad_norm": 0.25,
        "seconds": 0.5,
        "data_seconds": 0.1,
        "crops_per_second": 8.0,
    } | more


def test_rows_come_back_one_a_step(tmp_path):
    with Journal(tmp_path, label="training", steps=3) as journal:
        journal.step(row(1))
        journal.step(row(2, signs={"rank": 3.0, "alarm": "collapsed"}))
        journal.validation(2, {"mean_dice": 0.5})
        journal.step(row(3, total=math.nan, grad_norm=math.inf, skipped=True))
    rows = read_log(tmp_path / "log.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert rows[0] == row(1)
    assert rows[1]["validation"] == {"mean_dice": 0.5} and rows[1]["losses"] == {"a": 1.5, "b": 0.5}
    assert rows[2]["total"] is None and rows[2]["grad_norm"] is None and rows[2]["skipped"]
    assert list((tmp_path / "tensorboard").glob("events*"))
    for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_torn_last_line_is_left_out_and_then_mended(tmp_path):
    with Journal(tmp_path, label="training", steps=9) as journal:
        journal.step(row(1))
        journal.step(row(2))
    log = tmp_path / "log.jsonl"
    whole = log.read_bytes()
    for cut in (1, 5, 40):
        log.write_bytes(whole + whole.splitlines(keepends=True)[1][:cut])
        assert [r["step"] for r in read_log(log)] == [1, 2]
    with Journal(tmp_path, label="training", steps=9, done=2) as journal:
        journal.step(row(3))
    assert [r["step"] for r in read_log(log)] == [1, 2, 3]


def test_a_bad_line_inside_is_named(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DataFault, match="line 2"):
        read_log(tmp_path / "log.jsonl")
    with pytest.raises(DataFault, match="no such log"):
        read_log(tmp_path / "none.jsonl")


def test_a_full_disk_is_said_plainly(tmp_path):
    journal = Journal(tmp_path, label="training", steps=1)
    journal._file.close()
    with open("/dev/full", "wb", buffering=0) as journal._file, pytest.raises(Fault, match="No space left.*--resume"):
        journal.step(row(1))


def test_resuming_drops_the_rows_of_a_lost_future(tmp_path):
    with Journal(tmp_path, label="training", steps=9) as journal:
        for step in range(1, 6):
            journal.step(row(step, total=float(step)))
    with Journal(tmp_path, label="training", steps=9, done=3) as journal:
        journal.step(row(4, total=40.0))
    assert [(r["step"], r["total"]) for r in read_log(tmp_path / "log.jsonl")] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_progress_is_plain_lines_without_a_terminal(tmp_path, capfd, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: now[0])
    with Journal(tmp_path, label="pretraining", steps=200) as journal:
        for step in range(1, 101):  # a step takes half a second
            now[0] += 0.5
            journal.step(row(step))
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0] == "pretraining 1/200  loss 2.0000  8.0 crops/s  1:40 left"
    assert len(lines) == 5 and "\x1b" not in err  # one every ten seconds: steps 1, 21, 41, 61, 81
    assert lines[2].startswith("pretraining 41/200")


def test_a_terminal_shows_a_bar_and_NO_COLOR_is_honoured(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")
    with Journal(tmp_path, label="pretraining", steps=2) as journal:
        journal.step(row(1))
        journal.say("note [not markup]")
        journal.step(row(2))
    out, err = capfd.readouterr()
    assert out == ""
    assert "2/2  loss 2.0000" in err and "note [not markup]" in err
    assert "\x1b[3" not in err  # no colour


def test_without_tensorboard_it_says_so_once(tmp_path, capfd, monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name.startswith("torch.utils.tensorboard"):
            raise ModuleNotFoundError("No module named 'tensorboard'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with Journal(tmp_path, label="training", steps=2) as journal:
        journal.step(row(1))
        journal.step(row(2))
    assert capfd.readouterr().err.count("no TensorBoard") == 1
    assert len(read_log(tmp_path / "log.jsonl")) == 2
