"""Adapters and packed models on disk: PEFT's format, bitsandbytes' and our own."""
