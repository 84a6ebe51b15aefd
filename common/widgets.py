"""What can a hand learn by turning? Sliders over a picture and a sentence."""

import html

import ipywidgets
from IPython.display import display

from common import plots


def turn(draw, alt: str, **sliders) -> ipywidgets.VBox:
    """Show sliders that redraw a picture: `draw(**values)` returns an axes and a sentence.

    sliders: name → (values, the first of them). A picture is drawn when the hand lets go, and what
    was drawn is kept for the next time; the picture's height stays, so that the page does not jump.
    """
    drawn = {}
    controls = {
        name: ipywidgets.SelectionSlider(
            options=[(f"{value:g}", value) for value in values],
            value=first,
            description=name,
            continuous_update=False,
        )
        for name, (values, first) in sliders.items()
    }
    picture, sentence = ipywidgets.Image(format="png"), ipywidgets.HTML()

    def redraw(change=None):
        values = {name: control.value for name, control in controls.items()}
        key = tuple(values.values())
        if key not in drawn:
            ax, said = draw(**values)
            drawn[key] = plots.picture(ax, alt, tight=False).data, html.escape(said)
        picture.value, sentence.value = drawn[key]

    for control in controls.values():
        control.observe(redraw, "value")
    redraw()
    box = ipywidgets.VBox([*controls.values(), sentence, picture])
    display(box)
    return box
