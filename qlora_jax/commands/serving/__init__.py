"""What serve.py serves beside the base: its adapters, their options, and where their files may lie."""

from qlora_jax.commands.serving.adapters import AdapterOptions, adapter_sources, path_within, warn_of_templates

__all__ = ["AdapterOptions", "adapter_sources", "path_within", "warn_of_templates"]
