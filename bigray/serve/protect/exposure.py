"""Whether an endpoint may listen where the serve file says (driver, before anything starts)."""

from __future__ import annotations

import ipaddress

from bigray.errors import SpecError


def check_exposure(host: str, has_keys: bool, is_open: bool) -> None:
    """Refuse an endpoint that other machines can reach and that anybody may ask, unless that is what was asked for.

    Raises:
        SpecError: `host` is not of this machine alone, there are no keys, and `--open` was not given.
    """
    if has_keys or is_open or is_loopback(host):
        return
    raise SpecError(
        f"http_options.host: '{host}' can be reached from other machines and needs keys: `bigray keys add NAME --file "
        f"keys.json`, then `keys: keys.json` in the serve file's args; or --open to let anybody ask"
    )


def check_grpc_exposure(has_keys: bool, is_open: bool) -> None:
    """Refuse gRPC that anybody may ask: replicas listen for it on all interfaces, whatever `http_options.host` says.

    Raises:
        SpecError: there are no keys, and `--open` was not given.
    """
    if not (has_keys or is_open):
        raise SpecError(
            "grpc_options: Ray lets replicas listen for gRPC on all interfaces, so it needs keys: `bigray keys add "
            "NAME --file keys.json`, then `keys: keys.json` in the serve file's args; or --open to let anybody ask"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`; a name other than `localhost` counts as reachable by others."""
    name = host.strip().removeprefix("[").removesuffix("]").lower()
    if name == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address in ipaddress.ip_network("127.0.0.0/8" if address.version == 4 else "::1/128")
