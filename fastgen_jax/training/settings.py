"""The settings of GRPO."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a training with GRPO is like."""

    prompts_per_step: int = 8
    """Groups in an update."""
    group_size: int = 8
    """Answers to a prompt."""
    max_new_tokens: int = 32
    """Length limit of an answer."""
    temperature: float = 1.0
    """Of rollouts; the trained probabilities are those of logits divided by it."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    """A token counts while its probability is within [1 - clip_low, 1 + clip_high] times that of the rollout."""
    kl: float = 0.0
    """Strength with which the first weights are held on to; 0: not at all, and they are not kept."""
    normalize: bool = True
    """Divide advantages by the standard deviation of their group."""
    passes: int = 1
    """Updates with the same answers."""
    groups_in_flight: int | None = None
    """Groups that are generated at a time. Those that are not finished when an update begins go on after it, with their
    tokens and the log-probabilities with which these were drawn. None: `prompts_per_step`, so that none goes on."""
    seed: int = 0
    """Of the answers and the order of the prompts; the same seed gives the same weights."""

    def __post_init__(self) -> None:
        smallest = {"prompts_per_step": 1, "group_size": 2, "max_new_tokens": 1, "passes": 1}
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be positive: answers of a group must differ")
        if self.groups_in_flight is not None and self.groups_in_flight < self.prompts_per_step:
            raise ValueError(
                f"groups_in_flight is {self.groups_in_flight}, but an update needs {self.prompts_per_step} groups "
                "(prompts_per_step); increase it, or use None"
            )
