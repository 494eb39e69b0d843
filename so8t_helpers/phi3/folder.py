"""A Phi3 folder as a whole: whether its configuration, its tokenizer and its weights belong together."""

from __future__ import annotations

from pathlib import Path

from so8t_helpers.phi3.shape import HEAD, Phi3Shape, gguf_name, read_shape
from so8t_helpers.phi3.tokenizer_files import read_tokenizer
from so8t_helpers.phi3.weights import TensorPlace, read_checkpoint
from so8t_helpers.run.files import StageError, read_json
from so8t_helpers.settings import SettingsError


def check_folder(folder: Path) -> tuple[Phi3Shape, dict[str, TensorPlace]]:
    """Return what config.json says, and the tensors' places; of the weights the headers alone are read.

    Raises:
        SettingsError, StageError: no Phi3, a file that is missing or broken, or two that disagree.
    """
    shape, config = read_shape(folder), folder / "config.json"
    fast = folder / "tokenizer.json"
    read_json(folder / "tokenizer_config.json")
    if not fast.is_file():
        raise SettingsError(f"model.base: {folder} has no tokenizer.json; fetch the model again")
    ids = read_tokenizer(fast).get_vocab(with_added_tokens=True).values()
    if (largest := max(ids, default=0)) >= shape.vocab_size:
        raise StageError(
            f"{fast}: has a token of id {largest}, but vocab_size in {config} is {shape.vocab_size}; "
            "take both from one model"
        )
    places = read_checkpoint(folder)
    expected = shape.tensor_shapes()
    # A layer that config.json does not count would be left out without a word.
    extra = {name for name in places.keys() - expected.keys() - {HEAD} if gguf_name(name)}
    for name in [*expected, *sorted(extra)]:
        told = expected.get(name, "no such tensor")
        found = places[name].shape if name in places else "none"
        if told != found:
            raise StageError(
                f"{folder}: tensor {name} is {found} in the weights, {told} by {config}; take both from one "
                "model"
            )
    return shape, places
