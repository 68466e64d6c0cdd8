"""Form fields for the parameters of every method; those of one method show at a time."""

from typing import Any

import gradio as gr

from dittools.commands.terminal import first_line
from dittools.methods import METHODS
from dittools.studio.params import ParamField, changed, fields_of

DEFAULT = "gna"


class MethodFields:
    """The method's name and its parameters on one page."""

    def __init__(self) -> None:
        """Put the components on the page; the context around decides where."""
        names = [name for name in METHODS if name != "dense"]
        self.method = gr.Dropdown(
            [(f"{name}: {first_line(METHODS[name])}"[:90], name) for name in names],
            value=DEFAULT,
            label="Method",
            elem_id="dt-method",
        )
        self._names = names
        self._groups, self._fields = [], {}
        for name in names:
            with gr.Column(visible=name == DEFAULT, elem_classes="dt-params") as group:
                gr.HTML(f'<p class="dt-hint">{_hint(name)}</p>')
                self._fields[name] = [_component(name, field) for field in fields_of(name)]
            self._groups.append(group)
        self.method.change(
            lambda chosen: [gr.update(visible=name == chosen) for name in names],
            self.method,
            self._groups,
            show_progress="hidden",
            queue=False,
        )

    @property
    def inputs(self) -> list[Any]:
        """Components in the order `read` takes their values."""
        return [self.method, *(f for name in self._names for f in self._fields[name])]

    def read(self, values: tuple[Any, ...]) -> tuple[str, dict[str, Any]]:
        """Return the method and the parameters that differ from its defaults.

        Raises:
            InputError: a value is not usable.
        """
        chosen, rest = str(values[0]), list(values[1:])
        for name in self._names:
            count = len(self._fields[name])
            if name == chosen:
                return name, changed(name, rest[:count])
            rest = rest[count:]
        return chosen, changed(chosen, [])


def _hint(name: str) -> str:
    return (
        f"Left as they are, {name} runs as published for the model's family. A changed field sets "
        "the method's own parameters instead."
    )


def _component(method: str, field: ParamField) -> Any:
    label = field.name.replace("_", " ").capitalize()
    common = {"label": label, "info": field.help, "elem_id": f"dt-{method}-{field.name}"}
    if field.kind == "flag":
        return gr.Checkbox(field.default, **common)
    if field.kind == "choice":
        return gr.Dropdown(list(field.choices), value=field.default, **common)
    if field.kind == "share":
        return gr.Slider(0, 1, value=field.default, step=0.01, **common)
    if field.kind == "whole":
        return gr.Number(field.default, precision=0, **common)
    if field.kind == "number":
        return gr.Number(field.default, **common)
    return gr.Textbox(field.default, placeholder="none", **common)
