"""Veneer: one quantized base model, any number of adapters, one batch."""

__version__ = "0.1.0"
