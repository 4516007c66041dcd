"""The configuration of `run`, `plan` and `train`: a TOML file, or the built-in demo, with overrides."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from wasi_export.config import Config

DEMO = Path(__file__).parents[1] / "demo.toml"

ConfigFile = Annotated[
    Path | None, typer.Argument(metavar="[CONFIG]", help="TOML file. Default: the built-in demo.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="Override one key; repeatable."),
]


def read_config(path: Path | None, overrides: list[str] | None) -> "Config":
    """Returns the configuration in a file, or of the demo, with overrides on top.

    Raises:
        ConfigError: the file cannot be read, or a key or a value is wrong.
    """
    from wasi_export.config import Config

    return Config.from_toml(path or DEMO, overrides or ())
