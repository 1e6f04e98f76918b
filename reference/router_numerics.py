"""Numerics of a router as data: every choice that two correct routers may make differently is a field here.

Scope: one token's way from E router logits to k expert ids and their weights: score, choice, groups, renormalisation,
scale. Nothing here imports torch, so that a contract can hold it in the driver; :mod:`reference.routers` carries it out
and says what it accepts. Sources: DeepSeek-V3 (arXiv 2412.19437 §2.1.2, config.json), DeepSeek-V2 config.json, Qwen3,
Mixtral, Llama-4 and gpt-oss configs; AITER e4048607 csrc/kernels/topk_softmax_kernels_group.cu,
csrc/kernels/moe_fused_gate.cu, csrc/include/topk_gating_kernels.cuh. What a right declaration does not prove: that a
library keeps it.

Symbols: E experts, k chosen per token, G groups of E / G consecutive experts.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from reference.formats import Format
from reference.problem import ProblemError


class Score(enum.Enum):
    """What a logit x becomes, in float32."""

    SOFTMAX = "exp(x - max) / sum over all experts"
    SIGMOID = "1 / (1 + exp(-x))"
    SQRT_SOFTPLUS = "sqrt(log(1 + exp(x)))"  # DeepSeek-V4
    CHOSEN_SOFTMAX = "the softmax over the k chosen logits alone"  # gpt-oss


class Ranking(enum.Enum):
    """What experts are ranked by."""

    CHOICE = "the score plus the bias, as computed in float32"
    LOGIT = "the logit itself, whose order is exact, a subnormal one being it or zero; without bias and groups"


class GroupScore(enum.Enum):
    """What groups are ranked by."""

    MAX = "the largest choice of the group"  # DeepSeek-V2
    TOP2 = "the sum of its two largest choices"  # DeepSeek-V3


class Recovery(enum.Enum):
    """Where the weight of a chosen expert comes from."""

    KEPT = "its score"
    SUBTRACTED = "(score + bias) - bias, in float32: cancels where the bias is large"


class Special(enum.Enum):
    """What is promised of a row with NaN or +inf, or with fewer than k finite logits. Other rows are never affected."""

    UNIQUE = "its ids are distinct and in range; its weights are anything"
    NAN_LAST = "as UNIQUE, and no NaN is chosen while k other logits can be"
    ENOUGH = "as UNIQUE and without a NaN's id, if any kept groups hold k logits that are no NaN; else as IN_RANGE"
    IN_RANGE = "its ids lie in range but may repeat; its weights are anything"
    ANYTHING = "nothing"


@dataclass(frozen=True)
class RouterNumerics:
    """One router's numerics. -inf is an ordinary logit (a masked expert) as long as k others are finite.

    Attributes:
        score: what a logit becomes.
        top_k: k.
        renormalise: the k weights are divided by their sum.
        scale: routed scaling factor, a factor of every weight.
        scale_without_renormalise: it applies where there is no renormalisation too.
        groups: G; 1 is no groups.
        groups_kept: groups of which experts may be chosen; those of others rank below everything (-inf).
        group_score: what groups are ranked by; not looked at with one group.
        ranking: what experts are ranked by.
        recovery: where the weight of a chosen expert comes from.
        score_ulps: error of a float32 score in units in the last place, apart from that of the exponential's argument.
        scaled_exponent: the exponential is ``2**(x * fl(log2 e))``, whose argument is rounded: the relative error grows
            with the size of the logit (v_exp_f32).
        softplus_error: absolute error of the softplus: 0 with log1p, 2**-24 where ``1 + exp(x)`` is rounded first.
        score_store: format that scores and choices are rounded to before they are ranked, or None: float32.
        scale_ulps: error of renormalisation and scale, the sum apart, in units in the last place of the weight: 1 for a
            reciprocal, 0.5 for each product.
        sum_floor: what the sum of a renormalisation is raised to; 0 is no floor.
        sum_added: what is added to that sum before, in float32; DeepSeek-V3's own code adds 1e-20.
        weight_store: format that weights are rounded to at the end, or None: float32.
        special: what is promised of rows with NaN or +inf, or too few finite logits.

    Raises:
        ProblemError: fields out of range or in contradiction.
    """

    score: Score
    top_k: int
    renormalise: bool = True
    scale: float = 1.0
    scale_without_renormalise: bool = True
    groups: int = 1
    groups_kept: int = 1
    group_score: GroupScore = GroupScore.MAX
    ranking: Ranking = Ranking.CHOICE
    recovery: Recovery = Recovery.KEPT
    score_ulps: float = 4.0
    scaled_exponent: bool = False
    softplus_error: float = 0.0
    score_store: Format | None = None
    scale_ulps: float = 3.0
    sum_floor: float = 0.0
    sum_added: float = 0.0
    weight_store: Format | None = None
    special: Special = Special.UNIQUE

    def __post_init__(self) -> None:
        for name in ("top_k", "groups", "groups_kept"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ProblemError(f"{name} is {value!r}; it must be an integer of at least 1")
        if self.groups_kept > self.groups:
            raise ProblemError(f"groups_kept is {self.groups_kept}; there are {self.groups} groups")
        if not math.isfinite(self.scale) or not self.scale > 0:
            raise ProblemError(f"scale is {self.scale}; give a positive one")
        if not self.score_ulps >= 1 or not self.scale_ulps >= 1:
            raise ProblemError(
                f"score_ulps is {self.score_ulps}, scale_ulps {self.scale_ulps}; give at least 1, for two roundings"
            )
        chosen = self.score is Score.CHOSEN_SOFTMAX
        if chosen and (self.ranking is not Ranking.LOGIT or not self.renormalise):
            raise ProblemError("a softmax over the chosen logits ranks by logit and adds up to one; declare both")
        if self.ranking is Ranking.LOGIT and (self.groups > 1 or self.recovery is Recovery.SUBTRACTED):
            raise ProblemError("experts in groups, or with a bias, are not ranked by logit; declare Ranking.CHOICE")
        if self.special is Special.NAN_LAST and self.score in (Score.SOFTMAX, Score.CHOSEN_SOFTMAX):
            raise ProblemError("a NaN among the logits makes every score of a softmax NaN; declare Special.UNIQUE")

    @property
    def factor(self) -> float:
        """The scale that is applied."""
        return self.scale if self.renormalise or self.scale_without_renormalise else 1.0

    def refusal(self, experts: int) -> str:
        """Why the router has no answer for so many experts; empty if it has one."""
        if experts % self.groups:
            return f"{experts} experts do not divide into {self.groups} groups"
        size = experts // self.groups
        if self.groups > 1 and self.group_score is GroupScore.TOP2 and size < 2:
            return f"{experts} experts in {self.groups} groups leave no two to add up; give groups of at least 2"
        if self.groups_kept * size < self.top_k:
            return f"{self.groups_kept} groups of {size} experts do not hold the {self.top_k} to choose"
        return ""
