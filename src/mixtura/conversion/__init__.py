"""In and out of the ecosystem: dense checkpoints become mixtures, mixtures become files that other tools serve."""

from mixtura.conversion.upcycle import Upcycled as Upcycled
from mixtura.conversion.upcycle import upcycle as upcycle
