"""One module per group of commands: parse, call one verb, render.

They import what a verb needs inside the command's body, so that `xsave --help` stays quick.
Errors go up untouched; `xsave/cli.py` turns them into messages and exit codes.
"""
