"""A world of texts for tests: walk up and down the stairs of a house to the floor that is asked for.

An action is as many steps as one likes, "uud"; what is seen then has another length on every floor.
"""

from jaxrl_llm.environments.worlds import Reply

FLOORS = ("cellar", "hall", "music room", "gallery with a view", "attic")


class Climb:
    def __init__(self, start: int, goal: int, turns: int) -> None:
        self.floor, self.goal, self.turns, self.closed = start, goal, turns, False
        self.prompt = f"{FLOORS[goal]}? {FLOORS[start]}"
        self.admissible = ()

    def step(self, action: str) -> Reply:
        assert not self.closed
        assert self.turns > 0
        self.turns -= 1
        floor = self.floor + action.count("u") - action.count("d")
        if not action or set(action) - {"u", "d"} or not 0 <= floor < len(FLOORS):
            return Reply(f"no {action}", 0.0, False, False)
        self.floor = floor
        done = floor == self.goal
        return Reply(FLOORS[floor], float(done), done, True)

    def expert(self) -> str | None:
        return "u" * max(self.goal - self.floor, 0) + "d" * max(self.floor - self.goal, 0)

    def close(self) -> None:
        self.closed = True


class Stairs:
    def __init__(self, turns: int = 4) -> None:
        self.name, self.turns, self.begun = f"stairs-{len(FLOORS)}-{turns}", turns, []
        self.pairs = [(one, other) for one in range(len(FLOORS)) for other in range(len(FLOORS)) if one != other]
        self.tasks = len(self.pairs)

    def reset(self, seed: int) -> Climb:
        self.begun.append(Climb(*self.pairs[seed], self.turns))
        return self.begun[-1]
