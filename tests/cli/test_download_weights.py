"""``ramctl download-weights`` as a user types it."""

from __future__ import annotations

import hashlib
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ramctl.cli import app
from ramctl.download import Outcome, fetch, http, patience
from ramctl.scorers.registry import create
from ramctl.weights import MANIFEST_VARIABLE, ROOT_VARIABLE, load_manifest
from ramctl.weights.store import read_record
from tests.download.server import COMMIT, Act, Hub, hub_serving

DATA = b"weights" * 20_000
SHIPPED = "/team/one/resolve/main/one.bin"
MANIFEST = f"""
[one]
about = "one file"
used_by = ["scorer:aesthetic"]
licence = "MIT"
page = "https://example.org/one"
repo = "team/one"
files = [{{ path = "one.bin", size = {len(DATA)}, sha256 = "{hashlib.sha256(DATA).hexdigest()}" }}]

[two]
about = "a file whose size the hub knows, and an optional one"
licence = "Apache-2.0"
page = "https://example.org/two"
repo = "team/two"
files = ["two.txt", {{ path = "extra.bin", part = "extra", about_bytes = 7_000 }}]

[rare]
about = "on request"
used_by = ["scorer:deqa"]
licence = "MIT"
page = "https://example.org/rare"
repo = "team/rare"
on_request = true
about_bytes = 16_410_000_000
files = ["rare.bin"]

[guarded]
about = "its licence must be accepted first"
licence = "Own terms"
page = "https://example.org/guarded"
repo = "team/guarded"
gated = true
files = [{{ path = "guarded.bin", size = 5 }}]

[pickscore]
about = "its scorer and a preset have its name, too"
used_by = ["scorer:pickscore"]
licence = "MIT"
page = "https://example.org/pickscore"
repo = "team/pickscore"
files = [{{ path = "score.bin", size = 5 }}]
"""


@pytest.fixture(autouse=True)
def own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name)
    (tmp_path / "manifest.toml").write_text(MANIFEST, encoding="utf-8")
    monkeypatch.setenv(MANIFEST_VARIABLE, str(tmp_path / "manifest.toml"))
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "store"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("ramctl.download.needs.PAPER_PRESETS", ())


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_serving() as running:
        running.add("team/one", "one.bin", DATA)
        running.add("team/two", "two.txt", b"two", large=False)
        running.add("team/two", "extra.bin", b"extra" * 1000)
        running.add("team/guarded", "guarded.bin", b"guard")
        running.add("team/pickscore", "score.bin", b"score")
        yield running


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        app.main(["download-weights", *words])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def results(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    lines = capsys.readouterr().out.splitlines()
    return dict(line.removeprefix("RESULT ").split("=", 1) for line in lines)


def test_a_name_is_fetched_without_a_question(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("one", "--mirror", hub.url) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "RESULT weights.one=present",
        f"RESULT bytes_fetched={len(DATA)}",
        f"RESULT folder={tmp_path / 'store'}",
    ]
    assert "✓ one: 1 files, 140 kB, verified" in captured.err
    assert (tmp_path / "store" / "one" / "one.bin").read_bytes() == DATA
    assert run("one", "--mirror", hub.url) == 0
    assert "already here" in capsys.readouterr().err


def test_without_a_name_and_a_terminal_it_asks_for_yes(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--mirror", hub.url) == 2
    captured = capsys.readouterr()
    assert "ramctl download-weights --yes" in captured.err and "Apache-2.0" in captured.err
    assert hub.front.seen == []
    assert run("--mirror", hub.url, "--yes", "--without", "extra") == 0
    assert results(capsys)["bytes_fetched"] == str(len(DATA) + 3 + 5 + 5)
    # Nothing left to fetch: nothing to agree to.
    assert run("--mirror", hub.url, "--without", "extra") == 0


def rows(printed: str) -> dict[str, list[str]]:
    """The cells of the printed tables' rows, by their first."""
    cells = (re.split(" {2,}", line.strip()) for line in printed.splitlines() if line.startswith("  "))
    return {first: rest for first, *rest in cells}


def test_what_is_named_is_shown_with_size_state_and_licence_before_a_byte_is_asked_for(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "store" / "two").mkdir(parents=True)
    (tmp_path / "store" / "two" / "two.txt").write_bytes(b"two")
    shown: list[str] = []

    def fetch_all(*_: object) -> list[Outcome]:
        shown.append(capsys.readouterr().err)
        return []

    monkeypatch.setattr("ramctl.download.fetch_all", fetch_all)
    assert run("one", "two", "guarded", "--mirror", hub.url) == 0
    assert rows(shown[0]) == {
        "name": ["still to come", "state", "gated", "licence"],
        "one": ["140 kB", "missing", "no", "MIT"],
        "two + extra": ["about 7 kB", "partial", "no", "Apache-2.0"],
        "guarded": ["5 B", "missing", "yes", "Own terms"],
    }
    assert "about 147 kB to fetch, " in shown[0] and hub.front.seen == []
    assert "left out" not in shown[0]


def test_the_list_and_a_dry_run_tell_the_licence_and_what_is_gated(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--list") == 0
    listed = rows(capsys.readouterr().err)
    assert listed["name"] == ["size", "state", "used by", "gated", "licence"]
    assert listed["one"] == ["140 kB", "missing", "aesthetic", "no", "MIT"]
    assert listed["guarded"][-2:] == ["yes", "Own terms"] and listed["part extra"] == ["7 kB", "missing"]
    assert run("guarded", "two", "--dry-run", "--mirror", hub.url) == 0
    planned = rows(capsys.readouterr().err)
    assert planned["name"] == ["still to come", "state", "gated", "licence"]
    assert planned["guarded"] == ["5 B", "missing", "yes", "Own terms"]
    assert planned["two + extra"] == ["5 kB", "missing", "no", "Apache-2.0"]


@pytest.mark.parametrize("words", [("--dry-run",), ("--yes",), ()])
def test_what_comes_on_request_is_named_as_left_out_until_it_is_there(
    words: tuple[str, ...], hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "left out: rare (about 16.4 GB, `ramctl download-weights rare`)"
    run(*words, "--mirror", hub.url)
    assert said in capsys.readouterr().err
    (tmp_path / "store" / "rare").mkdir(parents=True)
    (tmp_path / "store" / "rare" / "rare.bin").write_bytes(b"rare")
    run(*words, "--mirror", hub.url)
    assert "left out" not in capsys.readouterr().err


def test_the_help_names_what_comes_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(MANIFEST_VARIABLE)
    assert run("--help") == 0
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    on_request = [entry for entry in load_manifest().values() if entry.on_request]
    assert on_request and "except what only comes when named: deqa (16 GB" in words
    for entry in on_request:
        for user in entry.used_by:
            scorer, _, engine = user.removeprefix("scorer:").partition(".")
            assert scorer in words and engine in words


def test_with_deqas_weights_comes_the_command_that_makes_its_interpreter_while_there_is_none(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAMCTL_DEQA_PYTHON", raising=False)
    hub.add("team/rare", "rare.bin", b"rare")
    command = "python -m ramctl.scorers.deqa.environment"
    assert run("rare", "--mirror", hub.url) == 0
    captured = capsys.readouterr()
    assert command in captured.err and "RESULT weights.rare=present" in captured.out
    assert run("one", "--mirror", hub.url) == 0
    assert command not in capsys.readouterr().err
    python = tmp_path / "store" / "deqa" / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("")
    assert run("rare", "--mirror", hub.url) == 0
    assert command not in capsys.readouterr().err


def test_weights_of_deqa_that_did_not_come_say_nothing_of_its_interpreter(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAMCTL_DEQA_PYTHON", raising=False)
    assert run("rare", "--mirror", hub.url) == 1
    assert "deqa.environment" not in capsys.readouterr().err


def test_paddleocrs_models_come_with_their_scorer_and_are_found_by_it(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(MANIFEST_VARIABLE)
    monkeypatch.setenv("PADDLE_PDX_CACHE_HOME", str(tmp_path / "cache"))
    for model in ("PP-OCRv3_mobile_det", "en_PP-OCRv4_mobile_rec"):
        hub.add(f"PaddlePaddle/{model}", "inference.yml", b"Global:\n", large=False)
        hub.add(f"PaddlePaddle/{model}", "inference.json", b"{}", large=False)
        hub.add(f"PaddlePaddle/{model}", "inference.pdiparams", model.encode())

    def missing_models() -> list[str]:
        lines = create("ocr", {"engine": "paddleocr"}).missing()
        return [line for line in lines if "PaddleOCR's model" in line]

    assert len(missing_models()) == 2
    assert run("scorer:ocr", "--mirror", hub.url) == 0
    assert missing_models() == []
    recorded = read_record(tmp_path / "store" / "pp-ocrv3-mobile-det")
    assert recorded.commit == COMMIT and recorded.files["inference.pdiparams"].vouched_by == "hub"


def test_damage_is_mended_by_a_command_without_a_presets_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, file in (("pickscore", "score.bin"), ("one", "one.bin")):
        (tmp_path / "store" / name).mkdir(parents=True)
        (tmp_path / "store" / name / file).write_bytes(b"?")
    assert run("--verify") == 1
    assert "Fetch again what is damaged: ramctl download-weights one scorer:pickscore\n" in capsys.readouterr().err


@pytest.mark.parametrize(("answer", "code"), [(b"n\n", 1), (b"y\n", 0)])
def test_on_a_terminal_it_asks(answer: bytes, code: int, hub: Hub, tmp_path: Path) -> None:
    mine, theirs = pty.openpty()
    command = "from ramctl.download import needs; needs.PAPER_PRESETS = (); from ramctl.cli.app import main; main()"
    child = subprocess.Popen(
        [sys.executable, "-c", command, "download-weights", "--mirror", hub.url],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "TERM": "xterm"},
    )
    os.close(theirs)
    shown = b""
    while b"[y/N]" not in shown:
        shown += os.read(mine, 4096)
    assert b"Apache-2.0" in shown and hub.front.seen == []
    os.write(mine, answer)
    deadline = time.monotonic() + 30
    while child.poll() is None and time.monotonic() < deadline:
        try:
            os.read(mine, 4096)
        except OSError:
            break
    assert child.wait(timeout=10) == code
    os.close(mine)
    assert (tmp_path / "store" / "one" / "one.bin").exists() == (code == 0)


def test_the_list_tells_what_is_here(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("one", "--mirror", hub.url)
    (tmp_path / "store" / "two").mkdir()
    (tmp_path / "store" / "two" / "two.txt.part").write_bytes(b"t")
    capsys.readouterr()
    assert run("--list") == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "RESULT weights.one=present",
        "RESULT weights.two=partial",
        "RESULT weights.two.extra=missing",
        "RESULT weights.rare=missing",
        "RESULT weights.guarded=missing",
        "RESULT weights.pickscore=missing",
    ]
    assert "aesthetic" in captured.err
    file = tmp_path / "store" / "one" / "one.bin"
    file.write_bytes(DATA[:-1])
    assert run("--list", "one") == 0
    captured = capsys.readouterr()
    assert captured.out == "RESULT weights.one=damaged\n"
    assert f"{len(DATA) - 1} bytes in place of {len(DATA)}" in captured.err


def test_verify_reads_every_file_again(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("one", "two", "--mirror", hub.url)
    assert run("--verify") == 0
    for name in ("one/one.bin", "two/two.txt"):
        file = tmp_path / "store" / name
        stamp = file.stat()
        data = file.read_bytes()
        file.write_bytes(data[:-1] + b"?")
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    capsys.readouterr()
    assert run("--list") == 0  # size and time are as they were
    assert results(capsys)["weights.one"] == "present"
    assert run("--verify") == 1
    captured = capsys.readouterr()
    assert "RESULT weights.one=damaged" in captured.out and "RESULT weights.two=damaged" in captured.out
    assert hashlib.sha256(DATA).hexdigest() in captured.err and "ramctl download-weights one two" in captured.err
    assert run("one", "two", "--mirror", hub.url) == 0
    assert run("--verify") == 0


def test_verifying_what_is_named_and_not_there_is_a_failure(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    run("one", "--mirror", hub.url)
    assert run("--verify") == 0 and run("one", "--verify") == 0
    capsys.readouterr()
    assert run("one", "two", "--verify") == 1
    captured = capsys.readouterr()
    assert "RESULT weights.one=present" in captured.out and "not verified: two" in captured.err
    assert run("two", "--list") == 0


def test_a_dry_run_counts_bytes_and_space_and_fetches_nothing(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("one", "two", "--dry-run", "--mirror", hub.url) == 0
    said = results(capsys)
    assert said["bytes_to_fetch.one"] == str(len(DATA)) and said["bytes_to_fetch.two"] == str(3 + 5000)
    assert said["bytes_to_fetch"] == str(len(DATA) + 5003) and said["bytes_exact"] == "true"
    assert int(said["bytes_free"]) > 0 and said["fits"] == "true"
    assert {seen.method for seen in hub.front.seen} == {"HEAD"} and hub.storage.seen == []
    assert not (tmp_path / "store").exists()


def test_a_dry_run_without_a_server_estimates(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("one", "two", "--dry-run", "--mirror", "http://127.0.0.1:9") == 0
    said = results(capsys)
    assert said["bytes_to_fetch"] == str(len(DATA) + 7_000) and said["bytes_exact"] == "false"


def test_a_dry_run_refuses_nothing(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ramctl.download.space_at", lambda _: 5)
    assert run("one", "--dry-run", "--mirror", hub.url) == 0
    assert results(capsys)["fits"] == "false"


def test_a_failure_is_one_exit_code_after_all_the_others_came(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("rare", "one", "--mirror", hub.url) == 1
    captured = capsys.readouterr()
    assert "RESULT weights.rare=failed" in captured.out and "RESULT weights.one=present" in captured.out
    assert "✗ rare: " in captured.err and "does not exist (404)" in captured.err
    assert "Traceback" not in captured.err


def test_another_folder_is_used_and_said(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("one", "--mirror", hub.url, "--output", str(tmp_path / "elsewhere")) == 0
    assert (tmp_path / "elsewhere" / "one" / "one.bin").exists() and not (tmp_path / "store").exists()
    assert f"export {ROOT_VARIABLE}={tmp_path / 'elsewhere'}" in capsys.readouterr().err
    assert run("--list", "one", "--output", str(tmp_path / "elsewhere")) == 0
    assert results(capsys) == {"weights.one": "present"}


def test_a_scorers_name_and_a_scorer_that_needs_nothing(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("scorer:aesthetic", "--mirror", hub.url) == 0
    assert results(capsys)["weights.one"] == "present"
    assert run("scorer:jpeg-compressibility") == 0
    assert "Nothing has to be downloaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["on"], "Did you mean 'one'"),
        (["one", "--without", "t5"], "no optional part 't5'"),
        (["one", "--mirror", "hf-mirror.com"], "not the address of a mirror"),
        (["one", "--mirror", "ftp://x.org"], "not the address of a mirror"),
        (["--list", "--verify"], "exclude each other"),
        (["one", "--jobs", "0"], "jobs"),
    ],
)
def test_mistakes_are_usage_errors(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.out == ""


def test_an_output_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run("one", "--output", str(tmp_path / "file")) == 2
    assert "is a file" in capsys.readouterr().err


@pytest.mark.parametrize("act", [Act(trickle=0.05), Act(cut=90_000, pause=40)])
def test_an_interrupt_keeps_what_came_even_from_a_server_that_fell_silent(act: Act, hub: Hub, tmp_path: Path) -> None:
    stored = next(iter(hub.storage.files))
    hub.storage.script[stored] = [act]
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
        "from ramctl.cli.app import main; main()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, "download-weights", "one", "--mirror", hub.url],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    part = tmp_path / "store" / "one" / "one.bin.part"
    deadline = time.monotonic() + 20
    while not (part.is_file() and part.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    said = child.communicate(timeout=10)[1]
    assert child.returncode == 130
    assert "the same command goes on from there" in said and "Traceback" not in said
    assert part.stat().st_size > 0
    assert run("one", "--mirror", hub.url) == 0
    assert (tmp_path / "store" / "one" / "one.bin").read_bytes() == DATA


def test_the_command_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom ramctl.cli.app import main\n"
        "try: main(['download-weights', '--list'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print([n for n in ('torch', 'transformers', 'diffusers', 'mlflow', 'scipy') if n in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_help_names_the_shipped_hub_and_the_constants_are_sane() -> None:
    assert http.DEFAULT_HUB == "https://huggingface.co"
    assert patience.ATTEMPTS > patience.CONNECT_ATTEMPTS > 1
    assert fetch.Options().jobs >= 1 and load_manifest()
