from __future__ import annotations

import pytest

from bigray.errors import SpecError
from bigray.serve.protect.exposure import check_exposure

HERE = ["127.0.0.1", "127.0.0.53", "127.255.255.254", "::1", "[::1]", "localhost", "LOCALHOST"]
EVERYWHERE = ["0.0.0.0", "::", "", "192.168.1.4", "10.0.0.1", "8.8.8.8", "fe80::1", "::ffff:10.0.0.1"]
NAMES = ["example.org", "localhost.example.org", "127.0.0.1.example.org", "myhost", "127.1", "2130706433", "128.0.0.1"]


@pytest.mark.parametrize("host", HERE)
def test_this_machine_alone_needs_no_key(host):
    check_exposure(host, has_keys=False, is_open=False)


@pytest.mark.parametrize("host", EVERYWHERE + NAMES)
def test_what_others_can_reach_needs_a_key_or_a_word(host):
    with pytest.raises(SpecError) as caught:
        check_exposure(host, has_keys=False, is_open=False)
    check_exposure(host, has_keys=True, is_open=False)
    check_exposure(host, has_keys=False, is_open=True)
    text = str(caught.value)
    assert text.startswith(f"http_options.host: '{host}' ")
    assert "\n" not in text


def test_the_way_out_is_told():
    with pytest.raises(SpecError) as caught:
        check_exposure("0.0.0.0", has_keys=False, is_open=False)
    assert all(
        way in str(caught.value) for way in ("bigray keys add NAME --file keys.json", "keys: keys.json", "--open")
    )
