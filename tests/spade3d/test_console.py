"""How commands end: the promised exit code, one line on standard error, and nothing half-written."""

import json
import os
import socket
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Annotated, Literal

import pytest
from cyclopts import Parameter

from spade3d import console
from spade3d.claim import CLAIM, Overruled
from spade3d.configuration import Common
from spade3d.faults import DataFault, Fault, Preempted, UsageFault


def app_that(does):
    app = console.command_line("spade-test", "A command.")

    @app.default
    def _(*, steps: int = 1) -> None:
        """Do it.

        Parameters
        ----------
        steps
            how often.
        """
        does(steps)

    return app


def raises(error):
    def does(_steps):
        raise error

    return does


@pytest.mark.parametrize(
    ("fault", "code"),
    [(Fault("it broke"), 1), (UsageFault("it broke"), 2), (DataFault("it broke"), 3), (Preempted("it broke"), 75)],
)
def test_a_fault_is_one_line_and_its_exit_code(capsys, fault, code):
    assert console.run(app_that(raises(fault)), []) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", "spade-test: it broke\n")


def test_a_message_of_many_lines_becomes_one(capsys):
    assert console.run(app_that(raises(DataFault("scan.nii:\n  cut   short"))), []) == 3
    assert capsys.readouterr().err == "spade-test: scan.nii: cut short\n"


def test_done_is_zero_and_interrupted_is_130(capsys):
    done = []
    assert console.run(app_that(done.append), ["--steps", "4"]) == 0 and done == [4]
    assert console.run(app_that(raises(KeyboardInterrupt())), []) == 130
    assert capsys.readouterr().err == "spade-test: interrupted\n"
    assert console.run(app_that(raises(KeyboardInterrupt("stopped by SIGINT after step 3, and saved"))), []) == 130
    assert capsys.readouterr().err == "spade-test: stopped by SIGINT after step 3, and saved\n"


def test_a_warning_is_one_line_without_a_place_in_our_code(capsys):
    def does(_steps):
        sys.stderr.write(warnings.formatwarning("scan.nii: no sform", UserWarning, "nifti.py", 104))

    assert console.run(app_that(does), []) == 0
    assert capsys.readouterr().err == "warning: scan.nii: no sform\n"


@pytest.mark.parametrize("tokens", [["--stepps", "4"], ["--steps", "many"], ["--steps"], ["surplus"]])
def test_a_wrong_option_is_two_and_one_line(capsys, tokens):
    assert console.run(app_that(raises(AssertionError)), tokens) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("spade-test: ") and err.count("\n") == 1 and "--help" in err


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ("--spacing 4 4", "--spacing: 4 4 given; it takes 3 numbers, or native"),
        ("--spacing 4 4 x --steps 2", "--spacing: 4 4 x given; it takes 3 numbers, or native"),
        ("--spacing=4", "--spacing: 4 given; it takes 3 numbers, or native"),
        ("--spacing nativ", "--spacing: nativ given; it takes 3 numbers, or native"),
        ("--spacing", "--spacing: nothing given; it takes 3 numbers, or native"),
        ("--window 5", "--window: 5 given; it takes 2 numbers"),
        ("--window -5 b", "--window: -5 b given; it takes 2 numbers"),
        ("--crop 5 5", "--crop: 5 5 given; it takes 3 whole numbers"),
        ("--steps many", "--steps: many given; it takes a whole number"),
        ("--mode", "--mode"),
    ],
)
def test_what_an_option_takes_is_said_in_words_and_not_in_types(capsys, tokens, said):
    app = console.command_line("spade-test", "A command.")

    @app.default
    def _(
        *,
        spacing: tuple[float, float, float] | Literal["native"] | None = None,
        window: tuple[float, float] = (0.0, 1.0),
        crop: tuple[Annotated[int, Parameter(help="i")], int, int] | None = None,
        steps: int | None = None,
        mode: str = "all",
    ) -> None:
        """Do it."""

    assert console.run(app, tokens.split()) == 2
    err = capsys.readouterr().err
    assert said in err and not any(word in err for word in ("tuple", "float", "Literal", "None", "int "))


def test_an_option_that_the_settings_refuse_is_named(capsys):
    app = console.command_line("spade-test", "A command.")

    @app.default
    def _(*, settings: Annotated[Common | None, Parameter(name="*")] = None) -> None:
        """Do it."""

    for tokens, said in {
        ("--steps", "0"): "--steps: '0' given; input should be greater than or equal to 1",
        ("--data.window-hu", "5", "1"): "lower end of a range comes first",
    }.items():
        assert console.run(app, list(tokens), Common) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1


def test_help_and_version_are_answered(capsys):
    assert console.run(app_that(raises(AssertionError)), ["--help"]) == 0
    assert "how often" in capsys.readouterr().out
    assert console.run(app_that(raises(AssertionError)), ["--version"]) == 0


def test_what_nobody_foresaw_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        console.run(app_that(raises(ZeroDivisionError())), [])


def test_a_path_must_be_there(tmp_path):
    assert console.existing(tmp_path, "a folder") == tmp_path
    with pytest.raises(DataFault, match="nowhere: no such file or folder; a store is needed"):
        console.existing(tmp_path / "nowhere", "a store")


HOLDS = "config.yaml"


def half_written(out):
    (out / "store" / "cases").mkdir(parents=True)
    (out / "store" / "cases" / "image").write_text("half")
    (out / "notes").write_text("half")


def test_a_run_begins_in_a_fresh_folder(tmp_path):
    with console.fresh_folder(tmp_path / "new" / "run", HOLDS) as out:
        (out / HOLDS).write_text("steps: 1")
    assert [entry.name for entry in out.iterdir()] == [HOLDS]


@pytest.mark.parametrize("error", [DataFault("bad scan"), KeyboardInterrupt(), ZeroDivisionError(), SystemExit(3)])
def test_what_goes_wrong_before_the_run_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)), console.fresh_folder(tmp_path / "new" / "run", HOLDS) as out:
        half_written(out)
        raise error
    assert not list(tmp_path.iterdir())


def test_a_folder_that_was_there_stays_and_is_empty_again(tmp_path):
    with pytest.raises(Fault), console.fresh_folder(tmp_path, HOLDS) as out:
        half_written(out)
        raise Fault("no")
    assert tmp_path.is_dir() and not list(tmp_path.iterdir())


def test_what_goes_wrong_in_a_run_that_began_leaves_it(tmp_path):
    with pytest.raises(Fault), console.fresh_folder(tmp_path / "run", HOLDS) as out:
        half_written(out)
        (out / HOLDS).write_text("steps: 1")
        raise Fault("no")
    assert (out / HOLDS).exists() and (out / "store").exists()


def test_a_run_that_was_killed_before_it_began_may_be_begun_again(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    half_written(tmp_path / "run")
    (tmp_path / "run" / console.UNFINISHED).touch()
    (tmp_path / "run" / CLAIM).write_text(json.dumps({"process": dead.pid, "host": socket.gethostname()}))
    with console.fresh_folder(tmp_path / "run", HOLDS) as out:
        assert (out / "store").is_dir()  # what was prepared is still of use
        (out / HOLDS).write_text("steps: 1")
    assert sorted(entry.name for entry in out.iterdir()) == [HOLDS, "notes", "store"]


def test_a_run_that_is_still_being_prepared_is_left_alone(tmp_path):
    """A second one is refused before it begins, and takes nothing of the first with it; the first goes on."""
    with console.fresh_folder(tmp_path / "run", HOLDS) as out:
        half_written(out)
        before = sorted(tmp_path.rglob("*"))
        said = f"process {os.getpid()} of this machine is running there"
        with pytest.raises(DataFault, match=said), console.fresh_folder(tmp_path / "run", HOLDS):
            raise KeyboardInterrupt
        assert sorted(tmp_path.rglob("*")) == before
        (out / HOLDS).write_text("steps: 1")
    assert sorted(entry.name for entry in out.iterdir()) == [HOLDS, "notes", "store"]


def test_what_another_process_took_over_is_not_cleared_away(tmp_path):
    said = "process 7 on far has taken over"
    with pytest.raises(Overruled, match=said), console.fresh_folder(tmp_path / "run", HOLDS) as out:
        half_written(out)
        (out / CLAIM).write_text(json.dumps({"process": 7, "host": "far"}))
        raise KeyboardInterrupt
    assert (out / "store" / "cases" / "image").exists() and (out / console.UNFINISHED).exists()


def test_a_run_that_another_machine_began_meanwhile_is_refused(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / console.UNFINISHED).touch()
    (run / CLAIM).write_text(json.dumps({"process": 7, "host": "far"}))

    def begin():
        (run / HOLDS).write_text("precious")
        (run / CLAIM).unlink()

    threading.Timer(0.3, begin).start()
    with pytest.raises(DataFault, match="already holds a run"), console.fresh_folder(run, HOLDS):
        pytest.fail("it must not begin")
    assert "waiting for process 7 on far" in capsys.readouterr().err
    assert [entry.name for entry in run.iterdir()] == [HOLDS]


def test_an_out_that_holds_something_is_refused_and_left_alone(tmp_path):
    run, other, file = tmp_path / "run", tmp_path / "other", tmp_path / "file"
    run.mkdir(), other.mkdir()
    for path in (run / HOLDS, other / "thesis.tex", file):
        path.write_text("precious")
    for out, said in {run: "already holds a run", other: r"is not empty \(1 entries\)", file: "is a file"}.items():
        with pytest.raises(DataFault, match=f"{out.name}: {said}"), console.fresh_folder(out, HOLDS):
            pytest.fail("it must not begin")
    assert all(path.read_text(encoding="utf-8") == "precious" for path in (run / HOLDS, other / "thesis.tex", file))


def test_an_out_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataFault, match="cannot be written"), console.fresh_folder(tmp_path / "file" / "run", HOLDS):
        pytest.fail("it must not begin")


def test_results_go_to_standard_output(capsys):
    console.print_result({"dice": 0.5, "report": "ä.html"}, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"dice": 0.5, "report": "ä.html"}
    console.print_result({"dice": 0.5, "ml": {"ann": {"liver": 1.5}}}, as_json=False)
    assert capsys.readouterr().out == "dice: 0.5\nml:\n  ann:\n    liver: 1.5\n"


def test_choices_and_progress_go_to_standard_error_as_they_are(capsys):
    """A subject may be called [b], and a folder [/b]: to rich these would be markup."""
    console.print_choice("run [/x]", {"held out": "subject [b]"})
    with console.progress_of("preparing [/x]") as progress:
        for done in range(1, 101):
            progress(done, 100, f"[/b] {done}")
    out, err = capsys.readouterr()
    assert out == "" and "run [/x]" in err and "subject [b]" in err
    lines = [line for line in err.splitlines() if line.startswith("preparing")]
    assert len(lines) == 10 and lines[-1] == "preparing [/x]: 100/100 [/b] 100"


def test_progress_on_a_terminal_shows_names_as_they_are(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    with console.progress_of("preparing [/x]") as progress:
        progress(1, 2, "[/b]")
        progress(2, 2, "[b]last")
    err = capsys.readouterr().err
    assert "preparing [/x]" in err and "[b]last" in err


def test_nothing_heavy_is_imported_for_the_console():
    """In a process of its own: options are read before torch."""
    import subprocess

    code = "import sys, spade3d.console; sys.exit('torch' in sys.modules or 'monai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=False).returncode == 0


def test_a_run_may_stand_for_its_encoder(tmp_path):
    file, run = tmp_path / "model.pt", tmp_path / "run"
    file.touch()
    assert console.checkpoint(file) == file
    run.mkdir()
    assert console.checkpoint(run) == run  # whoever reads it says what is missing
    (run / "encoder.safetensors").touch()
    assert console.checkpoint(run) == run / "encoder.safetensors"
    with pytest.raises(DataFault, match="a checkpoint, such as RUN/encoder.safetensors, is needed"):
        console.checkpoint(tmp_path / "none")
