"""TODO"""

import dataclasses


def option(default, help, *, minimum=None, above=None, below=None, choices=None):
    limits = dict(help=help, minimum=minimum, above=above, below=below, choices=choices)
    return dataclasses.field(default=default, metadata=limits)


def fields_of(config_class) -> list[tuple[str, dataclasses.Field]]:
    """("section.field", dataclass field) of every option of a config class."""
    out = []
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(field.type):
            out += [(f"{field.name}.{f.name}", f) for f in dataclasses.fields(field.type)]
        else:
            out.append((field.name, field))
    return out


def get_option(config, path):
    value = config
    for name in path.split("."):
        value = getattr(value, name)
    return value
