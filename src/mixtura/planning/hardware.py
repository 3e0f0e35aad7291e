"""Machines that a run may be planned for: by name, such as 64xH200, or from a TOML file of one's own.

Peaks are the makers', for dense products. A link's rate is one direction's, for each device: within a node NVLink, and
between nodes one network card a device. Prices are a round figure of what a device costs an hour when rented (2026);
put your own into a file.
"""

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path

from mixtura.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Equal devices in equal nodes."""

    name: str
    devices: int
    devices_per_node: int = 8
    memory_gb: float
    """Of a device, in units of 1e9 bytes."""
    bfloat16_tflops: float
    float32_tflops: float
    """Of products in float32 as torch computes them by default, without TF32."""
    memory_gb_per_s: float
    node_gb_per_s: float
    network_gb_per_s: float
    price_per_hour: float
    """US dollars for one device."""

    def link(self, group: int) -> float:
        """Bytes a second that a device sends to the others of a group of so many."""
        return 1e9 * (self.node_gb_per_s if group <= self.devices_per_node else self.network_gb_per_s)

    def peak(self, dtype: str) -> float:
        """FLOPs a second of one device."""
        return 1e12 * (self.bfloat16_tflops if dtype == "bfloat16" else self.float32_tflops)


_KEYS = ("memory_gb", "bfloat16_tflops", "float32_tflops", "memory_gb_per_s", "node_gb_per_s", "network_gb_per_s")
_KNOWN: dict[str, tuple[float, ...]] = {
    # name: the keys above, and the price
    "A100": (80, 312, 19.5, 2039, 300, 25, 1.6),
    "A100-40GB": (40, 312, 19.5, 1555, 300, 25, 1.2),
    "H100": (80, 989, 67, 3350, 450, 50, 2.5),
    "H800": (80, 989, 67, 3350, 200, 50, 2.0),
    "H200": (141, 989, 67, 4800, 450, 50, 3.2),
    "B200": (180, 2250, 75, 7700, 900, 50, 5.0),
    "L40S": (48, 362, 91.6, 864, 32, 12.5, 0.9),
    "RTX4090": (24, 165, 82.6, 1008, 32, 3, 0.4),
}


def read_hardware(spec: str) -> Hardware:
    """Hardware from "64xH200", "H100" or the path of a TOML file with the fields of `Hardware`.

    Raises:
        UserError: neither is known; names what is.
    """
    if spec.endswith(".toml"):
        return _from_file(Path(spec))
    count, _, kind = spec.rpartition("x") if "x" in spec else ("1", "", spec)
    named = {name.lower(): name for name in _KNOWN}.get(kind.lower())
    if named is None or not count.isdecimal() or int(count) < 1:
        raise UserError(
            f"--hardware is '{spec}': write a number, an x and one of {', '.join(_KNOWN)}, such as 64xH200, or the "
            "path of a .toml file with your own."
        )
    values = dict(zip(_KEYS, _KNOWN[named], strict=False))
    return Hardware(name=f"{count}x{named}", devices=int(count), price_per_hour=_KNOWN[named][-1], **values)


def _from_file(path: Path) -> Hardware:
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--hardware '{path}' cannot be read ({error.strerror}).") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--hardware '{path}' is no TOML: {error}.") from None
    fields = {field.name: field for field in dataclasses.fields(Hardware)}
    given.setdefault("name", path.stem)
    for key, value in given.items():
        if key not in fields:
            raise UserError(f"--hardware '{path}' has '{key}': it may have {', '.join(fields)}.")
        wanted = {str: "a text", int: "a whole number"}.get(fields[key].type, "a number")  # pyright: ignore
        fits = isinstance(value, str) if wanted == "a text" else isinstance(value, int | float) and value > 0
        if not fits or (wanted == "a whole number" and not isinstance(value, int)) or isinstance(value, bool):
            raise UserError(f"--hardware '{path}' has {key} = {value!r}: it must be {wanted}, greater than zero.")
    missing = [name for name, field in fields.items() if name not in given and field.default is dataclasses.MISSING]
    if missing:
        raise UserError(f"--hardware '{path}' lacks {', '.join(missing)}.")
    return Hardware(**given)
