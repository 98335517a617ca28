"""Keys and values in llama.cpp's cache: those of plain tokens, as a build writes them, with a prompt's in their place.

Of a base that is not loaded here nobody computes what these keys and values would be, so their form is looked up: in which order a head's
numbers are (llama_rope_type, and how the family's own code turns them), and which layers come first (those that do not slide).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from softprompt.errors import ModelError
from softprompt.export.slots import Form, Rows, layers_in

NORMAL, HALVES = 0, 2  # llama_rope_type: neighbouring numbers are turned against each other, or the two halves of a head
HALVES_IN_ITS_CODE = ("llama", "mistral")  # families whose own code turns halves where llama.cpp turns neighbours


@dataclass(frozen=True)
class Layout:
    """`forms`: of keys and values; `order`: the numbers of the layers in the order of the cache; `shapes`: as a prompt has them."""

    forms: tuple[Form, Form]
    order: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, name: str, model_type: str, turned: int, sliding: Sequence[bool], shapes: tuple[tuple[int, int], ...]) -> "Layout":
        """`sliding`: of every layer. Raises ModelError for a family whose order of numbers is not known."""
        if turned not in (NORMAL, HALVES) or (turned == NORMAL and model_type not in HALVES_IN_ITS_CODE):
            raise ModelError(
                f"{name}: in which order llama.cpp has the keys of {model_type} is not known, so it takes only prompts of rows"
            )
        order = sorted(range(len(sliding)), key=lambda number: (sliding[number], number))
        return cls((Form(turned == NORMAL, 1), Form(False, 1)), tuple(order), shapes)

    def with_prompt(self, state: bytes, states_PD: Tensor, first: int) -> bytes:
        """A state whose positions from `first` on hold these keys and values, [P, D] of all layers. Raises ModelError for another form."""
        data = bytearray(state)
        parts = self._parts(states_PD)
        for number, layer in zip(self.order, self._layers(state, first + len(states_PD)), strict=True):
            for rows, form, own in zip(layer.values(), self.forms, parts[2 * number : 2 * number + 2], strict=True):
                whole, new = rows.read(state), form.of(own)
                for index, position in enumerate(rows.positions):
                    if position >= first:
                        whole[index] = new[position - first]
                rows.write(whole, data)
        return bytes(data)

    def distance(self, state: bytes, states_D: Tensor) -> float:
        """The relative error between the keys and values of a state's only position and these."""
        parts, errors = self._parts(states_D[None]), []
        for number, layer in zip(self.order, self._layers(state, 1), strict=True):
            for rows, form, own in zip(layer.values(), self.forms, parts[2 * number : 2 * number + 2], strict=True):
                there = rows.read(state)
                errors.append(float((there - form.of(own)).norm() / there.norm().clamp(min=1e-9)))
        return sum(errors) / len(errors)

    def _parts(self, states_PD: Tensor) -> list[Tensor]:
        """[P, heads, head size] of the keys and the values of every layer."""
        split = states_PD.float().cpu().split([heads * size for heads, size in self.shapes], dim=1)
        return [part.reshape(len(part), *shape) for part, shape in zip(split, self.shapes, strict=True)]

    def _layers(self, state: bytes, length: int) -> list[dict[str, Rows]]:
        found = list(layers_in(state, length))
        sizes = [layer["keys"].read(state).shape[1] for layer in found]
        wanted = [self.shapes[2 * number][0] * self.shapes[2 * number][1] for number in self.order]
        if sizes != wanted:
            raise ModelError("llama.cpp keeps keys and values in a form that is not known: it takes only prompts of rows")
        return found
