"""The sizes of a model that methods of fine-tuning need."""

from qlora_jax.errors import OptionError
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.t5_config import T5Config
from qlora_jax.peft import Method, ModelShape


def shape_of(config: DecoderConfig | T5Config) -> ModelShape:
    """Return the sizes of a model with this configuration."""
    decoder = isinstance(config, DecoderConfig)
    return ModelShape(
        family=config.family,
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers if decoder else config.num_layers,
        decoder_layers=config.num_hidden_layers if decoder else config.num_decoder_layers,
        kv_heads=config.num_key_value_heads if decoder else config.num_heads,
        head_dim=config.head_dim,
        encoder_decoder=not decoder,
    )


def check_heads(config: DecoderConfig | T5Config, tensor: int) -> None:
    """Check that a tensor axis of this size splits no attention head.

    Raises:
        OptionError: a number of heads is not a multiple of the size.
    """
    names = ("num_attention_heads", "num_key_value_heads") if isinstance(config, DecoderConfig) else ("num_heads",)
    for name in names:
        if getattr(config, name) % tensor:
            raise OptionError(f"mesh tensor={tensor}: expected a divisor of the model's {name}, {getattr(config, name)}")


def method_for(method: Method | None, config: DecoderConfig | T5Config) -> Method | None:
    """Return the method with the fields filled in that depend on the model.

    Raises:
        OptionError: the method does not fit the model.
    """
    return None if method is None else method.for_model(shape_of(config))


def positions_left(config: DecoderConfig | T5Config, method: Method | None) -> int | None:
    """Return the most tokens in a row, without the method's virtual tokens, that the positions allow; None: no limit."""
    if not isinstance(config, DecoderConfig) or config.endless:
        return None
    return config.max_position_embeddings - (0 if method is None else method.virtual_tokens)
