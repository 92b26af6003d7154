"""Routing with skew and with locality in time, for synthetic mixtures of experts.

A text stays with a topic for some tokens, then takes another. A token's embedding is its topic, what all
tokens share, and noise of its own, in equal parts; the router's score of expert e in layer l is

    topic · A[l, e, topic] + skew · P[l, e] + noise,    A, P and noise standard normal,

because its row holds A and P along the directions of topics and of what is shared. With the defaults, 30 % of
the experts take about 95 % of a topic's tokens, and a third of them those of all topics. Which topic a token
has is its id modulo their number.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from powerinfer_formats.gguf_layout import ValueType
from powerinfer_formats.gguf_writer import GGUFWriter
from powerinfer_formats.model_source import ModelSource

#: How many there are.
TOPICS = 32
#: Weight of the topic in a router's score, in parts of the noise.
_TOPIC = 1.3
_KEY = "powerinfer.synthetic.locality"

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Topics:
    """``locality``: tokens for which a text stays with a topic, in the mean; ``skew``: how much experts
    differ in how often they are chosen, whatever the topic."""

    locality: float = 64.0
    skew: float = 0.5

    def write(self, writer: GGUFWriter) -> None:
        """Add the key that says how to draw tokens."""
        writer.add(_KEY, self.locality, ValueType.FLOAT32)


@cache
def directions(width: int) -> Floats:
    """Unit vectors: of what all tokens share, then of each topic; (1 + TOPICS, width)."""
    made = np.random.default_rng(width).standard_normal((1 + TOPICS, width))
    orthogonal = np.asarray(np.linalg.qr(made.T)[0].T if width > TOPICS else made)
    made = orthogonal / np.linalg.norm(orthogonal, axis=1, keepdims=True)
    return np.asarray(made, np.float32)


def embeddings(rng: np.random.Generator, first: int, count: int, width: int) -> Floats:
    """Rows ``first`` to ``first + count`` of the table: of length √(3 · width), a third of it noise."""
    along, root = directions(width), np.float32(width**0.5)
    topics = np.arange(first, first + count) % TOPICS
    noise = rng.standard_normal((count, width), dtype=np.float32)
    return np.asarray(root * (along[0] + along[1 + topics]) + noise, np.float32)


def router_rows(rng: np.random.Generator, experts: int, width: int, topics: Topics) -> Floats:
    """(experts, width)."""
    along, root = directions(width), np.float32(width**0.5)
    affinity = rng.standard_normal((experts, 1 + TOPICS), dtype=np.float32)
    affinity *= np.array([topics.skew] + [_TOPIC] * TOPICS, np.float32)
    noise = rng.standard_normal((experts, width), dtype=np.float32)
    return np.asarray((affinity @ along + noise) / root, np.float32)


def locality_of(source: ModelSource) -> float | None:
    """Tokens that a text for the model stays with a topic; None for a model without topics."""
    return source.get(_KEY, float, None)


def text(rng: np.random.Generator, count: int, vocabulary: int, locality: float) -> list[int]:
    """``count`` token ids of a text that stays with each topic for ``locality`` tokens in the mean."""
    tokens, topic = list[int](), int(rng.integers(TOPICS))
    for _ in range(count):
        if rng.random() < 1 / locality:
            topic = int(rng.integers(TOPICS))
        tokens.append(topic + TOPICS * int(rng.integers(vocabulary // TOPICS)))
    return tokens
