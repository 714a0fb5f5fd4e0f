"""The settings of a job as frozen dataclasses, one class per section.

These classes define the keys, their types, choices, ranges and defaults. Every daemon gets the same resolved
configuration. No other module states a default. `objective`, `advantage` and `task` are open mappings: the
class that each names defines and checks its keys (areal_like/registry.py).

The package imports neither hydra nor torch, because every process imports it first.
"""

from areal_like.config.buffer import BufferConfig, OnFailureConfig
from areal_like.config.distill import DistillConfig
from areal_like.config.episode import EpisodeConfig, RewardsConfig, SessionsConfig
from areal_like.config.evaluation import EvalConfig, EvalSetConfig
from areal_like.config.job import Config, DaemonConfig, MetricsConfig, ModelConfig
from areal_like.config.loading import from_mapping, to_mapping
from areal_like.config.lora import LoraConfig
from areal_like.config.offline import OfflineConfig, PreferencesConfig
from areal_like.config.reward_model import RewardModelConfig
from areal_like.config.rollout import RolloutConfig, SamplingConfig, SglangConfig
from areal_like.config.scorer import ScorerConfig
from areal_like.config.security import SecurityConfig
from areal_like.config.sft import SftConfig
from areal_like.config.trainer import KlConfig, TrainerConfig
from areal_like.config.weights import WeightsConfig

__all__ = [
    "BufferConfig",
    "Config",
    "DaemonConfig",
    "DistillConfig",
    "EpisodeConfig",
    "EvalConfig",
    "EvalSetConfig",
    "KlConfig",
    "LoraConfig",
    "MetricsConfig",
    "ModelConfig",
    "OfflineConfig",
    "OnFailureConfig",
    "PreferencesConfig",
    "RewardModelConfig",
    "RewardsConfig",
    "RolloutConfig",
    "SamplingConfig",
    "ScorerConfig",
    "SecurityConfig",
    "SessionsConfig",
    "SftConfig",
    "SglangConfig",
    "TrainerConfig",
    "WeightsConfig",
    "from_mapping",
    "to_mapping",
]
