"""`python -m lowmem_adamms`."""

from .cli import main

raise SystemExit(main())
