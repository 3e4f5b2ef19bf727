"""Makes one HTML file of the dashboard's files, so that it opens from a disk. Pure.

A page that is opened as ``file://`` may not load modules or fetch anything. So styles and scripts
are written into it, and its modules become ``data:`` addresses in an import map: they stay the
modules that the gateway serves, only their names are others. Nothing is bundled or compiled.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import posixpath
import re
from collections.abc import Mapping

__all__ = ["one_file"]

INDEX, APP = "index.html", "app.js"

SCOPE = "driftgate/"
"""Before the names of modules: a ``data:`` address has no folder that ``./x.js`` could start at."""

IMPORT = re.compile(r"""(\b(?:from|import)\s*)"(\.{1,2}/[^"]+\.js)\"""")
"""``import … from "./x.js"``, ``export … from "./x.js"``, minified ones too."""

STYLE = re.compile(r'<link rel="stylesheet" href="/static/([^"]+)" />')
ICON = re.compile(r'href="/static/([^"]+\.svg)"')
CLASSIC = re.compile(r'<script src="/static/([^"]+)"></script>')
MODULE = f'<script type="module" src="/static/{APP}"></script>'
HEAD = '<meta charset="utf-8" />'


def one_file(files: Mapping[str, bytes], *, data: str) -> str:
    """The dashboard as one page that first runs the script at ``data``, relative to it.

    ``files``: the dashboard's, by their names below ``/static/``. Its policy forbids every
    connection: what it shows is in it or lies beside it. KeyError where a file is missing.
    """
    text = {name: body.decode() for name, body in files.items()}
    page = text[INDEX]
    page = STYLE.sub(lambda m: f"<style>{_inline(text[m[1]], 'style')}</style>", page)
    page = ICON.sub(lambda m: f'href="{_data_url(files[m[1]], "image/svg+xml")}"', page)
    page = CLASSIC.sub(lambda m: f"<script>{_inline(text[m[1]], 'script')}</script>", page)
    modules = _modules(text)
    start = (
        f'<script src="{html.escape(data)}"></script>\n'
        f'    <script type="importmap">{json.dumps({"imports": modules})}</script>\n'
        f'    <script type="module">import "{SCOPE}{APP}";</script>'
    )
    assert MODULE in page
    page = page.replace(MODULE, start)
    policy = f'<meta http-equiv="content-security-policy" content="{_policy(page)}" />'
    return page.replace(HEAD, f"{HEAD}\n    {policy}", 1)


def _modules(text: Mapping[str, str]) -> dict[str, str]:
    """Address of each module that ``APP`` leads to, by its name in the import map."""
    found: dict[str, str] = {}
    wanted = [APP]
    while wanted:
        name = wanted.pop()
        if SCOPE + name in found:
            continue

        def renamed(match: re.Match[str], folder: str = posixpath.dirname(name)) -> str:
            target = posixpath.normpath(posixpath.join(folder, match[2]))
            wanted.append(target)
            return f'{match[1]}"{SCOPE}{target}"'

        source = IMPORT.sub(renamed, text[name])
        found[SCOPE + name] = _data_url(source.encode(), "text/javascript")
    return found


def _inline(source: str, element: str) -> str:
    """``source`` as the content of an element that ends at its first end tag."""
    assert f"</{element}" not in source.lower()
    return source


def _data_url(body: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(body).decode()}"


def _policy(page: str) -> str:
    """What the page may do: run and paint what is written into it here, load what lies beside it;
    no connection, no frame, no form."""

    def hashes(element: str) -> str:
        inline = re.findall(rf"<{element}(?: type=\"\w+\")?>(.*?)</{element}>", page, re.S)
        digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()) for s in inline]
        return " ".join(f"'sha256-{digest.decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src 'self' data: {hashes('script')}; "
        f"style-src {hashes('style')}; img-src data:; base-uri 'none'; form-action 'none'"
    )
