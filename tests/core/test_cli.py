"""The command line over a real store and a real gateway, and its errors as one line."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest
import typer
from aiohttp import web
from aiohttp.test_utils import TestServer
from typer.testing import CliRunner, Result

from driftgate import cli, cli_io
from driftgate.client import DEFAULT_URL
from driftgate.commands.options import DEFAULT_STORE
from driftgate.commands.serve import _gateway_config, keys_from
from driftgate.errors import DriftgateError, NotFoundError, RequestError
from driftgate.gateway.answers import Answers
from driftgate.gateway.api import ApiContext, add_api_routes
from driftgate.gateway.config import GatewayConfig
from driftgate.gateway.keys import digest_of
from driftgate.gateway.probe import ProbeReport
from driftgate.gateway.report import Limits, Written, write_report
from driftgate.gateway.report_source import StoreSource
from driftgate.storage import Reader, read_segment
from driftgate.storage.records import Kind
from driftgate.testing.stores import SLASHED, example_records, flip, write_store
from driftgate.trace import Trace
from driftgate.views import Cells, DriftEvent, StepDetail, TrajectoryDetail

COMMANDS = ["serve", "probe", "teach", "tail", "show", "cells", "export", "version", "index"]
COMMANDS += ["explain", "verdict", "feedback", "key", "report"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store"), example_records())


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)


def output(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


@pytest.fixture
async def url(store: Path) -> AsyncIterator[str]:
    reader, app = Reader(store), web.Application()

    def refuse(name: str | None) -> tuple[str, str]:
        raise RequestError("not here")

    context = ApiContext(reader=reader, submit=lambda record: refuse(None), mint=refuse)  # type: ignore[arg-type,return-value]
    add_api_routes(app, context)
    server = TestServer(app)
    await server.start_server()
    yield str(server.make_url("/"))
    await server.close()
    reader.close()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str) -> None:
    assert "Usage: driftgate " in output(command, "--help")


def test_the_overview_cuts_no_sentence() -> None:
    overview = output("--help").replace("[ARGS]...", "")
    assert "..." not in overview
    assert all(f"  {command} " in overview for command in COMMANDS)


def test_help_needs_neither_torch_nor_a_server() -> None:
    heavy = "{'torch', 'transformers', 'aiohttp', 'sqlite3'}"
    code = f"import sys, driftgate.cli; print(*({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_version() -> None:
    assert output("version").strip() == "0.1.0"


def test_show_from_the_store(store: Path) -> None:
    shown = output("show", SLASHED, "--store", store)
    assert "3 of 3 scored, reward 0.5" in shown
    assert "precision_differs" in shown
    assert "step 0, choice 0, token 3" in shown


def test_show_names_what_is_missing(store: Path) -> None:
    shown = output("show", "two", "--store", store)
    assert "INCOMPLETE_CAPTURE" in shown
    assert "! step 0 choice 0: routed_experts: not asked for" in shown


def test_show_json_is_the_view(store: Path) -> None:
    detail = msgspec.json.decode(
        output("show", SLASHED, "--store", store, "--json"), type=TrajectoryDetail
    )
    assert [step.step for step in detail.steps] == [0, 1, 2]
    step = msgspec.json.decode(
        output("show", SLASHED, "--step", "1", "--store", store, "--json"), type=StepDetail
    )
    assert step.step == 1


def test_show_a_step_prints_its_text(store: Path) -> None:
    trace = next(r for r in example_records() if isinstance(r, Trace))
    shown = output("show", SLASHED, "--step", "0", "--store", store)
    assert trace.token_bytes.decode() in shown
    assert '"role": "system"' in shown


def test_cells_from_the_store(store: Path) -> None:
    assert "reference float32 ×1" in output("cells", "--store", store)
    found = msgspec.json.decode(output("cells", "--store", store, "--json"), type=Cells)
    reader = Reader(store)
    assert found == Answers(reader).cells()
    reader.close()


async def test_cells_and_show_from_a_gateway(store: Path, url: str) -> None:
    for arguments in (["cells"], ["show", SLASHED], ["show", SLASHED, "--step", "2"]):
        served = await asyncio.to_thread(output, *arguments, "--url", url)
        assert served == await asyncio.to_thread(output, *arguments, "--store", store)


async def test_tail_prints_a_line_for_each_score(url: str) -> None:
    printed = await asyncio.to_thread(output, "tail", "--url", url, "--after", "0", "--no-follow")
    lines = printed.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith(f"● {SLASHED} 0.0  n=5  k3 ")
    assert 'worst " w' in lines[0]
    assert "comparable no (precision_differs)" in lines[3]
    assert "noise floor" in lines[4]


async def test_tail_json_is_the_event(url: str) -> None:
    arguments = ("--url", url, "--after", "2", "--no-follow", "--json", "--trajectory", SLASHED)
    printed = await asyncio.to_thread(output, "tail", *arguments)
    events = [msgspec.json.decode(line, type=DriftEvent) for line in printed.splitlines()]
    assert [event.cursor for event in events] == [3, 4, 5]


def test_export_writes_one_whole_row_for_each_trace(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    assert output("export", "--store", store, "-o", file) == ""
    lines = file.read_text().splitlines()
    assert output("export", "--store", store).splitlines() == lines
    rows = [json.loads(line) for line in lines]
    traces = [r for r in example_records() if isinstance(r, Trace)]
    assert sorted(row["trace_id"] for row in rows) == sorted(t.meta.trace_id for t in traces)[:4]
    assert {row["schema_version"] for row in rows} == {1}
    array = np.load(io.BytesIO(base64.b64decode(rows[0]["routes"]["npy_base64"])))
    assert list(array.shape) == rows[0]["routes"]["shape"]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_index_rebuild_keeps_the_answers(tmp_path: Path) -> None:
    write_store(tmp_path, example_records())
    before = output("cells", "--store", tmp_path, "--json")
    (tmp_path / "index.sqlite").unlink()
    assert "records 15" in output("index", "rebuild", "--store", tmp_path)
    assert output("cells", "--store", tmp_path, "--json") == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cells", "--store", "/nowhere"], "no store at /nowhere"),
        (["export", "--store", "/nowhere"], "no store at /nowhere"),
        (["tail", "--after", "soon"], "'soon'"),
        (["tail", "--after", "²"], "'²'"),
        (["serve"], "--upstream"),
        (["serve", "--upstream", "host:1"], "host:1"),
        (["serve", "--upstream", "http://h:1", "--config", "/nowhere.toml"], "/nowhere.toml"),
        (["teach", "--model", "/nowhere"], "/nowhere"),
        (["teach", "--model", "/nowhere", "--backend", "magic"], "magic"),
    ],
)
def test_wrong_usage_is_status_2_and_says_what(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "none", "--store", "STORE"], "driftgate: no trajectory 'none'"),
        (["export", "--trajectory", "none", "--store", "STORE"], "no trajectory 'none'"),
        (["cells", "--url", "http://127.0.0.1:9"], "no driftgate at http://127.0.0.1:9"),
        (["probe", "http://127.0.0.1:9"], "no engine answers at http://127.0.0.1:9"),
        (["export", "--store", "STORE", "-o", "/nowhere/x"], "cannot write /nowhere/x"),
        (
            ["serve", "--upstream", "http://127.0.0.1:9", "--store", "/dev/null/store"],
            "the store /dev/null/store cannot be opened",
        ),
    ],
)
def test_errors_are_one_line(
    store: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    given = [str(store) if a == "STORE" else a for a in arguments]
    monkeypatch.setattr(sys, "argv", ["driftgate", *given])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert said in str(ended.value.code)
    assert "\n" not in str(ended.value.code)


@pytest.mark.parametrize("command", ["cells", "tail"])
async def test_another_server_is_one_line(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    async def hello(_request: web.Request) -> web.Response:
        return web.Response(text="<html>hi</html>", content_type="text/html")

    app = web.Application()
    app.router.add_get("/{rest:.*}", hello)
    async with TestServer(app) as server:
        monkeypatch.setattr(sys, "argv", ["driftgate", command, "--url", str(server.make_url("/"))])
        with pytest.raises(SystemExit, match=r"what answers at .* is not"):
            await asyncio.to_thread(cli.main)


def test_serve_listens_until_it_is_told_to_stop(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "driftgate.cli", "serve", "--port", "0"]
    options = ["--upstream", "http://127.0.0.1:9", "--store", str(tmp_path / "store")]
    with subprocess.Popen(command + options, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[2].rstrip(",")
        assert "OPENAI_BASE_URL=" in process.stdout.readline()
        assert httpx.get(f"{url}/api/trajectories").json() == {"items": [], "next": None}
        minted = httpx.post(f"{url}/api/trajectories", json={"trajectory": "a/b"}).json()
        assert minted["base_url"] == f"{url}/t/a%2Fb/v1"
        process.terminate()
        assert process.wait(timeout=20) == 0


def test_a_port_that_is_taken_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        options = ["--upstream", "http://127.0.0.1:9", "--store", str(tmp_path), "--port", port]
        monkeypatch.setattr(sys, "argv", ["driftgate", "serve", *options])
        with pytest.raises(SystemExit, match=f"cannot serve at 127.0.0.1:{port}"):
            cli.main()


def test_probe_prints_what_is_missing_and_how_to_get_it() -> None:
    report = ProbeReport(
        url="http://e:8000",
        engine="vllm",
        version="0.29.0",
        models=[],
        model="tiny",
        token_ids=True,
        logprobs=True,
        streaming=True,
        notes=["Answers carry no routed experts: start it with --enable-return-routed-experts."],
    )
    lines = cli_io.report_text(report).splitlines()
    assert lines[0] == "vllm 0.29.0 at http://e:8000 serves tiny"
    assert lines[1].split() == ["token", "ids", "yes"]
    assert lines[4].split() == ["routed", "experts", "no"]
    assert lines[-1].endswith("--enable-return-routed-experts.")


def test_options_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "driftgate.toml"
    file.write_text(
        'upstream = "http://engine:8000"\nport = 1\nstore = "s"\n[engine_settings]\na = "b"\n'
    )
    config = _gateway_config(file, {"port": 2})
    assert config == GatewayConfig(
        upstream="http://engine:8000", port=2, store=Path("s"), engine_settings={"a": "b"}
    )


def test_a_setting_that_is_misspelled_is_named(tmp_path: Path) -> None:
    """And not the one that is missing by it."""
    file = tmp_path / "driftgate.toml"
    file.write_text('uptream = "http://engine:8000"\n')
    with pytest.raises(typer.BadParameter, match="there is no setting uptream"):
        _gateway_config(file, {})


def test_defaults_are_the_gateways() -> None:
    config = GatewayConfig(upstream="http://engine:8000")
    assert config.store == DEFAULT_STORE
    assert f"http://{config.host}:{config.port}" == DEFAULT_URL


def test_a_made_key_opens_what_its_digest_is_set_for() -> None:
    lines = dict(line.split() for line in output("key").splitlines())
    assert digest_of(lines["key:"]) == lines["digest:"]
    assert lines["key:"] not in output("key")


def test_other_addresses_than_loopback_need_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("serve", "--upstream", "http://e:1", "--host", "0.0.0.0")
    assert result.exit_code == 2
    assert "driftgate key" in result.output
    monkeypatch.setenv("DRIFTGATE_READ_KEY", "much-too-short")
    result = run("serve", "--upstream", "http://e:1", "--host", "0.0.0.0")
    assert result.exit_code == 2
    assert "DRIFTGATE_READ_KEY" in result.output
    assert "much-too-short" not in result.output


def test_keys_come_from_the_environment_as_digests() -> None:
    one, two = "first-key-0123456789", "second-key-0123456789"
    given = keys_from({"DRIFTGATE_CALL_KEY": f"{one}, {two}", "DRIFTGATE_SIGNING_KEY": "s"})
    assert given == {"call_keys": [digest_of(one), digest_of(two)], "signing_key": "s"}


def driftgate(
    *arguments: str | Path | bytes, to: str = os.devnull, encoding: str = "utf-8"
) -> tuple[int, str]:
    """Exit status and stderr of the command as its users run it."""
    with Path(to).open("wb") as output:
        done = subprocess.run(
            [sys.executable, "-m", "driftgate.cli", *arguments],
            stdout=output,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONIOENCODING": encoding},
            timeout=60,
        )
    return done.returncode, done.stderr.decode()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has one")
@pytest.mark.parametrize("command", ["cells", "export"])
def test_a_full_disk_under_the_output_is_one_line(command: str, store: Path) -> None:
    status, said = driftgate(command, "--store", store, to="/dev/full")
    assert status == 1
    assert said.startswith("driftgate: ")
    assert len(said.splitlines()) == 1


def test_a_terminal_without_our_signs_is_written_to(store: Path) -> None:
    assert driftgate("cells", "--store", store, encoding="latin-1") == (0, "")


def test_an_argument_that_is_no_text_is_one_line(store: Path) -> None:
    assert driftgate("show", b"\xff", "--store", store) == (
        1,
        "driftgate: '\\udcff' is not UTF-8\n",
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--url", "http://127.0.0.1:99999"], "ports end at 65535"),
        (["--key", "é"], "beyond ASCII"),
    ],
)
def test_an_address_or_key_that_can_be_none_is_one_line(arguments: list[str], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        run("cells", *arguments)


@pytest.mark.parametrize("command", ["teach", "floor"])
def test_a_mistyped_store_is_not_made(command: str, tmp_path: Path) -> None:
    """It would read as "all is scored"."""
    (tmp_path / "config.json").write_text("{}")
    result = run(command, "--model", tmp_path, "--store", tmp_path / "typo")
    assert result.exit_code == 2
    assert "there is no store at" in result.output
    assert not (tmp_path / "typo").exists()


def test_a_floor_of_nothing_says_so(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DriftgateError, match="holds no answer that could be run again"):
        run("floor", "--model", tmp_path, "--store", store)


def test_a_follower_may_start_before_its_gateway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("driftgate.teacher.launch.launch", lambda config: 0)
    monkeypatch.setattr("driftgate.logs.configure", lambda form: None)
    (tmp_path / "config.json").write_text("{}")
    output("teach", "--model", tmp_path, "--store", tmp_path / "new", "--follow")
    assert "there is no store at" in caplog.text


def test_another_trainers_explanation_names_those_there_are(store: Path) -> None:
    with closing(Reader(store)) as reader:
        (meta,) = [row.meta for row in reader.scores()][:1]
    with pytest.raises(
        NotFoundError, match=f"not scored by trainer x, but by .*{meta.trainer.digest}"
    ):
        run("explain", meta.trajectory, "--trainer", "x", "--store", store)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A store whose first trace has one bit flipped."""
    store = write_store(tmp_path / "damaged", example_records())
    segment, entry = next(
        (path, entry)
        for path in sorted(store.glob("segments/*.dgs"))
        for entry in read_segment(path)
        if entry.header.kind == Kind.TRACE
    )
    flip(segment, entry.offset)
    return store


def test_a_report_names_what_it_could_not_read(damaged: Path, tmp_path: Path) -> None:
    """The other trajectories are in it, and the status tells a script."""
    result = run("report", "-o", tmp_path / "report", "--store", damaged)
    assert result.exit_code == 1
    assert "index.html: 1 of 2 in full" in result.stdout
    assert "damaged: " in result.stderr
    assert "the segment is damaged" in (tmp_path / "report/data/base.js").read_text()


def test_a_rebuild_says_what_is_lost(damaged: Path) -> None:
    result = run("index", "rebuild", "--store", damaged)
    assert result.exit_code == 1
    assert "lost: " in result.stderr
    assert "is built on" in result.stderr
    assert "unreadable" not in result.output


def test_a_report_is_no_larger_than_asked(store: Path, tmp_path: Path) -> None:
    """Its page and its list count as well."""
    folder = tmp_path / "report"

    def write(size_bytes: int) -> Written:
        with closing(Reader(store)) as reader:
            limits = Limits(size_bytes=size_bytes)
            return asyncio.run(write_report(StoreSource(reader), folder, of="it", limits=limits))

    whole = write(100 << 20)
    less = write(whole.size_bytes - 1)
    assert less.in_full < whole.in_full
    assert less.size_bytes == sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    assert less.size_bytes < whole.size_bytes
    with pytest.raises(DriftgateError, match="alone take 0"):
        write(1000)


@pytest.mark.parametrize("output", ["file", "file/below"])
def test_a_report_that_cannot_be_written_is_one_line(
    output: str, store: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DriftgateError, match="choose another --output"):
        run("report", "-o", tmp_path / output, "--store", store)
