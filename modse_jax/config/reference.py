"""Prints the table of docs/options.md."""

from modse_jax.config.options import fields


def markdown_table() -> str:
    """Returns the table of all options in docs/options.md."""
    lines = ["| option | default | what |", "|---|---|---|"]
    for path, field in fields():
        choices = f" ({', '.join(field.metadata['choices'])})" if field.metadata["choices"] else ""
        lines.append(f"| `{path}` | `{field.default!r}` | {field.metadata['help']}{choices} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table())
