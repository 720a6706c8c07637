"""`python -m vmm_reference` is the command `vmm`."""

from .cli import command

command()
