"""What a model does while it runs: leaks, expert load, peakedness, memory and stability."""

from mixtura.diagnostics.leak import LeakReport as LeakReport
from mixtura.diagnostics.leak import probe_causal_lm as probe_causal_lm
from mixtura.diagnostics.leak import probe_layer as probe_layer
from mixtura.diagnostics.load import LoadSummary as LoadSummary
from mixtura.diagnostics.load import dropped_share as dropped_share
from mixtura.diagnostics.load import load_shares as load_shares
from mixtura.diagnostics.load import summarize_load as summarize_load
from mixtura.diagnostics.memory import live_bytes as live_bytes
from mixtura.diagnostics.memory import measure_peak_memory as measure_peak_memory
from mixtura.diagnostics.peakedness import Peakedness as Peakedness
from mixtura.diagnostics.peakedness import measure_peakedness as measure_peakedness
from mixtura.diagnostics.stability import SeriesSummary as SeriesSummary
from mixtura.diagnostics.stability import count_spikes as count_spikes
from mixtura.diagnostics.stability import find_spikes as find_spikes
from mixtura.diagnostics.stability import summarize_series as summarize_series
