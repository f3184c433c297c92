"""What pytest leaves out: the doctests of integrations whose packages are not installed."""

from importlib.util import find_spec

NEEDS = {"lightning": ("lightning", "pytorch_lightning"), "transformers": ("transformers",)}

collect_ignore = [
    f"torchflat/integrations/{name}.py" for name, packages in NEEDS.items() if not any(map(find_spec, packages))
]
