"""SO8T workbench: train rotations and LoRA together, bake them with proof, export, evaluate, report."""

from __future__ import annotations

__version__ = "0.1.0"
