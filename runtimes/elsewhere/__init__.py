"""The commands that take `--target`, on another machine: one module a command."""
