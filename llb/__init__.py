"""Finds the hidden defects in an unchecked training set and trains an image anomaly detector on what is left."""

from llb.encoder import load_encoder

__all__ = ["load_encoder"]
