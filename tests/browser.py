"""Headless Chromium, driven over a pipe by its own protocol (DevTools): it needs no library and no port."""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PATIENCE = 60  # seconds


class Browser:
    """One window. The profile keeps what pages keep (localStorage) for the next browser on it."""

    def __init__(self, profile: Path, page: Path):
        (self.read, theirs_out), (theirs_in, self.write) = os.pipe(), os.pipe()
        # the browser reads commands from descriptor 3, and writes answers to 4
        line = 'exec 8<&"$0" 9>&"$1"; shift; exec 3<&8 4>&9; exec "$@"'
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(
            ["bash", "-c", line, str(theirs_in), str(theirs_out), CHROMIUM, *flags, "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        os.close(theirs_in), os.close(theirs_out)
        self.number, self.rest, self.events, self.session = 0, b"", [], None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")
        self.go(page)

    def go(self, page: Path) -> None:
        before = len(self.events)
        self("Page.navigate", url=page.absolute().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events[before:]):
            self.events.append(self.next())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.session = None
        self("Browser.close")
        self.process.wait(PATIENCE)
        os.close(self.read), os.close(self.write)

    def __call__(self, method: str, **parameters) -> dict:
        """Give a command, and wait for its answer."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (answer := self.next()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def next(self) -> dict:
        while b"\0" not in self.rest:
            self.rest += os.read(self.read, 1 << 20) or exit("the browser has ended")
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def value(self, expression: str):
        """What a JavaScript expression gives."""
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, keys: str | list[str]) -> None:
        for key in keys:
            self("Input.dispatchKeyEvent", type="keyDown", key=key, **({"text": key} if len(key) == 1 else {}))
            self("Input.dispatchKeyEvent", type="keyUp", key=key)

    def saved(self, folder: Path, action: str) -> Path:
        """The file that an expression makes the page save."""
        self("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        self.value(action)
        end = time.monotonic() + PATIENCE
        while not (files := [file for file in folder.glob("*") if not file.name.endswith(".crdownload")]):
            assert time.monotonic() < end
            time.sleep(0.02)
        return files[0]

    def picture(self, file: Path, width: int, height: int, dark: bool = False, whole: bool = False) -> None:
        """A screenshot."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        shot = self("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        file.write_bytes(base64.b64decode(shot))

    def complaints(self) -> list[dict]:
        """Errors and other lines on the console, and requests other than for the page and its pictures."""
        names = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        wrong = [event for event in self.events if event.get("method") in names]
        requests = [
            e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"
        ]
        return wrong + [url for url in requests if not url.startswith(("data:", "file:", "about:", "blob:"))]
