"""A text world of a few lines, with switches that break what it promises or make it hang."""

import time

from jaxrl_llm.environments.worlds import Reply


class Countdown:
    """Say the number one below, down to 0: a world of a few lines, with switches that break what it promises."""

    turns = 6

    def __init__(self, *, tasks=4, name="countdown", broken="", hangs="", expert=True) -> None:
        self.tasks, self.name, self.broken, self.hangs, self.has_expert = tasks, name, broken, hangs, expert
        self.begun, self.open, self.shared = 0, 0, 0

    def reset(self, seed):
        if not 0 <= seed < self.tasks and self.broken != "seeds":
            raise ValueError(f"seed is {seed}")
        if self.hangs == "reset" and seed == 1:
            hang()
        return Counting(self, seed)


def hang() -> None:
    while True:
        time.sleep(0.01)


class Counting:
    def __init__(self, world, seed) -> None:
        self.world, self.seed, self.left, self.closed = world, seed, 2 + seed % 3, False
        world.begun += 1
        world.open += 1
        world.shared = 0
        drifts = world.broken == "prompt" and world.begun % 2
        self.prompt = " " if world.broken == "silent" else f"Count down from {self.left}{'!' * drifts}"

    @property
    def admissible(self):
        if self.left == 0:
            return ()
        return {"unlisted": ("one",), "lists": (str(self.left - 1), "7")}.get(self.world.broken, (str(self.left - 1),))

    def step(self, action):
        broken = self.world.broken
        if self.world.hangs == "step" and self.seed == 1 and self.left == 2:
            hang()
        if self.left == 0:
            return Reply("It is over.", float(broken == "pays on"), done=broken != "goes on", valid=False)
        self.world.shared += 1
        if action != str(self.left - 1):
            self.left += broken == "moves"
            reward, valid = float(broken == "pays"), broken == "takes anything" or (broken == "nothing" and not action)
            return Reply("No.", reward, False, valid, self.admissible if broken != "forgets" else ())
        self.left -= 1
        text = f"{self.left}{self.world.shared if broken == 'shared' else ''}{time.time() if broken == 'clock' else ''}"
        done = self.left == 0
        reward = float("nan") if broken == "nan" else float(done and broken != "never pays")
        return Reply(text, reward, done, True, ("0",) if broken == "lists at the end" else self.admissible)

    def expert(self):
        if not self.world.has_expert or (self.world.broken == "gives up" and self.left == 1):
            return None
        return {"sleeps": "9"}.get(self.world.broken, str(self.left - 1)) if self.left else None

    def close(self):
        self.world.open -= not self.closed
        self.closed = True
        if self.world.hangs == "close" and self.seed == 1:
            hang()
