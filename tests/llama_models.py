"""Small random Llamas for tests: a safetensors folder, and the GGUF file that llama.cpp would make of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n"
    "You are a helpful AI assistant<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CORPUS = [f"There are {n} apples and {2 * n} pears, so {n} + {2 * n} = {3 * n} fruits." for n in range(200)]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def tokenizer(pre: Any = None) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE as SmolLM2's is: every digit a word of its own."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre or pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), words]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    made.train_from_iterator(CORPUS, trainer)
    roles = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=SPECIAL[2], chat_template=CHATML, **roles)


def llama_folder(folder: Path, dtype: torch.dtype = torch.float16, **config: Any) -> LlamaForCausalLM:
    """Write a Llama folder with random weights, fixed seed, and return the model as it reads the folder."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "initializer_range": 0.2, **config}))
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):  # ones would hide a norm in the wrong place
            weight.data += 0.3 * torch.randn_like(weight)
    model.to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


_MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's conversion/llama.py, as it stands there."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def write_gguf(
    model: LlamaForCausalLM, path: Path, kind: str = "F16", keys: dict[str, Any] | None = None
) -> None:
    """Write a model as llama.cpp's converter does: norms in F32; `keys` change metadata, None drops a key."""
    config, text = model.config, tokenizer()
    vocabulary = sorted(text.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(text.backend_tokenizer.to_str())["model"]["merges"]
    # As a padded embedding has it: more rows than tokens.
    padding = [f"[PAD{i}]" for i in range(len(vocabulary), config.vocab_size)]
    writer = gguf.GGUFWriter(path, "llama")
    facts: dict[str, Any] = {
        "general.name": "Small",
        "general.license": "apache-2.0",
        "general.languages": ["en"],
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_parameters["rope_theta"],
        "llama.rope.dimension_count": config.hidden_size // config.num_attention_heads,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*(token for token, _ in vocabulary), *padding],
        "tokenizer.ggml.token_type": [
            *(3 if token in SPECIAL else 1 for token, _ in vocabulary),
            *(5 for _ in padding),
        ],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
        **(keys or {}),
    }
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
    for key, value in facts.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            add[type(value)](key, value)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    top = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    for name, weight in model.state_dict().items():
        data = weight.float().numpy()
        if name.startswith("model.layers."):
            layer, module = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            count = heads.get(module.rpartition(".")[2])
            data = data if count is None else permuted(data, count)
            target = f"blk.{layer}.{_MODULES[module]}.weight"
        elif name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        else:
            target = f"{top[name.split('.')[-2]]}.weight"
        stored = gguf.GGMLQuantizationType["F32" if data.ndim == 1 else kind]
        writer.add_tensor(target, gguf.quantize(data, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
