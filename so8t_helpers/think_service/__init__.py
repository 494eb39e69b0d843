"""The /think service: question in, final part of the answer and decision out, everything audited."""

from so8t_helpers.think_service.app import create_app
from so8t_helpers.think_service.server import serve

__all__ = ["create_app", "serve"]
