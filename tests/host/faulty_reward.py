"""A custom node for tests: a reward that works for a while, and then fails as a bug or full memory would."""

import copy

import torch

KINDS = {"error": lambda: RuntimeError("the reward broke"), "memory": lambda: torch.OutOfMemoryError("memory is full")}


class _Faulty:
    """The reward `inner`, and what it is like once bound, for `after` looks at pictures."""

    def __init__(self, inner, after: int, kind: str):
        self.inner, self.after, self.kind, self.name = inner, after, kind, "faulty reward"

    @property
    def gradient_scale(self) -> float:
        return self.inner.gradient_scale

    def bind(self, prompt: str) -> "_Faulty":
        return _Faulty(self.inner.bind(prompt), self.after, self.kind)

    def modules(self) -> list:
        return self.inner.modules()

    def parts(self) -> list:
        return [(1.0, self)]

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        self.after -= 1
        if self.after < 0:
            raise KINDS[self.kind]()
        return self.inner(pictures)


class FaultyReward:
    RETURN_TYPES = ("MASKUNET_REWARD",)
    FUNCTION = "wrap"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "reward": ("MASKUNET_REWARD",),
                "after": ("INT", {"default": 3}),
                "kind": (list(KINDS),),
            }
        }

    def wrap(self, reward, after: int, kind: str) -> tuple:
        wrapped = copy.copy(reward)
        wrapped.reward = _Faulty(reward.reward, after, kind)
        return (wrapped,)


NODE_CLASS_MAPPINGS = {"FaultyReward": FaultyReward}
