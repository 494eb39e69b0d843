"""What the two engines behind HTTP share: one client, streamed lines, clear errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx

from so8t_helpers.engines.base import Engine, EngineError, EngineTimeoutError


class HttpEngine(Engine):
    """A model behind a server on this machine or another; `timeout` is in seconds, for the next byte."""

    def __init__(self, name: str, version: str, model: str, url: str, timeout: float, parallel: int):
        self.name, self.version, self.model = name, version, model
        self.url, self.timeout, self.parallel = url, timeout, parallel
        self.client = http_client(url, timeout)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Send JSON and return the JSON of the answer."""
        try:
            response = self.client.post(path, json=body)
        except httpx.HTTPError as error:
            raise self.failure(error) from error
        if response.is_error:
            raise self.refusal(response)
        try:
            return response.json()
        except ValueError as error:
            raise EngineError(
                f"{self.name} at {self.url} answered no JSON: {response.text[:200]!r}"
            ) from error

    def lines(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Send JSON and yield the JSON objects of a streamed answer: bare lines or server-sent events.

        Where the server drops the connection before the first of them, the request is sent once more.
        """
        for again in (True, False):
            begun = False
            try:
                with self.client.stream("POST", path, json=body) as response:
                    if response.is_error:
                        response.read()
                        raise self.refusal(response)
                    for line in response.iter_lines():
                        text = line.removeprefix("data: ")
                        if text.startswith("{"):
                            try:
                                data = json.loads(text)
                            except ValueError as error:
                                raise EngineError(f"{self.name} at {self.url} broke off in a line") from error
                            if "error" in data:
                                raise self.explain(error_text(data))
                            begun = True
                            yield data
                return
            except httpx.HTTPError as error:
                if (
                    begun
                    or not again
                    or not isinstance(error, (httpx.NetworkError, httpx.RemoteProtocolError))
                ):
                    raise self.failure(error) from error

    def failure(self, error: httpx.HTTPError) -> EngineError:
        """The error for a request that got no answer."""
        if isinstance(error, httpx.TimeoutException):
            return EngineTimeoutError(
                f"{self.name} did not answer within {self.timeout:g} s at {self.url}; raise "
                "eval.timeout_seconds (serve.timeout_seconds), or lower max_new_tokens or num_ctx"
            )
        return EngineError(
            f"{self.name} at {self.url} broke off ({type(error).__name__}: {error}), ended or crashed; the "
            "same command asks it again"
        )

    def refusal(self, response: httpx.Response) -> EngineError:
        """The error for an answer with an error status."""
        try:
            return self.explain(error_text(response.json()))
        except ValueError:
            return self.explain(f"HTTP {response.status_code}: {response.text[:200]}")

    def explain(self, message: str) -> EngineError:
        """Turn the server's own words into an error that says what to do."""
        return EngineError(f"{self.name} ({self.model}): {message}")

    def close(self) -> None:
        """Close the connections."""
        self.client.close()


def http_client(url: str, timeout: float) -> httpx.Client:
    """A client for one server; on loopback a proxy from the environment would be wrong."""
    loopback = httpx.URL(url).host in {"127.0.0.1", "localhost", "::1"}
    return httpx.Client(
        base_url=url,
        timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)),
        trust_env=not loopback,
        # llama.cpp's server closes idle connections without a word; a reused one then breaks a request.
        limits=httpx.Limits(max_keepalive_connections=0),
    )


def error_text(data: Any) -> str:
    """The message in the error objects of both servers."""
    error = data.get("error", data) if isinstance(data, dict) else data
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
