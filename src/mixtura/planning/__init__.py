"""What a model costs before it runs: parameters, FLOPs, memory, and widths that match a budget. Pure Python.

Every formula stands here once and is tested against the real modules.
"""

from mixtura.planning.formulas import StateMemory as StateMemory
from mixtura.planning.formulas import active_parameters as active_parameters
from mixtura.planning.formulas import flops_per_token as flops_per_token
from mixtura.planning.formulas import flops_ratio as flops_ratio
from mixtura.planning.formulas import match_intermediate_size as match_intermediate_size
from mixtura.planning.formulas import model_parameters as model_parameters
from mixtura.planning.formulas import state_memory as state_memory
from mixtura.planning.shapes import FeedForwardShape as FeedForwardShape
from mixtura.planning.shapes import ModelShape as ModelShape
