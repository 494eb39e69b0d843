"""The run folder: where stages leave their artefacts, how they prove that they happened, who is at work."""
