"""Studies: does it help? Arms tuned alike, trained on the same seeds, compared with intervals."""
