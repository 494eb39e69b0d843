"""Functions that take data and return a figure; `style` holds what all figures share."""
