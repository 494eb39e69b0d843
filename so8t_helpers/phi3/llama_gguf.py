"""A Llama-shaped model in a GGUF file, dequantised, as llama.cpp's conversion/llama.py wrote it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import yaml
from gguf import GGMLQuantizationType, GGUFReader
from torch import Tensor

from so8t_helpers.phi3.llama import FUSED, Llama, phi3_config
from so8t_helpers.phi3.llama_tokenizer import Vocabulary, write_tokenizer
from so8t_helpers.phi3.shape import BLOCK, EMBEDDING, HEAD, TOP, weight_name
from so8t_helpers.run.files import StageError, sha256_file, write_json, write_text
from so8t_helpers.settings import SettingsError

# Modules of a Llama's block by llama.cpp's name: those that Phi-3 fuses, the others are as in Phi-3.
_MODULES = {name: module for module, name in BLOCK.items() if module not in FUSED} | {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
}
_TOP = {name: ours for ours, name in TOP.items()}
_ROPE_FACTORS = "rope_freqs.weight"
_SPECIAL = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "pad": "padding_token_id",
    "unk": "unknown_token_id",
}


def read_llama_gguf(path: Path) -> Llama:
    """Read a GGUF file's metadata and where its tensors lie.

    Weights become float16: it keeps 11 bits of what was dequantised, bfloat16 8; only a file that holds
    bfloat16 keeps that, whose range float16 lacks.

    Raises:
        SettingsError: another architecture or vocabulary, or a model that Phi-3 cannot express.
        StageError: not a GGUF file, or cut short.
    """
    reader = open_gguf(path)
    facts = _Facts(path, reader)
    sizes = _sizes(facts)
    tensors = {_llama_name(tensor.name): tensor for tensor in reader.tensors}
    factors = tensors.pop(_ROPE_FACTORS, None)
    if EMBEDDING not in tensors:
        raise StageError(f"{path}: no embedding among its tensors; it is not a whole model")
    sizes["vocab_size"] = int(tensors[EMBEDDING].shape[1])
    sizes["tie_word_embeddings"] = HEAD not in tensors
    kinds = {tensor.tensor_type for tensor in tensors.values()}
    dtype = torch.bfloat16 if GGMLQuantizationType.BF16 in kinds else torch.float16
    vocabulary = _vocabulary(facts)
    heads = {"q_proj": sizes["num_attention_heads"], "k_proj": sizes["num_key_value_heads"]}

    def read(name: str) -> Tensor:
        weights = torch.from_numpy(
            np.require(gguf.dequantize(tensors[name].data, tensors[name].tensor_type), requirements="W")
        )
        count = heads.get(name.split(".")[-2])
        return weights if count is None else _halves(weights, count)

    return Llama(
        name=path.name,
        config=phi3_config(sizes, factors and [_shortest(x) for x in factors.data], dtype),
        dtypes=dict.fromkeys(tensors, dtype),
        read=read,
        write_side_files=lambda folder: _write_side_files(facts, vocabulary, folder),
    )


def open_gguf(path: Path) -> GGUFReader:
    """Read a file's metadata. Raises StageError: not a GGUF file, or cut short."""
    try:
        return GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise StageError(f"{path}: not a GGUF file, or cut short ({error}); fetch it again") from error


class _Facts:
    """The metadata of a file, by key."""

    def __init__(self, path: Path, reader: GGUFReader):
        self.path, self.fields = path, reader.fields

    def get(self, key: str, default: Any = None) -> Any:
        field = self.fields.get(key)
        return default if field is None else field.contents()

    def need(self, key: str) -> Any:
        if key not in self.fields:
            raise StageError(f"{self.path}: no key {key}; it is not a whole model")
        return self.get(key)


def _sizes(facts: _Facts) -> dict[str, Any]:
    """Return the keys of config.json but those that the tensors tell."""
    path = facts.path
    if (architecture := facts.get("general.architecture")) != "llama":
        raise SettingsError(f"{path}: architecture {architecture!r}, only 'llama' is imported")
    if facts.get("split.count", 1) > 1:
        raise SettingsError(
            f"{path}: one of {facts.get('split.count')} parts; merge them with llama-gguf-split"
        )
    hidden, heads = facts.need("llama.embedding_length"), facts.need("llama.attention.head_count")
    head_dim = hidden // heads
    # What Phi-3 lacks: the key, and the value with which the model is the same without it.
    for key, neutral in {
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.rope.dimension_count": head_dim,
        "llama.expert_count": 0,
        "llama.attention.sliding_window": 0,
        "llama.rope.scaling.type": "none",
    }.items():
        if (value := facts.get(key, neutral)) != neutral:
            raise SettingsError(f"{path}: {key} is {value!r}, Phi-3 knows only {neutral!r}")
    special = {f"{role}_token_id": facts.get(f"tokenizer.ggml.{key}") for role, key in _SPECIAL.items()}
    return {
        "hidden_size": hidden,
        "intermediate_size": facts.need("llama.feed_forward_length"),
        "num_hidden_layers": facts.need("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": facts.get("llama.attention.head_count_kv", heads),
        "rms_norm_eps": _shortest(facts.need("llama.attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": facts.need("llama.context_length"),
        "rope_theta": _shortest(facts.get("llama.rope.freq_base", 10000.0)),
        **{key: special[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }


def _llama_name(name: str) -> str:
    """Return a tensor's name in a Llama checkpoint; its own where Llama has none such."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match and match[2] in _MODULES:
        return weight_name(int(match[1]), _MODULES[match[2]])
    return _TOP.get(name, name)


def _halves(weights: Tensor, heads: int) -> Tensor:
    """Undo `LlamaModel.permute`: the rows of a head, in pairs that rotate together, become two halves."""
    rows, columns = weights.shape
    return weights.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _shortest(value: float) -> float:
    """Return a float32 as the shortest number that rounds to it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _vocabulary(facts: _Facts) -> Vocabulary:
    kind = facts.need("tokenizer.ggml.model")
    if kind != "gpt2":
        raise SettingsError(
            f"{facts.path}: vocabulary {kind!r}; of GGUF files only byte-level BPE ('gpt2') is read. Import "
            "the model's safetensors folder, which has its tokenizer.model"
        )
    tokens = facts.need("tokenizer.ggml.tokens")
    ids = {role: facts.get(f"tokenizer.ggml.{key}") for role, key in _SPECIAL.items()}
    pre = facts.get("tokenizer.ggml.pre", "default")
    return Vocabulary(
        tokens=tokens,
        types=facts.need("tokenizer.ggml.token_type"),
        merges=facts.need("tokenizer.ggml.merges"),
        pre=pre,
        special={role: tokens[index] for role, index in ids.items() if index is not None},
        add_bos=facts.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"),
        chat_template=facts.get("tokenizer.chat_template"),
        context_length=facts.need("llama.context_length"),
    )


def _write_side_files(facts: _Facts, vocabulary: Vocabulary, folder: Path) -> None:
    write_tokenizer(folder, vocabulary, str(facts.path))
    ids = {role: facts.get(f"tokenizer.ggml.{key}") for role, key in _SPECIAL.items()}
    ends = [ids["eos"], facts.get("tokenizer.ggml.eot_token_id")]
    generation = {
        "bos_token_id": ids["bos"],
        "eos_token_id": sorted({end for end in ends if end is not None}),
        "pad_token_id": ids["pad"],
    }
    write_json(
        folder / "generation_config.json", {k: v for k, v in generation.items() if v not in (None, [])}
    )
    header = {
        key: facts.get(f"general.{field}")
        for key, field in (("license", "license"), ("language", "languages"))
        if facts.get(f"general.{field}")
    }
    front = f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n" if header else ""
    text = (
        f"{front}# {facts.get('general.name', facts.path.stem)}\n\n"
        f"The Llama of {facts.path.name} (SHA-256 {sha256_file(facts.path)}), dequantised and written as a "
        "Phi3 folder by `so8t import`: the same model, its linears fused.\n"
    )
    write_text(folder / "README.md", text)
