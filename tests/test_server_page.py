"""The page at `/`, looked at in Chromium: it loads nothing, streams, colours runs and compares with plain."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from fastapi.responses import HTMLResponse

from selfdraft import LLM
from selfdraft.async_llm import AsyncLLM
from selfdraft.server import app
from serving import served

from conftest import TEXT

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)
FILL = """<script>
field("prompt").value = %s; field("reference").value = %s; field("form").elements.mode.value = "text";
field("beside").checked = true; send();
</script><script async src="/wait"></script>"""


def test_the_page_is_one_file() -> None:
    page = (Path(app.__file__).parent / "page.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert "http" not in page
    assert "default-src 'none'" in app.CONTENT


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_page_in_a_browser(folder: Any, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    llm = LLM(str(folder), "llma")
    text = llm.generate(TEXT[:40], raw=True, max_new_tokens=128).text
    with served(AsyncLLM.load(llm)) as running:

        async def filled() -> HTMLResponse:
            page = bytes((await app._page()).body).decode() + FILL % (json.dumps(TEXT[:40]), json.dumps(text))
            allowed = app.CONTENT.replace("script-src", "script-src 'self'")  # for what it waits for
            return HTMLResponse(page, headers={"Content-Security-Policy": allowed})

        async def wait() -> HTMLResponse:
            """Its answer, which the browser waits for before it shows the page, comes after the texts."""
            for _ in range(600):
                if b'endpoint="completions",outcome="answered"} 2' in running.serving.metrics.page():
                    break
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.5)
            return HTMLResponse("")

        running.app.add_api_route("/filled", filled)
        running.app.add_api_route("/wait", wait)
        flags = "--headless --no-sandbox --disable-gpu --dump-dom"
        words = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path}"]
        url = f"http://127.0.0.1:{running.port}/filled"
        done = subprocess.run([*words, url], capture_output=True, text=True, timeout=120, check=True)
    shown = done.stdout
    assert ">The two texts are identical.</div>" in shown
    assert re.search(r'<mark class="run[01]">', shown)
    figures = re.findall(r'<div class="figures">([^<]+)</div>', shown)
    assert [line.split(":")[0] for line in figures] == ["llma", "plain"]
    assert all(re.search(r"\d+ tokens, [\d.]+ a forward, [\d.]+ tokens/s", line) for line in figures)
