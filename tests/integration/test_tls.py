"""An endpoint with a certificate and keys, which is how one is reached from other machines."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from bigray.cluster.connect import connect
from bigray.data.features import Column
from bigray.errors import DeployError, SpecError
from bigray.serve import runner
from bigray.serve.client import Client
from bigray.serve.config import ServeSpec, load_serve
from bigray.serve.protect.keys import create_key
from bigray.serve.sample import write_sample_bundle

pytestmark = pytest.mark.timeout(180)


def write_certificate(folder: Path) -> tuple[str, str]:
    """A key and a certificate for 127.0.0.1 that signs itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bigray test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    key_file, certificate_file = folder / "key.pem", folder / "certificate.pem"
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return str(key_file), str(certificate_file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def bundle(folder: Path) -> str:
    columns = (Column(name="width"), Column(name="height"))
    return write_sample_bundle(str(folder), name="area", columns=columns, class_names=(), onnx=False)


@pytest.fixture(scope="module")
def key(folder: Path) -> str:
    return create_key(folder / "keys.json", "test")


@pytest.fixture(scope="module")
def spec(folder: Path, key: str) -> ServeSpec:
    key_file, certificate_file = write_certificate(folder)
    spec = load_serve("serve/local.yaml").with_port(0).with_args(keys=str(folder / "keys.json"))
    tls = {"host": "0.0.0.0", "ssl_keyfile": key_file, "ssl_certfile": certificate_file}
    return spec.model_copy(update={"http_options": spec.http_options.model_copy(update=tls)})


@pytest.fixture(scope="module")
def endpoint(bundle: str, spec: ServeSpec) -> Iterator[runner.Deployment]:
    with connect():
        yield runner.deploy(bundle, spec)
        runner.shutdown()


def test_without_a_key_file_it_does_not_listen_beyond_this_machine(bundle, spec):
    open_to_all = spec.with_args(keys=None)
    with pytest.raises(SpecError, match=r"'0\.0\.0\.0' can be reached from other machines and needs keys"):
        runner.deploy(bundle, open_to_all)


def test_it_answers_who_trusts_its_certificate_and_has_a_key(endpoint, folder, key):
    with Client(endpoint.url, key=key, verify=str(folder / "certificate.pem")) as client:
        assert client.predict([{"width": 1.0, "height": 2.0}])[0].keys() == {"value"}


def test_who_does_not_trust_its_certificate_is_not_answered(endpoint, key):
    with Client(endpoint.url, key=key) as client, pytest.raises(DeployError, match="certificate"):
        client.predict([{"width": 1.0, "height": 2.0}])


def test_plain_http_is_not_answered(endpoint, key):
    with Client(endpoint.url.replace("https", "http"), key=key) as client, pytest.raises(DeployError):
        client.predict([{"width": 1.0, "height": 2.0}])


def test_a_key_is_asked_for_all_the_same(endpoint, folder):
    with (
        Client(endpoint.url, verify=str(folder / "certificate.pem")) as client,
        pytest.raises(DeployError, match="401"),
    ):
        client.predict([{"width": 1.0, "height": 2.0}])
