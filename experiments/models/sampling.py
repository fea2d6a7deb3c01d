"""How tokens of an answer are chosen, and what came of it."""

from dataclasses import dataclass

from experiments.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: an answer ends here if not before.
        temperature: 0: always the likeliest token, whatever the model's generation_config.json says; above, tokens are
            drawn, and its settings that are not among these hold too (`own_settings`).
        top_p: among the likeliest tokens with this probability together.
        top_k: among so many of the likeliest; 0: all.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def check(self) -> None:
        """Raise UserError for a value that makes no sense."""
        for name, fits, choose in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0, up to 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
        ):
            if not fits:
                raise UserError(f"{name}={getattr(self, name)}: choose {choose}")


@dataclass(frozen=True)
class Generated:
    """The answers to some prompts.

    Attributes:
        ids: of each prompt the new tokens, the one that ended the answer included.
        prompt_tokens: read, padding not counted; it took `prompt_seconds` until the first new tokens.
        seconds: for the new tokens after the first ones.
    """

    ids: list[list[int]]
    prompt_tokens: int
    prompt_seconds: float
    seconds: float

    @classmethod
    def sum(cls, parts: list["Generated"]) -> "Generated":
        """All of several batches."""
        return cls(
            [ids for part in parts for ids in part.ids],
            *(sum(getattr(part, name) for part in parts) for name in ("prompt_tokens", "prompt_seconds", "seconds")),
        )

    def speed(self) -> str:
        """One line for the terminal."""
        new = sum(map(len, self.ids))
        later = new - len(self.ids)
        read = f"{self.prompt_tokens} prompt tokens in {self.prompt_seconds:.2f} s"
        rate = f", {later / self.seconds:.1f} tokens/s" if later else ""
        return f"{read}, {new} new tokens in {self.seconds:.2f} s{rate}"
