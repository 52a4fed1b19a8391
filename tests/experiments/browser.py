"""A headless Chromium, which tests drive through two pipes, and pages that it opens."""

import contextlib
import functools
import http.server
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import threading

REPOSITORY = pathlib.Path(__file__).parents[2]
CHROMIUM = os.environ.get("FEDJAX_CLIP_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
RUNTIME = pathlib.Path(os.environ.get("FEDJAX_CLIP_ORT", REPOSITORY / "node_modules/onnxruntime-web")) / "dist"
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"),
)


class Browser:
    """A page of a headless Chromium, by the DevTools protocol over pipes: messages of JSON that end with a zero byte."""

    def __init__(self, profile):
        there, self.out = os.pipe()
        self.into, here = os.pipe()
        command = f'exec 3<&{there} 4>&{here}; exec "$@"'
        arguments = [CHROMIUM, *QUIET, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            ["bash", "-c", command, "bash", *arguments],
            pass_fds=(there, here),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(there)
        os.close(here)
        self.numbers, self.rest, self.session = itertools.count(1), b"", None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def ask(self, method, **params):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        message |= {} if self.session is None else {"sessionId": self.session}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                read = os.read(self.into, 65536)
                assert read, "Chromium has ended"
                self.rest += read
            told, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(told)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def run(self, code):
        """The value of a script, awaited."""
        found = self.ask("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def draw(self, points):
        """Draws a line through points of the canvas, in 0 .. 1, with the mouse."""
        left, top, size = self.run("(({left, top, width}) => [left, top, width])(drawing.getBoundingClientRect())")
        for number, (x, y) in enumerate(points):
            kind = "mousePressed" if number == 0 else "mouseMoved"
            where = {"x": left + size * x, "y": top + size * y, "button": "left", "buttons": 1, "clickCount": 1}
            self.ask("Input.dispatchMouseEvent", type=kind, **where)
        self.ask("Input.dispatchMouseEvent", type="mouseReleased", **{**where, "buttons": 0})

    def close(self):
        os.close(self.out)
        os.close(self.into)
        self.process.terminate()
        self.process.wait(20)


WAIT = """new Promise((done) => {{ const look = () => {{ const found = {found}; found ? done(found) : setTimeout(look, 50) }}; look() }})"""


@contextlib.contextmanager
def opened(site, profile):
    """A browser, and the address of a directory that is served to it, with onnxruntime-web at ``/ort/``."""
    (site / "ort").symlink_to(RUNTIME.resolve())

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments): ...

    handler = functools.partial(Handler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = Browser(profile)
        try:
            yield browser, f"http://127.0.0.1:{server.server_port}/"
        finally:
            browser.close()
            server.shutdown()


def missing():
    """What a browser test lacks here, in words; empty if nothing."""
    if CHROMIUM is None:
        return "there is no chromium: apt-get install chromium"
    if not RUNTIME.exists():
        return "there is no onnxruntime-web: npm install --no-save onnxruntime-web"
    return ""
