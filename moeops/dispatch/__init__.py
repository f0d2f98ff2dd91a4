"""From tokens to the experts that a gate chose, on whatever rank they are, and back: one dispatcher per file."""

from moeops.dispatch.base import Dispatcher, DispatchOptions, ExpertRanks
from moeops.dispatch.codecs import RowCodec, codec_hooks, register_codec
from moeops.dispatch.degrees import AutoChunks
from moeops.dispatch.gather import Gather
from moeops.dispatch.hooks import StageHooks
from moeops.dispatch.local import LocalDispatcher
from moeops.dispatch.options import Auto, Exact, Static
from moeops.dispatch.replicas import Placement
from moeops.dispatch.shadowing import ShadowPolicy

__all__ = [
    "Auto",
    "AutoChunks",
    "DispatchOptions",
    "Dispatcher",
    "Exact",
    "ExpertRanks",
    "Gather",
    "LocalDispatcher",
    "Placement",
    "RowCodec",
    "ShadowPolicy",
    "StageHooks",
    "Static",
    "codec_hooks",
    "register_codec",
]
