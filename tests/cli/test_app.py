from __future__ import annotations

import errno
import json
import os
import pty
import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
import typer

from ramctl import __version__, errors
from ramctl.cli import _errors, _output, app
from ramctl.launch import PARTNER_ENDED

HEAVY = ("torch", "transformers", "diffusers", "peft", "mlflow", "cv2", "matplotlib", "scipy", "onnxruntime")


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        app.main(words)
    code = caught.value.code
    assert isinstance(code, int)
    return code


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Registers a command ``fail`` that raises the given exception, in a command line of the test's own."""

    def register(error: BaseException) -> None:
        own = typer.Typer(pretty_exceptions_enable=False)

        @own.callback()
        def options() -> None: ...

        @own.command()
        def fail() -> None:
            raise error

        monkeypatch.setattr(app, "app", own)

    return register


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["presets"],
        ["presets", "show", "geneval-tiny"],
        ["presets", "explain", "lr"],
    ],
)
def test_quick_commands_load_nothing_heavy(words: list[str]) -> None:
    done = python(
        "import sys\n"
        "from ramctl.cli.app import main\n"
        "try:\n"
        f"    main({words!r})\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0, end.code\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_help_does_not_even_load_the_schema() -> None:
    done = python("import sys, ramctl.cli.app; print([n for n in ('pydantic', 'numpy') if n in sys.modules])")
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_threads_do_not_spin_for_long_unless_told_to(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: str | None
) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    monkeypatch.setattr(os, "environ", environment | given)
    with pytest.raises(SystemExit):
        app.main(["--version"])
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"ramctl {__version__}\n"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    for name in (*(name.replace("_", "-") for name in app.COMMANDS), "--debug", "--version"):
        assert name in text


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() in (0, 2)
    captured = capsys.readouterr()
    assert "presets" in captured.out + captured.err


@pytest.mark.parametrize(
    ("words", "said"), [(["presetz"], "presets"), (["--nonsense"], "nonsense"), (["doctor", "--foo"], "foo")]
)
def test_usage_errors_exit_with_2(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


def test_no_module_imports_click() -> None:
    done = python(
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'click' or name.startswith('click.'):\n"
        "            raise ImportError('click is refused')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import ramctl.cli.app\n"
    )
    if "typer/" in done.stderr.replace("\\", "/").split("click is refused")[0]:
        pytest.skip("this release of Typer needs click itself")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.RamctlError("what, where, what to do"), 1),
        (errors.ConfigError("what, where, what to do"), 2),
        (errors.MissingDependencyError("what, where, what to do"), 1),
    ],
)
def test_our_errors_are_their_message_and_code(
    error: errors.RamctlError,
    code: int,
    failing: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing(error)
    assert run("fail") == code
    captured = capsys.readouterr()
    assert captured.err == "what, where, what to do\n"
    assert captured.out == ""


@pytest.mark.parametrize("words", [("--debug", "fail"), ("fail", "--debug")])
def test_debug_shows_the_traceback_wherever_it_stands(
    words: tuple[str, ...], failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    failing(errors.UsageError("wrong"))
    assert run(*words) == 2
    text = capsys.readouterr().err
    assert "Traceback (most recent call last)" in text
    assert text.endswith("\nwrong\n")


def test_unexpected_error_is_called_a_bug(
    failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    failing(ValueError("first line\nsecond line"))
    assert run("fail") == 1
    text = capsys.readouterr().err
    assert text == "unexpected error: ValueError: first line\nThis is a bug; run with --debug for the traceback.\n"


def test_our_own_warnings_are_one_line_each_and_others_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usual: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *rest: usual.append(str(message)))
    _errors.warn_plainly()
    ours = str(_errors._PACKAGE / "weights" / "store.py")
    for filename in (ours, ours, "/elsewhere/ramctl/store.py"):
        warnings.showwarning("x.pth is not the official file.", UserWarning, filename, 1)
    assert capsys.readouterr().err == "Warning: x.pth is not the official file.\n"
    assert usual == ["x.pth is not the official file."]


def test_interrupt_exits_with_130(failing: Callable[[BaseException], None]) -> None:
    failing(KeyboardInterrupt())
    assert run("fail") == 130


def test_interrupt_outside_of_a_command_exits_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert _errors.report(KeyboardInterrupt(), debug=False) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def wrapped(cause: BaseException) -> RuntimeError:
    error = RuntimeError("the archive could not be written")
    error.__cause__ = cause
    return error


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a.bin"), "No space is left on the disk (a.bin)."),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "No space is left on the disk."),
        (OSError(errno.EROFS, "Read-only file system", "out"), "The disk is read-only (out)."),
        (OSError(errno.EACCES, "Permission denied", "out"), "Permission denied (out)."),
        (
            RuntimeError("write failed: No space left on device (os error 28)"),
            "No space is left on the disk.",
        ),
        (wrapped(OSError(errno.ENOSPC, "No space left on device")), "No space is left on the disk."),
        (MemoryError(), "The machine ran out of memory."),
        (OutOfMemoryError("CUDA out of memory"), "The GPU ran out of memory."),
        (
            type("InvalidCxxCompiler", (RuntimeError,), {"__module__": "torch._inductor.exc"})(
                "No working C++ compiler"
            ),
            "torch.compile does not work on this machine (No working C++ compiler). Go on without it: "
            "--runtime.compile false for train (with --rollout.float8 false, where that was on), --no-compile for eval",
        ),
    ],
)
def test_failures_of_the_machine_are_plain_sentences(
    error: BaseException,
    words: str,
    failing: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing(error)
    assert run("fail") == 1
    text = capsys.readouterr().err
    assert text.startswith(words)
    assert len(text.splitlines()) == 1
    assert "bug" not in text


def distributed(name: str, words: str) -> RuntimeError:
    """As torch.distributed's own types are."""
    error: RuntimeError = type(name, (RuntimeError,), {"__module__": "torch.distributed"})(words)
    return error


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] "


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(f"{GLOO}Connection closed by peer [127.0.0.1]:2966. This is typically caused by …"),
        RuntimeError(f"{GLOO}Read error [127.0.0.1]:9646: Connection reset by peer. This is …"),
        distributed("DistNetworkError", "Failed to recv, got 0 bytes. Connection was likely closed. Did the …"),
        distributed(
            "DistBackendError",
            "NCCL error …\nncclRemoteError: A call failed possibly due to a network error "
            "or a remote process exiting prematurely.",
        ),
    ],
)
def test_a_lost_partner_has_its_own_words_and_code(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    assert _errors.report(error, debug=False) == PARTNER_ENDED
    assert capsys.readouterr().err == "Another process of this run has ended.\n"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Connection reset by peer"),  # a download's
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        distributed("DistBackendError", "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000"),
    ],
)
def test_other_broken_connections_are_no_lost_partner(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    assert _errors.report(error, debug=False) == 1
    assert "Another process" not in capsys.readouterr().err


def test_other_system_errors_are_bugs(capsys: pytest.CaptureFixture[str]) -> None:
    assert _errors.report(FileNotFoundError(errno.ENOENT, "No such file", "x"), debug=False) == 1
    assert "This is a bug" in capsys.readouterr().err


def test_a_closed_pipe_is_silent() -> None:
    command = f"{sys.executable} -m ramctl presets show geneval-tiny | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("# geneval-tiny")
    assert done.stderr == ""


def test_a_pipe_closed_before_the_first_word_is_silent() -> None:
    command = f"{sys.executable} -m ramctl presets explain ram | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""


def test_a_terminal_without_the_characters_gets_stand_ins() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ramctl", "presets", "explain", "ram"],
        capture_output=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert b"p(t) ? t^time_power" in done.stdout


class TestOutput:
    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (0.1234567891, "0.123457"),
            (1.0, "1"),
            (1e-9, "1e-09"),
            (1234567, "1234567"),
            (True, "true"),
            (None, "none"),
            ("two\nlines", "two lines"),
        ],
    )
    def test_result_lines(self, value: object, text: str, capsys: pytest.CaptureFixture[str]) -> None:
        _output.result("key", value)
        captured = capsys.readouterr()
        assert captured.out == f"RESULT key={text}\n"
        assert captured.err == ""

    def test_numpy_numbers_are_numbers(self, capsys: pytest.CaptureFixture[str]) -> None:
        import numpy as np

        _output.result("key", np.float32(0.1))
        assert capsys.readouterr().out == "RESULT key=0.1\n"

    def test_table_is_plain_in_a_pipe(self, capsys: pytest.CaptureFixture[str]) -> None:
        _output.table("Title", ("a", "long name"), [("[red]x[/red]", 0.5), ("y", "z" * 200)])
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.splitlines() == [
            "Title",
            "  a             long name",
            "  [red]x[/red]  0.5",
            "  y             " + "z" * 200,
        ]

    def test_say_takes_text_as_it_is(self, capsys: pytest.CaptureFixture[str]) -> None:
        text = "[bold]/a/path[/bold] :smile: " + "x" * 300
        _output.say(text, style="red")
        assert capsys.readouterr().err == text + "\n"


def on_a_terminal(code: str, **environment: str) -> str:
    """What a program writes to standard error when that is a terminal."""
    leader, follower = pty.openpty()
    plain = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "TERM")}
    subprocess.run(
        [sys.executable, "-c", code],
        stderr=follower,
        stdout=subprocess.DEVNULL,
        timeout=60,
        check=True,
        env={**plain, "TERM": "xterm-256color", "COLUMNS": "100", **environment},
    )
    os.close(follower)
    text = os.read(leader, 65536).decode()
    os.close(leader)
    return text


def test_a_terminal_gets_colours_and_a_drawn_table_unless_no_color() -> None:
    code = "from ramctl.cli._output import say, table\nsay('hello', style='red')\ntable('T', ['c[b]'], [['[i]v']])\n"
    coloured = on_a_terminal(code)
    assert "\x1b[31mhello" in coloured
    assert "[i]v" in coloured
    assert "━" in coloured or "─" in coloured
    assert "\x1b[31m" not in on_a_terminal(code, NO_COLOR="1")


def test_commands_follow_the_convention() -> None:
    from importlib import import_module

    names = {command.name or "" for command in app.app.registered_commands}
    names |= {group.name or "" for group in app.app.registered_groups}
    for name in app.COMMANDS:
        assert callable(import_module(f"ramctl.cli.{name}").register)
        assert name.replace("_", "-") in names


def test_result_of_json_like_text_stays_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    _output.result("row", json.dumps({"a": "b\nc"}))
    assert capsys.readouterr().out.count("\n") == 1
