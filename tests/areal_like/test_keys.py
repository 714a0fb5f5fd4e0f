"""The directory of keys and its commands, a daemon's keyring, and the addresses that need keys."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from areal_like.config import SecurityConfig
from areal_like.errors import ConfigError
from areal_like.security.administration import add_key, init_keys, revoke_key, rotate_keys
from areal_like.security.binding import require_loopback_or_keys, resolves_to_loopback
from areal_like.security.keyring import Keyring
from areal_like.security.keys import AllowList, KeyDirectory, KeyRole
from launch.cli import main
from tests.support.keys import keyring, keys_of_machine, new_keys


class Clock:
    """Unix seconds that the test sets."""

    def __init__(self, now_s: float) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def allowed(path: Path) -> AllowList:
    return KeyDirectory(path).allowed


def secrets_of(path: Path) -> set[str]:
    """Everything in a directory of keys that must stay there."""
    documents = [json.loads(file.read_text()) for file in path.glob("*.secret")]
    return {document[field] for document in documents for field in ("secret", "token")}


def test_init_makes_a_private_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys"
    assert main(["keys", "init", str(path)]) == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    files = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()}
    roles = ("agent", "buffer", "monitor", "operator", "rollout", "router", "scorer", "trainer")
    secret = {f"{role}.secret" for role in roles}
    assert set(files) == secret | {
        "public.json",
        *(f"{role}.token" for role in ("operator", "monitor", "agent", "scorer")),
    }
    assert {mode for name, mode in files.items()} == {0o600}
    public = (path / "public.json").read_text()
    assert main(["keys", "show", str(path)]) == 0
    shown = capsys.readouterr().out
    assert len(secrets_of(path)) == 16
    for secret_text in secrets_of(path):
        assert secret_text not in public and secret_text not in shown
    assert [line.split()[:2] for line in shown.splitlines()[3:]] == [[role, role] for role in roles]
    assert main(["keys", "init", str(path)]) == 2, "keys are not overwritten"
    assert "is not empty" in capsys.readouterr().err
    assert (path / "public.json").read_text() == public


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["explode", "DIR"], "invalid choice"),
        (["show", "DIR", "--grace", "3"], "keys show takes no --grace"),
        (["init", "DIR", "name"], "keys init takes no NAME"),
        (["add", "DIR", "gpu-7"], "keys add: give DIR, NAME and --role ROLE"),
        (["add", "DIR", "a/b", "--role", "rollout"], "use 1 to 64 of the characters"),
        (["add", "DIR", "rollout", "--role", "rollout"], "has a key 'rollout'"),
        (["revoke", "DIR"], "keys revoke: give DIR and NAME"),
        (["revoke", "DIR", "nobody"], "has no key 'nobody' (keys: agent, buffer, "),
        (["rotate", "DIR", "nobody"], "has no key 'nobody'"),
        (["rotate", "DIR", "--grace", "-1"], "give seconds, 0 or more"),
        (["show", "ELSEWHERE"], "make the keys with `areal-like keys init"),
        (["rotate", "ELSEWHERE"], "make keys with `areal-like keys init"),
        (["init", "/proc/1/keys"], "/proc/1/keys: "),
    ],
)
def test_a_mistake_changes_no_key(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = new_keys(tmp_path / "keys")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    places = {"DIR": str(path), "ELSEWHERE": str(tmp_path / "nowhere")}
    assert main(["keys", *(places.get(arg, arg) for arg in args)]) == 2
    assert message in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_old_and_new_key_are_valid_in_the_grace(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    init_keys(path, [KeyRole.ROLLOUT, KeyRole.BUFFER], now_unix_s=1000.0)
    old = KeyDirectory(path).identity("rollout")
    rotate_keys(path, "rollout", grace_s=60.0, now_unix_s=2000.0)
    new = KeyDirectory(path).identity("rollout")
    assert new.public != old.public and new.token != old.token
    keys = allowed(path)
    for identity, is_old in ((old, True), (new, False)):
        for now_s, is_valid in ((2059.0, True), (2061.0, not is_old)):
            assert (keys.key(identity.public, now_unix_s=now_s) is not None) is is_valid
            assert (keys.key_of_token(identity.token, now_unix_s=now_s) is not None) is is_valid
    assert [key.public for key in keys.valid(KeyRole.ROLLOUT, now_unix_s=2059.0)] == [new.public, old.public]
    assert keys.valid(KeyRole.BUFFER, now_unix_s=9e9), "the other key was not renewed"
    # A second rotation does not extend the grace of the first, even under a clock that was set back.
    rotate_keys(path, "rollout", grace_s=600.0, now_unix_s=1990.0)
    newest = KeyDirectory(path).identity("rollout")
    keys = allowed(path)
    assert keys.key(old.public, now_unix_s=2061.0) is None
    assert keys.valid(KeyRole.ROLLOUT, now_unix_s=2061.0)[0].public == newest.public
    rotate_keys(path, "rollout", grace_s=0, now_unix_s=3000.0)
    assert len(allowed(path).keys) == 2, "expired keys are removed"


def test_revoke_removes_old_and_new_keys(tmp_path: Path) -> None:
    path = new_keys(tmp_path / "keys")
    added = add_key(path, "gpu-7", KeyRole.ROLLOUT)
    rotate_keys(path, "gpu-7", grace_s=60)
    assert revoke_key(path, "gpu-7") == 2
    assert allowed(path).key(added.public, now_unix_s=added.added_unix_s) is None
    assert not (path / "gpu-7.secret").exists()
    assert len(allowed(path).keys) == len(KeyRole), "other keys of the role stay"


def test_a_keyring_follows_its_directory(tmp_path: Path) -> None:
    path = new_keys(tmp_path / "keys")
    clock = Clock(allowed(path).keys[0].added_unix_s + 1)
    ring = keyring(path, KeyRole.ROLLOUT, clock=clock)
    first, calls = ring.identity, list[str]()
    end = ring.subscribe(lambda: calls.append(ring.identity.public))
    rotate_keys(path, grace_s=60, now_unix_s=clock.now_s)
    ring.refresh()
    second = ring.identity
    assert second != first and calls == [second.public]
    assert ring.candidates(KeyRole.BUFFER)[0] == KeyDirectory(path).identity("buffer").public
    assert len(ring.candidates(KeyRole.BUFFER)) == 2
    clock.now_s += 61
    assert len(ring.candidates(KeyRole.BUFFER)) == 1 and ring.sender(first.public) is None
    end()
    # A broken copy changes nothing, and is repaired by the next one.
    public = (path / "public.json").read_text()
    (path / "public.json").write_text(public[:100])
    ring.refresh()
    assert ring.sender(second.public) is not None and len(calls) == 1
    (path / "public.json").write_text(public)
    revoke_key(path, "rollout")
    ring.refresh()
    assert ring.identity == second and ring.sender(second.public) is None
    assert not ring.is_named("rollout", KeyRole.ROLLOUT)


def test_a_new_secret_waits_for_its_public_key(tmp_path: Path) -> None:
    path = new_keys(tmp_path / "keys")
    machine = keys_of_machine(path, tmp_path / "machine", "rollout")
    ring = keyring(machine, KeyRole.ROLLOUT)
    first = ring.identity
    rotate_keys(path, grace_s=60)
    (machine / "rollout.secret").write_bytes((path / "rollout.secret").read_bytes())
    ring.refresh()
    assert ring.identity == first, "no server knows the new key yet"
    (machine / "public.json").write_bytes((path / "public.json").read_bytes())
    ring.refresh()
    assert ring.identity == KeyDirectory(path).identity("rollout")


def test_a_keyring_needs_the_right_key(tmp_path: Path) -> None:
    path = new_keys(tmp_path / "keys")
    with pytest.raises(ConfigError, match="this daemon needs one of role trainer"):
        Keyring.of(SecurityConfig(keys=str(path), identity="rollout"), role=KeyRole.TRAINER)
    with pytest.raises(ConfigError, match=r"gpu-7\.secret: No such file"):
        Keyring.of(SecurityConfig(keys=str(path), identity="gpu-7"), role=KeyRole.ROLLOUT)
    secret = (path / "rollout.secret").read_bytes()
    revoke_key(path, "rollout")
    (path / "rollout.secret").write_bytes(secret)
    (path / "rollout.secret").chmod(0o644)
    with pytest.raises(ConfigError, match=r"can be read by other users: chmod 600"):
        keyring(path, KeyRole.ROLLOUT)
    (path / "rollout.secret").chmod(0o600)
    with pytest.raises(ConfigError, match=r"is not in its public\.json, or has expired"):
        keyring(path, KeyRole.ROLLOUT)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("", False),
        ("*", False),
        ("eth0", False),
        ("::", False),
        ("192.0.2.1", False),
        ("::ffff:192.0.2.1", False),
    ],
)
def test_loopback_addresses(host: str, expected: bool) -> None:
    assert resolves_to_loopback(host) is expected


def test_an_open_address_needs_keys(tmp_path: Path) -> None:
    for host in ("127.0.0.1", "localhost"):
        require_loopback_or_keys(SecurityConfig(), host, setting="buffer.host")
    with pytest.raises(
        ConfigError, match=r"buffer\.host=0\.0\.0\.0 .* `areal-like keys init DIR` .*insecure"
    ):
        require_loopback_or_keys(SecurityConfig(), "0.0.0.0", setting="buffer.host")
    require_loopback_or_keys(SecurityConfig(insecure=True), "0.0.0.0", setting="buffer.host")
    require_loopback_or_keys(SecurityConfig(keys=str(tmp_path)), "0.0.0.0", setting="buffer.host")


@pytest.mark.parametrize(
    "change",
    [
        {"public": "x y" * 13 + "z"},
        {"public": ["k"] * 40},
        {"token_sha256": "\u00e9" * 64},
        {"added_unix_s": "yesterday"},
        {"expires_unix_s": "2030"},
        {"expires_unix_s": True},
    ],
    ids=str,
)
def test_a_malformed_entry_leaves_the_keys_as_they_were(tmp_path: Path, change: dict[str, object]) -> None:
    """Otherwise its first use would raise, in the event loop of every daemon."""
    path = new_keys(tmp_path / "keys")
    ring = keyring(path, KeyRole.ROLLOUT)
    before = ring.directory.allowed
    document = json.loads((path / "public.json").read_text())
    document["keys"][0] |= change
    (path / "public.json").write_text(json.dumps(document))
    ring.refresh()
    assert ring.directory.allowed is before
    with pytest.raises(ConfigError, match=r"public\.json"):
        KeyDirectory(path)
