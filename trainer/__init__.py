"""lce-trainer: class-sharded face recognition training with compatible embeddings (LCE, ICCV 2021)."""

__version__ = "0.1.0"
