"""Adapters: LoRA of routed experts in peft, in memory and on disk."""
