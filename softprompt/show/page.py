"""The data's report as one HTML file that needs no other."""

from importlib.resources import files

import jinja2

from softprompt.config import Config
from softprompt.show import Shown
from softprompt.show.findings import MEASURE
from softprompt.show.words import said_of

LISTED = 50  # rows of each finding; --json has all


def page(shown: Shown, config: Config, num_rows: int) -> str:
    """The page, with the first `num_rows` training rows as the model sees them."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("softprompt.show") / "page.html").read_text(encoding="utf-8"))
    names = {"train": "train", "eval": "held out"}
    summaries = {names[name]: summary for name, summary in shown.summaries.items()}
    return template.render(
        summaries=summaries,
        labels={name: summary.labels for name, summary in summaries.items()},
        scripts={f"{name}, {part}": own for name, summary in summaries.items() for part, own in summary.scripts.items()},
        said=said_of(shown),
        rows=[(row, list(shown.pieces(row))) for row in shown.train.encoded[:num_rows]],
        data=config.data,
        base=config.model.location[0],
        bos=int(shown.encoder.bos_id is not None),
        measure=MEASURE,
        listed=LISTED,
    )
