"""A Llama-shaped model in a safetensors folder, as transformers saves it."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import LlamaConfig

from so8t_helpers.phi3.llama import Llama, llama3_factors, phi3_config
from so8t_helpers.phi3.shape import EMBEDDING, HEAD
from so8t_helpers.phi3.weights import FLOATS, INDEX_FILE, read_checkpoint
from so8t_helpers.run.files import StageError, read_json, write_json
from so8t_helpers.settings import SettingsError

_COPIED = ("*.json", "tokenizer.model", "*.jinja", "LICENSE*", "NOTICE*", "README.md")
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
# What Phi-3 lacks: the key, and the value with which the model is the same without it.
_LACKING = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "quantization_config": None,
    "sliding_window": None,
    "num_local_experts": None,
}


def read_llama_folder(folder: Path) -> Llama:
    """Read the configuration of a Llama folder and where its tensors lie.

    Raises:
        SettingsError: not a LlamaForCausalLM, or one that Phi-3 cannot express; it names the key.
        StageError: weights are missing, or not in 16- or 32-bit floats.
    """
    path = folder / "config.json"
    data = read_json(path)
    if data.get("model_type") != "llama":
        raise SettingsError(
            f"{folder}: expected a Llama folder (config.json with model_type 'llama'), found "
            f"{data.get('model_type')!r}; a Phi3 folder needs no import"
        )
    config = LlamaConfig(**data)
    for key, neutral in _LACKING.items():
        if (value := getattr(config, key, None)) != neutral:
            raise SettingsError(f"{path}: {key} is {value!r}, Phi-3 knows only {neutral!r}")
    head_dim = config.hidden_size // config.num_attention_heads
    if config.head_dim != head_dim:
        raise SettingsError(
            f"{path}: head_dim is {config.head_dim}, in Phi-3 it is hidden_size / heads, {head_dim}"
        )
    rope = dict(config.rope_parameters or {})  # transformers fills it in from the keys of any version
    kind = rope["rope_type"]
    if kind not in {"default", "llama3"} or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise SettingsError(
            f"{path}: rope type {kind!r} of {rope}; only plain rope and 'llama3' are imported"
        )
    places = {
        name: place
        for name, place in read_checkpoint(folder).items()
        # Old checkpoints keep the frequencies, which follow from config.json; a tied head is the embedding.
        if not name.endswith("rotary_emb.inv_freq") and not (config.tie_word_embeddings and name == HEAD)
    }
    if other := next((place for place in places.values() if place.dtype not in FLOATS), None):
        raise StageError(f"{other.path}: tensor {other.name} is {other.dtype}, expected {', '.join(FLOATS)}")
    dtypes = {name: FLOATS[place.dtype] for name, place in places.items()}
    sizes = {key: getattr(config, key) for key in _SIZES} | {"rope_theta": rope["rope_theta"]}
    factors = llama3_factors(rope, head_dim) if kind == "llama3" else None
    return Llama(
        name=folder.name,
        config=phi3_config(sizes, factors, dtypes[EMBEDDING]),
        dtypes=dtypes,
        read=lambda name: places[name].read(),
        write_side_files=lambda target: _copy_side_files(folder, target),
    )


def _copy_side_files(source: Path, folder: Path) -> None:
    for pattern in _COPIED:
        for path in source.glob(pattern):
            if path.name not in {"config.json", INDEX_FILE}:
                shutil.copyfile(path, folder / path.name)
    config = folder / "tokenizer_config.json"
    if config.is_file() and not (folder / "tokenizer.model").is_file():
        # llama.cpp's converter takes a Phi-3's vocabulary for SentencePiece but under this name (Phi-4's);
        # transformers reads tokenizer.json as it is under any name, since config.json says "phi3".
        data = read_json(config)
        write_json(config, data | {"tokenizer_class": "GPT2Tokenizer"})
