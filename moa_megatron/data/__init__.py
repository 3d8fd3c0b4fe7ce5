"""Text to Megatron's token files, and what trains from them: see docs/data.md."""
