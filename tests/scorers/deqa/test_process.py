"""The child process: messages of any size, deadlines, deaths told with their last words, nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ramctl.scorers.deqa.process import Child, ChildError

PRELUDE = """
import json, os, struct, sys, time
def read(size):
    data = sys.stdin.buffer.read(size)
    if len(data) < size:
        sys.exit(0)
    return data
def request():
    return json.loads(read(struct.unpack(">I", read(4))[0]))
def reply(header):
    data = json.dumps(header).encode()
    sys.stdout.buffer.write(struct.pack(">I", len(data)) + data)
    sys.stdout.buffer.flush()
"""

ECHO = """
while True:
    header = request()
    data = read(header["bytes"])
    sys.stderr.write("noise\\n" * header.get("noise", 0))
    reply({"sum": sum(data[:1000]), "length": len(data), "text": header.get("text")})
"""


@pytest.fixture
def children() -> Iterator[list[Child]]:
    made: list[Child] = []
    yield made
    for child in made:
        child.close(grace=0)


def start(children: list[Child], script: str) -> Child:
    child = Child([sys.executable, "-I", "-c", PRELUDE + script], "the child")
    children.append(child)
    return child


def gone(pid: int, within: float = 5.0) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_requests_and_replies_of_any_size(children: list[Child]) -> None:
    child = start(children, ECHO)
    for size in (0, 1, 65536, 5_000_000):
        payload = bytes([3]) * size
        reply = child.ask({"bytes": size, "text": "häß\n"}, payload, timeout=20)
        assert reply == {"sum": 3 * min(size, 1000), "length": size, "text": "häß\n"}


def test_a_talkative_child_does_not_block_and_its_last_lines_are_kept(children: list[Child]) -> None:
    child = start(children, ECHO)
    child.ask({"bytes": 0, "noise": 100_000}, timeout=20)
    child.close()
    assert child.errors == ["noise"] * 40


@pytest.mark.parametrize(
    ("script", "payload"),
    [
        pytest.param("request(); time.sleep(60)", b"", id="it never answers"),
        pytest.param("time.sleep(60)", b"x" * 3_000_000, id="it never reads"),
        pytest.param(
            r"request(); sys.stdout.buffer.write(b'\0\0\0\x09{'); sys.stdout.flush(); time.sleep(60)",
            b"",
            id="half an answer",
        ),
    ],
)
def test_a_child_that_hangs_is_ended_at_the_deadline(children: list[Child], script: str, payload: bytes) -> None:
    child = start(children, script)
    began = time.monotonic()
    with pytest.raises(ChildError, match=r"the child did not answer within 0\.7 s"):
        child.ask({}, payload, timeout=0.7)
    assert time.monotonic() - began < 5
    assert not child.alive


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("sys.exit('the reason')", "the child ended with code 1: the reason"),
        ("request(); raise ValueError('of no use')", "the child ended with code 1: ValueError: of no use"),
        ("request(); os._exit(7)", "the child ended with code 7: it wrote no message"),
        (
            "request(); print('so far', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)",
            "the child was killed by signal 9: so far",
        ),
    ],
)
def test_a_death_is_told_with_the_last_words(children: list[Child], script: str, told: str) -> None:
    child = start(children, script)
    with pytest.raises(ChildError) as caught:
        child.ask({}, b"x" * 1_000_000, timeout=10)
    assert str(caught.value) == told
    assert not child.alive
    with pytest.raises(ChildError):
        child.ask({}, timeout=1)


@pytest.mark.parametrize(
    "answer", ["b'Traceback: no header'", "b'\\0\\0\\0\\x02[]'", "b'\\0\\0\\0\\x03{{}'", "b'\\xff' * 8"]
)
def test_what_is_no_reply_is_refused(children: list[Child], answer: str) -> None:
    child = start(children, f"request()\nsys.stdout.buffer.write({answer})\nsys.stdout.flush(); time.sleep(60)")
    with pytest.raises(ChildError, match="not a reply"):
        child.ask({}, timeout=10)
    assert not child.alive


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ChildError, match="the child does not start"):
        Child([str(tmp_path / "python")], "the child")


def test_closing_ends_it_and_even_one_that_does_not_listen(children: list[Child]) -> None:
    child = start(children, ECHO)
    child.ask({"bytes": 0}, timeout=10)
    child.close()
    assert not child.alive
    child.close()
    deaf = start(children, "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)")
    deaf.close(grace=0.2)
    assert not deaf.alive


def test_it_does_not_outlive_a_parent_that_is_killed() -> None:
    script = f"""
import sys, time
from ramctl.scorers.deqa.process import Child
child = Child([sys.executable, "-I", "-c", {PRELUDE + ECHO!r}], "the child")
child.ask({{"bytes": 0}}, timeout=10)
print(child._process.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        parent.send_signal(signal.SIGKILL)
    assert gone(pid)


@pytest.mark.slow
def test_even_one_that_does_not_listen_ends_with_this_process() -> None:
    script = """
import sys
from ramctl.scorers.deqa.process import Child
child = Child([sys.executable, "-I", "-c", "import time; time.sleep(60)"], "the child")
print(child._process.pid, flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert gone(int(done.stdout))
    assert done.stderr == ""


def test_ctrl_c_does_not_reach_it_in_mid_batch(children: list[Child]) -> None:
    child = start(children, ECHO)
    assert os.getpgid(child._process.pid) != os.getpgid(0)
