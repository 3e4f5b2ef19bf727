"""What holds a connection is limited in number and time, and TLS is TLS."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from driftgate.client import Client
from driftgate.errors import DriftgateError
from driftgate.gateway import limits
from driftgate.gateway.app import GATEWAY, create_app
from driftgate.gateway.config import GatewayConfig
from driftgate.gateway.listen import listening, tls_context

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
WAIT_S = 20.0
"""For what should come within parts of a second; only a broken gateway takes this long."""


@contextlib.asynccontextmanager
async def gateway(
    tmp_path: Path, **options: Any
) -> AsyncIterator[tuple[web.Application, tuple[str, int]]]:
    config = GatewayConfig(upstream="http://127.0.0.1:9", port=0, store=tmp_path)
    app = create_app(config)
    refused = app[GATEWAY].metrics.refused.labels("connections").inc
    async with listening(app, config, shutdown_timeout_s=0.5, refused=refused, **options) as url:
        yield app, ("127.0.0.1", int(url.rpartition(":")[2]))


async def ask(host: str, port: int) -> bytes:
    """The answer to a question of health; empty where the connection is closed without one."""
    try:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(HEALTH)
        answer = await ended(reader)
        await close(writer)
    except ConnectionError:
        return b""
    return answer


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def ended(reader: asyncio.StreamReader) -> bytes:
    """What comes until the gateway closes the connection."""
    async with asyncio.timeout(WAIT_S):
        try:
            return await reader.read()
        except ConnectionError:
            return b""


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HTT", b"GET /healthz HTTP/1.1\r\nHost: l"])
async def test_a_request_that_does_not_come_is_not_waited_for(tmp_path: Path, sent: bytes) -> None:
    async with gateway(tmp_path, idle_timeout_s=0.2) as (_, address):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(sent)
        assert await ended(reader) == b""
        await close(writer)


async def test_a_kept_connection_that_idles_is_closed(tmp_path: Path) -> None:
    async with gateway(tmp_path, idle_timeout_s=0.2) as (_, address):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(HEALTH.replace(b"close", b"keep-alive"))
        assert (await ended(reader)).startswith(b"HTTP/1.1 200 ")
        await close(writer)


async def test_a_body_that_does_not_come_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BODY_TIMEOUT_S", 0.2)
    async with gateway(tmp_path) as (_, address):
        for path in (b"/v1/chat/completions", b"/api/trajectories"):
            reader, writer = await asyncio.open_connection(*address)
            head = b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{" % path
            writer.write(head)
            async with asyncio.timeout(WAIT_S):
                assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
            await close(writer)


async def test_a_connection_too_many_is_closed_and_counted(tmp_path: Path) -> None:
    async with gateway(tmp_path, max_connections=2) as (app, address):
        held = [await asyncio.open_connection(*address) for _ in range(2)]
        for _, writer in held:  # accepted, not only queued by the kernel
            writer.write(HEALTH.replace(b"close", b"keep-alive"))
        for reader, _ in held:
            await reader.readuntil(b"\r\n\r\n")
        assert await ask(*address) == b""
        assert b'driftgate_refused_total{why="connections"} 1.0' in app[GATEWAY].metrics.render()
        await close(held.pop()[1])
        async with asyncio.timeout(WAIT_S):
            while not (await ask(*address)).startswith(b"HTTP/1.1 200 "):
                pass  # it has not seen the other one leave
        await close(held.pop()[1])


async def test_an_agent_that_does_not_read_is_left(tmp_path: Path) -> None:
    ended = asyncio.Event()

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(bytes(1 << 20))
        finally:
            ended.set()

    app = web.Application()
    app.router.add_get("/", endless)
    config = GatewayConfig(upstream="http://127.0.0.1:9", port=0, store=tmp_path)
    async with listening(
        app, config, shutdown_timeout_s=0.5, refused=lambda: None, stalled_timeout_s=0.3
    ) as url:
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]), limit=1)
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with asyncio.timeout(WAIT_S):
            await ended.wait()
        writer.transport.abort()


# TLS.


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that vouches for itself, and its key."""
    folder, key = tmp_path_factory.mktemp("tls"), ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "driftgate tests")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert, private = folder / "cert.pem", folder / "key.pem"
    cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return cert, private


async def test_tls_is_spoken_and_nothing_else(
    tmp_path: Path, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = certificate
    config = GatewayConfig(
        upstream="http://127.0.0.1:9", port=0, store=tmp_path, tls_cert=cert, tls_key=key
    )
    app = create_app(config)
    async with listening(app, config, shutdown_timeout_s=0.5, refused=lambda: None) as url:
        assert url.startswith("https://127.0.0.1:")
        port = int(url.rpartition(":")[2])
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        async with Client(url) as client:
            minted = await client.mint("a")
        assert minted.base_url == f"{url}/t/a/v1"
        trusting = ssl.create_default_context(cafile=cert)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting)
        assert writer.get_extra_info("ssl_object").version() == "TLSv1.3"
        await close(writer)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEALTH)
        assert b"HTTP" not in await ended(reader)
        await close(writer)


async def test_old_tls_is_not_spoken(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = certificate
    config = GatewayConfig(
        upstream="http://127.0.0.1:9", store=tmp_path, tls_cert=cert, tls_key=key
    )
    context = tls_context(config)
    assert context is not None
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_a_certificate_that_cannot_be_used_is_named(
    tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    for cert in (tmp_path / "none.pem", certificate[1]):
        config = GatewayConfig(upstream="http://127.0.0.1:9", tls_cert=cert)
        with pytest.raises(DriftgateError, match=cert.name):
            tls_context(config)
    with pytest.raises(ValueError, match="tls_cert"):
        GatewayConfig(upstream="http://127.0.0.1:9", tls_key=certificate[1])
