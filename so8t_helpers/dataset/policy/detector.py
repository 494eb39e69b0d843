"""What finds unsafe content, in one place: word list, the user's classifier, a local model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from so8t_helpers.dataset.policy.harm import HarmWords
from so8t_helpers.settings import DatasetSettings, SettingsError, resolve


class Detector:
    """Says under which name a text is unsafe; what costs least comes first."""

    def __init__(self, settings: DatasetSettings, classifier: Path | None):
        self.words = HarmWords(settings.nsfw_words)
        self._scores: list[tuple[str, float, Callable[[list[str]], np.ndarray]]] = []
        if classifier is not None:
            from so8t_helpers.dataset.policy.ngrams import NgramClassifier  # noqa: PLC0415  (an option)

            trained = NgramClassifier(classifier)
            self._scores.append(("classifier", trained.threshold, trained.scores))
        if settings.nsfw_model is not None:
            threshold = 0.5 if settings.nsfw_threshold is None else settings.nsfw_threshold
            self._scores.append(("model", threshold, _model(settings)))

    def find(self, texts: list[str], may_match: list[bool]) -> list[str | None]:
        """Return for each normalised text a category of the word list, "classifier", "model", or None.

        `may_match` says in which of them a listed word may be.
        """
        found = [self.words.find(text) if may else None for text, may in zip(texts, may_match, strict=True)]
        for name, threshold, scores in self._scores:
            rest = [i for i, category in enumerate(found) if category is None]
            if rest:
                for i in np.flatnonzero(scores([texts[i] for i in rest]) >= threshold).tolist():
                    found[rest[i]] = name
        return found


def model_folder(settings: DatasetSettings) -> Path:
    """Return the folder of `nsfw_model`. Raises SettingsError: there is none."""
    folder = resolve(settings.nsfw_model or "")
    if not (folder / "config.json").is_file():
        raise SettingsError(f"dataset.nsfw_model: no model folder {folder} (it would hold a config.json)")
    return folder


def _model(settings: DatasetSettings) -> Callable[[list[str]], np.ndarray]:
    """Return a function that gives texts their probability of the unsafe labels, from a local model folder.

    Raises:
        SettingsError: no such folder, or none of its labels is in `nsfw_model_labels`.
    """
    folder = model_folder(settings)
    import torch  # noqa: PLC0415  (an option)
    from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, local_files_only=True, use_safetensors=True
    ).eval()
    unsafe = {label.lower() for label in settings.nsfw_model_labels}
    columns = [i for i, label in model.config.id2label.items() if label.lower() in unsafe]
    if not columns:
        known = ", ".join(model.config.id2label.values())
        raise SettingsError(f"dataset.nsfw_model_labels: none is a label of {folder}, which has {known}")

    @torch.inference_mode()
    def score(text: str) -> float:
        encoded = tokenizer(text, truncation=True, max_length=512, return_tensors="pt")
        logits = model(**encoded).logits[0].float()
        if model.config.problem_type == "multi_label_classification":
            return float(logits.sigmoid()[columns].max())
        return float(logits.softmax(-1)[columns].sum())

    # One by one: padding to a common length would let the other texts change a text's last digits.
    return lambda texts: np.array([score(text) for text in texts])
