"""The sections of a profile: every setting of a run, its default (the seed's), and what may stand there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from so8t_helpers.settings.inputs import Input
from so8t_helpers.settings.types import (
    AtOnce,
    Count,
    HttpUrl,
    NamePart,
    NonNegative,
    Place,
    Positive,
    Section,
    Share,
)

PROJECT_ROOT = Path(__file__).resolve().parents[2]


class RunSettings(Section):
    """Where and on what a run works. Relative folders are taken from the project's root."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")] = "demo"
    root: Place = "runs"
    reports_root: Place = "reports"
    notebooks: Place = "notebooks"
    seed: int = 0
    processes: AtOnce = 1  # workers that share 02_train's micro-steps, each on a card of its own
    stage_timeout: Positive | None = None  # seconds after which a stage's notebook is ended; null: never
    kernel_start_seconds: Positive = 180.0  # a notebook's; a virus scanner looks at all that it imports


class CacheSettings(Section):
    """Cache folders that users move to a larger disk; null leaves the library's own default."""

    hf_home: Place | None = None
    torchinductor_dir: Place | None = None
    temp_dir: Place | None = None


class DatasetSettings(Section):
    """01_dataset. `inputs` are files, globs, folders (docs/data.md); "demo" makes our own records."""

    inputs: Annotated[list[Input], Field(min_length=1)] = ["demo"]
    think_format: Literal["seed", "quadruple", "both", "english"] = "seed"
    think_command: str = "/think"
    plain_share: Share = 0.1
    eval_share: Share = 0.1
    system_prompt: str | None = None
    dialogue_answers: Literal["last", "every"] = "last"  # which answers of several turns are trained
    overlong: Literal["cut", "quarantine"] = "cut"
    personal_data: Literal["mask", "quarantine", "off"] = "mask"
    personal_names: Literal["off", "cues", "ner"] = "off"  # people's too: by words beside them, by GiNZA
    licences: list[str] = ["MIT", "Apache-2.0", "CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0", "self-made"]
    default_licence: str | None = None
    robots_dir: str | None = None  # holds <host>.txt files; null: robots/ in the folder of the first input
    robots_agent: str = "so8t-workbench"
    robots_fetch: bool = False  # adds missing ones
    nsfw_words: list[str] = []  # files of category<TAB>word
    nsfw_training: list[str] = []  # labelled records for a classifier, in files as `inputs` are
    nsfw_model: str | None = None  # a text-classification folder
    nsfw_model_labels: list[str] = ["nsfw", "unsafe", "toxic", "harmful", "LABEL_1"]
    nsfw_threshold: Share | None = None
    # A GGUF file or a model folder that writes thinking for records without reasoning of their own.
    teacher: str | None = None
    teacher_prompts: Place = "params/teacher"  # holds what it is asked: ja.txt and en.txt
    teacher_max_tokens: Count = 256
    teacher_parallel: AtOnce = 1  # records it thinks for at once; a kill loses so many
    near_duplicate_threshold: Share = 0.8  # Jaccard similarity of character 3-grams
    deduplicate: bool = True
    engine: Literal["process", "ray"] = "process"
    workers: AtOnce | None = None

    @field_validator("personal_names")
    @classmethod
    def _masks_too(cls, names: str, info: ValidationInfo) -> str:
        if names != "off" and info.data.get("personal_data") == "off":
            raise ValueError("does nothing while personal_data is off; set that to mask, or this to off")
        return names


class ModelSettings(Section):
    """The base model: a folder, a hub id, or the word "demo" for the small one that the demo makes itself."""

    base: Place = "AXCXEPT/Borea-Phi-3.5-mini-Instruct-Jp"
    revision: str | None = None
    quantization: Literal["int8", "nf4", "none"] = "int8"
    # tensor_core: 8-bit activations and gradients too; a little loss, so not the default. auto: where it runs
    int8_matmul: Literal["weight_only", "llm_int8", "tensor_core", "auto"] = "weight_only"


class GateSettings(Section):
    """SO8T gates in front of o_proj."""

    enabled: bool = True
    init_scale: NonNegative = 0.05  # 0: start at the identity
    learning_rate: Positive | None = None  # null: LoRA's
    layer_indices: list[int] | None = None  # null: every layer
    orthogonal_reg: NonNegative = 1e-4


class PetSettings(Section):
    """PET: lambda in three phases over shares of the optimizer steps."""

    enabled: bool = True
    lambda_exploration: NonNegative = 0.01
    lambda_transition: NonNegative = 0.05
    lambda_stabilization: NonNegative = 0.1
    phase_shares: list[Share] = [0.2, 0.4, 0.4]
    relative: bool = False  # divide the hidden states by their root mean square: models differ in scale
    penalty: Literal["mse", "huber"] = "mse"
    huber_delta: Positive = 1.0

    @model_validator(mode="after")
    def _shares_add_up(self) -> PetSettings:
        if len(self.phase_shares) != 3 or abs(sum(self.phase_shares) - 1.0) > 1e-6:
            raise ValueError(f"phase_shares must be three shares that add up to 1, got {self.phase_shares}")
        return self


class LoraSettings(Section):
    """LoRA on Phi-3's fused linears."""

    r: Annotated[int, Field(ge=1, le=16384)] = 64
    alpha: Count = 128
    rslora: bool = False  # scale by alpha / sqrt(r)
    b_rate: Positive | None = None  # B's own learning rate (LoRA+); null: A's
    dropout: Share = 0.05
    target_modules: list[str] = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


class TrainingSettings(Section):
    """02_train. `dataset_dir: null` reads this run's 01_dataset."""

    dataset_dir: str | None = None
    continue_from: str | None = None
    sequence_length: Annotated[int, Field(ge=16, le=2**20)] = 2048
    batch_size: Count = 1
    gradient_accumulation: Count = 16
    epochs: Positive = 3
    max_steps: Count | None = None
    learning_rate: Positive = 2e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_share: Share = 0.03
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0
    optimizer: Literal["paged_adamw_8bit", "adamw"] = "paged_adamw_8bit"
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    packing: bool = True
    speed: Literal["auto", "graph", "compile", "plain"] = "auto"
    gradient_checkpointing: bool = True
    memory_gib: Literal["auto"] | Positive = "auto"
    checkpoint_steps: Count | None = 100
    checkpoint_minutes: Positive | None = 10
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    angle_snapshots: Annotated[int, Field(ge=2)] = 50
    eval_steps: Literal["auto"] | Count | None = "auto"  # between two looks at the held-out loss
    eval_samples: Literal["auto"] | Count | None = "auto"  # held-out ones; null: all; auto: 3% of the time
    keep: Literal["last", "best"] = "last"  # which adapter
    patience: Count | None = None  # looks without a new best after which the training stops
    sample_steps: Literal["auto"] | Count | None = "auto"  # between two rounds of answers; auto: 2% of time
    sample_prompts: Count = 8
    trackers: list[Literal["tensorboard", "trackio", "wandb", "mlflow"]] = []


class BakeSettings(Section):
    """03_bake. `adapter_dir: null` reads this run's 02_train/adapter."""

    adapter_dir: str | None = None
    logit_bound: Positive = 1e-4
    layer_bound: Positive = 1e-5
    proof_texts: Count = 8
    proof_tokens: Annotated[int, Field(ge=2)] = 80
    max_shard_gib: Positive = 4.0


GgufType = Literal["f16", "bf16", "q8_0", "q4_k_m", "q5_k_m", "q6_k"]


class GgufSettings(Section):
    """04_gguf. `model_dir: null` reads this run's 03_bake/model."""

    model_dir: str | None = None
    types: Annotated[list[GgufType], Field(min_length=1)] = ["f16", "q8_0", "q4_k_m"]
    name: NamePart = "phi3-so8t"
    imatrix: bool = False
    imatrix_tokens: Count = 65536
    threads: AtOnce | None = None
    quality_tokens: Count = 8192
    o_proj_study: bool = True


class EvalSettings(Section):
    """05_ollama_eval. `gguf_dir: null` reads this run's 04_gguf."""

    gguf_dir: str | None = None
    engine: Literal["auto", "ollama", "llama_cpp"] = "auto"
    ollama_url: HttpUrl = "http://127.0.0.1:11434"
    models: Annotated[list[NamePart], Field(min_length=1)] = ["base", "baked", "f16", "q8_0", "q4_k_m"]
    prompts: Count | None = None
    max_new_tokens: Count = 512
    temperature: NonNegative = 0.0
    num_ctx: Annotated[int, Field(ge=256)] = 4096  # llama.cpp takes no fewer
    parallel: AtOnce = 4
    timeout_seconds: Positive = 600.0
    bootstrap_samples: Count = 1000
    keep_in_ollama: bool = False
    show_thinking: bool = False
    harness_tasks: list[str] = []
    harness_dir: str | None = None


class ServeSettings(Section):
    """The /think service (`so8t serve`). `audit_log: null` is serve/audit.jsonl in this run's folder."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8808
    model: NamePart = "q4_k_m"
    max_query_chars: Count = 8000
    max_new_tokens: Count = 512
    queue_length: Count = 16
    requests_per_minute: Count = 60
    timeout_seconds: Positive = 120.0
    log_queries: bool = False
    audit_log: str | None = None
    most_shared: Count | None = None  # characters that a final part may repeat of the thinking
    connections: Annotated[int, Field(ge=16)] = 512  # open at once
    receive_seconds: Positive = 10.0  # for the head of a request, and again for its body
    client_system_turns: bool = False  # take those of /v1/chat/completions, after dataset.system_prompt
    # What leaves where the model itself states DENY: its answer, or `deny_text`. A model's word is no gate.
    on_deny: Literal["answer", "refuse", "escalate"] = "answer"
    deny_text: Annotated[str, Field(min_length=1)] = "この質問にはお答えできません。担当者にご確認ください。"


class Settings(Section):
    """A whole profile."""

    profile: str = "demo"
    run: RunSettings = RunSettings()
    cache: CacheSettings = CacheSettings()
    dataset: DatasetSettings = DatasetSettings()
    model: ModelSettings = ModelSettings()
    so8t: GateSettings = GateSettings()
    pet: PetSettings = PetSettings()
    lora: LoraSettings = LoraSettings()
    training: TrainingSettings = TrainingSettings()
    bake: BakeSettings = BakeSettings()
    gguf: GgufSettings = GgufSettings()
    eval: EvalSettings = EvalSettings()
    serve: ServeSettings = ServeSettings()

    @property
    def run_dir(self) -> Path:
        """Folder of this run's artefacts."""
        return resolve(self.run.root) / self.run.name

    @property
    def reports_dir(self) -> Path:
        """Folder of this run's HTML reports."""
        return resolve(self.run.reports_root) / self.run.name


def resolve(path: str | Path) -> Path:
    """Return `path` with `~` expanded; a relative one is taken from the project's root, not the cwd."""
    path = Path(path).expanduser()
    return path if path.is_absolute() else PROJECT_ROOT / path
