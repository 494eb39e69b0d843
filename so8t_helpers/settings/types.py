"""What may stand in a profile: the kinds of values that its sections share, and what a section is."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
AtOnce = Annotated[int, Field(ge=1, le=1024)]  # threads, processes, requests; no machine has more
Place = Annotated[str, Field(min_length=1)]  # "" would be the project's own folder
# Part of a file's name that is looked up: nothing that leads elsewhere or stands for several.
NamePart = Annotated[str, Field(pattern=r"^\w[\w .+-]{0,79}$")]


def _http_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        good = False
    if not good:
        raise ValueError("must be the address of a server, such as http://127.0.0.1:11434")
    return url


HttpUrl = Annotated[str, AfterValidator(_http_url)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors; types are never converted (YAML's `1e-4` is a text)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
