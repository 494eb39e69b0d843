"""The model as transformers runs it: batched greedy writing with a key-value cache, on the CPU or a GPU."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from so8t_helpers.engines.base import Completion, Engine, EngineError, Piece, Pieces
from so8t_helpers.phi3.shape import logit_rows
from so8t_helpers.phi3.template import of_tokenizer
from so8t_helpers.phi3.tokenizer_files import load_tokenizer
from so8t_helpers.phi3.weights import read_checkpoint
from so8t_helpers.run.files import StageError


class Transformers(Engine):
    """A model folder in this process; see `open_transformers`."""

    name = "transformers"

    def __init__(self, model: Any, tokenizer: Any, label: str, parallel: int, think_command: str):
        self.version = importlib.metadata.version("transformers")
        self.network, self.tokenizer = model, tokenizer
        self.model, self.parallel, self.think_command = label, parallel, think_command
        self.dialect = of_tokenizer(tokenizer)
        stops = tokenizer.convert_tokens_to_ids(list(self.dialect.stops))
        self.stop_ids = torch.tensor(stops, device=model.device)

    def complete(self, prompt: str, *, max_tokens: int, temperature: float = 0.0, seed: int = 0) -> Pieces:
        started, first = time.perf_counter(), None
        ids = self.tokenize(prompt)
        written: list[int] = []
        shown, stopped = "", False
        for _, tokens in self._steps([ids], max_tokens, temperature, seed):
            first = first or time.perf_counter() - started
            written += tokens
            stopped = tokens[0] in self.stop_ids
            # A run of byte tokens is decoded as a whole: what it stands for is open until it ends.
            # (The vocabulary is padded: an id may have no piece.)
            if (self.tokenizer.convert_ids_to_tokens(tokens[0]) or "").startswith("<0x"):
                continue
            text = self._decode(written)
            if not text.endswith("\ufffd"):  # byte-level BPE: the first bytes of a character, or so it seems
                yield Piece(text[len(shown) :])
                shown = text
        rest = self._decode(written)[len(shown) :]
        seconds = time.perf_counter() - started
        yield Piece(rest, "", len(written), len(ids), first, seconds, stopped)

    def complete_many(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        on_done: Callable[[Completion], None] | None = None,
    ) -> list[Completion]:
        """Go on after many prompts in batches of `parallel`, those of like length together."""
        ids = [self.tokenize(prompt) for prompt in prompts]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        found: dict[int, Completion] = {}
        for start in range(0, len(order), self.parallel):
            batch = order[start : start + self.parallel]
            begun = time.perf_counter()
            written: list[list[int]] = [[] for _ in batch]
            for rows, tokens in self._steps([ids[i] for i in batch], max_tokens, temperature, seed):
                for row, token in zip(rows, tokens, strict=True):
                    written[row].append(token)
            seconds = time.perf_counter() - begun
            for i, answer in zip(batch, written, strict=True):
                stopped = bool(answer) and answer[-1] in self.stop_ids
                text = self._decode(answer)
                found[i] = Completion(text, "", len(answer), len(ids[i]), None, seconds, stopped, answer)
                if on_done is not None:
                    on_done(found[i])
        return [found[i] for i in range(len(prompts))]

    def tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.inference_mode()
    def score(self, text: str, start: int = 1) -> list[float]:
        ids = torch.tensor([self.tokenize(text)], device=self.network.device)  # (1, T)
        hidden = self.network.base_model(input_ids=ids).last_hidden_state[0, start - 1 : -1]  # (n, d)
        head = self.network.get_output_embeddings()
        scores: list[float] = []
        rows = logit_rows(len(head.weight))
        for states, following in zip(hidden.split(rows), ids[0, start:].split(rows), strict=True):
            shares = head(states).float().log_softmax(-1)  # (rows, V)
            scores += shares.gather(1, following[:, None])[:, 0].tolist()
        return scores

    def close(self) -> None:
        """Free the model's memory."""
        self.network = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _steps(
        self, prompts: list[list[int]], max_tokens: int, temperature: float, seed: int
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Write token by token: yield which rows are still at it, and each one's token.

        Rows that have ended leave the batch and the cache, so a long answer is not paid for by all.
        """
        device = self.network.device
        longest = max(map(len, prompts))
        pad = [longest - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * p + prompt for p, prompt in zip(pad, prompts, strict=True)], device=device)
        mask = torch.tensor([[0] * p + [1] * (longest - p) for p in pad], device=device)  # (B, T)
        position = (mask.cumsum(1) - 1).clamp(min=0)
        rows, cache = torch.arange(len(prompts), device=device), None
        generator = torch.Generator(device=device).manual_seed(seed)
        for _ in range(max_tokens):
            places = {"attention_mask": mask, "position_ids": position, "past_key_values": cache}
            out = self.network(input_ids=ids, **places, use_cache=True, logits_to_keep=1)
            cache, logits = out.past_key_values, out.logits[:, -1]  # (B, V)
            if temperature > 0:
                share = (logits.float() / temperature).softmax(-1)
                chosen = torch.multinomial(share, 1, generator=generator)[:, 0]
            else:
                chosen = logits.argmax(-1)
            yield rows.tolist(), chosen.tolist()
            going = ~torch.isin(chosen, self.stop_ids)
            if not bool(going.any()):
                return
            if not bool(going.all()):
                cache.batch_select_indices(going.nonzero()[:, 0])
                rows, chosen, mask, position = rows[going], chosen[going], mask[going], position[going]
            ids, position = chosen[:, None], position[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)

    def _decode(self, ids: list[int]) -> str:
        """Return the text as the model wrote it, control tokens too, up to where it stopped."""
        written = ids[:-1] if ids and ids[-1] in self.stop_ids else ids
        return str(self.tokenizer.decode(written, skip_special_tokens=False))


def open_transformers(
    folder: Path, *, parallel: int = 32, think_command: str = "/think", device: str | None = None
) -> Transformers:
    """Load a plain model folder; float32 on the CPU, the folder's own type on a GPU.

    Args:
        folder: config, safetensors and tokenizer, as transformers writes them.
        parallel: prompts in a batch.
        device: "cpu", "cuda", …; None takes a GPU where there is one.

    Raises:
        EngineError: the folder holds no model that transformers loads without code of its own, or a weights
            file is missing, cut short, or named outside the folder.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    shown, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    # Phi-3.5's own config.json draws a warning about its rope keys, which are what llama.cpp reads.
    transformers_logging.set_verbosity_error()
    try:
        read_checkpoint(folder)  # transformers follows an index wherever it leads
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32 if device == "cpu" else "auto", use_safetensors=True
        )
        tokenizer = load_tokenizer(folder)
    except (OSError, ValueError, KeyError, StageError) as error:
        raise EngineError(f"transformers cannot load {folder}: {error}") from error
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()
    return Transformers(model.to(device).eval(), tokenizer, folder.name, parallel, think_command)
