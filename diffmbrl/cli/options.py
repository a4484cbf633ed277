"""Build the options of a command from the config dataclasses, and the configs from what was given."""

import functools
import inspect
import operator
import re
import types
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from typing import Annotated, Any, Union, get_args, get_origin

import tyro

from diffmbrl.jobs.configs import Group, Option, options_of

WORDS = ("backend",)  # parameters of tasks that are not numbers


@dataclass(frozen=True)
class Command:
    """A command of the command line.

    Args:
        name: Its name.
        configs: The dataclasses of its options.
        summary: Its help; by default the first paragraphs of the first config's docstring.
        single: A field, a tuple, of which exactly one is given.
        left_out: Fields that the command does not take.
    """

    name: str
    configs: tuple[type[Any], ...] = ()
    summary: str = ""
    single: str | None = None
    left_out: Sequence[str] = ()

    def options(self) -> list[tuple[Field, Option, Any, str]]:
        """List the options.

        Returns:
            For each, the field of its config, its place, its type and its help.
        """
        found = []
        for config in self.configs:
            helps, places = argument_helps(config), options_of(config)
            for x in fields(config):
                place, kind = places[x.name]
                if place.flag != "" and x.name not in self.left_out:
                    found.append((x, place, kind, helps[x.name]))
        return found

    def parser(self) -> Any:
        """Make the type from which tyro builds the command: one nested dataclass for each group of options.

        Returns:
            An annotated dataclass.
        """
        groups: dict[str, list[Any]] = {}
        for x, place, kind, text in self.options():
            groups.setdefault(place.group, []).append(self._argument(x, place, kind, text))
        made = [(group, make_dataclass(group, groups[group])) for group in get_args(Group) if group in groups]
        summary = self.summary or summary_of(self.configs[0])
        command = make_dataclass(self.name, made)
        return Annotated[command, tyro.conf.subcommand(self.name, description=summary)]

    def read(self, given: Any) -> list[Any]:
        """Make the configs of what was given.

        Args:
            given: An instance of the type of `parser`.

        Returns:
            An instance of each config.

        Raises:
            ValueError: If a pair of the form name=value is wrong.
        """
        groups = [getattr(given, x.name) for x in fields(given)]
        found = {name: value for group in groups for name, value in vars(group).items()}
        places = {x.name: (place, kind) for x, place, kind, _ in self.options()}
        values = {name: _value(*places[name], name, value) for name, value in found.items()}
        if self.single is not None:
            values[self.single] = (found[self.single],)
        return [
            config(**{x.name: values[x.name] for x in fields(config) if x.name in values}) for config in self.configs
        ]

    def _argument(self, x: Field, place: Option, kind: Any, text: str) -> tuple[str, Any, Any]:
        """Name, type and default of one argument, as `make_dataclass` takes them."""
        form = _given_type(kind)
        default = x.default if x.default is not MISSING else MISSING
        if x.default_factory is not MISSING or isinstance(default, tuple):
            default = list(default) if isinstance(default, tuple) else []
        name = (place.flag or x.name).replace("_", "-")
        if x.name == self.single:
            form, default, name, text = str, MISSING, place.single or name, place.single_help or text
        positional = default is MISSING and place.metavar is not None and x.name != self.single
        unset = default is None or default is False or default == []
        settings = tyro.conf.arg(
            name=None if positional else name,
            metavar=place.metavar or _metavar(form),
            help=text,
            help_behavior_hint="" if unset else None,
        )
        annotated = Annotated[form, tyro.conf.Positional, settings] if positional else Annotated[form, settings]
        if default is MISSING:
            return x.name, annotated, field()
        if isinstance(default, list):
            return x.name, annotated, field(default_factory=lambda default=default: list(default))
        return x.name, annotated, field(default=default)


def summary_of(config: type[Any]) -> str:
    """The paragraphs of a docstring above its sections.

    Args:
        config: A class.

    Returns:
        The text.
    """
    return inspect.cleandoc(config.__doc__ or "").partition("\n\nArgs:")[0]


def argument_helps(config: type[Any]) -> dict[str, str]:
    """Read the section `Args:` of a docstring.

    Args:
        config: A class.

    Returns:
        The description of each argument, in one line.
    """
    section = inspect.cleandoc(config.__doc__ or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    entries = re.split(r"^ {4}(\w+): ", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in zip(entries[1::2], entries[2::2], strict=True)}


def parse_numbers(given: Sequence[str], option: str = "--param", example: str = "m_p=0.2") -> dict[str, float | str]:
    """Parse name=value pairs whose values are numbers, or words for the few parameters that are.

    Args:
        given: The pairs.
        option: The option, for the message.
        example: A pair, for the message.

    Returns:
        The values by name.

    Raises:
        ValueError: If a pair has another form.
    """
    parameters, form = {}, f"name=value with a number, such as {example}"
    for name, number in parse_pairs(given, option, form).items():
        try:
            parameters[name] = number if name in WORDS else float(number)
        except ValueError:
            raise ValueError(f"{option} takes {form}; got '{name}={number}'") from None
    return parameters


def parse_pairs(given: Sequence[str], option: str, form: str) -> dict[str, str]:
    """Parse name=value pairs.

    Args:
        given: The pairs.
        option: The option, for the message.
        form: The form of a pair, for the message.

    Returns:
        The values by name.

    Raises:
        ValueError: If a pair has another form, or a name is given twice.
    """
    found: dict[str, str] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{option} takes {form}; got '{pair}'")
        if name in found:
            raise ValueError(f"{option} {name} is given more than once: {' '.join(given)}")
        found[name] = value
    return found


EXAMPLES = {"param": "m_p=0.2", "model-mismatch": "mass=1.2", "option": "warmup=500", "slurm": "timeout_min=60"}


def _value(place: Option, kind: Any, name: str, given: Any) -> Any:
    """The value of a field: lists are tuples, and pairs dictionaries."""
    flag = (place.flag or name).replace("_", "-")
    kinds = [kind, *get_args(kind)] if get_origin(kind) in (Union, types.UnionType) else [kind]
    pairs = next((part for part in kinds if get_origin(part) is dict), None)
    if pairs is not None and isinstance(given, list):
        if get_args(pairs)[1] in (float, float | str):
            return parse_numbers(given, f"--{flag}", EXAMPLES[flag])
        return parse_pairs(given, f"--{flag}", f"name=value, such as {EXAMPLES[flag]}")
    return tuple(given) if isinstance(given, list) else given


def _metavar(form: Any) -> str | None:
    """The placeholder of a type: its own name, without None; tyro's for words to choose from."""
    parts = [part for part in get_args(form) if part is not type(None)]
    if get_origin(form) is list:
        return f"{parts[0].__name__.upper()} ..."
    if get_origin(form) in (Union, types.UnionType) and len(parts) == 1:
        return parts[0].__name__.upper()
    return None


def _given_type(kind: Any) -> Any:
    """The type that the command line parses: lists of pairs for dictionaries, lists for tuples."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is tuple:
        return list[parts[0]]
    if origin is dict:
        return list[str]
    if origin in (Union, types.UnionType):
        # A field that takes a number or a table of numbers has the number on the command line.
        simple = [part for part in parts if get_origin(part) is not dict]
        tables = [list[str]] if len(simple) == 1 else []
        return functools.reduce(operator.or_, tables + simple)
    return kind
