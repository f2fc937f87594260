"""Starting several processes: one voice, one exit code, nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ramctl import launch as module
from ramctl.launch import is_launched, launch
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


def test_a_killed_process_is_named_with_its_signal(children: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = script(children, "if rank: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)")
    assert launch(words, 2) == 1
    assert capfd.readouterr().err == "Process 1 was killed by SIGKILL.\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launching_process_ends_all(children: Path, number: signal.Signals) -> None:
    words = script(children, "open(f'up-{rank}', 'w').write(str(os.getpid()))\ntime.sleep(120)")
    code = (
        f"import sys; sys.path.remove({str(children)!r}); sys.path.insert(0, {str(ROOT)!r})\n"
        "from ramctl import launch\n"
        "launch._GRACE_SECONDS = 0.5\n"
        f"sys.exit(launch.launch({words!r}, 2))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not all((children / f"up-{rank}").is_file() and (children / f"up-{rank}").read_text() for rank in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.send_signal(number)
    if number == signal.SIGTERM:  # as `timeout` does, which signals the process and then its group
        time.sleep(0.2)
        parent.send_signal(number)
    assert parent.wait(timeout=60) == 130
    for rank in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(int((children / f"up-{rank}").read_text()), 0)


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
