"""Masked autoencoders (MAE) with MoA feedforward layers; docs/vision.md. Needs the extra `vision`."""
