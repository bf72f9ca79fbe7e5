"""`python -m finemoe` is the `finemoe` command."""

from finemoe.cli.main import main

main()
