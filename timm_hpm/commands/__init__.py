"""The commands of `python -m timm_hpm`: they parse, call and print."""
