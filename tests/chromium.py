"""A headless Chromium over its debugging pipe: no driver, no package, no port."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FOUND = os.environ.get("GAS_ENGINE_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
WITHOUT = "needs Chromium: apt-get install -y chromium, or GAS_ENGINE_CHROMIUM=/path/to/chrome"


class Chromium:
    """One page at a time, at any width, in light or dark; ``errors`` collects what its console complains of."""

    def __enter__(self) -> Chromium:
        self.folder = tempfile.TemporaryDirectory(prefix="chromium", ignore_cleanup_errors=True)
        (theirs_in, self.out), (self.inn, theirs_out) = os.pipe(), os.pipe()
        command = [
            FOUND, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--remote-debugging-pipe", f"--user-data-dir={self.folder.name}", "about:blank",
        ]  # fmt: skip

        def take_places() -> None:
            """Chromium reads commands from descriptor 3 and answers on 4."""
            high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 100) for descriptor in (theirs_in, theirs_out)]
            for descriptor, place in zip(high, (3, 4), strict=True):
                os.dup2(descriptor, place)
                os.close(descriptor)

        self.process = subprocess.Popen(
            command, close_fds=False, preexec_fn=take_places, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in), os.close(theirs_out)
        self.count, self.read, self.errors, self.session = 0, b"", list[str](), None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *error: object) -> None:
        self.session = None
        try:
            self.send("Browser.close")
        finally:
            self.process.wait(20)
            os.close(self.inn), os.close(self.out)
            self.folder.cleanup()

    def send(self, method: str, **parameters):
        """The result of a command; what is told meanwhile is looked through for errors."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self.count:
            self._hear(answer)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def _message(self, wait: float = 60):
        end = time.monotonic() + wait
        while b"\0" not in self.read:
            ready, _, _ = select.select([self.inn], [], [], max(0, end - time.monotonic()))
            part = os.read(self.inn, 1 << 20) if ready else b""
            assert part, "Chromium says nothing"
            self.read += part
        line, _, self.read = self.read.partition(b"\0")
        return json.loads(line)

    def _hear(self, message) -> None:
        said, kind = message.get("params", {}), message.get("method")
        if kind == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(said["exceptionDetails"])[:500])
        if kind == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(said["args"])[:500])
        if kind == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.errors.append(said["entry"]["text"])
        if kind == "Network.requestWillBeSent" and not said["request"]["url"].startswith(("file:", "data:", "about:")):
            self.errors.append(f"asked the network for {said['request']['url']}")

    def open(self, path, width: int, dark: bool = False, height: int = 900) -> None:
        """Load a file, at a width, and wait until it is drawn."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=features)
        self.size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **self.size)
        self.send("Page.navigate", url=path.absolute().as_uri())
        self.until("document.readyState === 'complete' && location.protocol === 'file:'")
        self.ask("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 50))))")

    def ask(self, expression: str):
        """The value of an expression of the page, awaited if it is a promise."""
        answer = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression: str) -> None:
        end = time.monotonic() + 30
        while not self.ask(expression):
            assert time.monotonic() < end, expression
            time.sleep(0.02)

    def key(self, name: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)

    def picture(self, path, whole: bool = False):
        """A PNG of what is seen, or of the whole page."""
        height = self.ask("document.documentElement.scrollHeight" if whole else "innerHeight + scrollY")
        top = 0 if whole else self.ask("scrollY")
        clip = {"x": 0, "y": top, "width": self.size["width"], "height": height - top, "scale": 1}
        options = {"format": "png", "captureBeyondViewport": True, "clip": clip}
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", **options)["data"]))
        return path
