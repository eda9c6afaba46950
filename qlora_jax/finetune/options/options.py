"""The options of the main job, in groups: the one place of their defaults. The docstrings are the command line's help."""

import dataclasses
import math
from pathlib import Path
from typing import Literal, get_args

from qlora_jax.finetune.options.context import ContextOptions
from qlora_jax.finetune.options.data import DataOptions
from qlora_jax.finetune.options.reporting import WatchOptions
from qlora_jax.finetune.options.tuning import MethodName, TuningOptions
from qlora_jax.models import Remat
from qlora_jax.peft import ALL_LINEAR, IA3, FullFineTuning, LoRA, Method, reads_weights
from qlora_jax.quant import DataType, EmbeddingStorage, Quantization
from qlora_jax.train import OPTIMIZERS, OptimizerName, Schedule

ObjectiveName = Literal["sft", "dpo"]
_SHARED = ("target_modules", "target_regex", "exclude_modules", "modules_to_save")  # options of LoRA that IA3 has too
# Of LoRA's learning rate; a tenth for full fine-tuning: Schulman et al. 2025, "LoRA Without Regret".
_RATE_OF_METHOD: dict[MethodName, float] = {"full": 0.1}


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The base model and how its frozen weights are held."""

    model: str | None = None
    """Folder, .gguf file or Hugging Face hub id; SmolLM2-135M-Instruct, fetched once, if left out."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    adapter: str | None = None
    """Folder or hub id of a LoRA adapter in PEFT's format to go on from, with its rank, alpha and targets; a fresh one if
    left out. For DPO it is the reference too."""
    data_type: DataType | Literal["none"] = Quantization.data_type
    """Storage of the linear layers; "none" keeps them dense: LoRA instead of QLoRA."""
    block_size: int = Quantization.block_size
    """Weights that share a scale."""
    double_quantization: bool = Quantization.double_quantization
    """Whether the scales are quantised as well."""
    embedding_storage: EmbeddingStorage = "none"
    """Storage of the token table and the output head: int8, nf4 (double-quantised), or none: dense."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type; auto: bfloat16 on GPU and TPU, float32 on CPU."""
    remat: Remat | Literal["auto"] = "auto"
    """What the backward pass recomputes; auto: whole layers on GPU and TPU, all but products on CPU."""

    def quantization(self) -> Quantization | None:
        """How the linear layers are stored; None for dense ones. Raises ValueError for unknown values."""
        if self.data_type == "none":
            if (self.block_size, self.double_quantization) != (Quantization.block_size, Quantization.double_quantization):
                raise ValueError("block_size, double_quantization: expected a 4-bit data_type, found none")
            return None
        return Quantization(self.data_type, self.block_size, self.double_quantization)


@dataclasses.dataclass(frozen=True)
class LoRAOptions:
    """The adapter."""

    rank: int = LoRA.rank
    """r, the inner size."""
    alpha: float = LoRA.alpha
    """The adapter's output is scaled by alpha / r."""
    dropout: float = LoRA.dropout
    """Share of the adapter's inputs dropped while training."""
    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    """Names of linear layers (or their last parts); all-linear: every one but the output head."""
    target_regex: str | None = None
    """One regular expression over whole module names, instead of target-modules."""
    use_rslora: bool = LoRA.use_rslora
    """Scale by alpha / sqrt(r)."""
    use_dora: bool = LoRA.use_dora
    """DoRA: train the lengths of the weights' columns by themselves."""
    init_lora_weights: str | None = None
    """How A and B start, by PEFT's names: gaussian or orthogonal; pissa, pissa_niter_N or loftq, from the original weights;
    eva, from the training data. A uniform and B zero if left out."""
    loftq_iter: int = LoRA.loftq_iter
    """Turns of LoftQ."""
    exclude_modules: tuple[str, ...] = ()
    """Names (or last parts) of linear layers that get no adapter all the same."""
    layers_to_transform: tuple[int, ...] = ()
    """Numbers of the layers that get an adapter; all of them if left out."""
    layers_pattern: tuple[str, ...] = ()
    """Names of the lists of layers whose numbers count there (such as layers); any if left out."""
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    """Other ranks: a regular expression of the last parts of a name and r there, in turn."""
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    """Other alphas, in the same way."""
    modules_to_save: tuple[str, ...] = ()
    """Ends of names of token tables, heads and norms that are trained as a whole, and saved."""
    trainable_token_indices: tuple[int, ...] = ()
    """Tokens whose rows of the token table (of the head too, where that is the same table) are trained."""
    special_tokens: tuple[str, ...] = ()
    """Tokens to add to the tokenizer, which is saved beside the adapter; their rows of table and head are trained."""

    def build(self) -> LoRA:
        """The adapter that they describe; raises ValueError where they describe none."""
        if self.target_regex is not None and self.target_modules != (ALL_LINEAR,):
            raise ValueError("target_modules and target_regex: expected one of them, found both")
        targets = self.target_modules if self.target_modules != (ALL_LINEAR,) else ALL_LINEAR
        return LoRA(
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            target_modules=targets if self.target_regex is None else self.target_regex,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init_lora_weights=LoRA.init_lora_weights if self.init_lora_weights is None else self.init_lora_weights,
            loftq_iter=self.loftq_iter,
            exclude_modules=self.exclude_modules,
            layers_to_transform=self.layers_to_transform,
            layers_pattern=self.layers_pattern,
            rank_pattern=tuple(self.rank_pattern.items()),
            alpha_pattern=tuple(self.alpha_pattern.items()),
            modules_to_save=self.modules_to_save,
            trainable_token_indices=self.trainable_token_indices,
        )


@dataclasses.dataclass(frozen=True)
class ObjectiveOptions:
    """What it is to learn. An encoder-decoder learns targets from sources (sft)."""

    objective: ObjectiveName = "sft"
    """sft: the answers of the data; dpo: to prefer chosen answers to rejected ones."""
    dpo_beta: float | None = None
    """How closely DPO holds to the reference; 0.1 if left out."""
    label_smoothing: float | None = None
    """Share of the pairs that DPO takes for the wrong way round; 0 if left out."""

    def __post_init__(self) -> None:
        if self.objective not in get_args(ObjectiveName):
            raise ValueError(f"objective: expected one of {', '.join(get_args(ObjectiveName))}, found {self.objective!r}")
        for name in ("dpo_beta", "label_smoothing"):
            if self.objective != "dpo" and getattr(self, name) is not None:
                raise ValueError(f"{name}: expected none with objective {self.objective}, found {getattr(self, name)}")
        if self.dpo_beta is not None and not 0 < self.dpo_beta < math.inf:
            raise ValueError(f"dpo_beta: expected a number above 0, found {self.dpo_beta}")
        if self.label_smoothing is not None and not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing: expected 0 to below 0.5, found {self.label_smoothing}")


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer and its learning rate."""

    optimizer: OptimizerName = "adamw"
    """Update rule; bytes of its state a parameter: adamw 8, adamw8bit 2, lion 4, adafactor next to none."""
    learning_rate: float | None = None
    """The highest learning rate; by the size of the model if left out: 1e-3 below 1 billion parameters, 2e-4 below 20
    billion, else 1e-4 (the last two are QLoRA's); for DPO 5e-5, 5e-6 and 5e-6; a tenth of that for lion, and for full
    fine-tuning. Of any size: ia3 3e-3, prompt-tuning 3e-2, prefix-tuning 1e-2, p-tuning and prefix-projection 1e-3; a
    twentieth of that for DPO."""
    schedule: Schedule = "constant"
    """Its course after the warm-up."""
    warmup_ratio: float = 0.03
    """Share of the steps in which it rises."""
    beta1: float | None = None
    """Decay of the first moment; 0.9 if left out."""
    beta2: float | None = None
    """Decay of the second moment; 0.999 if left out, 0.99 for lion."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    loraplus_lr_ratio: float | None = None
    """LoRA+: so many times the learning rate for LoRA's B (and for norms and DoRA's magnitudes); the same if left out."""
    max_grad_norm: float = 0.3
    """Global norm to which gradients are clipped; 0 for no clipping."""
    host_offload: bool = False
    """Keep the optimizer's state in host memory (what paged optimizers are for)."""
    host_adapter: bool = False
    """Keep the adapter and its gradient in host memory as well: the device holds those of one layer at a time."""
    neftune_alpha: float = 0.0
    """Strength of the noise on the embeddings while training (NEFTune; 5 is usual); 0 for none."""

    def __post_init__(self) -> None:
        problems = []
        if self.optimizer not in OPTIMIZERS:
            problems.append(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, found {self.optimizer!r}")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            problems.append(f"learning_rate: expected a number above 0, found {self.learning_rate}")
        if self.loraplus_lr_ratio is not None and not 0 < self.loraplus_lr_ratio < math.inf:
            problems.append(f"loraplus_lr_ratio: expected a number above 0, found {self.loraplus_lr_ratio}")
        if not 0 <= self.warmup_ratio <= 1:
            problems.append(f"warmup_ratio: expected 0 to 1, found {self.warmup_ratio}")
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if beta is not None and self.optimizer == "adafactor":
                problems.append(f"{name}: expected none with the optimizer adafactor, found {beta}")
            elif beta is not None and not 0 <= beta < 1:
                problems.append(f"{name}: expected 0 to below 1, found {beta}")
        if not (0 <= self.weight_decay < math.inf and 0 <= self.max_grad_norm < math.inf):
            found = f"{self.weight_decay}, {self.max_grad_norm}"
            problems.append(f"weight_decay, max_grad_norm: expected numbers of at least 0, found {found}")
        if not 0 <= self.neftune_alpha < math.inf:
            problems.append(f"neftune_alpha: expected a number of at least 0, found {self.neftune_alpha}")
        if problems:
            raise ValueError("; ".join(problems))

    def peak_learning_rate(
        self, parameters: int, objective: ObjectiveName = "sft", method: MethodName = "lora", own: float | None = None
    ) -> float:
        """The highest learning rate for a base model of so many parameters; `own` is that of a method of any size."""
        if self.learning_rate is not None:
            return self.learning_rate
        if own is not None:
            return own / (20 if objective == "dpo" else 1) / (10 if self.optimizer == "lion" else 1)
        small, middle, large = {"sft": (1e-3, 2e-4, 1e-4), "dpo": (5e-5, 5e-6, 5e-6)}[objective]
        rate = small if parameters < 1e9 else middle if parameters < 20e9 else large
        rate *= _RATE_OF_METHOD.get(method, 1.0)
        return rate / 10 if self.optimizer == "lion" else rate  # its updates are ±1 each, of ten times the norm


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Length, records and place of the run."""

    output: Path = Path("runs/plain-answers")
    """Folder of the run."""
    overwrite: bool = False
    """Delete a run that the folder holds."""
    epochs: int = 2
    """Passes over the training data."""
    max_steps: int | None = None
    """Stop after so many steps, whatever the epochs."""
    batch_size: int = 2
    """Rows of one micro-batch on each device."""
    accumulation_steps: int = 1
    """Micro-batches of one step."""
    seed: int = 0
    """Of the adapter's initial values, the order of the data and dropout."""
    eval_every: int = 20
    """Steps between evaluations; 0: only before and after."""
    predict_with_generate: bool = False
    """Measure RougeL of an encoder-decoder at every evaluation, not after training alone."""
    early_stopping_patience: int = 0
    """Stop after so many evaluations without a lower held-out loss, and keep the adapter of the lowest one; 0: never."""
    save_every: int = 20
    """Steps between checkpoints; 0: only after the last."""
    keep: int = 3
    """Checkpoints that are kept."""
    memory_check: bool = True
    """Refuse a run whose planned memory the devices do not have, before anything is loaded."""
    samples: int = 3
    """Held-out prompts whose answers before and after are shown; 0 for none."""

    def __post_init__(self) -> None:
        least = {"epochs": 1, "batch_size": 1, "accumulation_steps": 1, "keep": 1}
        least |= dict.fromkeys(("seed", "eval_every", "early_stopping_patience", "save_every", "samples"), 0)
        low = [
            f"{name}: expected at least {bound}, found {getattr(self, name)}"
            for name, bound in least.items()
            if getattr(self, name) < bound
        ]
        if self.max_steps is not None and self.max_steps < 1:
            low.append(f"max_steps: expected at least 1, found {self.max_steps}")
        if self.early_stopping_patience and self.eval_every == 0:
            low.append("early_stopping_patience: expected eval_every of at least 1, found 0")
        if low:
            raise ValueError("; ".join(low))


@dataclasses.dataclass(frozen=True)
class Options:
    """Fine-tune a language model with QLoRA."""

    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    lora: LoRAOptions = dataclasses.field(default_factory=LoRAOptions)
    data: DataOptions = dataclasses.field(default_factory=DataOptions)
    optimizer: OptimizerOptions = dataclasses.field(default_factory=OptimizerOptions)
    run: RunOptions = dataclasses.field(default_factory=RunOptions)
    objective: ObjectiveOptions = dataclasses.field(default_factory=ObjectiveOptions)
    watch: WatchOptions = dataclasses.field(default_factory=WatchOptions)
    tuning: TuningOptions = dataclasses.field(default_factory=TuningOptions)
    context: ContextOptions = dataclasses.field(default_factory=ContextOptions)

    def method(self) -> Method:
        """The method of fine-tuning that they describe; raises ValueError where they describe none."""
        match self.tuning.method:
            case "lora":
                return self.lora.build()
            case "full":
                return FullFineTuning()
            case "ia3":
                return self._ia3()
            case _:
                return self.tuning.virtual()

    def _ia3(self) -> IA3:
        lora = self.lora.build()  # whose targets and exclusions it shares
        usual = self.lora.target_regex is None and self.lora.target_modules == (ALL_LINEAR,)
        return IA3(
            target_modules=None if usual else lora.target_modules,
            feedforward_modules=self.tuning.feedforward_modules or None,
            exclude_modules=lora.exclude_modules,
            modules_to_save=lora.modules_to_save,
        )

    def starts_from_adapter(self) -> bool:
        """Whether training starts from another function than that of the base alone."""
        return self.model.adapter is not None or reads_weights(self.lora.init_lora_weights or True)

    def check(self) -> None:
        """Raises ValueError where options of several groups contradict each other."""
        self._check_method()
        if self.model.adapter is not None:
            fresh = dataclasses.asdict(LoRAOptions(dropout=self.lora.dropout))
            given = [name for name, value in dataclasses.asdict(self.lora).items() if value != fresh[name]]
            if given:
                raise ValueError(f"adapter: has its own shape: expected no {', '.join(given)} beside it, found some")
            if self.tuning != TuningOptions():
                raise ValueError(f"adapter: is of its own method: expected no method beside it, found {self.tuning.method}")
        share = "held_out_rows" if self.data.streaming else "held_out"
        none_held_out = self.data.eval_data is None and getattr(self.data, share) == 0
        if self.run.early_stopping_patience and none_held_out:
            raise ValueError(f"early_stopping_patience: expected held-out data, found {share} 0 and no eval_data")
        if self.watch.sample_every and (self.run.samples == 0 or none_held_out):
            raise ValueError("sample_every: expected held-out data and samples of at least 1, found none")
        if self.run.predict_with_generate and none_held_out:
            raise ValueError(f"predict_with_generate: expected held-out data, found {share} 0 and no eval_data")
        found = getattr(self.data, share)
        if self.data.eval_data is not None and found not in (0, getattr(DataOptions, share)):
            raise ValueError(f"{share}: expected none beside eval_data, found {found:g}")
        if self.data.streaming and self.run.max_steps is None:
            raise ValueError("streaming: expected max_steps beside it (the length of a stream is unknown), found none")
        if self.data.streaming and self.run.epochs != RunOptions.epochs:
            raise ValueError(f"epochs: expected max_steps alone with streaming, found {self.run.epochs}")

    def _check_method(self) -> None:
        method = self.tuning.method
        if method == "lora":
            return
        if self.context.longlora:
            raise ValueError(f"longlora: expected method lora, found {method}")
        if self.context.groups > 1 and method not in ("full", "ia3"):
            raise ValueError(f"attention_groups: expected 1 with virtual tokens ({method}), found {self.context.groups}")
        plain = LoRAOptions()
        given = [
            name
            for name, value in vars(self.lora).items()
            if value != getattr(plain, name) and not (method == "ia3" and name in _SHARED)
        ]
        if given:
            raise ValueError(f"{', '.join(given)}: expected none with method {method}, found some: they are LoRA's")
        if method == "full":
            if self.model.data_type != "none" or self.model.embedding_storage != "none":
                found = f"{self.model.data_type} and {self.model.embedding_storage}"
                raise ValueError(f"data_type, embedding_storage: expected none and none with method full, found {found}")
            if self.model.adapter is not None:
                raise ValueError(f"adapter: expected none with method full, found {self.model.adapter}; merge it first")
