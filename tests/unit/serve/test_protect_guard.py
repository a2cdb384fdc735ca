from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from bigray.errors import StorageError
from bigray.serve.http import Refusal
from bigray.serve.protect.guard import Guard
from bigray.serve.protect.keys import create_key, revoke_key


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def secret(file: Path) -> str:
    return create_key(file, "anna")


def bearer(secret: str) -> dict[bytes, bytes]:
    return {b"authorization": f"Bearer {secret}".encode()}


def refusal(guard: Guard, headers: dict[bytes, bytes], scope: str = "predict") -> Refusal:
    with pytest.raises(Refusal) as caught:
        guard.authorize(headers, scope)
    assert "\n" not in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    "show",
    [
        lambda secret: {b"authorization": f"Bearer {secret}".encode()},
        lambda secret: {b"authorization": f"bearer {secret}".encode()},
        lambda secret: {b"authorization": f"BEARER   {secret} ".encode()},
        lambda secret: {b"x-api-key": secret.encode()},
        lambda secret: {b"x-api-key": f" {secret}".encode(), b"authorization": b"Basic YTpi"},
    ],
)
def test_a_key_counts_in_either_header(file, secret, show):
    assert Guard(file).authorize(show(secret), "predict").name == "anna"


@pytest.mark.parametrize(
    "show",
    [
        lambda secret: {},
        lambda secret: {b"authorization": b""},
        lambda secret: {b"authorization": b"Bearer"},
        lambda secret: {b"authorization": b"Bearer "},
        lambda secret: {b"authorization": secret.encode()},
        lambda secret: {b"authorization": f"Basic {secret}".encode()},
        lambda secret: {b"authorization": f"Bearer {secret}x".encode()},
        lambda secret: {b"authorization": f"Bearer {secret} {secret}".encode()},
        lambda secret: {b"authorization": b"Bearer \xff\x00"},
        lambda secret: {b"authorization": b"Bearer wrong", b"x-api-key": secret.encode()},
        lambda secret: {b"x-api-key": b"bgr_00000000_" + b"A" * 43},
        lambda secret: {b"cookie": f"key={secret}".encode()},
        lambda secret: {b"x-api-key": b"x" * 1_000_000},
    ],
)
def test_without_a_valid_key_all_are_told_the_same(file, secret, show):
    found = refusal(Guard(file), show(secret))
    nothing = refusal(Guard(file), {})
    assert (found.status, found.headers) == (401, ((b"www-authenticate", b'Bearer realm="bigray"'),))
    assert found.message == nothing.message


def test_a_revoked_key_is_told_what_an_unknown_one_is(file, secret):
    revoke_key(file, "anna")
    guard = Guard(file)
    assert refusal(guard, bearer(secret)).message == refusal(guard, {}).message


def test_a_key_without_the_scope_is_refused_with_403(file, secret):
    found = refusal(Guard(file), bearer(secret), "admin")
    assert (found.status, found.message) == (403, "this key may not do that: it lacks the scope 'admin'")


def test_an_admin_key_may_do_both(file):
    secret = create_key(file, "root", scopes=("admin",))
    guard = Guard(file)
    assert guard.authorize(bearer(secret), "admin") == guard.authorize(bearer(secret), "predict")


def test_a_key_that_asks_too_often_is_told_when_to_come_back(file):
    clock = Clock()
    secret = create_key(file, "batch", rate_per_s=0.25)
    guard = Guard(file, clock=clock)
    guard.authorize(bearer(secret), "predict")
    found = refusal(guard, bearer(secret))
    assert (found.status, found.headers) == (429, ((b"retry-after", b"4"),))
    clock.now = 4.0
    assert guard.authorize(bearer(secret), "predict").name == "batch"


def test_the_wait_is_told_as_one_second_at_least(file):
    secret = create_key(file, "fast", rate_per_s=10)
    guard = Guard(file, clock=Clock())
    for _ in range(10):
        guard.authorize(bearer(secret), "predict")
    assert refusal(guard, bearer(secret)).headers == ((b"retry-after", b"1"),)


def test_replicas_share_the_rate(file):
    secret = create_key(file, "fast", rate_per_s=10)
    guard = Guard(file, clock=Clock())
    guard.set_replicas(5)
    for _ in range(2):
        guard.authorize(bearer(secret), "predict")
    assert refusal(guard, bearer(secret)).status == 429


def test_an_open_guard_lets_everybody_through():
    guard = Guard()
    assert guard.is_open
    assert guard.authorize({}, "admin") is None
    assert guard.reload() is False


def test_a_file_without_live_keys_lets_nobody_through(file, secret):
    revoke_key(file, "anna")
    guard = Guard(file)
    assert not guard.is_open
    assert refusal(guard, bearer(secret)).status == 401


@pytest.mark.parametrize("content", [None, "", "{", '{"format": 9}'])
def test_a_guard_does_not_start_without_its_file(file, content):
    if content is not None:
        file.write_text(content)
    with pytest.raises(StorageError, match=r"keys\.json"):
        Guard(file)


def test_new_and_revoked_keys_count_after_a_reload(file, secret):
    guard = Guard(file)
    new = create_key(file, "ben")
    revoke_key(file, "anna")
    assert guard.authorize(bearer(secret), "predict").name == "anna"
    assert guard.reload() is True
    assert guard.authorize(bearer(new), "predict").name == "ben"
    assert refusal(guard, bearer(secret)).status == 401
    assert guard.reload() is False


def test_a_reload_does_not_give_a_key_its_requests_back(file):
    secret = create_key(file, "slow", rate_per_s=1)
    guard = Guard(file, clock=Clock())
    guard.authorize(bearer(secret), "predict")
    create_key(file, "ben")
    assert guard.reload() is True
    assert refusal(guard, bearer(secret)).status == 429


@pytest.mark.parametrize("breaking", [lambda file: file.write_text("{"), lambda file: file.unlink()])
def test_a_file_that_breaks_changes_nothing_and_is_told_once(file, secret, caplog, breaking):
    guard = Guard(file)
    good = file.read_bytes()
    breaking(file)
    with caplog.at_level(logging.WARNING, logger="ray.serve"):
        assert [guard.reload() for _ in range(3)] == [False] * 3
    assert [record.getMessage() for record in caplog.records] == [f"bigray: keys stay as they were: {guard.problem}"]
    assert str(file) in guard.problem
    assert guard.authorize(bearer(secret), "predict").name == "anna"
    file.write_bytes(good)
    guard.reload()
    assert guard.problem == ""


def test_neither_refusals_nor_logs_hold_a_secret_or_a_hash(file, secret, caplog):
    guard = Guard(file)
    digest = json.loads(file.read_text())["keys"][0]["sha256"]
    texts = [refusal(guard, bearer(secret + "x")).message, refusal(guard, bearer(secret), "admin").message]
    file.write_text(file.read_text().replace('"predict"', f'"{secret}"'))
    guard.reload()
    texts += [guard.problem, caplog.text]
    assert guard.problem
    assert not any(secret in text or digest in text for text in texts)
