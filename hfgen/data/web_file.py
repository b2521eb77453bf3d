"""A file on a web server, read from front to back by one request that is renewed when the connection breaks."""

from __future__ import annotations

import http.client
import logging
import time
import urllib.error
import urllib.request

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 60
RETRY_SECONDS = (1, 5, 30)


class WebFile:
    """A context manager with ``read(size)``; the request is sent by the first read."""

    def __init__(self, url: str) -> None:
        self.url, self.position = url, 0
        self._length: int | None = None
        self._response: http.client.HTTPResponse | None = None

    def __enter__(self) -> WebFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes, fewer only at the end of the file.

        Raises:
            urllib.error.HTTPError: if the server refuses.
            OSError: if the connection cannot be made or kept, after three more attempts.
        """
        data = bytearray()
        pauses = iter(RETRY_SECONDS)
        while len(data) < size:
            try:
                part = self._receive(size - len(data))
            except (OSError, http.client.HTTPException) as error:
                self.close()
                refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
                pause = None if refused else next(pauses, None)
                if pause is None:
                    raise
                logger.warning("%s at byte %d: %s; trying again in %d s", self.url, self.position, error, pause)
                time.sleep(pause)
                continue
            if not part:
                break
            data += part
            self.position += len(part)
        return bytes(data)

    def _receive(self, size: int) -> bytes:
        if self._response is None:
            headers = {"Range": f"bytes={self.position}-"} if self.position else {}
            request = urllib.request.Request(self.url, headers=headers)
            self._response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
            if self.position and self._response.status != http.HTTPStatus.PARTIAL_CONTENT:
                raise OSError("the connection broke, and the server cannot continue inside of a file")
            length = self._response.headers.get("Content-Length")
            self._length = None if length is None else self.position + int(length)
        part = self._response.read(size)
        if not part and self._length is not None and self.position < self._length:
            raise ConnectionError(f"the connection was closed {self._length - self.position} bytes too early")
        return part
