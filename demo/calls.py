"""HTTP requests that can be sent, and shown as the curl command that sends the same.

Knows nothing of what is asked or what the answer should be. No proxy from the environment is
used: everything here is on this machine.
"""

import json
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, and how long all of it took."""

    status: int
    text: str
    seconds: float

    @property
    def json(self) -> Any:
        """The body read; ValueError if it is not JSON."""
        return json.loads(self.text)


@dataclass(frozen=True, slots=True)
class Call:
    """A GET, or with a body a POST of JSON."""

    url: str
    body: Mapping[str, object] | None = None

    @property
    def curl(self) -> str:
        """What to type in a shell, one key of the body a line."""
        if self.body is None:
            return f"curl -s {self.url}"
        keys = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in self.body.items())
        stream = "N" if self.body.get("stream") else ""
        data = shlex.quote("{" + ",\n         ".join(keys) + "}")
        return (
            f"curl -s{stream} {self.url} \\\n"
            f"    -H 'Content-Type: application/json' \\\n"
            f"    -d {data}"
        )

    def send(self) -> Answer:
        """Sends it and reads the whole answer.

        Raises:
            OSError: No connection, or a broken one.
            http.client.HTTPException: The answer is not HTTP, or ends early.
        """
        began = time.monotonic()
        with self._response() as response:
            text = response.read().decode()
            return Answer(response.status, text, time.monotonic() - began)

    def stream(self) -> Iterator[str]:
        """Sends it and yields the data of each server-sent event as it comes."""
        with self._response() as response:
            for line in response:
                if line.startswith(b"data: "):
                    yield line.removeprefix(b"data: ").decode().strip()

    @contextmanager
    def _response(self) -> Iterator[HTTPResponse]:
        at = urlsplit(self.url)
        connection = HTTPConnection(at.netloc, timeout=TIMEOUT_SECONDS)
        try:
            if self.body is None:
                connection.request("GET", at.path)
            else:
                content_type = {"Content-Type": "application/json"}
                connection.request("POST", at.path, json.dumps(self.body), content_type)
            yield connection.getresponse()
        finally:
            connection.close()
