"""Options as they were given on the command line: to pass on, or to refuse where they would do nothing."""

from collections.abc import Collection

import typer

from wasi_export.errors import UsageError


def given_options(context: typer.Context, without: Collection[str] = ()) -> list[str]:
    """Returns the options that were given on the command line, as they were, but for some."""
    words = []
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if name in without or source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[name]
        if isinstance(value, bool):
            words.append(parameter.opts[0] if value else parameter.secondary_opts[0])
        else:
            words.append(f"{parameter.opts[0]}={value}")
    return words


def require_option(context: typer.Context, needed: str, options: Collection[str]) -> None:
    """Lets options pass that do nothing without another one, where that was given or they were not.

    Args:
        context: of the command.
        needed: parameter without which the options do nothing, as "data".
        options: parameters of the options.

    Raises:
        UsageError: some of them were given, and what they need was not.
    """
    if context.params[needed]:
        return
    others = {str(parameter.name) for parameter in context.command.params} - set(options)
    if given := given_options(context, others):
        verb = "needs" if len(given) == 1 else "need"
        raise UsageError(f"{', '.join(given)} {verb} --{needed}: give it too, or leave out what needs it")
