"""Starting several processes: one voice, one exit code, nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ramctl import launch as module
from ramctl.errors import RamctlError
from ramctl.launch import PARTNER_ENDED, is_launched, launch
from ramctl.runfolder import TYPED_ARGUMENTS, resume_command

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes ``python -m ramctl <file>`` run that Python file instead; the folder of such files."""
    package = tmp_path / "ramctl"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text("import sys, runpy; runpy.run_path(sys.argv[1], run_name='__main__')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "_FIRST_WORD_SECONDS", 1.0)
    return tmp_path


def script(folder: Path, text: str) -> list[str]:
    (folder / "child.py").write_text(f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{text}\n")
    return [str(folder / "child.py"), "--some", "option"]


def test_a_process_knows_whether_it_was_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not is_launched()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not is_launched()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert is_launched()


def test_every_process_gets_its_place_and_the_first_owns_the_terminal(
    children: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    keys = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", TYPED_ARGUMENTS)
    words = script(
        children,
        f"told = [os.environ[k] for k in {keys!r}] + [' '.join(sys.argv[2:])]\n"
        "open(f'seen-{rank}', 'w').write(' | '.join(told))\n"
        "print(f'I am {rank}')",
    )
    assert launch(words, 3) == 0
    assert capfd.readouterr().out == "I am 0\n"
    seen = [(children / f"seen-{rank}").read_text().split(" | ") for rank in range(3)]
    assert [row[:5] for row in seen] == [[str(rank), str(rank), "3", "3", "127.0.0.1"] for rank in range(3)]
    assert len({row[5] for row in seen}) == 1
    assert {row[6] for row in seen} == {f"{words[0]} --some option"}
    assert {row[7] for row in seen} == {"--some option"}


def test_a_mistake_is_told_once_with_its_exit_code(children: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = script(children, "print('The preset is wrong.', file=sys.stderr); sys.exit(2)")
    assert launch(words, 2) == 2
    assert capfd.readouterr().err == "The preset is wrong.\n"


def test_the_first_process_may_take_its_time_to_say_it(children: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = script(children, "time.sleep(0 if rank else 0.5)\nprint(f'Told by {rank}.', file=sys.stderr); sys.exit(1)")
    assert launch(words, 2) == 1
    assert capfd.readouterr().err == "Told by 0.\n"


def test_a_failure_of_another_process_is_shown_and_ends_the_first(
    children: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = script(children, "if rank: sys.exit('Out of luck.')\ntime.sleep(60)")
    start = time.monotonic()
    assert launch(words, 2) == 1
    assert time.monotonic() - start < 20
    assert capfd.readouterr().err == "Process 1 failed:\nOut of luck.\n"


def lost_partner(rank: str) -> str:
    """What a process does whose partner has ended."""
    return f"if rank == {rank}: print('Another has ended.', file=sys.stderr); sys.exit({PARTNER_ENDED})\n"


def test_the_process_that_the_first_one_lost_is_shown_with_its_code(
    children: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Processes 0 and 1 fail sooner than 2, which they have lost: its log, not the first best, tells why."""
    words = script(
        children,
        lost_partner("0") + lost_partner("1") + "time.sleep(0.4); print('Model file is gone.'); sys.exit(2)",
    )
    assert launch(words, 3) == 2
    assert capfd.readouterr().err == "Another has ended.\nProcess 2 failed:\nModel file is gone.\n"


def test_a_first_process_that_speaks_for_itself_is_enough_whatever_the_others_lost(
    children: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = script(children, lost_partner("1") + "time.sleep(0.4); sys.exit('Disk full.')")
    assert launch(words, 2) == 1
    assert capfd.readouterr().err == "Disk full.\n"


def test_lost_processes_without_a_culprit_fail_without_more_words(
    children: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(script(children, lost_partner("rank")), 3) == 1
    assert capfd.readouterr().err == "Another has ended.\n"


def test_a_killed_process_is_the_cause_of_the_others_failures(
    children: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = script(children, lost_partner("0") + "if rank == 1: time.sleep(60)\nos.kill(os.getpid(), signal.SIGKILL)")
    assert launch(words, 3) == 1
    assert capfd.readouterr().err == "Another has ended.\nProcess 2 was killed by SIGKILL.\n"


def test_of_failures_seen_at_once_a_kill_comes_first() -> None:
    running: Any = [SimpleNamespace(poll=lambda code=code: code) for code in (PARTNER_ENDED, 1, -9)]
    assert module._failures(running) == {2: -9, 0: PARTNER_ENDED, 1: 1}
    assert next(iter(module._failures(running))) == 2


def test_a_process_that_fails_without_a_word_is_still_named(children: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(script(children, "if rank: os._exit(1)\ntime.sleep(60)"), 2) == 1
    assert capfd.readouterr().err == "Process 1 failed without a message.\n"


def assert_ended(folder: Path, rank: int) -> None:
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / f"up-{rank}").read_text()), 0)


def wait_for(*files: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(file.is_file() and file.read_text() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.02)


UP = "open(f'up-{rank}', 'w').write(str(os.getpid()))\ntime.sleep(120)"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_processes_are_started_ends_those_that_were(
    children: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """The signal comes inside of Popen, when the second process is there and nobody but Popen knows of it."""
    real = subprocess.Popen

    def popen(*args: Any, **keywords: Any) -> subprocess.Popen[bytes]:
        process = real(*args, **keywords)
        rank = keywords["env"]["RANK"]
        wait_for(children / f"up-{rank}")
        if rank == "1":
            os.kill(os.getpid(), number)
            time.sleep(0.01)
        return process

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(module, "_GRACE_SECONDS", 0.5)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert launch(script(children, UP), 3) == 130
    assert not (children / "up-2").exists()
    for rank in (0, 1):
        assert_ended(children, rank)
    if number == signal.SIGTERM:  # the rest of that SIGTERM finds nothing left to do
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        signal.signal(signal.SIGTERM, before[0])
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_process_that_cannot_be_started_ends_those_that_were(children: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.Popen

    def popen(*args: Any, **keywords: Any) -> subprocess.Popen[bytes]:
        if keywords["env"]["RANK"] == "1":
            raise BlockingIOError(11, "Resource temporarily unavailable")
        process = real(*args, **keywords)
        wait_for(children / "up-0")
        return process

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(RamctlError, match=r"^Process 1 could not be started: .*unavailable.*--num-processes\.$"):
        launch(script(children, UP), 2)
    assert_ended(children, 0)


def test_a_killed_process_is_named_with_its_signal(children: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = script(children, "if rank: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)")
    assert launch(words, 2) == 1
    assert capfd.readouterr().err == "Process 1 was killed by SIGKILL.\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launching_process_ends_all(children: Path, number: signal.Signals) -> None:
    words = script(children, UP)
    code = (
        f"import sys; sys.path.remove({str(children)!r}); sys.path.insert(0, {str(ROOT)!r})\n"
        "from ramctl import launch\n"
        "launch._GRACE_SECONDS = 0.5\n"
        f"sys.exit(launch.launch({words!r}, 2))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    wait_for(children / "up-0", children / "up-1")
    parent.send_signal(number)
    if number == signal.SIGTERM:  # as `timeout` does, which signals the process and then its group
        time.sleep(0.2)
        parent.send_signal(number)
    assert parent.wait(timeout=60) == 130
    for rank in (0, 1):
        assert_ended(children, rank)


def test_the_command_that_resumes_is_the_one_that_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TYPED_ARGUMENTS, raising=False)
    monkeypatch.setattr(sys, "argv", ["ramctl", "train", "my preset", "--lr", "1e-4"])
    assert resume_command(tmp_path) == "ramctl train 'my preset' --lr 1e-4"
    monkeypatch.setattr(sys, "argv", ["ramctl", "train", "p", "--fresh", "--output", "x", "--output=y", "--lr", "1"])
    assert resume_command(Path("x-2")) == "ramctl train p --lr 1 --output x-2"
    monkeypatch.setenv(TYPED_ARGUMENTS, "train p --num-processes 2")
    assert resume_command(tmp_path) == "ramctl train p --num-processes 2"


@pytest.mark.parametrize(
    ("joined", "words", "code"), [(True, ["nowhere"], 2), (True, ["--version"], 0), (False, ["nowhere"], 2)]
)
def test_a_process_still_joined_to_others_ends_with_its_code_and_all_but_the_teardown(
    joined: bool, words: list[str], code: int
) -> None:
    """Gloo's threads may abort a process whose interpreter is being taken apart; ``Last`` stands for that."""
    program = f"""
import atexit, os, sys
from ramctl.cli.app import main
class Last:
    def __del__(self, write=os.write):
        write(1, b"taken apart")
last = Last()
if {joined}:
    from torch import distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
real_exit = sys.exit
def exit(code):
    atexit.register(print, "cleared up", end=" ")
    real_exit(code)
sys.exit = exit
main({words!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "cleared up" in done.stdout
    assert ("taken apart" in done.stdout) is not joined


@pytest.mark.slow
def test_a_real_mistake_in_two_processes_is_told_once(tmp_path: Path) -> None:
    words = (
        f"train geneval-tiny --num-processes 2 --output {tmp_path / 'run'} --prompts.train nowhere.jsonl --device cpu"
    )
    done = subprocess.run(
        [sys.executable, "-m", "ramctl", *words.split()],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("nowhere.jsonl does not exist") == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr


_LOSING = """
import sys
from ramctl.cli import _errors
from ramctl.engine.distributed import connect
from ramctl.errors import ScorerError
world, _ = connect("cpu")
world.barrier()
try:
    if world.rank:
        raise ScorerError("The model file is gone.")
    world.gather(0)
except Exception as error:
    code = _errors.report(error, debug=False)
import os
sys.stderr.flush()
os._exit(code)
"""


@pytest.mark.slow
def test_the_error_behind_a_broken_connection_is_told(
    children: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With real connections: the first process only knows that its partner is gone."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # The stand-in for the package's __main__ must not stand in the package's way.
    head = f"sys.modules.pop('ramctl'); sys.path[:] = [{str(ROOT)!r}] + [p for p in sys.path if p != {str(children)!r}]"
    assert launch(script(children, head + _LOSING), 2) == 1
    told = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("[")]  # torch's own log
    assert told == ["Another process of this run has ended.", "Process 1 failed:", "The model file is gone."]
