"""Mask policies, the methods of choosing which units go: one in each file, named in YAML by class path."""

from src.policies.angular import AngularDistance
from src.policies.base import MaskPolicy
from src.policies.block_influence import BlockInfluence
from src.policies.bypass import BypassBP
from src.policies.concave import ConcaveGate
from src.policies.exhaustive import Exhaustive
from src.policies.fisher import Fisher
from src.policies.grain import Grain
from src.policies.gumbel_topk import GumbelTopK
from src.policies.hard_concrete import HardConcrete
from src.policies.layer_kl import LayerKL
from src.policies.level_switch import LevelSwitch
from src.policies.magnitude import Magnitude
from src.policies.mean_activation import MeanActivation
from src.policies.measuring import Probe
from src.policies.perplexity import OneShotPerplexity
from src.policies.prompt_masks import PromptMasks
from src.policies.prune_merge import PruneMerge
from src.policies.random_search import RandomSearch
from src.policies.segment_evolution import SegmentEvolution
from src.policies.sleb import SLEB
from src.policies.streamline import Streamline
from src.policies.tail import Tail
from src.policies.taylor import Taylor
from src.policies.tinyfusion import TinyFusion

__all__ = [
    "AngularDistance",
    "BlockInfluence",
    "BypassBP",
    "ConcaveGate",
    "Exhaustive",
    "Fisher",
    "Grain",
    "GumbelTopK",
    "HardConcrete",
    "LayerKL",
    "LevelSwitch",
    "Magnitude",
    "MaskPolicy",
    "MeanActivation",
    "OneShotPerplexity",
    "Probe",
    "PromptMasks",
    "PruneMerge",
    "RandomSearch",
    "SLEB",
    "SegmentEvolution",
    "Streamline",
    "Tail",
    "Taylor",
    "TinyFusion",
]
