"""Masked autoencoders (MAE) with MoA feedforward layers. Needs the extra `vision`."""
