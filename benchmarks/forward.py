"""The reference: an aiohttp server that forwards bytes with aiohttp's client and looks at nothing.

python -m benchmarks.forward --port N --upstream URL
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator

import aiohttp
import uvloop
from aiohttp import web

HOP_HEADERS = {"host", "connection", "content-length", "transfer-encoding", "keep-alive"}
UPSTREAM = web.AppKey("upstream", str)
SESSION = web.AppKey("session", aiohttp.ClientSession)


async def forward(request: web.Request) -> web.StreamResponse:
    """Send the request on as it is; a stream comes back as it arrives, other answers whole."""
    headers = {
        name: value for name, value in request.headers.items() if name.lower() not in HOP_HEADERS
    }
    url = request.app[UPSTREAM] + request.path_qs
    body = await request.read() if request.body_exists else None
    session = request.app[SESSION]
    async with session.request(request.method, url, data=body, headers=headers) as answer:
        passed = {"content-type": answer.headers.get("content-type", "")}
        if answer.content_type != "text/event-stream":
            return web.Response(body=await answer.read(), status=answer.status, headers=passed)
        stream = web.StreamResponse(status=answer.status, headers=passed)
        await stream.prepare(request)
        async for data in answer.content.iter_any():
            await stream.write(data)
        await stream.write_eof()
        return stream


async def session(app: web.Application) -> AsyncIterator[None]:
    """The client, as long as the server lives."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as opened:
        app[SESSION] = opened
        yield


async def serve(port: int, upstream: str) -> None:
    """Forward until the process is ended."""
    app = web.Application(client_max_size=1 << 30)
    app[UPSTREAM] = upstream
    app.cleanup_ctx.append(session)
    app.router.add_route("*", "/{path:.*}", forward)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
    await asyncio.Event().wait()


def main() -> None:
    """Entry point of the child process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", required=True)
    options = parser.parse_args()
    uvloop.run(serve(options.port, options.upstream))


if __name__ == "__main__":
    main()
