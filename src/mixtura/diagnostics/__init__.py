"""What a model does while it runs: expert choices and what they tell, leaks, load, peakedness, memory, stability."""

from mixtura.diagnostics.choices import Choices as Choices
from mixtura.diagnostics.choices import Peakedness as Peakedness
from mixtura.diagnostics.choices import RoutedLayer as RoutedLayer
from mixtura.diagnostics.choices import measure_peakedness as measure_peakedness
from mixtura.diagnostics.choices import record_choices as record_choices
from mixtura.diagnostics.choices import routed_layers as routed_layers
from mixtura.diagnostics.health import LoadSummary as LoadSummary
from mixtura.diagnostics.health import SeriesSummary as SeriesSummary
from mixtura.diagnostics.health import count_spikes as count_spikes
from mixtura.diagnostics.health import dropped_share as dropped_share
from mixtura.diagnostics.health import find_spikes as find_spikes
from mixtura.diagnostics.health import live_bytes as live_bytes
from mixtura.diagnostics.health import load_shares as load_shares
from mixtura.diagnostics.health import measure_peak_memory as measure_peak_memory
from mixtura.diagnostics.health import summarize_load as summarize_load
from mixtura.diagnostics.health import summarize_series as summarize_series
from mixtura.diagnostics.leak import LeakReport as LeakReport
from mixtura.diagnostics.leak import probe_causal_lm as probe_causal_lm
from mixtura.diagnostics.leak import probe_layer as probe_layer
from mixtura.diagnostics.specialization import measure_specialization as measure_specialization
