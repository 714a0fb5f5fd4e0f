"""The operator's token: the launcher and other commands send it to the run's daemons and to nobody else."""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from areal_like.config.security import SecurityConfig
from areal_like.errors import ConfigError
from areal_like.paths import write_json
from launch.observation import http_json
from launch.observation.http_json import Operator, may_belong_to
from tests.launch.test_supervision import ENDLESS, drain, run, scripted_workplace
from tests.support.keys import make_keys
from tests.support.launching import TEST_LIMIT_S, areal_like, launcher, launcher_log, wait_for_steps
from tests.support.waiting import HANG_LIMIT_S

pytestmark = pytest.mark.timeout(TEST_LIMIT_S)
fetch_json = partial(http_json.fetch_json, timeout_s=HANG_LIMIT_S)
post_json = partial(http_json.post_json, timeout_s=HANG_LIMIT_S)


@pytest.fixture
def workplace(tmp_path: Path) -> Iterator[Path]:
    """A working directory with scripted daemons and a directory of keys."""
    make_keys(tmp_path / "keys")
    yield from scripted_workplace(tmp_path)


def test_launcher_and_status_of_a_run_with_keys(workplace: Path) -> None:
    root, keys = workplace / "runs" / "x", workplace / "keys"
    token = (keys / "operator.token").read_text().strip()
    with launcher("name=x", f"security.keys={keys}", ENDLESS, cwd=workplace) as process:
        wait_for_steps(2, root, process=process)
        shown = areal_like("status", "x", cwd=workplace)
        assert shown.returncode == 0 and "queued" in shown.stdout, shown
        (keys / "monitor.token").write_text("a token that was revoked")
        shown = areal_like("status", "x", cwd=workplace, environment={"COLUMNS": "300"})
        assert "needs a valid token" in " ".join(shown.stdout.split()), shown
        (keys / "operator.token").unlink()
        shown = areal_like("status", "x", cwd=workplace)
        assert (shown.returncode, shown.stdout) == (2, "")
        assert "this needs the operator's token" in shown.stderr
        assert drain(process, root)[0] == 0
    everything = "".join(launcher_log(root)) + (root / "config.yaml").read_text()
    assert token not in everything


def test_launcher_without_the_operators_token_does_not_start(workplace: Path) -> None:
    (workplace / "keys" / "operator.token").unlink()
    code, _, stderr = run(workplace, f"security.keys={workplace}/keys")
    assert code == 2 and "this needs the operator's token" in stderr
    (workplace / "keys" / "operator.token").write_text("x")
    (workplace / "keys" / "operator.token").chmod(0o644)
    code, _, stderr = run(workplace, f"security.keys={workplace}/keys")
    assert code == 2 and "chmod 600" in stderr


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    """An HTTP server that records the Authorization headers that it gets and sends `answer`."""
    state = SimpleNamespace(answer=b'{"x": 1}', status=200, authorizations=[])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.authorizations.append(self.headers.get("Authorization"))
            self.send_response(state.status)
            self.end_headers()
            self.wfile.write(state.answer)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            """Prints nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        state.address = f"127.0.0.1:{listening.server_address[1]}"
        thread = threading.Thread(target=listening.serve_forever, args=(0.02,))
        thread.start()
        yield state
        listening.shutdown()
        thread.join()


def test_tokens_go_only_to_addresses_in_endpoint_files(tmp_path: Path, server: SimpleNamespace) -> None:
    tokens = make_keys(tmp_path / "keys")
    operator = Operator(SecurityConfig(keys=str(tmp_path / "keys")), tmp_path / "endpoints")
    assert fetch_json(server.address, "/status", operator=operator) == {"x": 1}
    assert post_json(server.address, "/control/drain", {}, operator=operator) == {"x": 1}
    write_json(tmp_path / "endpoints" / "buffer.json", {"http": server.address})
    assert fetch_json(server.address, "/status", operator=operator) == {"x": 1}
    (tmp_path / "keys" / "operator.token").write_text("the token after a rotation\n")
    assert post_json(server.address, "/control/drain", {}, operator=operator) == {"x": 1}
    assert server.authorizations == [
        None,
        None,
        f"Bearer {tokens['monitor']}",
        "Bearer the token after a rotation",
    ]


@pytest.mark.parametrize("name", ["rollout-9", "buffer-of-mine", "x"])
def test_a_forged_endpoint_file_never_gets_the_operators_token(
    tmp_path: Path, server: SimpleNamespace, name: str
) -> None:
    """Every rollout server can write such a file."""
    tokens = make_keys(keys := tmp_path / "keys")
    write_json(tmp_path / "endpoints" / f"{name}.json", {"role": "buffer", "http": server.address})
    operator = Operator(SecurityConfig(keys=str(tmp_path / "keys")), tmp_path / "endpoints")
    fetch_json(server.address, "/status", operator=operator)
    post_json(server.address, "/control/drain", {}, operator=operator)
    (keys / "monitor.token").unlink()
    fetch_json(server.address, "/status", operator=operator)
    for role in ("rollout", "buffer"):
        (keys / f"{role}.secret").unlink()
    fetch_json(server.address, "/status", operator=operator)
    (keys / "trainer.secret").unlink()
    with pytest.raises(ConfigError, match=r"keys add .* monitor --role monitor"):
        fetch_json(server.address, "/status", operator=operator)
    read_with = [f"Bearer {tokens[name]}" for name in ("monitor", "rollout", "trainer")]
    assert server.authorizations == [read_with[0], None, *read_with[1:]]


@pytest.mark.parametrize("name", ["buffer", "trainer-7"])
def test_no_read_carries_the_operators_token(tmp_path: Path, server: SimpleNamespace, name: str) -> None:
    """A rollout server can also write the endpoint file of a rank that the job does not have."""
    tokens = make_keys(tmp_path / "keys")
    (tmp_path / "keys" / "monitor.token").unlink()
    write_json(tmp_path / "endpoints" / f"{name}.json", {"http": server.address})
    operator = Operator(SecurityConfig(keys=str(tmp_path / "keys")), tmp_path / "endpoints")
    fetch_json(server.address, "/status", operator=operator)
    assert server.authorizations == [f"Bearer {tokens['rollout']}"]


def test_a_forged_file_does_not_keep_operators_from_the_buffer(
    tmp_path: Path, server: SimpleNamespace
) -> None:
    token = make_keys(tmp_path / "keys")["operator"]
    for name in ("rollout-0", "buffer", "zzz"):
        write_json(tmp_path / "endpoints" / f"{name}.json", {"http": server.address})
    operator = Operator(SecurityConfig(keys=str(tmp_path / "keys")), tmp_path / "endpoints")
    post_json(server.address, "/control/drain", {}, operator=operator)
    assert server.authorizations == [f"Bearer {token}"]


@pytest.mark.parametrize("how", ["mode", "owner"])
def test_no_change_to_addresses_that_others_can_write(
    tmp_path: Path, server: SimpleNamespace, how: str
) -> None:
    tokens = make_keys(tmp_path / "keys")
    address = server.address if how == "mode" else "10.1.2.3:80"
    write_json(file := tmp_path / "endpoints" / "buffer.json", {"http": address})
    if how == "mode":
        file.chmod(0o666)
    elif os.getuid() == 0:
        os.chown(file.parent, 12345, -1)
        os.chown(file, 54321, -1)
    else:
        pytest.skip("only root can give a file away")
    operator = Operator(SecurityConfig(keys=str(tmp_path / "keys")), tmp_path / "endpoints")
    if how == "mode":
        fetch_json(server.address, "/status", operator=operator)
        with pytest.raises(ConfigError, match="can be written by other users"):
            post_json(server.address, "/control/drain", {}, operator=operator)
        assert server.authorizations == [f"Bearer {tokens['monitor']}"]
    else:
        with pytest.raises(ConfigError, match="belongs to another user"):
            operator.headers(address, changes=True)


def test_no_token_for_another_user_with_a_daemons_port(
    tmp_path: Path, server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed daemon leaves its endpoint file; afterwards anybody may listen at its port."""
    make_keys(tmp_path / "keys")
    write_json(tmp_path / "endpoints" / "buffer.json", {"http": server.address})
    operator = Operator(SecurityConfig(keys=str(tmp_path / "keys")), tmp_path / "endpoints")
    assert operator.headers(server.address, changes=True)
    assert may_belong_to(server.address, os.getuid()) and may_belong_to("10.1.2.3:80", 12345)
    assert not may_belong_to(server.address, 12345) and not may_belong_to("[::1]:1", os.getuid())
    if os.getuid() == 0:
        os.chown(tmp_path / "endpoints" / "buffer.json", 12345, -1)
    else:
        monkeypatch.setattr("launch.observation.http_json.may_belong_to", lambda address, user: False)
    operator = Operator(SecurityConfig(keys=str(tmp_path / "keys")), tmp_path / "endpoints")
    assert fetch_json(server.address, "/status", operator=operator) == {"x": 1}
    assert server.authorizations == [None]


@pytest.mark.parametrize("answer", [b"", b"[]", b"\xff", b"x" * (1 << 16), b"[" * 100_000])
def test_responses_are_checked(
    server: SimpleNamespace, answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.observation.http_json._MAX_RESPONSE_BYTES", 1 << 17)
    server.answer = answer
    assert fetch_json(server.address, "/status") is None
    with pytest.raises(ConnectionError):
        post_json(server.address, "/control/drain", {})
    server.answer, server.status = b'{"error": "no"}', 401
    for refused in (lambda: fetch_json(server.address, "/x"), lambda: post_json(server.address, "/x", {})):
        with pytest.raises(ConfigError, match="refuses this command: no"):
            refused()


def test_endless_answer_is_cut(server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.observation.http_json._MAX_RESPONSE_BYTES", 1 << 16)
    server.answer = b'{"x": "' + b"y" * (1 << 20)
    assert fetch_json(server.address, "/status") is None
