"""What every HTML page of Mixtura shares: how templates are filled, the style sheet, the theme switch and printing."""

from pathlib import Path

import jinja2

SHARED_TEMPLATES = Path(__file__).parent / "templates"
"""`base.css` and `base.js`, which every page includes."""


def page_environment(templates: Path) -> jinja2.Environment:
    """Reads templates from a folder, and from the shared ones."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([templates, SHARED_TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment
