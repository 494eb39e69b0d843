"""One look for all figures and tables."""
