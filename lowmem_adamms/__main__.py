"""`python -m lowmem_adamms`."""

from .cli import process

raise SystemExit(process())
