"""Finds the hidden defects in an unchecked training set and trains an image anomaly detector on what is left."""

__all__ = ["load_encoder"]


def __getattr__(name: str):
    """Import `load_encoder` on first use: it needs JAX, and llb.tables and llb.pictures do not."""
    if name == "load_encoder":
        from llb.device import use_cpu_without_driver
        from llb.encoders import load_encoder

        use_cpu_without_driver()
        return load_encoder
    raise AttributeError(f"module 'llb' has no attribute {name!r}")
