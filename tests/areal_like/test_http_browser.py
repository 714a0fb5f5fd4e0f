"""A web page in a real browser against a daemon without keys: requests from a page, and DNS rebinding."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.support.daemon_process import DaemonProcess

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed (Debian: apt install chromium)"),
]

PAGE = """<form id=f method=post target=frame action="DAEMON/control/drain"></form><iframe name=frame></iframe><script>
const tell = (text) => fetch("/told?" + encodeURIComponent(text), {keepalive: true});
const outcome = (name, promise) => promise.then(r => tell(name + " sent " + r.type), e => tell(name + " failed"));
document.getElementById("f").submit();
outcome("post", fetch("DAEMON/control/drain", {method: "POST", mode: "no-cors", body: "{}"}));
outcome("read", fetch("DAEMON/status"));
outcome("json", fetch("DAEMON/control/drain", {method: "POST", headers: {"content-type": "application/json"}, body: "{}"}));
</script>"""  # noqa: E501


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    daemon = DaemonProcess(tmp_path, "serve")
    daemon.wait_ready()
    yield daemon
    daemon.close()


def browse(url: str, directory: Path) -> str:
    """Opens a page in a browser that resolves evil.example to this machine; returns the page's DOM."""
    command = [CHROMIUM, "--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
               f"--user-data-dir={directory}", "--host-resolver-rules=MAP evil.example 127.0.0.1",
               "--virtual-time-budget=4000", "--dump-dom", url]  # fmt: skip
    if os.geteuid() == 0:
        command.insert(1, "--no-sandbox")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return done.stdout


def test_page_cannot_stop_a_run(daemon: DaemonProcess, tmp_path: Path) -> None:
    told: list[str] = []
    page = PAGE.replace("DAEMON", f"http://127.0.0.1:{daemon.port}").encode()

    class Evil(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name, _, query = self.path.partition("?")
            if name == "/told":
                told.append(unquote(query))
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(page if name == "/" else b"")

        def log_message(self, *_: object) -> None:
            """Prints nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Evil) as site:
        thread = threading.Thread(target=site.serve_forever)
        thread.start()
        try:
            browse(f"http://evil.example:{site.server_address[1]}/", tmp_path / "profile")
        finally:
            site.shutdown()
            thread.join()
    assert "post sent opaque" in told and "read failed" in told, told
    refused = re.search(r'areal_http_refused_total{reason="origin"} (\d+)', daemon.get("/metrics")[1])
    assert refused is not None and int(refused[1]) >= 3, "form, post and read have reached the daemon"
    assert json.loads(daemon.get("/status")[1])["not_ready"] == ""


def test_rebound_name_reads_nothing(daemon: DaemonProcess, tmp_path: Path) -> None:
    seen = browse(f"http://evil.example:{daemon.port}/status", tmp_path / "profile")
    assert "security.allowed_hosts" in seen and '"pid"' not in seen
    own = browse(f"http://localhost:{daemon.port}/status", tmp_path / "profile")
    assert '"pid"' in own, "a person may look at the page"
