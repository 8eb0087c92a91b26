"""What the command's verbs do, file to file.

Each reads what a person named, calls the core, writes whole files, says what came out and returns
what `--json` holds.
"""
