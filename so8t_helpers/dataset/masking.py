"""Personal data in a record: masked where it stands, or a reason not to take the record."""

from __future__ import annotations

from so8t_helpers.dataset import personal_data
from so8t_helpers.dataset.personal_data.names import NameFinder
from so8t_helpers.dataset.quarantine import RejectedError
from so8t_helpers.dataset.records import TEXT_FIELDS, Record


def mask_record(record: Record, policy: str, names: NameFinder | None) -> list[str]:
    """Mask personal data in place, earlier turns and context included; return the kinds found.

    Args:
        policy: `dataset.personal_data`, "mask" or "quarantine".
        names: finds people's names; None: they stay.

    Raises:
        RejectedError: there is some, and the policy is to quarantine.
    """
    kinds: list[str] = []
    said: dict[str, str] = {}  # what was found -> what stands there now

    def masked(text: str) -> str:
        found = personal_data.find(text, names)
        kinds.extend(place.kind for place in found)
        said.update((text[place.start : place.end], personal_data.MASKS[place.kind]) for place in found)
        return personal_data.mask(text, found)

    def as_elsewhere(text: str) -> str:
        """Mask a part of what was looked through: alone it may lack the word that told what it is."""
        for found in sorted(said, key=len, reverse=True):
            text = text.replace(found, said[found])
        return masked(text)

    for name in TEXT_FIELDS:
        if value := getattr(record, name):
            setattr(record, name, masked(value))
    record.history = tuple(map(masked, record.history))
    if record.check:
        record.check = {**record.check, "value": as_elsewhere(record.check["value"])}
    if kinds and policy == "quarantine":
        raise RejectedError("personal_data", f"found: {', '.join(sorted(set(kinds)))}")
    found = list(kinds)
    if found:
        record.context = as_elsewhere(record.context)  # a part of the question, counted there
    return found
