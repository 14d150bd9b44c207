"""Headless Chromium for tests, by its DevTools protocol over two pipes: no driver and no package is needed."""

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# The browser reads file descriptor 3 and writes 4; both ends are first moved out of the way of each other.
LAUNCH = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 20) for end in sys.argv[1:3]]
for end, number in zip(ends, (3, 4)):
    os.dup2(end, number)
    os.close(end)
os.execv(sys.argv[3], sys.argv[3:])
"""
SECONDS = 60  # for one answer; a machine may be busy


class Page:
    """One tab. `said` holds what it complained of, `requests` the addresses that it asked for."""

    def __init__(self, reads, writes):
        self._reads, self._writes, self._ids, self._rest = reads, writes, itertools.count(1), b""
        self._events, self._session, self.said, self.requests = [], None, [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """A DevTools command; returns its result."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda m: m.get("id") == number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, path, width=1280, height=900, dark=False, touch=False):
        """Shows a file on a screen of this size, and forgets what was said before."""
        self.said, self.requests = [], []
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self._events.clear()
        self.call("Page.navigate", url=Path(path).absolute().as_uri())
        self._until(lambda m: m.get("method") == "Page.loadEventFired")

    def run(self, script):
        """The value of a JavaScript expression; a promise is waited for. Raises what it throws."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"].get("description"))
        return found["result"].get("value")

    def mouse(self, kind, x, y, **more):
        """A mouse event as the user's own: kind is mouseMoved, mousePressed, mouseReleased or mouseWheel."""
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def click(self, x, y):
        """Presses and lifts the left button."""
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(kind, x, y, button="left", clickCount=1)

    def key(self, name):
        """Presses and lifts a key, e.g. "Enter", "ArrowRight" or "+"."""
        text = {"Enter": "\r"}.get(name, name if len(name) == 1 else "")
        code = {"Enter": 13}.get(name, 0)
        self.call("Input.dispatchKeyEvent", type="keyDown", key=name, text=text, windowsVirtualKeyCode=code)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=name, windowsVirtualKeyCode=code)

    def screenshot(self, path, whole=False):
        """A PNG of the window, or of the whole page."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    def _until(self, wanted):
        """The next message, kept or new, that is wanted."""
        ends = time.monotonic() + SECONDS
        for i, message in enumerate(self._events):
            if wanted(message):
                return self._events.pop(i)
        while time.monotonic() < ends:
            if not select.select([self._reads], [], [], 1)[0]:
                continue
            data = os.read(self._reads, 1 << 20)
            if not data:
                raise RuntimeError("Chromium ended")
            *whole, self._rest = (self._rest + data).split(b"\0")
            found = None
            for message in map(json.loads, whole):
                self._note(message)
                if found is None and wanted(message):
                    found = message
                else:
                    self._events.append(message)
            if found is not None:
                return found
        raise TimeoutError(f"Chromium gave no answer in {SECONDS} s")

    def _note(self, message):
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Runtime.consoleAPICalled":
            self.said.append(str(parameters["args"]))
        elif method == "Runtime.exceptionThrown":
            self.said.append(str(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.said.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])


@contextlib.contextmanager
def browser(folder):
    """A Page; `folder` holds the browser's profile."""
    (their_in, our_out), (our_in, their_out) = os.pipe(), os.pipe()
    options = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run",
               "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
               "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND", "about:blank"]  # fmt: skip
    words = [sys.executable, "-c", LAUNCH, str(their_in), str(their_out), BINARY, *options]
    with subprocess.Popen(words, pass_fds=(their_in, their_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                          start_new_session=True) as process:  # fmt: skip
        os.close(their_in)
        os.close(their_out)
        try:
            page = Page(our_in, our_out)
            yield page
            with contextlib.suppress(RuntimeError):
                page._session = None
                page.call("Browser.close")
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            os.close(our_in)
            os.close(our_out)
