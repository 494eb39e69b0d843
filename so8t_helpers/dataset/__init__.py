"""Stage 01_dataset: four-class records become training samples, or are quarantined with a reason."""

from so8t_helpers.dataset.build import Built, build

__all__ = ["Built", "build"]
