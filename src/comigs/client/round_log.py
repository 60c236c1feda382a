"""What a client's steps measure, one by one and over a round.

L blocks, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Outcome:
    """The outcome is what one step measured.

    nats, balance: means over the batch's T tokens that are learnt. shares_LE: for each piece of the
    batch, the sums of the routing weights over these tokens; empty without a router.
    """

    tokens: int
    nats: float = 0.0
    balance: float = 0.0
    shares_LE: list[Tensor] = field(default_factory=list)


@dataclass
class RoundLog:
    """The log is what a client's round measured.

    train_losses, router_losses: nats per token of each step. share_sum_LE: the experts' routing
    weights, summed over trained_tokens tokens; None without a router. sent_losses, sent_tokens,
    epsilon: of what is sent by itself and privately, and what the run has spent so far.
    """

    train_losses: list[float] = field(default_factory=list)
    router_losses: list[float] = field(default_factory=list)
    balance_losses: list[float] = field(default_factory=list)
    share_sum_LE: Tensor | None = None
    learning_rate: float = 0.0
    trained_tokens: int = 0
    local_steps: int = 0
    sent_losses: list[float] = field(default_factory=list)
    sent_tokens: int = 0
    epsilon: float | None = None

    def note_sent(self, sent: RoundLog) -> None:
        """Add what the noised steps of what is sent measured."""
        self.sent_losses, self.sent_tokens = sent.train_losses, sent.trained_tokens
        self.epsilon = sent.epsilon

    def note(self, outcome: Outcome) -> None:
        """Add a local step."""
        self.train_losses.append(outcome.nats)
        self.balance_losses.append(outcome.balance)
        self.trained_tokens += outcome.tokens
        for shares_LE in outcome.shares_LE:
            before_LE = self.share_sum_LE
            self.share_sum_LE = shares_LE if before_LE is None else before_LE + shares_LE
