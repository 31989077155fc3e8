"""AR-OPD, anchored residual on-policy distillation (arXiv:2606.10385), on Megatron-Core."""

__version__ = "0.1.0"
