"""The games of TextWorldExpress, played in Java beside Python."""

from jaxrl_llm.environments.worlds.textworld_express.world import TextWorldExpress

__all__ = ["TextWorldExpress"]
