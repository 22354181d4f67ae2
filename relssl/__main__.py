"""`python -m relssl` is the program `relssl`."""

from __future__ import annotations

from relssl.cli import main

main()
