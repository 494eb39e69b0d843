"""Stage 01_dataset: four-class records become training samples, or are quarantined with a reason."""
