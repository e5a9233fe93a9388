"""Headless Chromium over a pipe, by its DevTools protocol: no port, no driver, no package.

with Browser(executable()) as browser:
    page = browser.open(path, width=360)
    page.evaluate("document.title"), page.console, page.requests
"""

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",  # it cannot be had by root, nor in most containers
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
SECONDS = 60  # for any answer: compilers may be at work beside


def executable() -> str | None:
    """The browser of this machine: $CHROMIUM, or the first of NAMES on the path."""
    names = (os.environ.get("CHROMIUM", ""), *NAMES)
    return next(filter(None, map(shutil.which, filter(None, names))), None)


class Browser:
    def __init__(self, command: str):
        self._numbers = itertools.count(1)
        self._unread = b""
        self.events: list[dict] = []
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # The browser reads from descriptor 3 and writes to 4; its ends are moved there from higher ones.
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
        move = f'exec "$@" 3<&{high[0]} 4>&{high[1]} {high[0]}<&- {high[1]}>&-'
        flags = (*FLAGS, f"--user-data-dir={self._profile.name}")
        self._process = subprocess.Popen(
            ["bash", "-c", move, "browser", command, *flags, "about:blank"],
            pass_fds=high,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for end in (theirs_in, theirs_out, *high):
            os.close(end)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # The first end of the pipe to go takes the browser and its children with it.
        os.close(self._out)
        os.close(self._in)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._profile.cleanup()

    def call(self, method: str, session: str | None = None, **params) -> dict:
        """The result of a method; events that come before it are kept. Raises RuntimeError for an error."""
        number = next(self._numbers)
        message = {
            "id": number,
            "method": method,
            "params": params,
            **({"sessionId": session} if session else {}),
        }
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def wait(self, session: str, method: str) -> dict:
        """The first event of this name."""
        seen = 0
        while True:
            for event in self.events[seen:]:
                if event.get("sessionId") == session and event.get("method") == method:
                    return event
            seen = len(self.events)
            self.events.append(self._next())

    def _next(self) -> dict:
        end = time.monotonic() + SECONDS
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
            more = os.read(self._in, 1 << 20) if ready else b""
            if not more:
                raise TimeoutError("the browser does not answer" if not ready else "the browser has gone")
            self._unread += more
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, *, width=1280, height=900, phone=False, dark=False, paper=False) -> "Page":
        """The page of a file, loaded, in a window of this size."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        scale = 2 if phone else 1
        page.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", media="print" if paper else "", features=[scheme])
        page.call("Page.navigate", url=path.resolve().as_uri())
        self.wait(session, "Page.loadEventFired")
        # Whatever the load set in motion has been drawn and reported after two frames.
        page.evaluate(
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))"
        )
        return page


class Page:
    def __init__(self, browser: Browser, session: str, target: str):
        self._browser, self._session, self._target = browser, session, target

    def call(self, method: str, **params) -> dict:
        return self._browser.call(method, self._session, **params)

    def evaluate(self, expression: str):
        """The value of a JavaScript expression (of a promise: what it comes to). Raises RuntimeError."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description"))
        return answer["result"].get("value")

    def _events(self, *methods: str) -> list[dict]:
        return [
            event["params"]
            for event in self._browser.events
            if event.get("sessionId") == self._session and event.get("method") in methods
        ]

    @property
    def console(self) -> list[str]:
        """All that the page, its errors and the browser have to say: exceptions, violations, warnings."""
        self.evaluate("0")  # brings in what is under way
        names = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event) for event in self._events(*names)]

    @property
    def requests(self) -> list[str]:
        """Addresses that the page asked for, its own first."""
        self.evaluate("0")
        return [event["request"]["url"] for event in self._events("Network.requestWillBeSent")]

    def press(self, x: float, y: float) -> None:
        """A click of the mouse, in pixels of the window."""
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = "none" if kind == "mouseMoved" else "left"
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=1)

    def point(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def tap(self, x: float, y: float) -> None:
        """A finger on a touch screen."""
        for kind, points in (("touchStart", [{"x": x, "y": y}]), ("touchEnd", [])):
            self.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)

    def key(self, name: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name)

    def screenshot(self, path: Path | None = None, whole=True) -> bytes:
        """A PNG of the whole page (or of the window), written to `path` if there is one."""
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        data = base64.b64decode(picture["data"])
        if path:
            path.write_bytes(data)
        return data

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)
