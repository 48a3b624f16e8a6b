"""The command line."""

from shardwright.cli.main import main as main
